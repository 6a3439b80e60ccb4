"""The scales of weights that minimize the quantization noise of a cache.

A block of n channels is rotated before it is quantized, so its noise is the same in every channel and proportional to
A = Σ s² E|k|². Scores read the noise through the query, with the factor B = Σ E|q|² / s². Scaling k by s and q by 1/s
does not change q·k, and by the Cauchy-Schwarz inequality A·B is least at s⁴ = E|q|² / E|k|². For V the same holds with
the second moments of V, and with the squared lengths of the columns of the output matrix in place of E|q|².
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Problem", "groups", "noise", "solve", "solve_powers"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_FLOOR = 1e-10  # share of a block's largest moment; a lower limit, so that a constant zero channel has a finite scale
_STEPS = 40


@dataclass(frozen=True)
class Problem:
    """Channels to balance; all arrays are (channels,)."""

    cached: Floats  #: second moments of the cached channels, E|k|² or E|v|²
    reader: Floats  #: E|q|², summed over the heads that read it, or squared lengths of the output's columns
    block: Ints  #: number of the channel's block, from 0
    group: Ints  #: number of the channel's group, from 0; channels of a group have the same scale

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
        label = label[label]  # path halving
        if np.array_equal(label, before):
            return np.asarray(np.unique(label, return_inverse=True)[1], np.int64)


def noise(problem: Problem, scale: Floats) -> float:
    """Σ over the blocks of A·B / n: the noise in the scores (or the output) per unit of the type's relative error."""
    a = _sum(problem.block, problem.cached * scale**2)
    b = _sum(problem.block, problem.reader / scale**2)
    return float((a * b / np.bincount(problem.block)).sum())


def solve(problem: Problem) -> Floats:
    """The best scales as real numbers, (channels,). The energy of a block does not increase.

    If every group is inside one block, s⁴ = Σ reader / Σ cached over the group. In a group that several blocks share
    (one norm's weight for all heads), each block is weighted by its A and B. These depend on the scales, so the
    computation is repeated a few times.
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

    Only ratios matter within a block, so the exact scales may be multiplied by a common factor before they are rounded.
    The factor with the least noise is taken; of several such factors the one nearest to 1, because K and Q must stay in
    the range of fp16. All scales are 1 if no others have less noise.
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
    """The result of `reduce` for the values of each label."""
    result = values[np.unique(labels, return_index=True)[1]].copy()
    reduce.at(result, labels, values)
    return result
