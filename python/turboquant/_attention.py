"""Attention over encoded K and V."""
from __future__ import annotations

import math
from typing import Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from ._arrays import FLOATS, byte_array, finite_of, float_array, last_axis, threads_of
from ._types import PLAIN, CacheType, TypeInfo, resolve_cache

#: Rows of K and of V, floats (..., n_kv_head, rows, head).
Window = tuple[ArrayLike, ArrayLike]
#: The cache types that are floats, with their names in NumPy.
_FLOATS = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}


@overload
def attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, type_k: str | TypeInfo, type_v: str | TypeInfo,
    scale: float | None = None, mask: ArrayLike | None = None, causal: bool = False, soft_cap: float = 0.0,
    sparse_v: float = 0.0, window: Window | None = None, return_skip_rate: Literal[False] = False, threads: int = 1,
) -> NDArray[np.float32]: ...


@overload
def attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, type_k: str | TypeInfo, type_v: str | TypeInfo,
    scale: float | None = None, mask: ArrayLike | None = None, causal: bool = False, soft_cap: float = 0.0,
    sparse_v: float = 0.0, window: Window | None = None, return_skip_rate: Literal[True], threads: int = 1,
) -> tuple[NDArray[np.float32], float]: ...


def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    type_k: str | TypeInfo,
    type_v: str | TypeInfo,
    scale: float | None = None,
    mask: ArrayLike | None = None,
    causal: bool = False,
    soft_cap: float = 0.0,
    sparse_v: float = 0.0,
    window: Window | None = None,
    return_skip_rate: bool = False,
    threads: int = 1,
) -> NDArray[np.float32] | tuple[NDArray[np.float32], float]:
    """softmax(scale * Q K^T + mask) V over encoded K and V, in float32.

    Args:
        q: floats (..., n_head, n_query, head_k): float32, float16 or bfloat16.
        k: uint8 (..., n_kv_head, n_kv, row_bytes) of rows of head_k values. n_head is a multiple of n_kv_head; head h
            reads KV head ``h // (n_head // n_kv_head)`` (grouped-query attention).
        v: uint8 (..., n_kv_head, n_kv, row_bytes) of rows of head_v values.
        type_k, type_v: the types of k and v, in any pair: turbo types, or "q8_0", "q4_0" (rows in ggml's layout),
            "f16", "bf16", "f32" (k or v may then be a float16, bfloat16 or float32 array (..., n_kv_head, n_kv, head)
            instead of its bytes). Rows of these five are multiples of 32 values. Rows of f32 are rounded to int8 in
            blocks of 32 when they are read, as rows of q8_0 are when they are written.
        scale: factor of the scores; 1 / sqrt(head_k) if None.
        mask: float32 or float16 values that are added to the scores, or bool (False: hidden); broadcast to
            (..., n_query, n_kv). All heads have the same mask.
        causal: query i attends to KV rows 0 ... n_kv - n_query + i, so the last query attends to all of them. A row
            that `mask` hides stays hidden. n_query must be at most n_kv.
        soft_cap: if not 0, a score s becomes ``soft_cap * tanh(s / soft_cap)`` before the mask.
        sparse_v: a row of V is skipped if its softmax weight, relative to the largest so far, is at most this for all
            queries that share the row. 0 skips only rows whose weights are all 0. The default of llama.cpp's
            ``--cache-sparse-v`` is 1e-6.
        window: an exact window, like that of llama.cpp's ``--cache-window``: the newest W rows of K and V before they
            were encoded, as a pair of float arrays (..., n_kv_head, W, head_k) and (..., n_kv_head, W, head_v). W is at
            most n_kv. These rows replace the last W rows of k and v, whose bytes are not read; `mask` and `causal`
            apply to them in the same way. float32 rows are treated as "f32" (see type_k); float16 and bfloat16 rows are
            not rounded.
        return_skip_rate: also return the share of the rows of V that were skipped, 0 ... 1. Rows count once per KV head
            and tile of queries, masked rows included.
        threads: number of threads, over which heads and queries are distributed.

    Leading axes (...) are batches; they must be the same in q, k and v.

    Returns:
        float32 (..., n_head, n_query, head_v). A query row that is masked everywhere gives zeros. With
        return_skip_rate the result is a tuple of this array and a float.

    Raises:
        TypeError, ValueError: the text names the argument, its shape or dtype, and what is required.

    The parts over the window and over the other rows each have a maximum, a sum and an output, which are merged.
    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv 1805.02867), section 3.
    """
    info_k, info_v = resolve_cache(type_k, "type_k"), resolve_cache(type_v, "type_v")
    threads = threads_of(threads)
    queries, keys, values = float_array(q, "q"), _cache_rows(k, info_k, "k"), _cache_rows(v, info_v, "v")
    for name, array, layout in (("q", queries, "(..., n_head, n_query, head_k)"),
                                ("k", keys, "(..., n_kv_head, n_kv, row_bytes)"),
                                ("v", values, "(..., n_kv_head, n_kv, row_bytes)")):
        if array.ndim < 3:
            raise ValueError(f"{name}: got shape {array.shape}, wanted {layout}")
    head_k = last_axis(queries, info_k.block, "q", f"the block of {info_k.name}")
    last_axis(keys, info_k.block_bytes, "k", f"the bytes of a block of {info_k.name}")
    head_v = info_v.row_values(last_axis(values, info_v.block_bytes, "v", f"the bytes of a block of {info_v.name}"))

    *batch, n_head, n_query, _ = queries.shape
    n_kv_head, n_kv = keys.shape[-3:-1]
    wanted_k = (*batch, n_kv_head, n_kv, info_k.row_bytes(head_k))
    if keys.shape != wanted_k:
        raise ValueError(f"k: got shape {keys.shape}, wanted {wanted_k}: {info_k.name} rows of {head_k} values, "
                         "as in q")
    wanted_v = (*wanted_k[:-1], values.shape[-1])
    if values.shape != wanted_v:
        raise ValueError(f"v: got shape {values.shape}, wanted {wanted_v}: as many heads and rows as k")
    if n_kv_head == 0 or n_head % n_kv_head:
        raise ValueError(f"q: got {n_head} heads (shape {queries.shape}), wanted a multiple of the {n_kv_head} heads "
                         "of k")

    scale = 1.0 / math.sqrt(head_k) if scale is None else finite_of(scale, "scale")
    soft_cap = finite_of(soft_cap, "soft_cap")
    if soft_cap < 0:
        raise ValueError(f"soft_cap: got {soft_cap}, wanted 0 (none) or more")
    sparse_v = finite_of(sparse_v, "sparse_v")
    if not 0 <= sparse_v < 1:
        raise ValueError(f"sparse_v: got {sparse_v}, wanted 0 (off) or more, and less than 1")
    bias = _mask(mask, causal, (*batch, n_query, n_kv))
    newest = None if window is None else _window(window, (*batch, n_kv_head, n_kv), head_k, head_v)

    out = np.zeros((*batch, n_head, n_query, head_v), dtype=np.float32)
    _core.kernels_check()
    if out.size == 0 or n_kv == 0:  # zeros, as for a query row that is masked everywhere
        return (out, 0.0) if return_skip_rate else out
    queries, keys, values = np.ascontiguousarray(queries), np.ascontiguousarray(keys), np.ascontiguousarray(values)
    rows = left_out = 0
    for item in np.ndindex(*batch):
        exact = newest and (newest[0][item], newest[1][item], *newest[2:])
        counts = _core.attention(queries[item], keys[item], values[item], None if bias is None else bias[item], exact,
                                 out[item], info_k.id, info_v.id, scale, soft_cap, sparse_v, threads)
        rows, left_out = rows + counts[0], left_out + counts[1]
    return (out, left_out / rows) if return_skip_rate else out


def _cache_rows(array: ArrayLike, info: TypeInfo | CacheType, argument: str) -> NDArray[np.uint8]:
    """The bytes of K or V; an array of floats of the type is not converted."""
    floats = np.asarray(array)
    if _FLOATS.get(info.name) == floats.dtype.name:
        return np.ascontiguousarray(floats).view(np.uint8)
    rows = byte_array(floats, argument)
    # the core needs aligned 32-bit floats
    return rows.copy() if info.name == "f32" and rows.ctypes.data % 4 else rows


def _window(
    window: Window, shape: tuple[int, ...], head_k: int, head_v: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], int, int]:
    """The bytes of the window's K and V, and their types. shape: (..., n_kv_head, n_kv) of the encoded rows."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        what = f"{len(window)} of them" if isinstance(window, (tuple, list)) else type(window).__name__
        raise TypeError(f"window: got {what}, wanted two float arrays, of the newest rows of k and of v")
    rows, types = [], []
    for array, head, side in ((window[0], head_k, "k"), (window[1], head_v, "v")):
        floats = np.asarray(array)
        info = next((PLAIN[name] for name, dtype in _FLOATS.items() if floats.dtype.name == dtype), None)
        if info is None:
            raise TypeError(f"window: got an array of {floats.dtype} for {side}, wanted {FLOATS}")
        count = floats.shape[-2] if floats.ndim >= 2 else 0
        if floats.shape != (*shape[:-1], count, head):
            wanted = ", ".join(map(str, (*shape[:-1], "W", head)))
            raise ValueError(f"window: got shape {floats.shape} for {side}, wanted ({wanted}): heads and rows as those of "
                             f"{side}")
        if count > shape[-1]:
            raise ValueError(f"window: got {count} rows of {side}, wanted at most the {shape[-1]} rows of k and v")
        rows.append(np.ascontiguousarray(floats).view(np.uint8))
        types.append(info.id)
    if rows[0].shape[-2] != rows[1].shape[-2]:
        raise ValueError(f"window: got {rows[0].shape[-2]} rows of k and {rows[1].shape[-2]} of v, wanted as many of both")
    return rows[0], rows[1], types[0], types[1]


def _mask(mask: ArrayLike | None, causal: bool, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """The values that are added to the scores, contiguous in the last two axes, or None."""
    bias: NDArray[np.float32] | None = None
    if mask is not None:
        array = np.asarray(mask)
        if array.dtype == np.bool_:
            array = np.where(array, np.float32(0), np.float32(-np.inf))
        array = float_array(array, "mask")
        try:
            bias = np.ascontiguousarray(np.broadcast_to(array, shape))
        except ValueError:
            raise ValueError(f"mask: got shape {array.shape}, wanted {shape} (batch, n_query, n_kv) or one that "
                             "broadcasts to it") from None
    if causal:
        n_query, n_kv = shape[-2:]
        if n_query > n_kv:
            raise ValueError(f"causal: got {n_query} queries and {n_kv} KV rows, wanted no more queries than rows")
        future = np.triu(np.full((n_query, n_kv), -np.inf, dtype=np.float32), k=n_kv - n_query + 1)
        bias = np.ascontiguousarray(np.broadcast_to(future, shape) if bias is None else bias + future)
    return bias
