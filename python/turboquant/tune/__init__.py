"""`turboquant tune`: which cache types each layer of a model needs, measured and then chosen for a budget.

`meter` runs the program that measures, `losses` says what every type costs in every layer, `allocate` spends the budget,
`run` ties them together, `report` shows the result. docs/tune.md has the method.
"""
