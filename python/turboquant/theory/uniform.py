"""Min-max uniform quantization: 2**bits equally spaced levels from the smallest value to the largest."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Uniform", "quantize", "slot_width"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Uniform:
    """Quantized vectors and their parameters. The error of a value is at most half of `width`."""

    index: NDArray[np.int64]  #: (..., n), indices 0 ... 2**bits - 1
    low: Floats  #: (...), the smallest value of each vector, which is level 0
    width: Floats  #: (...), the distance of neighbouring levels, in the unit of the values
    values: Floats  #: (..., n), the reconstruction: low + index * width

    def used(self, bits: int) -> NDArray[np.int64]:
        """The number of levels, of 2**bits, that each vector uses: (...)."""
        hit = self.index[..., None, :] == np.arange(1 << bits)[:, None]
        return np.asarray(hit.any(axis=-1).sum(axis=-1))


def slot_width(x: ArrayLike, bits: int) -> Floats:
    """(max - min) / (2**bits - 1) over the last axis of x (..., n): (...). Raises ValueError if bits < 1."""
    if bits < 1:
        raise ValueError(f"bits: got {bits}, wanted 1 or more")
    array = np.asarray(x, dtype=np.float64)
    return np.asarray((array.max(axis=-1) - array.min(axis=-1)) / ((1 << bits) - 1))


def quantize(x: ArrayLike, bits: int) -> Uniform:
    """Round each vector of x (..., n) to the nearest of its 2**bits levels.

    A vector of equal values has the width 0 and no error.

    Raises:
        ValueError: bits is below 1, or a vector is empty.
    """
    array = np.asarray(x, dtype=np.float64)
    width, low = slot_width(array, bits), array.min(axis=-1)
    index = np.rint((array - low[..., None]) / np.where(width > 0, width, 1.0)[..., None]).astype(np.int64)
    return Uniform(index, low, width, low[..., None] + index * width[..., None])
