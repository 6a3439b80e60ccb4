"""The scales that make the quantization noise of a cache as small as it can be without touching the cache.

A block of n channels is rotated before it is quantized, so its noise is the same in every channel: proportional to A
= Σ s² E|k|². It is read through the query, as B = Σ E|q|² / s². Scaling k by s and q by 1/s leaves q·k as it is, and
A·B is least, by Cauchy-Schwarz, at s⁴ = E|q|² / E|k|². For V the same holds with the second moments of V and, for q,
the squared length of the columns of the output matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Problem", "groups", "noise", "solve", "solve_powers"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_FLOOR = 1e-10  # of a block's largest moment: a channel that never moves must not be scaled to infinity
_STEPS = 40


@dataclass(frozen=True)
class Problem:
    """Channels to balance; all arrays are (channels,)."""

    cached: Floats  #: second moments of what is cached, E|k|² or E|v|²
    reader: Floats  #: of what reads it: E|q|², summed over the heads that do, or squared lengths of columns
    block: Ints  #: which block of the cache a channel is in, from 0
    group: Ints  #: channels with the same number have the same scale, from 0

    def floored(self) -> tuple[Floats, Floats]:
        """`cached` and `reader` without zeros."""
        cached, reader = (
            np.maximum(moments, np.maximum(_FLOOR * _per(self.block, moments, np.maximum)[self.block], 1e-30))
            for moments in (self.cached, self.reader)
        )
        return cached, reader


def groups(channels: int, pairs: list[tuple[Ints, Ints]]) -> Ints:
    """Number the sets of channels that `pairs` connect: (channels,), from 0."""
    label = np.arange(channels)
    while True:
        before = label.copy()
        for a, b in pairs:
            low = np.minimum(label[a], label[b])
            np.minimum.at(label, a, low)
            np.minimum.at(label, b, low)
        label = label[label]  # halves the length of chains
        if np.array_equal(label, before):
            return np.asarray(np.unique(label, return_inverse=True)[1], np.int64)


def noise(problem: Problem, scale: Floats) -> float:
    """Σ over the blocks of A·B / n: the noise in the scores (or the output), per unit of the type's own error."""
    a = _sum(problem.block, problem.cached * scale**2)
    b = _sum(problem.block, problem.reader / scale**2)
    return float((a * b / np.bincount(problem.block)).sum())


def solve(problem: Problem) -> Floats:
    """The best scales, (channels,), for real numbers. Blocks keep their energy or lose some.

    Where groups lie within blocks this is s⁴ = Σ reader / Σ cached over the group. A group that several blocks share
    (one norm's weight for all heads) weighs each by its A and B, which depend on the scales: a few rounds settle them.
    """
    cached, reader = problem.floored()
    scale = np.ones_like(cached)
    for _ in range(_STEPS):
        a = _sum(problem.block, cached * scale**2)[problem.block]
        b = _sum(problem.block, reader / scale**2)[problem.block]
        fourth = _sum(problem.group, a * reader) / _sum(problem.group, b * cached)
        updated = (fourth**0.25)[problem.group]
        if np.allclose(updated, scale, rtol=1e-9, atol=0):
            break
        scale = updated
    return scale


def solve_powers(problem: Problem, low: Ints, high: Ints) -> Floats:
    """The best scales among the powers of two from 2**low to 2**high; `low` and `high` are (channels,).

    Only ratios matter within a block, so the exact scales may all be moved by a common factor before they are rounded:
    the factor that leaves the least noise is taken, and of several the one nearest to 1, as K and Q must stay within
    the range of fp16. 1 everywhere if nothing is better than that.
    """
    exact = np.log2(solve(problem))
    low = _per(problem.group, low, np.maximum)[problem.group]
    high = _per(problem.group, high, np.minimum)[problem.group]
    best = np.ones_like(exact)
    least = noise(problem, best)
    for shift in sorted(np.arange(-8, 8.125, 0.125), key=abs):
        scale = 2.0 ** np.clip(np.round(exact + shift), np.minimum(low, 0), np.maximum(high, 0))
        found = noise(problem, scale)
        if found < least * (1 - 1e-9):
            best, least = scale, found
    return best


def _sum(labels: Ints, values: Floats) -> Floats:
    return np.bincount(labels, weights=values).astype(np.float64)


def _per(labels: Ints, values: NDArray[Any], reduce: np.ufunc) -> NDArray[Any]:
    """`reduce` of the values with each label."""
    result = values[np.unique(labels, return_index=True)[1]].copy()
    reduce.at(result, labels, values)
    return result
