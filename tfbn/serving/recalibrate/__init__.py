"""Sweep a SavedModel without the model's code, and write its next version.

`recalibration` is the list of steps; `recognition` finds batch norm in a graph of another tool,
`loading` runs the graph as a Keras model, `weights` reads and replaces single variables.
"""
