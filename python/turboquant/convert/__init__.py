"""Balance K against Q, and V against the output, inside a model's weights: `turboquant convert`.

`turboquant.measure.capture` reads the queries, keys and values, `paths` follows them to the weights, `plan` and
`balance` compute the scales, `turboquant.models` writes the scaled weights, `check` measures the result, and `run` does
all steps. docs/convert.md explains the idea.
"""
