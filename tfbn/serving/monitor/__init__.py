"""Compare the data that a served model receives with its population.

`monitor` adds the measurement to an endpoint; `served_stats` collects answers; `alarm` is the test.
"""
