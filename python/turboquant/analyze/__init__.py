"""What quantization does to the queries, keys and values of a model: `turboquant analyze`.

`measure` reads a file of `turboquant dump-kv` layer by layer, `report` tells and draws. docs/convert.md explains the
figures.
"""
