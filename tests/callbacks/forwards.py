"""A callback around other callbacks."""

import keras


class Forwards(keras.callbacks.Callback):
    """A user's callback that forwards every hook to a list."""

    def __init__(self, *callbacks):
        super().__init__()
        self.inner = keras.callbacks.CallbackList(list(callbacks))

    def set_model(self, model):
        super().set_model(model)
        self.inner.set_model(model)

    def set_params(self, params):
        super().set_params(params)
        self.inner.set_params(params)


for _name in [name for name in dir(keras.callbacks.Callback) if name.startswith("on_")]:
    setattr(
        Forwards,
        _name,
        lambda self, *args, _name=_name, **kwargs: getattr(self.inner, _name)(*args, **kwargs),
    )
