"""Length and direction stored separately: a norm per vector, and the rotated direction with one codebook.

This is TurboQuant's algorithm 1, generalized from unit vectors to all vectors by a stored norm. PolarQuant (arXiv
2502.02617) has the same first steps, a rotation and a separate length, and then quantizes angles.
"""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .codebook import lloyd_max, nearest, normal

__all__ = ["Encoded", "decode", "encode", "levels", "roundtrip"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Encoded:
    """Quantized vectors."""

    norm: Floats  #: (...), the factor of the reconstructed direction in the decoder
    index: NDArray[np.int64]  #: (..., n), 0 ... 2**bits - 1


@functools.cache
def _unit(bits: int) -> tuple[float, ...]:
    return tuple(lloyd_max(normal(), bits).levels)


def levels(n: int, bits: int) -> Floats:
    """The Lloyd-Max levels of N(0, 1/n), (2**bits,): one codebook for every vector of n channels."""
    return np.array(_unit(bits)) / math.sqrt(n)


def encode(x: ArrayLike, bits: int, rotation: ArrayLike, *, norm_correction: bool = True) -> Encoded:
    """Quantize vectors x (..., n) with an orthonormal matrix (n, n), such as `rotation.random_rotation` gives.

    With `norm_correction` the stored norm is |x| / |c|, where c are the chosen levels, so that the reconstruction has
    the length of x. Without it the stored norm is |x|, as in the paper, and the reconstruction is slightly too short,
    because levels are means and vary less than the values. A vector of zeros has the norm 0.

    Source: TurboQuant, algorithm 1, and section 1 on norms.
    """
    array, matrix = np.asarray(x, dtype=np.float64), np.asarray(rotation, dtype=np.float64)
    norm = np.linalg.norm(array, axis=-1)
    codebook = levels(array.shape[-1], bits)
    index = nearest(array / np.where(norm > 0, norm, 1.0)[..., None] @ matrix.T, codebook)
    if norm_correction:
        norm = norm / np.linalg.norm(codebook[index], axis=-1)
    return Encoded(np.asarray(norm), index)


def decode(encoded: Encoded, bits: int, rotation: ArrayLike) -> Floats:
    """The reconstruction, float64 (..., n)."""
    codebook = levels(encoded.index.shape[-1], bits)
    return np.asarray(encoded.norm[..., None] * codebook[encoded.index] @ np.asarray(rotation, dtype=np.float64))


def roundtrip(x: ArrayLike, bits: int, rotation: ArrayLike, *, norm_correction: bool = True) -> Floats:
    """decode(encode(x)) for x (..., n)."""
    return decode(encode(x, bits, rotation, norm_correction=norm_correction), bits, rotation)
