"""Sweep a SavedModel without the model's code, and write its next version.

`recalibration` contains the steps. `recognition` and `patterns` recognize batch norm in graphs of
other tools, `loading` converts a graph to a Keras model, and `weights` loads and replaces
variables.
"""
