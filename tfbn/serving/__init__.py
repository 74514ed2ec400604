"""From a trained model to TensorFlow Serving and back.

`export` writes a version, `monitor` compares its requests with the population, and `recalibrate`
writes the next version from new data. All three share `provenance`, the record of where the
statistics of a version came from, and `versions`, the numbered directories of a model.
"""
