"""Balance K against Q, and V against the output, inside a model's weights: `turboquant convert`.

`stream` reads what attention sees from the program turboquant-capture, `paths` follows it to the weights, `plan` and
`balance` find the scales, `check` measures the result, and `run` ties them together; `turboquant.models` writes the
scaled weights. docs/convert.md explains the idea.
"""
