"""Write a model as the next version of a SavedModel, verified.

`exporting` contains the steps. `signature` names inputs and outputs, `endpoint` writes the graph,
`checks` verifies a version, and `batch_norms` and `warmup` write additional files.
"""
