"""GGUF model files: their metadata, and copies of them with other weights or metadata.

`header` reads the part before the tensors, `modelfile` reads a whole file piece by piece, and `weights` scales tensors
in their file format. These modules need the package `gguf`.
"""
