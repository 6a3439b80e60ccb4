"""Check the arguments of the public functions, and convert arrays to the form that the core reads.

Messages have the form "argument: got ..., wanted ...": TypeError for dtypes and Python types, ValueError for shapes
and values.
"""
from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FLOATS = "float32, float16 or bfloat16 (of ml_dtypes)"


def threads_of(threads: Any) -> int:
    if isinstance(threads, bool):
        raise TypeError("threads: got a bool, wanted an int")
    try:
        count = operator.index(threads)
    except TypeError:
        raise TypeError(f"threads: got {threads!r} ({type(threads).__name__}), wanted an int") from None
    if not 1 <= count <= 1024:
        raise ValueError(f"threads: got {count}, wanted 1 to 1024")
    return count


def block_of(block: Any) -> int:
    try:
        size = operator.index(block)
    except TypeError:
        raise TypeError(f"block: got {block!r} ({type(block).__name__}), wanted 128, 64 or 32") from None
    if size not in (128, 64, 32):
        raise ValueError(f"block: got {size}, wanted 128, 64 or 32")
    return size


def finite_of(value: Any, argument: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{argument}: got {value!r} ({type(value).__name__}), wanted a number") from None
    if not np.isfinite(number):
        raise ValueError(f"{argument}: got {number}, wanted a finite number")
    return number


def float_array(x: ArrayLike, argument: str) -> NDArray[np.float32]:
    """x as float32: x itself if it is float32 in native byte order, and a converted copy otherwise."""
    array = np.asarray(x)
    # ml_dtypes registers bfloat16 with NumPy under this name, so it need not be imported here.
    if array.dtype.name in ("float32", "float16", "bfloat16"):
        return array.astype(np.float32, copy=False)
    raise TypeError(f"{argument}: got an array of {array.dtype}, wanted {FLOATS}; "
                    f"convert it with {argument}.astype(numpy.float32)")


def byte_array(q: ArrayLike, argument: str) -> NDArray[np.uint8]:
    array = np.asarray(q)
    if array.dtype != np.uint8:
        raise TypeError(f"{argument}: got an array of {array.dtype}, wanted the uint8 that quantize returns")
    return array


def last_axis(array: NDArray[Any], multiple: int, argument: str, unit: str) -> int:
    """The length of the last axis. It must be a positive multiple of `multiple`, which `unit` names in errors."""
    if array.ndim == 0:
        raise ValueError(f"{argument}: got a scalar, wanted an array whose last axis is a multiple of {multiple} "
                         f"({unit})")
    length: int = array.shape[-1]
    if length == 0 or length % multiple:
        raise ValueError(f"{argument}: got shape {array.shape}, wanted a last axis that is a positive multiple of "
                         f"{multiple} ({unit}), not {length}")
    return length


def as_rows(array: NDArray[Any]) -> NDArray[Any]:
    """The array as (rows, last axis). The last axis is contiguous, and the stride of rows is at least their length.

    The result is a view where strides allow it (slices of rows, padded rows), and a copy otherwise (transposed,
    reversed or repeated rows).
    """
    rows = array.reshape(-1, array.shape[-1])
    item, length = rows.itemsize, rows.shape[-1]
    apart = rows.strides[0] if rows.shape[0] > 1 else length * item
    contiguous = length == 1 or rows.strides[1] == item
    if contiguous and apart >= length * item and apart % item == 0 and rows.flags.aligned:
        return rows
    return np.ascontiguousarray(rows)
