"""Export models to TensorFlow Serving, monitor their inputs, and recalibrate them.

`export` writes a version, `monitor` compares its requests with the population, and `recalibrate`
writes the next version from new data. They share four modules: `versions` creates the numbered
directories of a model, `provenance` records where the statistics of a version come from, `sweeps`
determines whether the statistics of a model are stale, and `saved_models` reads a SavedModel.
"""
