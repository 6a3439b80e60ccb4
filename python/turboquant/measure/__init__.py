"""Measurements of one model with llama.cpp's programs, which `convert`, `evaluate` and `tune` use.

`programs` runs the programs. `perplexity`, `needle`, `speed` and `capture` read their results, and `kvsize` reads the
size of the cache. `pairs` names the cache types. `results` stores results, and `measurer` returns each result from
there or from a run.
"""
