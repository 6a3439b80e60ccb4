"""GGUF model files: what they say of themselves, and copies of them with other weights or metadata.

`header` reads what stands before the tensors, `modelfile` a whole file, piece by piece, and `weights` scales tensors as
they lie in it. They need the package `gguf`.
"""
