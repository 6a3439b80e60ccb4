"""TurboQuant in readable NumPy: the oracle that every kernel of the C++ core must match.

Written from the formulas, not from the C++: the Walsh-Hadamard transform is a matrix, the codebooks are solved from
their two conditions, the signs are hashed where they are needed, and everything is float64 until the format says
otherwise. Slow, and meant to be read from top to bottom:

1. the transform      y = S2 . H/sqrt(n) . S1 . x
2. the codebook       Lloyd-Max levels of N(0,1), rounded to int8
3. the bytes          fp16 scale, then indices
4. decode             what the format fixes: bit-exact
5. encode             what an encoder may improve: a search for the scale
6. dot, attention     in the rotated domain

Decoding is bit-equal to the core. The encoder follows the same rules but in float64, where the core rounds rotated values
to 1/2048 of the block's RMS: a value that lies that close to the boundary of two centroids may get the other one, and two
candidates that explain a block equally well may swap. Neither makes a visible difference in error; the tests bound it.

Sources: Zandieh, Daliri, Hadian, Mirrokni, "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate",
arXiv 2504.19874, algorithm 1 (rotate, then quantize every coordinate with the optimal scalar quantizer); Max, "Quantizing
for minimum distortion", IRE Trans. Inf. Theory 6, 1960 (codebooks); cpp/FORMAT.md (bytes, scale search).
"""
from __future__ import annotations

import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "FORMATS", "Format", "attention", "codebook", "density", "dequantize", "dot", "hadamard", "levels", "lloyd_max",
    "pack", "prepare", "quantize", "rotate", "rotation_matrix", "signs", "step", "unpack", "unrotate", "upper_tail",
]

Floats = NDArray[np.float64]


# ---- 1. the transform ------------------------------------------------------------------------------------------------

def signs(which: int, n: int = 128) -> Floats:
    """The sign vector S1 or S2: n numbers +1 or -1, the first n bits of SHA-256("turboquant S1") or ("... S2").

    Bit i is bit i % 8 of byte i // 8, and a 1 means that value i is negated. A hash, so that nobody chose them.
    """
    digest = hashlib.sha256(b"turboquant S%d" % which).digest()
    bits = np.unpackbits(np.frombuffer(digest, dtype=np.uint8), bitorder="little")[:n]
    return 1.0 - 2.0 * bits


def hadamard(n: int) -> Floats:
    """The Walsh-Hadamard matrix of order n, a power of two, entries +1 and -1 (Sylvester's construction).

    H_1 = [1],  H_2n = [[H_n, H_n], [H_n, -H_n]]
    """
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix


@functools.cache
def rotation_matrix(n: int) -> Floats:
    """R = diag(S2) . H_n / sqrt(n) . diag(S1): orthonormal, so its inverse is its transpose."""
    matrix: Floats = signs(2, n)[:, None] * hadamard(n) / math.sqrt(n) * signs(1, n)
    matrix.flags.writeable = False
    return matrix


def _blocks(x: ArrayLike, block: int) -> Floats:
    """x (..., n) as (..., n // block, block)."""
    array = np.asarray(x).astype(np.float64)
    return array.reshape(*array.shape[:-1], array.shape[-1] // block, block)


def rotate(x: ArrayLike, block: int = 128) -> Floats:
    """R . x for every block of the last axis. x: (..., n), n a multiple of the block. float64 of the same shape."""
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

    The optimum satisfies two conditions at once, and alternating them converges to it:
    a boundary is the midpoint of its two centroids (nearest-neighbour), and a centroid is the mean of the density between
    its boundaries, (density(low) - density(high)) / P(low < x < high). The mean squared error is 0.1175, 0.0345, 0.0095
    for 2, 3, 4 bits.
    """
    half = 1 << (bits - 1)  # the density is symmetric, so only the positive centroids are solved
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
    """The distance of neighbouring int8 levels: the outermost centroid is 127 steps."""
    return lloyd_max(bits)[-1] / 127


def levels(bits: int) -> NDArray[np.int64]:
    """The centroids as integers -127 ... 127, so that integer and float arithmetic decode the same: round(c / step)."""
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

    4 bits: byte j holds elements j (low nibble) and j + n/2. 2 bits: byte j holds j, j + n/4, j + n/2, j + 3n/4, lowest
    bits first. 3 bits: the two low bits as for 2 bits, then bit 2 of every index, eight elements to a byte, lowest first.
    """
    def stacked(values: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
        parts = np.split(values, 8 // width, axis=-1)
        packed = np.zeros_like(parts[0])
        for place, part in enumerate(parts):
            packed |= part << (place * width)
        return packed

    index = np.asarray(index, dtype=np.uint8)
    if bits in (2, 4):
        return stacked(index, bits)
    return np.concatenate([stacked(index & 3, 2), np.packbits(index >> 2, axis=-1, bitorder="little")], axis=-1)


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of `pack`."""
    def unstacked(values: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
        mask = (1 << width) - 1
        return np.concatenate([(values >> shift) & mask for shift in range(0, 8, width)], axis=-1)

    packed = np.asarray(packed, dtype=np.uint8)
    if bits in (2, 4):
        return unstacked(packed, bits)
    low_bytes = packed.shape[-1] * 2 // 3
    high = np.unpackbits(packed[..., low_bytes:], axis=-1, bitorder="little")
    return unstacked(packed[..., :low_bytes], 2) | high << 2


# ---- 4. decode -------------------------------------------------------------------------------------------------------

def _split(q: ArrayLike, form: Format) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """Bytes (..., row_bytes) to scales (..., blocks) and the integer levels (..., blocks, block)."""
    array = np.asarray(q, dtype=np.uint8)
    blocks = array.reshape(*array.shape[:-1], array.shape[-1] // form.block_bytes, form.block_bytes)
    scale = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
    return scale, levels(form.bits)[unpack(blocks[..., 2:], form.bits)]


def dequantize(q: ArrayLike, type: str, *, rotated: bool = False) -> NDArray[np.float32]:
    """Decode rows: uint8 (..., row_bytes) to float32 (..., n), bit for bit what the format prescribes.

        x = S1 . H/sqrt(n) . S2 . (d * step * level)

    The sum over the levels is an integer that fits int16, so the only roundings are those of the float32 factor
    d * (step/sqrt(n)) and of its product with that integer; S1 comes last. With `rotated` the values before the inverse
    transform are returned instead, d * step * level, rounded in the same two places.
    """
    form = FORMATS[type]
    scale, level = _split(q, form)
    if rotated:
        factor, integers, last = np.float32(step(form.bits)), level, np.float32(1)
    else:
        factor = np.float32(step(form.bits) / math.sqrt(form.block))
        integers = (level * signs(2, form.block).astype(np.int64)) @ hadamard(form.block).astype(np.int64)  # H = H^T
        last = signs(1, form.block).astype(np.float32)  # after the rounding, so that a negated zero is -0.0
    with np.errstate(invalid="ignore", over="ignore"):  # a stored scale may be anything: inf * 0 is NaN
        values = (scale.astype(np.float32) * factor)[..., None] * integers.astype(np.float32) * last
    return values.reshape(*np.shape(q)[:-1], -1)


# ---- 5. encode -------------------------------------------------------------------------------------------------------

#: Factors on the boundaries between centroids that the encoder tries, around a block's RMS.
SEARCH = {4: 0.80 + 0.03 * np.arange(13), 3: 0.84 + 0.04 * np.arange(9), 2: 0.88 + 0.06 * np.arange(5)}


def quantize(x: ArrayLike, type: str) -> NDArray[np.uint8]:
    """Encode rows: (..., n) to uint8 (..., row_bytes). A block with a NaN or an infinity, and a zero block, give zeros.

    1. y = R x, and its RMS.
    2. For every factor f: assign each y_i to the nearest centroid of the codebook scaled by f * RMS. With levels c, the best
       scale s of that assignment, A/B with A = <y, c>, B = <c, c>, leaves the error <y, y> - A^2/B. Keep the
       assignment with the least.
    3. Norm correction: store d with d * step * <y, c> = <y, y>, so that the inner product of the block with its own
       reconstruction is right, and not shrunk by rounding.
    """
    form = FORMATS[type]
    array = np.asarray(x).astype(np.float64)
    finite = np.isfinite(array)
    blocks = _blocks(np.where(finite, array, 0.0), form.block)
    clean = finite.reshape(blocks.shape).all(axis=-1)

    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    unit = np.where(largest > 0, largest, 1.0)
    y = rotate(blocks / unit, form.block)  # divided first, so that squares neither overflow nor vanish
    energy = np.square(y).sum(axis=-1)
    rms = np.sqrt(energy / form.block)

    c = levels(form.bits)
    positive = c[c > 0]
    bounds = (positive[1:] + positive[:-1]) / 2 * step(form.bits)
    best = np.full(energy.shape, -1.0)
    best_product = np.ones_like(energy)
    best_index = np.zeros(y.shape, dtype=np.uint8)
    for factor in SEARCH[form.bits]:
        scaled = factor * rms[..., None, None] * bounds
        magnitude = (np.abs(y)[..., None] > scaled).sum(axis=-1)
        index = np.where(y < 0, len(positive) - 1 - magnitude, len(positive) + magnitude).astype(np.uint8)
        level = c[index]
        product, norm = (y * level).sum(axis=-1), np.square(level).sum(axis=-1)
        explained = product**2 / norm
        better = explained > best
        best = np.where(better, explained, best)
        best_product = np.where(better, product, best_product)
        best_index = np.where(better[..., None], index, best_index)

    nonzero = clean & (largest[..., 0] > 0)
    d = np.where(nonzero, energy / np.where(nonzero, best_product, 1.0) / step(form.bits) * unit[..., 0], 0.0)
    scale = np.minimum(d, 65504.0).astype("<f2")  # the largest finite fp16
    packed = np.concatenate([scale[..., None].view(np.uint8), pack(best_index, form.bits)], axis=-1)
    packed[scale == 0] = 0
    return packed.reshape(*array.shape[:-1], -1)


# ---- 6. dot, attention -----------------------------------------------------------------------------------------------

def prepare(query: ArrayLike, block: int = 128) -> tuple[Floats, NDArray[np.int64]]:
    """Rotate query rows (..., n) and round every block to int8: scales (..., blocks), integers (..., blocks, block).

    A rotated value is scale * integer up to half a scale; the largest magnitude of a block is 127.
    """
    y = _blocks(rotate(query, block), block)
    scale = np.abs(y).max(axis=-1) / 127
    return scale, np.rint(y / np.where(scale > 0, scale, 1.0)[..., None]).astype(np.int64)


def dot(query: ArrayLike, q: ArrayLike, type: str) -> Floats:
    """Dot products of query rows (..., n) with encoded rows (rows..., row_bytes): float64 (..., rows...).

    R is orthonormal, so <query, x> = <R query, R x>: the encoded rows stay rotated, and the sums over int8 are exact.
    """
    form = FORMATS[type]
    query_scale, query_level = prepare(query, form.block)
    scale, level = _split(q, form)
    products = np.tensordot(query_scale[..., None] * query_level,
                            scale.astype(np.float64)[..., None] * step(form.bits) * level, axes=([-2, -1], [-2, -1]))
    return np.asarray(products)


def attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, type_k: str, type_v: str, scale: float | None = None,
    mask: ArrayLike | None = None, soft_cap: float = 0.0,
) -> Floats:
    """softmax(scale * Q K^T + mask) V with decoded K and V, float64; no rounding of the queries.

    q (n_head, n_query, head_k), k and v (n_kv_head, n_kv, row_bytes), mask (n_query, n_kv), added to the scores.
    A query row that is masked everywhere gives zeros. Shapes and meanings as in `turboquant.attention`.
    """
    queries = np.asarray(q).astype(np.float64)
    keys, values = dequantize(k, type_k).astype(np.float64), dequantize(v, type_v).astype(np.float64)
    group = len(queries) // len(keys)  # query heads that share a KV head
    keys, values = np.repeat(keys, group, axis=0), np.repeat(values, group, axis=0)
    scores = queries @ keys.swapaxes(1, 2) * (1 / math.sqrt(queries.shape[-1]) if scale is None else scale)
    if soft_cap:
        scores = soft_cap * np.tanh(scores / soft_cap)
    if mask is not None:
        scores = scores + np.asarray(mask)
    largest = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(largest), largest, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total > 0, total, 1.0) @ values
