"""Train on handwritten digits, export `models/digits/<version>/`, save images to ask about.

python train_and_export.py
"""

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

import tfbn

digits = load_digits()
images = (digits.images[..., None] / 16).astype("float32")
inputs = keras.Input((8, 8, 1), name="image")
x = layers.ReLU()(tfbn.BatchNormalization()(layers.Conv2D(32, 3)(inputs)))
x = layers.ReLU()(tfbn.BatchNormalization()(layers.Conv2D(64, 3)(x)))
outputs = layers.Dense(10, activation="softmax")(layers.Flatten()(x))
model = keras.Model(inputs, outputs)
model.compile("adam", "sparse_categorical_crossentropy")
order = np.random.default_rng(0).permutation(len(images))
train, served = images[order[:1200]], images[order[1200:]]
model.fit(train, digits.target[order[:1200]], epochs=5)
tfbn.update_population_stats(model, train)

exported = tfbn.export(model, "models/digits", require_population=True, monitor=True)
print(tfbn.describe(exported.path))
np.save("images.npy", images[:10])
# For monitor_client.py: what a server may meet, as it was and from a camera in the dark.
np.save("traffic.npy", served[:100])
np.save("dark.npy", 0.3 * served[:100])
