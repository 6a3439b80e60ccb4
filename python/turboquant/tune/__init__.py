"""`turboquant tune`: choose the cache types of each layer of a model from measurements, for a given budget.

`meter` runs the program that measures, `losses` estimates the loss of every type in every layer, `allocate` spends the
budget, `run` does all steps, and `report` shows the result. docs/tune.md has the method.
"""
