"""QJL: inner products from one bit per random projection, which are unbiased but noisy.

    estimate = sqrt(pi/2) / m * |x| * sum_i <s_i, q> sign(<s_i, x>)        s_i ~ N(0, I), i = 1 ... m

For one projection s the product <s, q> sign(<s, x>) has the mean sqrt(2/pi) <q, x> / |x| and the second moment |q|**2.
So the estimate has the mean <q, x> and the variance (pi/2 |q|**2 |x|**2 - <q, x>**2) / m.

Source: Zandieh, Daliri, Han, "QJL: 1-Bit Quantized JL Transform for KV Cache Quantization with Zero Overhead", arXiv
2406.03482, section 3; as a second stage: TurboQuant, lemma 4 and algorithm 2.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import polarquant

__all__ = ["Signs", "decode", "dot", "encode", "projections", "variance", "with_residual"]

Floats = NDArray[np.float64]


class Signs(NamedTuple):
    """Vectors encoded by QJL: m bits and a norm each."""

    sign: NDArray[np.int8]  #: (..., m), signs +1 or -1
    norm: Floats  #: (...), norms


def projections(n: int, m: int | None = None, seed: int = 0) -> Floats:
    """A Gaussian matrix S (m, n) of independent N(0,1) values. The default m = n gives one bit per channel.

    As in `rotation.random_rotation`, the matrix is independent of vectors drawn from ``default_rng(seed)``.
    """
    stream = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2,)))
    return stream.standard_normal((n if m is None else m, n))


def encode(x: ArrayLike, matrix: ArrayLike) -> Signs:
    """The signs of S x and the norms of vectors x (..., n). The sign of 0 is +1."""
    array = np.asarray(x, dtype=np.float64)
    projected = array @ np.asarray(matrix, dtype=np.float64).T
    return Signs(np.where(projected < 0, -1, 1).astype(np.int8), np.asarray(np.linalg.norm(array, axis=-1)))


def decode(signs: Signs, matrix: ArrayLike) -> Floats:
    """The vectors (..., n) whose inner product with q is QJL's estimate: sqrt(pi/2) / m * norm * S^T sign.

    Their mean over S is x, but they are no good reconstruction: they are longer than x by about sqrt(1 + pi/2 * n/m).
    """
    s = np.asarray(matrix, dtype=np.float64)
    return np.asarray(math.sqrt(math.pi / 2) / len(s) * signs.norm[..., None] * (signs.sign.astype(np.float64) @ s))


def dot(query: ArrayLike, signs: Signs, matrix: ArrayLike) -> Floats:
    """Estimates of <query, x> for queries (..., n) and all encoded vectors (rows..., n): (..., rows...).

    The query is projected, but not quantized.
    """
    s = np.asarray(matrix, dtype=np.float64)
    projected = np.asarray(query, dtype=np.float64) @ s.T
    products = np.tensordot(projected, signs.sign.astype(np.float64), axes=([-1], [-1]))
    return np.asarray(math.sqrt(math.pi / 2) / len(s) * products * signs.norm)


def variance(query: ArrayLike, x: ArrayLike, m: int) -> Floats:
    """The variance of `dot` over S with m projections, for vectors (..., n) in pairs: (...)."""
    q, array = np.asarray(query, dtype=np.float64), np.asarray(x, dtype=np.float64)
    lengths = np.square(q).sum(axis=-1) * np.square(array).sum(axis=-1)
    return np.asarray((math.pi / 2 * lengths - np.square((q * array).sum(axis=-1))) / m)


def with_residual(x: ArrayLike, bits: int, rotation: ArrayLike, matrix: ArrayLike) -> Floats:
    """TurboQuant's algorithm 2: `polarquant` with bits - 1, and QJL with one bit for the residual. float64 (..., n).

    Inner products with the result are unbiased over S for every first stage. The rate is `bits` per channel, if S has
    as many rows as x has channels, plus two norms per vector.
    """
    array = np.asarray(x, dtype=np.float64)
    first = polarquant.roundtrip(array, bits - 1, rotation, norm_correction=False)
    return first + decode(encode(array - first, matrix), matrix)
