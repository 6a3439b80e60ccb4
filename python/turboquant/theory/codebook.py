"""Scalar quantizers for a known density: Lloyd-Max, uniform, and what no quantizer can beat."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Codebook", "Density", "best_uniform", "laplace", "lloyd_max", "nearest", "normal", "shannon_bound",
    "sphere_coordinate",
]

Floats = NDArray[np.float64]
_GRID = 100_001  # points of the numerical integrals: levels of N(0,1) are right to 1e-6


class Density(NamedTuple):
    """A probability density on an interval; outside it is 0, or too small to matter."""

    function: Callable[[Floats], Floats]  #: values at x, any shape; need not be normalised
    low: float
    high: float


def normal(sigma: float = 1.0) -> Density:
    """N(0, sigma**2), to 10 sigma."""
    return Density(lambda x: np.exp(-np.square(x / sigma) / 2), -10 * sigma, 10 * sigma)


def laplace(sigma: float = 1.0) -> Density:
    """The two-sided exponential density of standard deviation sigma, to 25 sigma: heavier tails than N(0, sigma**2)."""
    return Density(lambda x: np.exp(-math.sqrt(2) / sigma * np.abs(x)), -25 * sigma, 25 * sigma)


def sphere_coordinate(n: int) -> Density:
    """One coordinate of a random point on the unit sphere in n dimensions, n > 3: (1 - x**2)**((n - 3) / 2).

    So is every coordinate of a randomly rotated unit vector. Close to N(0, 1/n) for large n. Source: TurboQuant,
    lemma 1.
    """
    return Density(lambda x: np.power(np.clip(1 - np.square(x), 0, None), (n - 3) / 2), -1.0, 1.0)


class Codebook(NamedTuple):
    """A scalar quantizer: a value takes the nearest level."""

    levels: Floats  #: (2**bits,), ascending
    mse: float  #: mean squared error over the density that it was made for

    @property
    def bounds(self) -> Floats:
        """(2**bits - 1,): the midpoints, where one level's slot ends and the next begins."""
        return np.asarray((self.levels[1:] + self.levels[:-1]) / 2)


class _Moments:
    """Integrals of p, x p and x**2 p between any points, by the trapezoidal rule."""

    def __init__(self, density: Density) -> None:
        self.x, self.width = np.linspace(density.low, density.high, _GRID, retstep=True)
        weight = density.function(self.x)
        self.density = weight / (np.sum(weight[1:] + weight[:-1]) / 2 * self.width)
        self._integrands = [self.density * self.x**power for power in range(3)]
        self._integrals = [np.concatenate([[0.0], np.cumsum((y[1:] + y[:-1]) / 2 * self.width)])
                           for y in self._integrands]

    def between(self, bounds: Floats, power: int) -> Floats:
        """The integral of x**power p over each of the len(bounds) + 1 slots."""
        y, total = self._integrands[power], self._integrals[power]
        place = (bounds - self.x[0]) / self.width
        at = np.clip(place.astype(np.int64), 0, len(self.x) - 2)
        part = place - at
        inside = total[at] + self.width * part * (y[at] + part / 2 * (y[at + 1] - y[at]))
        return np.diff(inside, prepend=0.0, append=total[-1])

    def mse(self, levels: Floats) -> float:
        bounds = (levels[1:] + levels[:-1]) / 2
        mass, first, second = (self.between(bounds, power) for power in range(3))
        return float(np.sum(second - 2 * levels * first + levels**2 * mass))


def lloyd_max(density: Density, bits: int, *, tolerance: float = 1e-10, steps: int = 100_000) -> Codebook:
    """The 2**bits levels with the least mean squared error for a density (for a log-concave one the only optimum).

    Two conditions are alternated until no level moves by more than `tolerance` of the density's width: a boundary is
    the midpoint of its two levels, a level is the mean of the density between its boundaries. The start is Panter and
    Dite's for many levels, density**(1/3). Source: Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6, 1960;
    Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28, 1982; TurboQuant, section 3.1.

    Raises:
        ValueError: bits is not 1 ... 8.
        ArithmeticError: not settled after so many steps.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: got {bits}, wanted 1 to 8")
    moments = _Moments(density)
    compander = np.cumsum(np.cbrt(moments.density))
    levels = np.interp((np.arange(1 << bits) + 0.5) / (1 << bits), compander / compander[-1], moments.x)
    for _ in range(steps):
        bounds = (levels[1:] + levels[:-1]) / 2
        mass = moments.between(bounds, 0)
        means = np.where(mass > 1e-15, moments.between(bounds, 1) / np.where(mass > 1e-15, mass, 1.0), levels)
        moved = np.abs(means - levels).max()
        levels = means
        if moved <= tolerance * (density.high - density.low):
            return Codebook(levels, moments.mse(levels))
    raise ArithmeticError(f"{1 << bits} levels still move by {moved:.2g} after {steps} steps")


def best_uniform(density: Density, bits: int) -> Codebook:
    """2**bits equally spaced levels about 0 with the least mean squared error: what tuning a range can do."""
    moments = _Moments(density)
    places: Floats = np.arange(1 << bits, dtype=np.float64) - ((1 << bits) - 1) / 2

    def error(width: float) -> float:
        return moments.mse(places * width)

    low, high = 0.0, (density.high - density.low) / (1 << bits)
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-9 * (density.high - density.low):  # golden-section search
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if error(a) < error(b) else (a, high)
    return Codebook(places * (low + high) / 2, error((low + high) / 2))


def nearest(x: ArrayLike, levels: ArrayLike) -> NDArray[np.int64]:
    """The index of the level nearest to each value of x; any shape. A value on a boundary takes the lower level."""
    ascending = np.asarray(levels, dtype=np.float64)
    bounds = (ascending[1:] + ascending[:-1]) / 2
    return np.asarray(np.searchsorted(bounds, np.asarray(x, dtype=np.float64)), dtype=np.int64)


def shannon_bound(bits: float) -> float:
    """4**-bits: the mean squared error per value of N(0,1) that no code of that rate can go below, however long.

    Source: Shannon, "Coding theorems for a discrete source with a fidelity criterion", 1959; TurboQuant, theorem 3.
    """
    return float(4.0**-bits)
