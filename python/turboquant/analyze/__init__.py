"""`turboquant analyze`: the effect of quantization on the queries, keys and values of a model.

`measure` reads a file of `turboquant dump-kv` layer by layer, and `report` prints and draws the results.
docs/convert.md explains the figures.
"""
