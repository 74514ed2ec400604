"""Pure functions on TensorFlow graphs, independent of Keras."""
