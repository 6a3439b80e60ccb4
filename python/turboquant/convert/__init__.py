"""Balance K against Q, and V against the output, inside a model's weights: `turboquant convert`.

`turboquant.measure.capture` reads what attention sees, `paths` follows it to the weights, `plan` and `balance` find the
scales, `turboquant.models` writes the scaled weights, `check` measures the result, and `run` ties them together.
docs/convert.md explains the idea.
"""
