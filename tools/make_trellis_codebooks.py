#!/usr/bin/env python3
"""Train the codebooks of the trellis-coded types, and search for their code.

    make_trellis_codebooks.py            train all three codebooks; print them beside those of the format
    make_trellis_codebooks.py --codes    compare all pairs of taps with six bits of memory, at 3 bits

The codebooks are constants of the format (cpp/FORMAT.md, "Trellis-coded types"), so nothing is written. The program
shows where they come from: Lloyd's iteration (1982) with the encoder in the loop, on blocks of normally distributed
values. Each block is divided by the scale that the encoder would choose, a path through the trellis assigns a level to
each value, and each level becomes the weighted mean of its values. The levels are symmetric about 0, and the mean of
the scales is 1. After five iterations the granular error, by which the encoder chooses scales, is fitted. At the end
levels are rounded to integers of which the outermost is 127. The iteration converges slowly: further rounds move some
levels by 1 and gain 0.1%, and on other blocks levels may differ by 1 as well.

Arithmetic is in floating point and without the encoder's limits, so errors differ from the core's in the fourth digit.
All random numbers are seeded: a run repeats exactly. It needs the package `turboquant` for the constants.
"""
from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from turboquant import reference

Floats = NDArray[np.float32]
BLOCK = 128


class Code(NamedTuple):
    """The bits of a step's subset are parities of its path bit and the `memory` bits before: bit k of `taps0` (lower
    bit of the subset) and `taps1` stands for the path bit of k steps before."""

    memory: int
    taps0: int
    taps1: int

    def subset(self, window: int) -> int:
        """The subset of a step; bit k of `window` is the path bit of k steps before."""
        return 2 * ((window & self.taps1).bit_count() & 1) + ((window & self.taps0).bit_count() & 1)

    def __str__(self) -> str:
        return f"{self.taps0:03o}/{self.taps1:03o}"


CODE = Code(reference.MEMORY, 0o044, 0o103)


class Book(NamedTuple):
    """Levels, ascending, for blocks of unit RMS, and the granular error of a value under scale 1, by which the encoder
    predicts the error of a scale."""

    levels: Floats
    granular: float

    @property
    def step(self) -> float:
        return float(self.levels[-1] / 127)

    def stored(self) -> Book:
        """With integer multiples of the step as levels."""
        return self._replace(levels=np.rint(self.levels / self.step).astype(np.float32) * np.float32(self.step))

    def __str__(self) -> str:
        positive = np.rint(self.levels[len(self.levels) // 2 :] / self.step).astype(int)
        return f"step {self.step:.4f}, granular error {self.granular:.3g}, levels {' '.join(map(str, positive))}"


def published(bits: int) -> Book:
    """The codebook of the format."""
    family = reference.Trellis(bits)
    return Book((family.levels * family.step).astype(np.float32), reference.GRANULAR[bits])


def initial(bits: int) -> Book:
    """Quantiles of the normal distribution whose variance is 3: codebooks for little error have nearly the cube root of
    the density of the values (Panter and Dite 1951)."""
    count = 2 << bits
    levels = [statistics.NormalDist(0, 3**0.5).inv_cdf((i + 0.5) / count) for i in range(count)]
    return Book(np.array(levels, np.float32), 0.6 / count**2)


def normal_blocks(count: int, seed: int, block: int = BLOCK) -> Floats:
    """Blocks (count, block) of normally distributed values, each with an RMS of 1 as after the encoder's transform."""
    x = np.random.default_rng(seed).standard_normal((count, block))
    return (x / np.sqrt(np.square(x).mean(-1, keepdims=True))).astype(np.float32)


def choose_scales(x: Floats, book: Book) -> Floats:
    """The scale of each block's levels (count, 1) that is expected to leave the least error, as in the encoder."""
    errors = []
    for factor in reference.SCALES:
        over = np.maximum(np.abs(x) - book.levels[-1] * factor, 0)
        errors.append(book.granular * factor**2 * x.shape[-1] + np.square(over).sum(-1))
    return np.array(reference.SCALES, np.float32)[np.argmin(errors, axis=0)][:, None]


def best_subsets(metric: Floats, code: Code) -> NDArray[np.intp]:
    """The subsets (steps, count) of the paths with the least sums of metrics (steps, 4, count), over all start states.
    A state is the newest `memory` path bits, the newest in bit 0."""
    half = 1 << code.memory >> 1
    states = np.arange(2 * half)
    lower, upper = states >> 1, states >> 1 | half  # the two states before
    windows = states | np.array([[0], [2 * half]])  # their oldest bit, then the state
    from_lower, from_upper = np.vectorize(code.subset)(windows)
    cost = np.zeros((2 * half, metric.shape[-1]), np.float32)
    choices = []
    for step in metric:
        a, b = cost[lower] + step[from_lower], cost[upper] + step[from_upper]
        choices.append(b < a)
        cost = np.minimum(a, b)
    state = cost.argmin(0)
    chosen = np.empty((len(metric), metric.shape[-1]), np.intp)
    for t in reversed(range(len(metric))):
        above = np.take_along_axis(choices[t], state[None], axis=0)[0]
        chosen[t] = np.where(above, from_upper[state], from_lower[state])
        state = np.where(above, upper[state], lower[state])
    return chosen


def assign(y: Floats, book: Book, code: Code = CODE) -> NDArray[np.intp]:
    """The numbers of the levels that the encoder chooses for blocks y (count, n) under scale 1. The elements are
    independent, so they are visited in their own order."""
    nearest, metric = [], []
    for subset in range(4):
        member = book.levels[subset::4]
        number = np.searchsorted((member[1:] + member[:-1]) / 2, y.T)
        nearest.append(4 * number + subset)
        metric.append(np.square(y.T - member[number]))
    subsets = best_subsets(np.stack(metric, axis=1), code)
    return np.take_along_axis(np.stack(nearest), subsets[None], axis=0)[0].T


def relative_error(x: Floats, book: Book, code: Code = CODE) -> float:
    """The mean squared error of blocks of unit RMS with scales that preserve inner products: <x, x'> = <x, x>."""
    values = book.levels[assign(x / choose_scales(x, book), book, code)].astype(np.float64)
    energy = np.square(x.astype(np.float64)).sum(-1)
    return float((energy * np.square(values).sum(-1) / np.square((x * values).sum(-1)) - 1).mean())


def improve(x: Floats, book: Book, code: Code = CODE) -> Book:
    """One iteration: each level becomes the mean of its values, and the mean of the chosen scales becomes 1."""
    scale = choose_scales(x, book)
    y = x / scale
    number = assign(y, book, code)
    weight = np.broadcast_to(np.square(scale), y.shape)  # an error of y counts with the square of the scale
    count = len(book.levels)
    total = np.bincount(number.ravel(), weight.ravel(), count)
    levels = np.bincount(number.ravel(), (weight * y).ravel(), count)
    levels, total = levels[count // 2 :] - levels[: count // 2][::-1], total[count // 2 :] + total[: count // 2][::-1]
    positive = np.where(total > 0, levels / np.maximum(total, 1e-9), book.levels[count // 2 :])
    mean = float(scale.mean())
    levels = mean * np.concatenate([-positive[::-1], positive])
    return Book(levels.astype(np.float32), mean**2 * book.granular)


def fit_granular(x: Floats, book: Book, code: Code = CODE) -> Book:
    """The granular error with the best choice of scales, within a factor of 1.5."""
    books = [book._replace(granular=book.granular * 1.5 ** (i / 4)) for i in range(-4, 5)]
    return min(books, key=lambda one: relative_error(x, one, code))


def train(bits: int, x: Floats, rounds: int, code: Code = CODE) -> Book:
    book = initial(bits)
    for _ in range(rounds):
        for _ in range(5):
            book = improve(x, book, code)
        book = fit_granular(x, book, code)
    return book.stored()


def codes(memory: int) -> Iterator[Code]:
    """All codes in Ungerboeck's form (1982): the newest and the oldest path bit change the upper bit of the subset
    alone. A code and its reversal in time are equal, so one of the two is left out."""
    inner = range(0, 1 << memory, 2)
    ends = 1 | 1 << memory
    for taps0, taps1 in itertools.product(inner[1:], (taps | ends for taps in inner)):
        reversed_taps = [int(f"{taps:0{memory + 1}b}"[::-1], 2) for taps in (taps0, taps1)]
        if [taps0, taps1] >= reversed_taps:
            yield Code(memory, taps0, taps1)


def search(memory: int, bits: int, most: int) -> None:
    """Print the codes with the least error by their number of taps: all on few blocks, the best on more."""
    few, more, book = normal_blocks(100, 1), normal_blocks(4096, 2), published(bits)
    by_taps: dict[int, list[tuple[float, Code]]] = {}
    for code in codes(memory):
        taps = code.taps0.bit_count() + code.taps1.bit_count()
        by_taps.setdefault(taps, []).append((relative_error(few, book, code), code))
    for taps, found in sorted(by_taps.items()):
        best = sorted((relative_error(more, book, code), code) for _, code in sorted(found)[:most])
        print(f"{taps} taps:", ", ".join(f"{code} {error:.5f}" for error, code in best[:2]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", action="store_true", help="search for the code instead")
    parser.add_argument("--memory", type=int, default=CODE.memory, help="of the codes (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=8192, help="blocks to train on (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=12, help="of five iterations (default: %(default)s)")
    given = parser.parse_args()
    if given.codes:
        return search(given.memory, bits=3, most=8)
    x, fresh = normal_blocks(given.blocks, 3), normal_blocks(8192, 4)
    for bits in (4, 3, 2):
        for name, book in (("trained", train(bits, x, given.rounds)), ("format", published(bits))):
            print(f"{bits} bits, {name + ':':8} error {relative_error(fresh, book):.5f}, {book}", flush=True)


if __name__ == "__main__":
    main()
