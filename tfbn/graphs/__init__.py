"""TensorFlow graphs, without any knowledge of Keras."""
