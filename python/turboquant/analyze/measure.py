"""Measure the distributions of K and V of every layer, and the errors of each cache type in K, V and attention.

All errors are those of the real codec on the real values. Attention is computed for at most `QUERIES` queries of the
file, evenly spread. It is causal, without sliding windows, sinks and soft caps that a model may have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._codec import dequantize, quantize, rotate
from .._types import type_for_head
from ..convert.balance import Problem, noise, solve
from ..dump import FORMAT, check_dump
from ..errors import TurboQuantError
from ..reference import hadamard

__all__ = ["STOCK", "TYPES", "Analysis", "AnalyzeError", "Effect", "Half", "Layer", "analyze", "check_types"]

Floats = NDArray[np.float64]
Array = NDArray[np.float32]

#: The cache types that are measured by default.
TYPES = ("turbo4", "turbo3", "turbo2", "turbo4_tcq", "turbo3_tcq", "turbo2_tcq", "q8_0", "q4_0")
#: llama.cpp's own types that can be measured. llama.cpp rotates heads whose size is a multiple of 64, and so does
#: this module.
STOCK = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
QUERIES = 128
#: A layer is to be protected if its error exceeds that of the median layer by this factor.
PROTECT = 2.0


class AnalyzeError(TurboQuantError):
    """The file or a type cannot be used. The text says what to do."""


@dataclass(frozen=True)
class Effect:
    """The errors that a cache type causes in K or V of one layer."""

    mse: float  #: squared error divided by the sum of the squared values
    #: K: KL divergence of attention's weights, in nats per query; V: squared error of attention's output, divided by
    #: the squared output
    harm: float
    #: K: standard deviation of the error of a score (scale * q.k), without a shift common to all scores of a query
    score: float | None = None


@dataclass(frozen=True)
class Half:
    """K or V of one layer. "Rotated" is None where no block divides the head."""

    outlier: float  #: RMS of the largest channel divided by that of the median channel, in the worst block
    outlier_rotated: float | None
    kurtosis: float  #: mean of x^4 over the squared mean of x^2, per block: 3n / (n + 2) for normal values, at most n
    kurtosis_rotated: float | None
    fit: float | None  #: Kolmogorov-Smirnov distance of rotated blocks of length 1 from N(0, 1/n), 0 ... 1
    effects: dict[str, Effect | None]  #: effects by type; None if the type cannot store such heads


@dataclass(frozen=True)
class Layer:
    """The cache of one layer."""

    layer: int
    head_k: int
    head_v: int
    heads: int
    kv_heads: int
    k: Half
    v: Half
    balance: float  #: share of K's noise in the scores that is left if channels are balanced one by one (see `convert`)


@dataclass(frozen=True)
class Analysis:
    """The analysis of a file."""

    model: str
    text: str
    tokens: int
    queries: int  #: number of queries for which attention was measured
    types: tuple[str, ...]
    layers: list[Layer]

    def harms(self, half: str, type: str) -> dict[int, float]:
        """The error of attention due to a type of K ("k") or V ("v"), by layer, without layers that it cannot store."""
        effects = {layer.layer: getattr(layer, half).effects[type] for layer in self.layers}
        return {layer: effect.harm for layer, effect in effects.items() if effect}

    def protect(self, half: str, type: str) -> list[int]:
        """The layers whose error, for K ("k") or V ("v"), is more than `PROTECT` times that of the median layer."""
        harms = self.harms(half, type)
        median = float(np.median(list(harms.values()))) if harms else 0.0
        return [layer for layer, harm in harms.items() if harm > PROTECT * median]


def check_types(types: Sequence[str]) -> None:
    """Raise AnalyzeError if one of the types is unknown."""
    for type in types:
        if type in STOCK:
            continue
        try:
            type_for_head(type, 128)
        except ValueError as error:
            raise AnalyzeError(f"{error}; or one of {', '.join(STOCK)}") from None


def analyze(
    path: Path, types: Sequence[str] = TYPES, progress: Callable[[int, int], None] = lambda done, total: None
) -> Analysis:
    """Measure a file of `turboquant dump-kv`, with one layer in memory at a time.

    Raises:
        AnalyzeError, DumpError: the file is no dump, or a type is unknown.
    """
    check_types(types)
    with _opened(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise AnalyzeError(
                f"{path} was not made by `turboquant dump-kv` of this version: its format is "
                f"{metadata.get('format', 'not given')!r}, not {FORMAT!r}"
            )
        for key in ("model", "text", "tokens"):
            if key not in metadata or (key == "tokens" and not re.fullmatch(r"\d{1,12}", metadata[key])):
                raise AnalyzeError(f"{path} names no {key}: make it again with `turboquant dump-kv`")
        scales, numbers = check_dump(file, path)
        names = set(file.keys())
        layers = []
        for done, number in enumerate(numbers):
            progress(done, len(numbers))
            if f"v.{number}" in names:  # otherwise V is a part of K, and K and V must have the same type
                if f"q.{number}" not in names:
                    raise AnalyzeError(f"{path} has no q.{number}: make it again with `turboquant dump-kv`")
                queries = [(_read(file, path, name), scales[name]) for name in _queries(names, number)]
                k, v = (_read(file, path, f"{role}.{number}") for role in "kv")
                layers.append(_layer(number, queries, k, v, types))
        progress(len(numbers), len(numbers))
    if not layers:
        raise AnalyzeError(f"{path} has no layer with K and V of its own: there is nothing to analyze")
    tokens = int(metadata["tokens"])
    return Analysis(
        metadata["model"], metadata["text"], tokens, min(tokens, QUERIES), tuple(types), layers
    )


def _opened(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise AnalyzeError("analyze needs the package safetensors: pip install 'turboquant[convert]'") from None
    if not path.is_file():
        raise AnalyzeError(f"{path}: no such file; `turboquant dump-kv` makes one")
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise AnalyzeError(
            f"{path} is no whole safetensors file ({error}): make it again with `turboquant dump-kv`"
        ) from None


def _read(file: Any, path: Path, name: str) -> Array:
    values = np.asarray(file.get_tensor(name), np.float32)
    if not np.isfinite(values).all():
        raise AnalyzeError(f"{path}: {name} is not finite: make it again with `turboquant dump-kv`")
    return values


def _queries(names: set[str], layer: int) -> list[str]:
    return sorted(name for name in names if re.fullmatch(rf"q\.{layer}(\.\d{{1,6}})?", name))


# ---- one layer -------------------------------------------------------------------------------------------------------


def _layer(number: int, queries: Sequence[tuple[Array, float]], k: Array, v: Array, types: Sequence[str]) -> Layer:
    head_k, head_v = k.shape[2], v.shape[2]
    reading = list(_attentions(queries, k))
    k_effects: dict[str, Effect | None] = {}
    v_effects: dict[str, Effect | None] = {}
    for type in types:
        k_hat, v_hat = stored(k, type, head_k), stored(v, type, 64)
        k_effects[type] = None if k_hat is None else _effect_k(k, k_hat, reading)
        v_effects[type] = None if v_hat is None else _effect_v(v, v_hat, reading)
    moments = np.zeros((k.shape[1], head_k))
    for q, scale in queries:
        squares = np.square(q, dtype=np.float64).mean(axis=0) * scale**2
        moments += squares.reshape(k.shape[1], -1, head_k).sum(axis=1)
    return Layer(
        number, head_k, head_v, sum(q.shape[1] for q, _ in queries), k.shape[1], _half(k, k_effects),
        _half(v, v_effects), _balanced(np.square(k, dtype=np.float64).mean(axis=0), moments),
    )  # fmt: skip


def _half(x: Array, effects: dict[str, Effect | None]) -> Half:
    n = _block(x.shape[2])
    if n is None:
        outlier, kurtosis = _shape(x, x.shape[2])
        return Half(outlier, None, kurtosis, None, None, effects)
    y = rotate(x, n)
    outlier, kurtosis = _shape(x, n)
    outlier_rotated, kurtosis_rotated = _shape(y, n)
    return Half(outlier, outlier_rotated, kurtosis, kurtosis_rotated, _fit(y, n), effects)


def _block(head: int) -> int | None:
    """The block length of turbo types for heads of `head` values."""
    return next((n for n in (128, 64, 32) if head % n == 0), None)


def _shape(x: Array, n: int) -> tuple[float, float]:
    """Outlier ratio and kurtosis; see `Half`."""
    squares = np.square(x.reshape(len(x), -1, n), dtype=np.float64)
    channels = np.sqrt(squares.mean(axis=0))
    ratio = channels.max(axis=1) / np.maximum(np.median(channels, axis=1), 1e-30)
    second = squares.mean(axis=2)
    live = second > 0
    fourth = np.square(squares).mean(axis=2)
    return float(ratio.max()), float((fourth[live] / second[live] ** 2).mean()) if live.any() else 0.0


def _fit(y: Array, n: int) -> float:
    blocks = y.reshape(-1, n).astype(np.float64)
    length = np.linalg.norm(blocks, axis=1, keepdims=True)
    unit = np.sort((blocks / np.where(length > 0, length, 1)).ravel() * math.sqrt(n))
    grid = np.linspace(-6, 6, 4001)
    normal = np.interp(unit, grid, [(1 + math.erf(x / math.sqrt(2))) / 2 for x in grid])
    steps = np.arange(len(unit) + 1) / len(unit)
    return float(max((normal - steps[:-1]).max(), (steps[1:] - normal).max()))


def stored(x: Array, type: str, rotation: int) -> Array | None:
    """x (tokens, KV heads, head) after encoding and decoding; None if the type cannot store such heads.

    For llama.cpp's own types `rotation` is the upper limit of the blocks that are rotated, as llama.cpp does if the
    head is a multiple of 64.
    """
    head = x.shape[2]
    if type not in STOCK:
        try:
            info = type_for_head(type, head)
        except ValueError:
            return None
        return dequantize(quantize(x, info), info)
    if head % 32:
        return None
    import gguf

    kind = gguf.GGMLQuantizationType[type.upper()]
    n = math.gcd(head, 1 << (rotation.bit_length() - 1)) if head % 64 == 0 else 1
    turn = hadamard(n) / math.sqrt(n)
    y = (x.reshape(-1, n) @ turn).astype(np.float32).reshape(-1, head)
    back = gguf.quants.dequantize(gguf.quants.quantize(y, kind), kind)
    return np.asarray((back.reshape(-1, n) @ turn).reshape(x.shape), np.float32)


# ---- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attention:
    """Evenly spread queries of the heads that read one KV head."""

    kv_head: int
    q: Floats  #: (heads, queries, head), times the scale of the scores
    weights: Floats  #: (heads, queries, tokens), softmax of the scores
    seen: NDArray[np.bool_]  #: (queries, tokens), whether a query attends to a token


def _attentions(queries: Sequence[tuple[Array, float]], k: Array) -> Iterator[_Attention]:
    tokens = len(k)
    picked = np.unique(np.linspace(0, tokens - 1, min(tokens, QUERIES)).round().astype(np.int64))
    seen = np.arange(tokens) <= picked[:, None]
    for q, scale in queries:
        group = q.shape[1] // k.shape[1]
        for kv_head in range(k.shape[1]):
            own = q[picked, kv_head * group : (kv_head + 1) * group].swapaxes(0, 1).astype(np.float64) * scale
            scores = np.where(seen, own @ k[:, kv_head].T.astype(np.float64), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            yield _Attention(kv_head, own, weights / weights.sum(-1, keepdims=True), seen)


def _effect_k(k: Array, k_hat: Array, reading: Sequence[_Attention]) -> Effect:
    difference = (k_hat - k).astype(np.float64)
    square, count, divergence, rows = 0.0, 0, 0.0, 0
    for one in reading:
        error = one.q @ difference[:, one.kv_head].T
        mean = np.where(one.seen, error, 0).sum(axis=-1) / one.seen.sum(axis=-1)
        centred = np.where(one.seen, error - mean[..., None], 0)
        square += float(np.square(centred).sum())
        count += one.seen.sum() * len(error)
        # KL(p || p̂) = log Σ p exp(e) - Σ p e for scores with the error e
        shift = centred.max(axis=-1, keepdims=True)
        partition = np.log((one.weights * np.exp(centred - shift)).sum(axis=-1)) + shift[..., 0]
        divergence += float((partition - (one.weights * centred).sum(axis=-1)).sum())
        rows += error.shape[0] * error.shape[1]
    return Effect(_relative(difference, k), divergence / rows, math.sqrt(square / max(count, 1)))


def _effect_v(v: Array, v_hat: Array, reading: Sequence[_Attention]) -> Effect:
    difference = (v_hat - v).astype(np.float64)
    error, energy = 0.0, 0.0
    for one in reading:
        error += float(np.square(one.weights @ difference[:, one.kv_head]).sum())
        energy += float(np.square(one.weights @ v[:, one.kv_head].astype(np.float64)).sum())
    return Effect(_relative(difference, v), error / max(energy, 1e-300))


def _relative(difference: Floats, x: Array) -> float:
    return float(np.square(difference).sum() / max(float(np.square(x, dtype=np.float64).sum()), 1e-300))


def _balanced(cached: Floats, reader: Floats) -> float:
    """See `Layer.balance`. Arguments are second moments, (KV heads, head)."""
    head = cached.shape[1]
    place = np.arange(cached.size)
    problem = Problem(cached.ravel(), reader.ravel(), place // (_block(head) or head), place)
    before = noise(problem, np.ones(cached.size))
    return noise(problem, solve(problem)) / before if before else 1.0
