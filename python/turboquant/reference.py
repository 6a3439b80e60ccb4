"""TurboQuant in readable NumPy: the reference that every kernel of the C++ core must match.

This module was written from the formulas, not from the C++ code. The Walsh-Hadamard transform is a matrix product, the
codebooks are solved from the two Lloyd-Max conditions, the signs are computed by hashing, and all arithmetic is float64
where the format does not prescribe otherwise. The code is slow. It is ordered for reading from top to bottom:

1. the transform      y = S2 . H/sqrt(n) . S1 . x
2. the codebook       Lloyd-Max levels of N(0,1), rounded to int8
3. the bytes          fp16 scale, then indices
4. decode             fixed by the format to the last bit
5. encode             a search for the scale, which an encoder may improve
6. dot, attention     in the rotated domain

Decoding gives the same bits as the core. The encoder follows the rules of the core, but its transform is in float64 and
that of the core is in float32. So a rotated value close to a boundary may get the neighbouring index, and a scale close
to a tie the neighbouring fp16 value. Fewer than one block in a hundred differs, with nearly the same error; the tests
bound both.

Sources: Zandieh, Daliri, Hadian, Mirrokni, "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate",
arXiv 2504.19874, algorithm 1 (rotate, then quantize every coordinate with the optimal scalar quantizer); Max,
"Quantizing for minimum distortion", IRE Trans. Inf. Theory 6, 1960 (codebooks); cpp/FORMAT.md (bytes, scale search).
"""
from __future__ import annotations

import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "FORMATS", "Format", "attention", "attention_weights", "codebook", "decode_rows", "density", "dequantize",
    "dot", "hadamard", "levels", "lloyd_max", "pack", "prepare", "quantize", "rotate", "rotation_matrix", "signs",
    "softmax_weights", "step", "unpack", "unrotate", "upper_tail",
]

Floats = NDArray[np.float64]


# ---- 1. the transform ------------------------------------------------------------------------------------------------

def signs(which: int, n: int = 128) -> Floats:
    """The sign vector S1 or S2: n numbers +1 or -1, the first n bits of SHA-256("turboquant S1") or ("... S2").

    Bit i is bit i % 8 of byte i // 8, and a 1 means that value i is negated. The signs come from a hash, so that they
    are verifiably not chosen.
    """
    digest = hashlib.sha256(b"turboquant S%d" % which).digest()
    bits = np.unpackbits(np.frombuffer(digest, dtype=np.uint8), bitorder="little")[:n]
    return np.where(bits == 1, -1.0, 1.0)


def hadamard(n: int) -> Floats:
    """The Walsh-Hadamard matrix of order n, a power of two, entries +1 and -1 (Sylvester's construction).

    H_1 = [1],  H_2n = [[H_n, H_n], [H_n, -H_n]]
    """
    matrix: Floats = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def rotation_matrix(n: int) -> Floats:
    """R = diag(S2) . H_n / sqrt(n) . diag(S1): orthonormal, so its inverse is its transpose."""
    return signs(2, n)[:, None] * hadamard(n) / math.sqrt(n) * signs(1, n)


def _blocks(x: ArrayLike, block: int) -> Floats:
    """x (..., n) as (..., n // block, block)."""
    array = np.asarray(x).astype(np.float64)
    return array.reshape(*array.shape[:-1], array.shape[-1] // block, block)


def rotate(x: ArrayLike, block: int = 128) -> Floats:
    """R . x for every block of the last axis of x (..., n), n a multiple of the block: float64 (..., n)."""
    return (_blocks(x, block) @ rotation_matrix(block).T).reshape(np.shape(x))


def unrotate(y: ArrayLike, block: int = 128) -> Floats:
    """The inverse of `rotate`."""
    return (_blocks(y, block) @ rotation_matrix(block)).reshape(np.shape(y))


# ---- 2. the codebook -------------------------------------------------------------------------------------------------

def density(x: float) -> float:
    """The density of N(0,1)."""
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def upper_tail(x: float) -> float:
    """The probability that N(0,1) exceeds x."""
    return math.erfc(x / math.sqrt(2)) / 2


@functools.cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """The 2**bits centroids that quantize N(0,1) with the least mean squared error, ascending.

    The optimum satisfies two conditions, and applying them in turn converges to it: a boundary is the midpoint of its
    two centroids, and a centroid is the mean of the density between its boundaries, which for N(0,1) is
    (density(low) - density(high)) / P(low < x < high). The mean squared error is 0.1175, 0.0345 and 0.0095 for 2, 3
    and 4 bits (Max, 1960, table I).
    """
    half = 1 << (bits - 1)  # The density is symmetric, so only the positive centroids are computed.
    centroids = [3.0 * (i + 0.5) / half for i in range(half)]
    moved = 1.0
    while moved > 1e-15:
        bounds = [0.0, *((a + b) / 2 for a, b in zip(centroids, centroids[1:])), math.inf]
        means = [(density(low) - density(high)) / (upper_tail(low) - upper_tail(high))
                 for low, high in zip(bounds, bounds[1:])]
        moved = max(abs(a - b) for a, b in zip(centroids, means))
        centroids = means
    return (*(-c for c in reversed(centroids)), *centroids)


def step(bits: int) -> float:
    """The value of one unit of the int8 levels: the outermost centroid is 127 steps."""
    return lloyd_max(bits)[-1] / 127


def levels(bits: int) -> NDArray[np.int64]:
    """The centroids as integers round(c / step) in -127 ... 127, so that integer and float decoding agree."""
    return np.rint(np.array(lloyd_max(bits)) / step(bits)).astype(np.int64)


class Format(NamedTuple):
    """A block format: bits of an index, values in a block."""

    bits: int
    block: int

    @property
    def block_bytes(self) -> int:
        return 2 + self.bits * self.block // 8


#: name -> Format, in the order of the type ids.
FORMATS = {f"turbo{bits}" + ("" if block == 128 else f"_{block}"): Format(bits, block)
           for bits in (4, 3, 2) for block in (128, 64, 32)}


def codebook(type: str) -> NDArray[np.float32]:
    """The type's centroids in units of the block's RMS: step * levels, float32 (2**bits,)."""
    bits = FORMATS[type].bits
    return np.float32(step(bits)) * levels(bits).astype(np.float32)


# ---- 3. the bytes ----------------------------------------------------------------------------------------------------

def pack(index: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Indices (..., n) to bytes (..., n * bits / 8).

    4 bits: byte j holds elements j (low nibble) and j + n/2. 2 bits: byte j holds j, j + n/4, j + n/2, j + 3n/4,
    lowest bits first. 3 bits: the two low bits as for 2 bits, then bit 2 of every index, eight elements per byte.
    """
    def stacked(values: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
        parts = np.split(values, 8 // width, axis=-1)
        packed = np.zeros(parts[0].shape, dtype=np.uint8)
        for place, part in enumerate(parts):
            packed |= part << (place * width)
        return packed

    if bits in (2, 4):
        return stacked(index, bits)
    low = np.bitwise_and(index, 3, dtype=np.uint8)
    return np.concatenate([stacked(low, 2), np.packbits(index >> 2, axis=-1, bitorder="little")], axis=-1)


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of `pack`."""
    def unstacked(values: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
        mask = (1 << width) - 1
        parts = [np.bitwise_and(values >> shift, mask, dtype=np.uint8) for shift in range(0, 8, width)]
        return np.concatenate(parts, axis=-1)

    if bits in (2, 4):
        return unstacked(packed, bits)
    low_bytes = packed.shape[-1] * 2 // 3
    high = np.unpackbits(packed[..., low_bytes:], axis=-1, bitorder="little")
    return np.asarray(unstacked(packed[..., :low_bytes], 2) | high << 2, dtype=np.uint8)


# ---- 4. decode -------------------------------------------------------------------------------------------------------

def _split(q: ArrayLike, form: Format) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """The scales (..., blocks) and the integer levels (..., blocks, block) of encoded rows (..., row_bytes)."""
    array = np.asarray(q, dtype=np.uint8)
    blocks = array.reshape(*array.shape[:-1], array.shape[-1] // form.block_bytes, form.block_bytes)
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
    return scale, levels(form.bits)[unpack(blocks[..., 2:], form.bits)]


def dequantize(q: ArrayLike, type: str, *, rotated: bool = False) -> NDArray[np.float32]:
    """Decode rows: uint8 (..., row_bytes) to float32 (..., n), bit for bit what the format prescribes.

        x = S1 . H/sqrt(n) . S2 . (d * step * level)

    The sum over the levels is an integer that fits int16. So only the float32 factor d * (step/sqrt(n)) and its product
    with that integer are rounded; S1 is applied last. With `rotated` the result is d * step * level, the values before
    the inverse transform, rounded in the same two places.
    """
    form = FORMATS[type]
    scale, level = _split(q, form)
    if rotated:
        factor, integers, last = np.float32(step(form.bits)), level, np.ones(form.block, dtype=np.float32)
    else:
        factor = np.float32(step(form.bits) / math.sqrt(form.block))
        integers = (level * signs(2, form.block).astype(np.int64)) @ hadamard(form.block).astype(np.int64)  # H = H^T
        last = signs(1, form.block).astype(np.float32)  # after the rounding, so that a negated zero is -0.0
    with np.errstate(invalid="ignore", over="ignore"):  # a stored scale may be infinite, and inf * 0 is NaN
        values = (scale.astype(np.float32) * factor)[..., None] * integers.astype(np.float32) * last
    return values.reshape(*np.shape(q)[:-1], -1)


# ---- 5. encode -------------------------------------------------------------------------------------------------------

#: The search uses integers, so that all instruction sets make the same choices: the RMS is 2048 units, and a coarse
#: unit is 64 units.
RMS_UNIT = 2048
COARSE_UNIT = 64

#: Factors on the boundaries between centroids that the encoder tries, around a block's RMS.
SEARCH = tuple(0.76 + 0.06 * i for i in range(8))


def _assign(magnitude: NDArray[np.int64], bounds: Floats) -> NDArray[np.int64]:
    """The number of bounds (..., levels - 1) that each magnitude (..., n) exceeds: its index among the levels."""
    return np.asarray((magnitude[..., None] > bounds[..., None, :]).sum(axis=-1))


def quantize(x: ArrayLike, type: str) -> NDArray[np.uint8]:
    """Encode rows: (..., n) to uint8 (..., row_bytes). A block with a NaN or an infinity, and a zero block, give zeros.

    1. Rotate, y = R x, and round to integers z = round(2048 y / RMS).
    2. Search the scale. For every factor f, compare |z|, in coarse units, with the codebook's boundaries times f. With
       levels c, A = <|z|, c> and B = <c, c>, the best scale of that assignment is A/B, and its squared error is
       <z, z> - A^2/B. So the best factor has the greatest A^2/B.
    3. Assign every |z| to its nearest level under the best scale A/B, at full precision.
    4. Correct the norm: choose d so that the inner product of the block with its reconstruction is that of the block
       with itself, d * step * <y, c> = <y, y>. Without the correction it would be smaller.
    """
    form = FORMATS[type]
    array = np.asarray(x).astype(np.float64)
    finite = np.isfinite(array)
    blocks = _blocks(np.where(finite, array, 0.0), form.block)
    largest = np.abs(blocks).max(axis=-1)
    encoded = finite.reshape(blocks.shape).all(axis=-1) & (largest > 0)
    unit = np.where(largest > 0, largest, 1.0)  # scaled to about 1, so that squares neither overflow nor vanish

    y = rotate(blocks / unit[..., None], form.block)
    rms = np.sqrt(np.square(y).mean(axis=-1))
    z = np.rint(y / np.where(rms > 0, rms, 1.0)[..., None] * RMS_UNIT).astype(np.int64)
    magnitude = np.abs(z)

    c = levels(form.bits)
    positive = c[c > 0]
    midpoints = (positive[1:] + positive[:-1]) / 2

    coarse = np.minimum((magnitude + COARSE_UNIT // 2) // COARSE_UNIT, 127)
    best, scale = np.full(rms.shape, -1.0), np.ones(rms.shape)
    for factor in SEARCH:
        level = positive[_assign(coarse, midpoints * step(form.bits) * factor * RMS_UNIT / COARSE_UNIT)]
        a, b = (coarse * level).sum(axis=-1), np.square(level).sum(axis=-1)
        scale = np.where(a**2 / b > best, a / b * COARSE_UNIT, scale)
        best = np.maximum(a**2 / b, best)

    place = _assign(magnitude, np.rint(midpoints * scale[..., None]))
    index = np.where(z < 0, len(positive) - 1 - place, len(positive) + place).astype(np.uint8)
    product, energy = (magnitude * positive[place]).sum(axis=-1), np.square(z).sum(axis=-1)
    gain = energy / np.where(encoded, product, 1) * rms / (RMS_UNIT * step(form.bits)) * unit
    d = np.minimum(np.where(encoded, gain, 0.0), 65504.0).astype("<f2")  # the largest finite fp16
    packed = np.concatenate([d[..., None].view(np.uint8), pack(index, form.bits)], axis=-1)
    packed[d == 0] = 0
    return packed.reshape(*array.shape[:-1], -1)


# ---- 6. dot, attention -----------------------------------------------------------------------------------------------

def prepare(query: ArrayLike, block: int = 128) -> tuple[Floats, NDArray[np.int64]]:
    """Rotate query rows (..., n) and round every block to int8: scales (..., blocks), integers (..., blocks, block).

    A rotated value is scale * integer with an error of at most scale / 2; the largest magnitude of a block is 127.
    """
    y = _blocks(rotate(query, block), block)
    scale = np.abs(y).max(axis=-1) / 127
    return scale, np.rint(y / np.where(scale > 0, scale, 1.0)[..., None]).astype(np.int64)


def dot(query: ArrayLike, q: ArrayLike, type: str) -> Floats:
    """Dot products of query rows (..., n) with encoded rows (rows..., row_bytes): float64 (..., rows...).

    R is orthonormal, so <query, x> = <R query, R x>: no inverse rotation is needed, and the sums over int8 are exact.
    """
    form = FORMATS[type]
    query_scale, query_level = prepare(query, form.block)
    scale, level = _split(q, form)
    products = np.tensordot(query_scale[..., None] * query_level,
                            scale.astype(np.float64)[..., None] * step(form.bits) * level, axes=([-2, -1], [-2, -1]))
    return np.asarray(products)


def decode_rows(rows: ArrayLike, type: str) -> Floats:
    """Rows of K or V (..., row_bytes) as float64 (..., n): turbo types, and ggml's f32, f16, bf16, q8_0, q4_0.

    ggml-common.h defines the layouts of ggml's types. q8_0 is an fp16 scale and 32 int8. q4_0 is an fp16 scale and 16
    bytes; byte j holds values j (low half) and j + 16, each increased by 8.
    """
    if type in FORMATS:
        return dequantize(rows, type).astype(np.float64)
    raw = np.ascontiguousarray(rows).view(np.uint8)
    if type in ("f16", "f32"):
        return raw.view({"f16": "<f2", "f32": "<f4"}[type]).astype(np.float64)
    if type == "bf16":  # the upper half of a float32
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    blocks = raw.reshape(*raw.shape[:-1], -1, {"q8_0": 34, "q4_0": 18}[type])
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float64)
    if type == "q8_0":
        level = blocks[..., 2:].view(np.int8).astype(np.float64)
    else:
        level = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1).astype(np.float64) - 8
    return np.asarray((scale * level).reshape(*raw.shape[:-1], -1))


def softmax_weights(
    queries: ArrayLike, keys: ArrayLike, *, scale: float | None = None, mask: ArrayLike | None = None,
    soft_cap: float = 0.0,
) -> Floats:
    """softmax(scale * Q K^T + mask), float64 (n_head, n_query, n_kv).

    queries (n_head, n_query, head_k) and keys (n_kv_head, n_kv, head_k) are floats. mask (n_query, n_kv) is added to
    the scores. A query row that is masked everywhere gives zeros. `turboquant.attention` explains the other arguments.
    """
    query_rows, key_rows = np.asarray(queries).astype(np.float64), np.asarray(keys).astype(np.float64)
    # the query heads of a GQA group share a KV head
    key_rows = np.repeat(key_rows, len(query_rows) // len(key_rows), axis=0)
    scores = query_rows @ key_rows.swapaxes(1, 2) * (1 / math.sqrt(query_rows.shape[-1]) if scale is None else scale)
    if soft_cap:
        scores = soft_cap * np.tanh(scores / soft_cap)
    if mask is not None:
        scores = scores + np.asarray(mask)
    largest = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(largest), largest, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    return np.asarray(weights / np.where(total > 0, total, 1.0))


def attention_weights(
    q: ArrayLike, k: ArrayLike, *, type_k: str, scale: float | None = None, mask: ArrayLike | None = None,
    soft_cap: float = 0.0,
) -> Floats:
    """`softmax_weights` of decoded K (n_kv_head, n_kv, row_bytes); queries are not rounded."""
    return softmax_weights(q, decode_rows(k, type_k), scale=scale, mask=mask, soft_cap=soft_cap)


def attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, type_k: str, type_v: str, scale: float | None = None,
    mask: ArrayLike | None = None, soft_cap: float = 0.0, window: tuple[ArrayLike, ArrayLike] | None = None,
) -> Floats:
    """Attention over encoded K and V, float64 (n_head, n_query, head_v). v is (n_kv_head, n_kv, row_bytes).

    window: floats (n_kv_head, W, head_k) and (n_kv_head, W, head_v) that replace the last W rows of k and v.
    """
    keys, values = decode_rows(k, type_k), decode_rows(v, type_v)
    if window is not None:
        keys, values = (np.concatenate([rows[:, : rows.shape[1] - np.shape(newest)[1]], newest], axis=1)
                        for rows, newest in zip((keys, values), window))
    weights = softmax_weights(q, keys, scale=scale, mask=mask, soft_cap=soft_cap)
    return weights @ np.repeat(values, len(weights) // len(values), axis=0)
