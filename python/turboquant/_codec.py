"""Encode, decode, rotate, prepare and dot: the functions of turboquant.h on arrays of any shape."""
from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arrays import as_rows, block_of, byte_array, float_array, last_axis, threads_of
from ._types import TypeInfo, resolve


def quantize(x: ArrayLike, type: str | TypeInfo, *, threads: int = 1) -> NDArray[np.uint8]:
    """Encode rows of floats.

    Args:
        x: (..., n) of float32, float16 or bfloat16 (ml_dtypes); n is a multiple of the type's block. Strides are
            arbitrary: contiguous float32 rows are read in place, all other arrays are copied first.
        type: a type's name ("turbo4", "turbo3_64", ...) or its `TypeInfo`.
        threads: number of threads, over which the rows are distributed.

    Returns:
        uint8 (..., n // block * block_bytes), C-contiguous. cpp/FORMAT.md specifies the bytes.

    Raises:
        TypeError: x has another dtype (float64 is not narrowed silently), or type is no name.
        ValueError: there is no such type, the last axis is no multiple of its block, or TURBOQUANT_KERNELS names
            kernels that cannot run.

    Warns:
        RuntimeWarning: blocks with a NaN or an infinity were stored as zeros, or blocks whose RMS exceeds fp16's range
            (65504) were stored with the largest finite scale. The text has the number of these blocks.

    Source: TurboQuant (arXiv 2504.19874), algorithm 1, with a Walsh-Hadamard rotation and a scale per block.
    """
    info = resolve(type)
    threads = threads_of(threads)
    array = float_array(x, "x")
    n = last_axis(array, info.block, "x", f"the block of {info.name}")
    out = np.empty((*array.shape[:-1], info.row_bytes(n)), dtype=np.uint8)
    _core.kernels_check()
    if out.size == 0:
        return out
    nonfinite, saturated = _core.encode(info.id, as_rows(array), out.reshape(-1, out.shape[-1]), threads)
    if nonfinite:
        warnings.warn(f"x: {nonfinite} of {array.size // info.block} blocks hold NaN or infinity; they are stored as "
                      "zeros", RuntimeWarning, stacklevel=2)
    if saturated:
        warnings.warn(f"x: the scale of {saturated} of {array.size // info.block} blocks is above fp16's largest "
                      "value; they are stored with that value", RuntimeWarning, stacklevel=2)
    return out


def dequantize(
    q: ArrayLike, type: str | TypeInfo, *, rotated: bool = False, threads: int = 1
) -> NDArray[np.float32]:
    """Decode rows. All bytes can be decoded; a block whose stored scale is not finite gives values that are not finite.

    Args:
        q: uint8 (..., row_bytes) as `quantize` returns it; row_bytes is a multiple of the type's block_bytes. Rows that
            are contiguous inside are read in place, whatever the distance between them.
        type: the type's name or its `TypeInfo`.
        rotated: return the values in the rotated domain, without the inverse transform. Up to rounding they are
            ``rotate(dequantize(q, type), block)``. Dot products with rotated queries can use them directly.
        threads: number of threads, over which the rows are distributed.

    Returns:
        float32 (..., n). The values are the same on every machine and with all kernels.

    Raises:
        TypeError: q is not uint8, or type is no name.
        ValueError: there is no such type, or the last axis is no multiple of its block_bytes.
    """
    info = resolve(type)
    threads = threads_of(threads)
    array = byte_array(q, "q")
    row_bytes = last_axis(array, info.block_bytes, "q", f"the bytes of a block of {info.name}")
    out = np.empty((*array.shape[:-1], info.row_values(row_bytes)), dtype=np.float32)
    _core.kernels_check()
    if out.size:
        _core.decode(info.id, as_rows(array), out.reshape(-1, out.shape[-1]), bool(rotated), threads)
    return out


def rotate(x: ArrayLike, block: int = 128, *, threads: int = 1) -> NDArray[np.float32]:
    """y = S2 . H/sqrt(block) . S1 . x for every block of the last axis.

    The map is orthonormal, so it preserves norms and dot products (float32 rounding aside).

    Args:
        x: (..., n) of float32, float16 or bfloat16; n is a multiple of the block.
        block: 128, 64 or 32.
        threads: number of threads, over which the blocks are distributed.

    Returns:
        float32 array of the shape of x.

    Raises:
        TypeError, ValueError: as in `quantize`.
    """
    return _transform(x, block, False, threads)


def unrotate(x: ArrayLike, block: int = 128, *, threads: int = 1) -> NDArray[np.float32]:
    """x = S1 . H/sqrt(block) . S2 . y: the inverse of `rotate`, with the same arguments."""
    return _transform(x, block, True, threads)


def _transform(x: ArrayLike, block: int, inverse: bool, threads: int) -> NDArray[np.float32]:
    block = block_of(block)
    threads = threads_of(threads)
    array = float_array(x, "x")
    last_axis(array, block, "x", "block")
    out = np.empty(array.shape, dtype=np.float32)
    _core.kernels_check()
    if out.size:
        _core.rotate(block, np.ascontiguousarray(array).reshape(-1), out.reshape(-1), inverse, threads)
    return out


def query_dtype(block: int) -> np.dtype[np.void]:
    """The structured dtype of one prepared query block: scale (float32), sum (int32, of q), q (int8, block)."""
    return np.dtype([("scale", "<f4"), ("sum", "<i4"), ("q", "i1", (block_of(block),))])


def prepare(query: ArrayLike, block: int = 128) -> NDArray[np.void]:
    """Rotate query rows and round every block to int8 with one float scale, for `dot`.

    Args:
        query: (..., n) of float32, float16 or bfloat16; n is a multiple of the block.
        block: the block of the type of the encoded rows: 128, 64 or 32.

    Returns:
        Structured array (..., n // block) of `query_dtype`. A rotated value is ``scale * q`` with an error of at most
        half of ``scale``. A block with a NaN or an infinity has the scale NaN.
    """
    block = block_of(block)
    array = float_array(query, "query")
    n = last_axis(array, block, "query", "block")
    dtype = query_dtype(block)
    out = np.empty((*array.shape[:-1], n // block), dtype=dtype)
    if _core.query_bytes(block, n) != n // block * dtype.itemsize:
        raise RuntimeError(f"a prepared block of {block} is not laid out as query_dtype says")  # ABI mismatch
    _core.kernels_check()
    if out.size:
        _core.query(block, as_rows(array), out.view(np.uint8).reshape(-1, n // block * dtype.itemsize))
    return out


def dot(query: ArrayLike, q: ArrayLike, type: str | TypeInfo) -> NDArray[np.float32]:
    """Dot products of query rows with encoded rows, computed in the rotated domain without decoding.

    Args:
        query: floats (..., n), or the result of `prepare` for them, a structured array (..., n // block).
        q: uint8 (rows..., row_bytes), encoded rows of n values.
        type: the type of q.

    Returns:
        float32 (..., rows...): the products of every query row with every encoded row. The query is rounded to int8,
        so the result differs from ``query @ dequantize(q, type)``. For random rows the root mean square of the
        difference is about 0.7 % of |query| |row| / sqrt(n), the root mean square of the products of such rows.

    Raises:
        TypeError, ValueError: as in `dequantize`, or query and q have different n.
    """
    info = resolve(type)
    rows = byte_array(q, "q")
    n = info.row_values(last_axis(rows, info.block_bytes, "q", f"the bytes of a block of {info.name}"))
    prepared = np.asarray(query)
    if prepared.dtype.names is None:
        prepared = prepare(prepared, info.block)
    elif prepared.dtype != query_dtype(info.block):
        raise TypeError(f"query: got an array of {prepared.dtype}, wanted floats or what prepare(query, {info.block}) "
                        "returns")
    if prepared.ndim == 0 or prepared.shape[-1] * info.block != n:
        have = prepared.shape[-1] * info.block if prepared.ndim else 0
        raise ValueError(f"query: got rows of {have} values, wanted {n}, the values in a row of q (shape {rows.shape})")
    out = np.empty((*prepared.shape[:-1], *rows.shape[:-1]), dtype=np.float32)
    _core.kernels_check()
    if out.size:
        queries = np.ascontiguousarray(prepared).view(np.uint8).reshape(-1, n // info.block * prepared.dtype.itemsize)
        source = as_rows(rows)
        _core.dot(info.id, source, queries, out.reshape(queries.shape[0], source.shape[0]), n)
    return out
