"""TurboQuant in readable NumPy: the reference that every kernel of the C++ core must match.

This module was written from the formulas, not from the C++ code. The Walsh-Hadamard transform is a matrix product, the
Lloyd-Max codebooks are solved from their two conditions, the path of a trellis is found by a plain dynamic program, the
signs are computed by hashing, and all arithmetic is float64 where the format does not prescribe otherwise. The code is
slow. It is ordered for reading from top to bottom:

1. the transform      y = S2 . H/sqrt(n) . S1 . x
2. families           what they have in common
3. Lloyd-Max          an index for each value: codebook, bytes, a search for the scale
4. trellis            a path that chooses each value's subset of the levels: codebook, bytes, the best path
5. formats            a family and a block length
6. decode             fixed by the format to the last bit
7. encode             fixed by this project's encoder, which may improve
8. dot, attention     in the rotated domain

Decoding gives the same bits as the core. The encoder follows the rules of the core, but its transform is in float64 and
that of the core is in float32. So a rotated value close to a boundary may get the neighbouring index, and a scale close
to a tie the neighbouring stored value. Few blocks differ, with nearly the same error; the tests bound both.

Sources: Zandieh, Daliri, Hadian, Mirrokni, "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate",
arXiv 2504.19874, algorithm 1 (rotate, then quantize every coordinate with the optimal scalar quantizer); Max,
"Quantizing for minimum distortion", IRE Trans. Inf. Theory 6, 1960 (codebooks); Marcellin, Fischer, "Trellis coded
quantization of memoryless and Gauss-Markov sources", IEEE Trans. Commun. 38, 1990 (trellis); cpp/FORMAT.md (bytes,
scale search).
"""
from __future__ import annotations

import abc
import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "FORMATS", "Family", "Format", "LloydMax", "Trellis", "attention", "attention_weights", "best_path", "codebook",
    "decode_rows", "density", "dequantize", "dot", "hadamard", "levels", "lloyd_max", "pack", "prepare", "quantize",
    "rotate", "rotation_matrix", "signs", "softmax_weights", "step", "subsets", "unpack", "unrotate", "upper_tail",
]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bytes = NDArray[np.uint8]


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


# ---- 2. families -----------------------------------------------------------------------------------------------------

#: The encoders compute in integers, so that all instruction sets make the same choices: the RMS of a block is 2048
#: units.
RMS_UNIT = 2048

#: The largest finite fp16.
LARGEST_HALF = 65504.0


class Family(abc.ABC):
    """A way to encode rotated blocks: a value is d * step * level, with one scale d for each block.

    `bits` are those of each value beside the scale.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits

    @property
    @abc.abstractmethod
    def step(self) -> float:
        """The value of one unit of the levels; the RMS of a block is about 1."""

    @property
    @abc.abstractmethod
    def levels(self) -> Integers:
        """All levels, ascending, -127 ... 127."""

    @abc.abstractmethod
    def split(self, blocks: Bytes) -> tuple[NDArray[np.float16], Integers]:
        """The scales d (...) and the levels (..., n) of encoded blocks (..., block_bytes)."""

    @abc.abstractmethod
    def assign(self, z: Integers) -> tuple[Bytes, Integers]:
        """The encoder: rotated values (..., n), in units of RMS / 2048, to blocks without scale, and their levels."""

    @abc.abstractmethod
    def with_scale(self, blocks: Bytes, d: Floats) -> Bytes:
        """The blocks of `assign` with the scales d (...) >= 0: rounded, at most the largest that there is.

        A block whose scale becomes zero gets zeros in all its bytes.
        """


def _stack(values: NDArray[np.uint8], width: int) -> Bytes:
    """Values (..., n) of `width` bits to bytes (..., n * width / 8).

    With p = 8 / width values to a byte, byte j holds the values j, j + n/p, j + 2n/p, ..., lowest bits first.
    """
    parts = np.split(values, 8 // width, axis=-1)
    packed = np.zeros(parts[0].shape, dtype=np.uint8)
    for place, part in enumerate(parts):
        packed |= part << (place * width)
    return packed


def _unstack(packed: Bytes, width: int) -> NDArray[np.uint8]:
    """The inverse of `_stack`."""
    mask = (1 << width) - 1
    parts = [np.bitwise_and(packed >> shift, mask, dtype=np.uint8) for shift in range(0, 8, width)]
    return np.concatenate(parts, axis=-1)


# ---- 3. Lloyd-Max ----------------------------------------------------------------------------------------------------

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


def pack(index: NDArray[np.uint8], bits: int) -> Bytes:
    """Indices (..., n) to bytes (..., n * bits / 8).

    4 bits: byte j holds elements j (low nibble) and j + n/2. 2 bits: byte j holds j, j + n/4, j + n/2, j + 3n/4,
    lowest bits first. 3 bits: the two low bits as for 2 bits, then bit 2 of every index, eight elements per byte.
    """
    if bits in (2, 4):
        return _stack(index, bits)
    low = np.bitwise_and(index, 3, dtype=np.uint8)
    return np.concatenate([_stack(low, 2), np.packbits(index >> 2, axis=-1, bitorder="little")], axis=-1)


def unpack(packed: Bytes, bits: int) -> NDArray[np.uint8]:
    """The inverse of `pack`."""
    if bits in (2, 4):
        return _unstack(packed, bits)
    low_bytes = packed.shape[-1] * 2 // 3
    high = np.unpackbits(packed[..., low_bytes:], axis=-1, bitorder="little")
    return np.asarray(_unstack(packed[..., :low_bytes], 2) | high << 2, dtype=np.uint8)


#: The search for the scale uses coarser units, of 64 units of z.
COARSE_UNIT = 64

#: Factors on the boundaries between centroids that the encoder tries, around a block's RMS.
SEARCH = tuple(0.76 + 0.06 * i for i in range(8))


def _places(magnitude: Integers, bounds: Floats) -> Integers:
    """The number of bounds (..., levels - 1) that each magnitude (..., n) exceeds: its index among the levels."""
    return np.asarray((magnitude[..., None] > bounds[..., None, :]).sum(axis=-1))


class LloydMax(Family):
    """turbo4, turbo3, turbo2: an fp16 scale, and for each value the index of the nearest Lloyd-Max centroid."""

    @property
    def step(self) -> float:
        return step(self.bits)

    @property
    def levels(self) -> Integers:
        return levels(self.bits)

    def split(self, blocks: Bytes) -> tuple[NDArray[np.float16], Integers]:
        scale = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
        return scale, self.levels[unpack(blocks[..., 2:], self.bits)]

    def assign(self, z: Integers) -> tuple[Bytes, Integers]:
        """Search the scale, then take the nearest levels.

        1. For every factor f, compare |z|, in coarse units, with the codebook's boundaries times f. With levels c,
           A = <|z|, c> and B = <c, c>, the best scale of that assignment is A/B, and its squared error is
           <z, z> - A^2/B. So the best factor has the greatest A^2/B.
        2. Assign every |z| to its nearest level under the best scale A/B, at full precision (float32).
        """
        magnitude = np.abs(z)
        positive = self.levels[self.levels > 0]
        midpoints = (positive[1:] + positive[:-1]) / 2

        coarse = np.minimum((magnitude + COARSE_UNIT // 2) // COARSE_UNIT, 127)
        best, scale = np.full(z.shape[:-1], -1.0), np.ones(z.shape[:-1])
        for factor in SEARCH:
            level = positive[_places(coarse, midpoints * self.step * factor * RMS_UNIT / COARSE_UNIT)]
            a, b = (coarse * level).sum(axis=-1), np.square(level).sum(axis=-1)
            scale = np.where(a**2 / b > best, COARSE_UNIT * a / b, scale)
            best = np.maximum(a**2 / b, best)

        bounds = np.rint(midpoints.astype(np.float32) * scale.astype(np.float32)[..., None])
        place = _places(magnitude, bounds.astype(np.float64))
        index = np.where(z < 0, len(positive) - 1 - place, len(positive) + place).astype(np.uint8)
        packed = pack(index, self.bits)
        scale_bytes = np.zeros((*packed.shape[:-1], 2), dtype=np.uint8)
        return np.concatenate([scale_bytes, packed], axis=-1), self.levels[index]

    def with_scale(self, blocks: Bytes, d: Floats) -> Bytes:
        half = np.minimum(d, LARGEST_HALF).astype(np.float32).astype("<f2")
        scaled = np.concatenate([half[..., None].view(np.uint8), blocks[..., 2:]], axis=-1)
        scaled[half == 0] = 0
        return scaled


# ---- 4. trellis ------------------------------------------------------------------------------------------------------

#: Path bits before an element's own that its subset depends on. They are the state of the trellis.
MEMORY = 6

#: bits -> the positive levels, the step, and the granular error of a value. Levels and step were trained on N(0,1) with
#: the encoder in the loop; the granular error is that of values within the outermost level, relative to the square of
#: the scale. cpp/FORMAT.md has the same tables.
TRELLIS_LEVELS = {
    4: (2, 7, 12, 17, 22, 28, 33, 39, 45, 51, 58, 67, 77, 90, 105, 127),
    3: (5, 15, 26, 38, 51, 68, 91, 127),
    2: (12, 39, 72, 127),
}
TRELLIS_STEP = {4: 0.0215, 3: 0.0194, 2: 0.0149}
GRANULAR = {4: 0.00233, 3: 0.00938, 2: 0.0414}

#: Scales of the levels, relative to a block's RMS, from which the encoder chooses.
SCALES = (0.73, 0.78, 0.83, 0.89, 0.95, 1.01, 1.08, 1.15, 1.23, 1.31, 1.40, 1.50, 1.75, 2.20, 3.00, 4.20)

#: The largest distance from a level in a metric, and the number of low bits of its square that a metric omits.
MOST_DISTANCE = 255
METRIC_SHIFT = 8

#: Levels beyond the outermost one, to which values are limited.
GRID_MARGIN = 8

#: The scale is an fp16 without its sign and its five lowest bits. The largest finite one is 64512.
SCALE_BITS = 10
LARGEST_SCALE_CODE = 0x3DF


def subsets(path: NDArray[np.integer]) -> Integers:
    """The subset 0 ... 3 of each step, (..., n), of a path (..., 6 + n) whose first six bits are the start state.

    With u(t) for the path bit of step t, the subset is 2 c1 + c0:

        c0 = u(t-2) ^ u(t-5)        c1 = u(t) ^ u(t-1) ^ u(t-6)
    """
    n = path.shape[-1] - MEMORY
    u = [path[..., MEMORY - ago : MEMORY - ago + n].astype(np.int64) for ago in range(MEMORY + 1)]
    return np.asarray(2 * (u[0] ^ u[1] ^ u[6]) + (u[2] ^ u[5]))


def best_path(metric: Integers) -> NDArray[np.uint8]:
    """The path (..., 6 + n) with the least sum of metrics, metric (..., n, 4): the cost of each subset in each step.

    A dynamic program (Viterbi 1967). The state after a step is its newest six path bits, the newest in bit 0. The least
    cost of a state is over its two predecessors, which differ in their oldest bit, and all start states cost nothing.
    Of two predecessors with equal cost the one whose oldest bit is 0 is taken, of final states with equal cost the
    smallest.
    """
    n = metric.shape[-2]
    states = np.arange(1 << MEMORY)
    before = (states >> 1) | (np.arange(2)[:, None] << (MEMORY - 1))  # (2, states): the predecessors of each state
    oldest_first = np.arange(MEMORY - 1, -1, -1)
    branch = np.concatenate([before[..., None] >> oldest_first & 1,
                             np.broadcast_to(states[:, None] & 1, (*before.shape, 1))], axis=-1)
    subset = subsets(branch)[..., 0]  # (2, states): the subset of the step from that predecessor

    cost = np.zeros((*metric.shape[:-2], len(states)), dtype=np.int64)
    choices = []
    for t in range(n):
        candidates = cost[..., before] + metric[..., t, :][..., subset]
        choices.append(candidates.argmin(axis=-2))
        cost = candidates.min(axis=-2)

    state = cost.argmin(axis=-1)
    path = np.empty((*metric.shape[:-2], MEMORY + n), dtype=np.uint8)
    for t in reversed(range(n)):
        path[..., MEMORY + t] = state & 1
        oldest = np.take_along_axis(choices[t], state[..., None], axis=-1)[..., 0]
        state = state >> 1 | oldest << (MEMORY - 1)
    path[..., :MEMORY] = state[..., None] >> oldest_first & 1
    return path


def _round(x: float) -> int:
    """x >= 0 to the nearest integer, halves upwards."""
    return math.floor(x + 0.5)


def _order(n: int) -> Integers:
    """The element of each step: eight elements at a distance of n/8, then the eight after these, and so on."""
    return np.arange(n).reshape(8, n // 8).T.reshape(n)


class Trellis(Family):
    """turbo4_tcq, turbo3_tcq, turbo2_tcq: trellis-coded quantization (Marcellin and Fischer 1990).

    There are 2 << bits levels; the level with the number k belongs to the subset k mod 4. One bit of each value is a
    path bit, and a value's path bit with the six before it determines its subset. The other bits, the rest, are the
    number of a level in the subset. A block is ten bits of scale, the six path bits before the first, the n path bits
    in the order of the steps, and the rests: two bits of each, then one bit of each, as far as there are bits.
    """

    @property
    def step(self) -> float:
        return float(np.float32(TRELLIS_STEP[self.bits]))

    @property
    def levels(self) -> Integers:
        positive = np.array(TRELLIS_LEVELS[self.bits])
        return np.concatenate([-positive[::-1], positive])

    @property
    def _widths(self) -> list[int]:
        """The bits of a rest in each of its fields."""
        rest = self.bits - 1
        return [2] * (rest // 2) + [1] * (rest % 2)

    def split(self, blocks: Bytes) -> tuple[NDArray[np.float16], Integers]:
        n = (blocks.shape[-1] - 2) * 8 // self.bits
        word = np.ascontiguousarray(blocks[..., :2]).view("<u2")[..., 0]
        scale = ((word & ((1 << SCALE_BITS) - 1)) << 5).astype("<u2").view("<f2")

        path = np.unpackbits(blocks, axis=-1, bitorder="little")[..., SCALE_BITS : 16 + n]
        subset = np.empty((*blocks.shape[:-1], n), dtype=np.int64)
        subset[..., _order(n)] = subsets(path)

        rest, first, shift = np.zeros(subset.shape, dtype=np.int64), 2 + n // 8, 0
        for width in self._widths:
            size = n * width // 8
            rest |= _unstack(blocks[..., first : first + size], width).astype(np.int64) << shift
            first, shift = first + size, shift + width
        return scale, self.levels[4 * rest + subset]

    def assign(self, z: Integers) -> tuple[Bytes, Integers]:
        """Choose the scale of the levels, find the best path, then take the nearest level of each subset.

        1. Choose the scale f with the least expected error: within the outermost level it is granular * f^2, and beyond
           it the distance from the outermost level.
        2. Convert z to a grid with bits - 1 fractional bits of a level. (A midpoint of two levels of a subset is then
           an integer.)
        3. The metric of a subset is the squared distance from its nearest level, limited and without its low bits.
        4. Find the path with the least sum of metrics.
        5. Take the nearest level of each subset; of two equally near levels the lower.
        """
        n = z.shape[-1]

        unit = np.full(z.shape[:-1], np.nan)  # of the levels, in units of z
        least = np.full(z.shape[:-1], np.iinfo(np.int64).max)
        for factor in SCALES:
            outermost = _round(127 * self.step * factor * RMS_UNIT)
            over = np.maximum(np.abs(z) - outermost, 0)
            error = _round(GRANULAR[self.bits] * factor * factor * RMS_UNIT**2 * n) + np.square(over).sum(axis=-1)
            unit = np.where(error < least, self.step * factor * RMS_UNIT, unit)
            least = np.minimum(error, least)

        one = 1 << (self.bits - 1)
        ratio = np.floor((one << 15) / unit + 0.5).astype(np.int64)
        limit = (127 + GRID_MARGIN) * one
        grid = np.clip((z * ratio[..., None] + (1 << 14)) >> 15, -limit, limit)

        members = self.levels.reshape(-1, 4).T * one  # (4, 2 << bits >> 2): the levels of each subset
        metric = np.empty((*z.shape, 4), dtype=np.int64)
        for subset, member in enumerate(members):
            distance = np.abs(grid[..., None] - member).min(axis=-1)
            metric[..., subset] = np.square(np.minimum(distance, MOST_DISTANCE)) >> METRIC_SHIFT

        order = _order(n)
        path = best_path(metric[..., order, :])
        subset_of = np.empty(z.shape, dtype=np.int64)
        subset_of[..., order] = subsets(path)
        bounds = (members[:, 1:] + members[:, :-1]) // 2
        rest = (grid[..., None] > bounds[subset_of]).sum(axis=-1)

        no_scale = np.zeros((*z.shape[:-1], SCALE_BITS), dtype=np.uint8)
        fields, shift = [np.packbits(np.concatenate([no_scale, path], axis=-1), axis=-1, bitorder="little")], 0
        for width in self._widths:
            fields.append(_stack((rest >> shift & ((1 << width) - 1)).astype(np.uint8), width))
            shift += width
        return np.concatenate(fields, axis=-1), self.levels[4 * rest + subset_of]

    def with_scale(self, blocks: Bytes, d: Floats) -> Bytes:
        """The scale is an fp16 whose five lowest bits are rounded away, halves upwards."""
        half = np.minimum(d, LARGEST_HALF).astype(np.float32).astype("<f2").view("<u2")
        code = np.minimum((half + 16) >> 5, LARGEST_SCALE_CODE).astype("<u2")
        scaled = np.concatenate([blocks[..., :2] | code[..., None].view(np.uint8), blocks[..., 2:]], axis=-1)
        scaled[code == 0] = 0
        return scaled


# ---- 5. formats ------------------------------------------------------------------------------------------------------

class Format(NamedTuple):
    """A block format: its family, and the values in a block."""

    family: Family
    block: int

    @property
    def bits(self) -> int:
        return self.family.bits

    @property
    def block_bytes(self) -> int:
        return 2 + self.bits * self.block // 8


#: name -> Format, in the order of the type ids.
FORMATS = {f"turbo{bits}{suffix}" + ("" if block == 128 else f"_{block}"): Format(family(bits), block)
           for family, suffix in ((LloydMax, ""), (Trellis, "_tcq")) for bits in (4, 3, 2) for block in (128, 64, 32)}


def codebook(type: str) -> NDArray[np.float32]:
    """The type's levels in units of the block's RMS: step * levels, float32."""
    family = FORMATS[type].family
    return np.float32(family.step) * family.levels.astype(np.float32)


# ---- 6. decode -------------------------------------------------------------------------------------------------------

def _split(q: ArrayLike, form: Format) -> tuple[NDArray[np.float16], Integers]:
    """The scales (..., blocks) and the integer levels (..., blocks, block) of encoded rows (..., row_bytes)."""
    array = np.asarray(q, dtype=np.uint8)
    return form.family.split(array.reshape(*array.shape[:-1], array.shape[-1] // form.block_bytes, form.block_bytes))


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
        factor, integers, last = np.float32(form.family.step), level, np.ones(form.block, dtype=np.float32)
    else:
        factor = np.float32(form.family.step / math.sqrt(form.block))
        integers = (level * signs(2, form.block).astype(np.int64)) @ hadamard(form.block).astype(np.int64)  # H = H^T
        last = signs(1, form.block).astype(np.float32)  # after the rounding, so that a negated zero is -0.0
    with np.errstate(invalid="ignore", over="ignore"):  # a stored scale may be infinite, and inf * 0 is NaN
        values = (scale.astype(np.float32) * factor)[..., None] * integers.astype(np.float32) * last
    return values.reshape(*np.shape(q)[:-1], -1)


# ---- 7. encode -------------------------------------------------------------------------------------------------------

def quantize(x: ArrayLike, type: str) -> Bytes:
    """Encode rows: (..., n) to uint8 (..., row_bytes). A block with a NaN or an infinity, and a zero block, give zeros.

    1. Rotate, y = R x, and round to integers z = round(2048 y / RMS).
    2. The family assigns levels c to the values.
    3. Correct the norm: choose d so that the inner product of the block with its reconstruction is that of the block
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

    assigned, level = form.family.assign(z)
    product, energy = (z * level).sum(axis=-1), np.square(z).sum(axis=-1)
    encoded &= product > 0
    gain = energy / np.where(encoded, product, 1) * rms / (RMS_UNIT * form.family.step) * unit
    return form.family.with_scale(assigned, np.where(encoded, gain, 0.0)).reshape(*array.shape[:-1], -1)


# ---- 8. dot, attention -----------------------------------------------------------------------------------------------

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
                            scale.astype(np.float64)[..., None] * form.family.step * level, axes=([-2, -1], [-2, -1]))
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
