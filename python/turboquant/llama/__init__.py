"""llama.cpp with the TurboQuant cache types: patch its sources, build it."""
