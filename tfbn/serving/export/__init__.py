"""Write a model as the next version of a SavedModel, verified.

`exporting` is the list of steps; `signature` names inputs and outputs, `endpoint` writes the graph,
`checks` has the tests that a version must pass, `batch_norms` and `warmup` write files beside it.
"""
