"""Compare the data that a served model receives with its population.

`monitor` builds an endpoint that computes moments with `per_sample`, `answers` converts its answers
to moments, `served_stats` accumulates them, and `alarm` computes the p-value.
"""
