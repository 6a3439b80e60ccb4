"""Scale rows, columns or elements of a tensor in the format of a GGUF file, without requantizing.

Floats are multiplied. A block of a quantized type is scaled through its fp16 scales, by powers of two only, so every
weight is multiplied exactly by that power of two. `exponents` returns the powers at which no fp16 scale overflows or
loses a bit as a subnormal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FLOATS", "LARGEST", "Block", "block", "exponents", "largest", "scale_columns", "scale_rows"]

Bytes = NDArray[np.uint8]

#: Types that store each value as a float.
FLOATS = ("F32", "F16", "BF16")
#: The largest finite value of each type.
LARGEST = {"F32": (2 - 2.0**-23) * 2.0**127, "F16": 65504.0, "BF16": (2 - 2.0**-7) * 2.0**127}


@dataclass(frozen=True)
class Block:
    """A block of a quantized type: number of values, bytes, and the offsets of its fp16 scales and minima."""

    values: int
    bytes: int
    scales: tuple[int, ...]


_BLOCKS = {
    "Q4_0": Block(32, 18, (0,)),
    "Q4_1": Block(32, 20, (0, 2)),
    "Q5_0": Block(32, 22, (0,)),
    "Q5_1": Block(32, 24, (0, 2)),
    "Q8_0": Block(32, 34, (0,)),
    "Q2_K": Block(256, 84, (80, 82)),
    "Q3_K": Block(256, 110, (108,)),
    "Q4_K": Block(256, 144, (0, 2)),
    "Q5_K": Block(256, 176, (0, 2)),
    "Q6_K": Block(256, 210, (208,)),
    "IQ4_NL": Block(32, 18, (0,)),
    "IQ4_XS": Block(256, 136, (0,)),
}


def block(type: str) -> Block | None:
    """The layout of a quantized type; None if the type cannot be scaled."""
    return _BLOCKS.get(type)


def exponents(rows: Bytes, type: str, axis: str = "rows") -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The powers of two by which each row, or with axis "columns" each column, can be scaled.

    Args:
        rows: (rows, bytes of a row).

    Returns:
        The lowest and the highest exponent, (rows,) or (columns,) each.
    """
    over = 1 if axis == "rows" else 0
    if type in FLOATS:
        found = largest(rows, type, axis)
        free = np.full(len(found), 100)
        top = 15 if type == "F16" else 127
        return -free, np.where(found > 0, np.minimum(free, top - _exponent(found)), free)
    layout = _BLOCKS[type]
    scales = _fp16(rows, layout).astype(np.float64)
    mantissa, exponent = np.frexp(scales)
    digits = np.abs(mantissa * 2048).astype(np.int64)  # fp16 has 11 significant bits
    lowest = exponent - 11 + np.log2(np.maximum(digits & -digits, 1)).astype(np.int64)
    used = scales != 0
    low = np.where(used, -24 - lowest, -100).max(axis=2).max(axis=over)
    high = np.where(used, 15 - _exponent(scales), 100).min(axis=2).min(axis=over)
    return (low, high) if axis == "rows" else (low.repeat(layout.values), high.repeat(layout.values))


def largest(rows: Bytes, type: str, axis: str = "rows") -> NDArray[np.float64]:
    """The largest magnitude in each row of floats, or (axis "columns") in each column; NaN counts as infinite."""
    magnitudes = np.abs(_to_float(rows, type)).max(axis=1 if axis == "rows" else 0)
    return np.where(np.isnan(magnitudes), np.inf, magnitudes)


def scale_rows(rows: Bytes, type: str, factors: NDArray[np.float64]) -> Bytes:
    """A copy of (rows, bytes of a row) with every row multiplied by its factor, (rows,).

    Raises:
        ValueError: a factor of a quantized type is no power of two, or a result is not finite.
    """
    if type in FLOATS:
        return _from_float(_to_float(rows, type) * factors[:, None], type)
    layout = _BLOCKS[type]
    result = rows.copy()
    _put_fp16(result, layout, _scaled(_fp16(rows, layout), factors[:, None, None]))
    return result


def scale_columns(rows: Bytes, type: str, factors: NDArray[np.float64]) -> Bytes:
    """A copy of (rows, bytes of a row) with every column multiplied by its factor, (columns,).

    Raises:
        ValueError: as in `scale_rows`, or the columns of a block have different factors.
    """
    if type in FLOATS:
        return _from_float(_to_float(rows, type) * factors, type)
    layout = _BLOCKS[type]
    of_block = factors.reshape(-1, layout.values)
    if (of_block != of_block[:, :1]).any():
        raise ValueError(f"columns of one {type} block cannot be scaled differently")
    result = rows.copy()
    _put_fp16(result, layout, _scaled(_fp16(rows, layout), of_block[:, :1]))
    return result


def _exponent(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """floor(log2(|x|)); the result for 0 is arbitrary."""
    return np.asarray(np.frexp(values)[1] - 1, np.int64)


def _fp16(rows: Bytes, layout: Block) -> NDArray[np.float16]:
    """The fp16 scales of a tensor, (rows, blocks, scales of a block)."""
    blocks = rows.reshape(len(rows), -1, layout.bytes)
    parts = [blocks[:, :, at : at + 2] for at in layout.scales]
    return np.ascontiguousarray(np.concatenate(parts, axis=2)).view("<f2")


def _put_fp16(rows: Bytes, layout: Block, scales: NDArray[np.float16]) -> None:
    blocks = rows.reshape(len(rows), -1, layout.bytes)
    raw = np.ascontiguousarray(scales.astype("<f2")).view(np.uint8)
    for number, at in enumerate(layout.scales):
        blocks[:, :, at : at + 2] = raw[:, :, 2 * number : 2 * number + 2]


def _scaled(scales: NDArray[np.float16], factors: NDArray[np.float64]) -> NDArray[np.float16]:
    if (np.frexp(factors)[0] != 0.5).any():
        raise ValueError("a block's scale can be multiplied by powers of two only")
    wanted = scales.astype(np.float64) * factors
    with np.errstate(over="ignore"):
        result = wanted.astype(np.float16)
    if not np.array_equal(result, wanted, equal_nan=True):
        raise ValueError("an fp16 scale leaves its range")
    return result


def _to_float(rows: Bytes, type: str) -> NDArray[np.float64]:
    if type == "BF16":
        return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return rows.view("<f4" if type == "F32" else "<f2").astype(np.float64)


def _from_float(values: NDArray[np.float64], type: str) -> Bytes:
    with np.errstate(over="ignore"):
        if type == "BF16":
            bits = values.astype(np.float32).view(np.uint32)
            rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16  # rounds to nearest even
            result = rounded.astype("<u2")
            finite = np.isfinite((rounded << 16).view(np.float32))
        else:
            floats = values.astype("<f4" if type == "F32" else "<f2")
            finite = np.isfinite(floats)
            result = floats
    if not finite.all():
        raise ValueError(f"a weight leaves the range of {type}")
    return np.ascontiguousarray(result).view(np.uint8).reshape(len(values), -1)
