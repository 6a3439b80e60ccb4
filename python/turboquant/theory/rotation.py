"""Rotations that spread a vector's energy over all its channels: random orthonormal matrices, and the fast transform.

`turboquant.rotate` is the fast rotation S2 . H/sqrt(n) . S1; this module has its middle part, stage by stage.
"""
from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..reference import hadamard, rotation_matrix

__all__ = [
    "butterfly_stages", "dense_multiplications", "hadamard", "peak_to_mean", "random_rotation", "rotation_matrix",
    "walsh_hadamard", "walsh_hadamard_additions",
]

Floats = NDArray[np.float64]


def random_rotation(n: int, seed: int = 0) -> Floats:
    """A random orthonormal matrix (n, n), uniformly distributed (Haar measure).

    It is the Q of the QR decomposition of a Gaussian matrix, with its columns multiplied by the signs of R's diagonal.
    Without these signs the distribution would depend on the sign convention of the library. Source: TurboQuant,
    algorithm 1; Mezzadri, "How to generate random matrices from the classical compact groups", Notices of the AMS 54,
    2007.

    The matrix is independent of vectors drawn from ``default_rng(seed)``.
    """
    stream = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
    q, r = np.linalg.qr(stream.standard_normal((n, n)))
    return np.asarray(q * np.where(np.diag(r) < 0, -1.0, 1.0))


def _stages(x: ArrayLike) -> Iterator[Floats]:
    array = np.asarray(x, dtype=np.float64)
    n = array.shape[-1] if array.ndim else 0
    if n < 1 or n & (n - 1):
        raise ValueError(f"x: got shape {array.shape}, wanted a last axis that is a power of two")
    yield array
    h = 1
    while h < n:
        pairs = array.reshape(*array.shape[:-1], n // (2 * h), 2, h)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        array = np.stack([a + b, a - b], axis=-2).reshape(array.shape)
        yield array
        h *= 2


def butterfly_stages(x: ArrayLike) -> Floats:
    """The stages of H . x for vectors x (..., n), n a power of two: (log2(n) + 1, ..., n); stage 0 is x.

    A stage replaces every pair (a, b) of channels at distance h by (a + b, a - b), with h = 1, 2, 4, ..., n/2. The
    stages are not normalised: the orthonormal transform is the last stage divided by sqrt(n).

    Raises:
        ValueError: n is no power of two.
    """
    return np.stack(list(_stages(x)))


def walsh_hadamard(x: ArrayLike) -> Floats:
    """H/sqrt(n) . x for vectors x (..., n): orthonormal and its own inverse. Errors as in `butterfly_stages`."""
    for stage in _stages(x):
        last = stage
    return np.asarray(last / math.sqrt(last.shape[-1]))


def dense_multiplications(n: int) -> int:
    """Multiply-adds of a dense rotation of n channels: n**2."""
    return n * n


def walsh_hadamard_additions(n: int) -> int:
    """Additions and subtractions of the butterfly for n channels, a power of two: n * log2(n)."""
    return n * (n.bit_length() - 1)


def peak_to_mean(x: ArrayLike) -> Floats:
    """max |x| / mean |x| over the last axis of x (..., n): (...). 1 for equal magnitudes, n for a single spike."""
    magnitude = np.abs(np.asarray(x, dtype=np.float64))
    return np.asarray(magnitude.max(axis=-1) / magnitude.mean(axis=-1))
