"""Measuring one model with llama.cpp's programs: `convert`, `evaluate` and `tune` stand on it.

`programs` runs them, `perplexity`, `needle`, `speed` and `capture` read what each finds, `kvsize` what the cache takes,
`pairs` names the cache types. `results` remembers, and `measurer` takes each result from there or from a run.
"""
