"""Scalar quantizers for a known density: Lloyd-Max and uniform, and Shannon's limit."""
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
_GRID = 100_001  # points of the numerical integrals, with which levels of N(0,1) have an error below 1e-6


class Density(NamedTuple):
    """A probability density on an interval. Outside the interval it is 0 or negligible."""

    function: Callable[[Floats], Floats]  #: the density at x, of any shape; it need not be normalised
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

    Every coordinate of a randomly rotated unit vector has this density. For large n it is close to N(0, 1/n). Source:
    TurboQuant, lemma 1.
    """
    return Density(lambda x: np.power(np.clip(1 - np.square(x), 0, None), (n - 3) / 2), -1.0, 1.0)


class Codebook(NamedTuple):
    """A scalar quantizer, which rounds a value to the nearest level."""

    levels: Floats  #: (2**bits,), ascending
    mse: float  #: mean squared error for the density that it was made for

    @property
    def bounds(self) -> Floats:
        """The midpoints between neighbouring levels, (2**bits - 1,)."""
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
    """The 2**bits levels with the least mean squared error for a density (the unique optimum if it is log-concave).

    Two conditions are applied in turn until no level moves by more than `tolerance` times the width of the interval: a
    boundary is the midpoint of its two levels, and a level is the mean of the density between its boundaries. The
    iteration starts at the levels for density**(1/3), Panter and Dite's approximation for many levels. Source: Max,
    "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6, 1960; Lloyd, "Least squares quantization in PCM",
    IEEE Trans. Inf. Theory 28, 1982; TurboQuant, section 3.1.

    Raises:
        ValueError: bits is not 1 ... 8.
        ArithmeticError: the levels did not converge.
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
    """The 2**bits equally spaced levels, symmetric about 0, with the least mean squared error."""
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
    """The index of the nearest level for each value of x, of any shape. On a boundary the lower level is taken."""
    ascending = np.asarray(levels, dtype=np.float64)
    bounds = (ascending[1:] + ascending[:-1]) / 2
    return np.asarray(np.searchsorted(bounds, np.asarray(x, dtype=np.float64)), dtype=np.int64)


def shannon_bound(bits: float) -> float:
    """4**-bits, the lower limit of the mean squared error per value of N(0,1) for all codes of that rate.

    Source: Shannon, "Coding theorems for a discrete source with a fidelity criterion", 1959; TurboQuant, theorem 3.
    """
    return float(4.0**-bits)
