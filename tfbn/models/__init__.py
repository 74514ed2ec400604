"""Keras models: their layers, observed calls, copies, conversion and folding."""
