"""Train on handwritten digits, export `models/digits/<version>/`, save ten images to ask about.

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
model.fit(images, digits.target, epochs=5)
tfbn.update_population_stats(model, images)

exported = tfbn.export(model, "models/digits", require_population=True)
tfbn.describe(exported.path)
np.save("images.npy", images[:10])
