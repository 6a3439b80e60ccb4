"""Measure how K and V of every layer are distributed, and what each cache type does to them and to attention.

All errors are those of the real codec on the real values. Attention is that of the file's own queries, causal, without
what a model may add to it (sliding windows, sinks, soft caps), and of at most `QUERIES` queries, evenly spread.
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
from ..llama.files import LlamaError
from ..reference import hadamard

__all__ = ["STOCK", "TYPES", "Analysis", "AnalyzeError", "Effect", "Half", "Layer", "analyze", "check_types"]

Floats = NDArray[np.float64]
Array = NDArray[np.float32]

#: What is measured unless told otherwise.
TYPES = ("turbo4", "turbo3", "turbo2", "q8_0", "q4_0")
#: llama.cpp's own types that can be measured; it rotates heads that 64 divides, and so they are here.
STOCK = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
QUERIES = 128
#: A layer is to be protected if its error is this many times the median layer's.
PROTECT = 2.0


class AnalyzeError(LlamaError):
    """The file or the types cannot be used. The text says what to do."""


@dataclass(frozen=True)
class Effect:
    """What a cache type does to K or V of one layer."""

    mse: float  #: squared error relative to the squares of the values
    harm: float  #: K: KL divergence of attention's weights, in nats per query; V: squared error of attention's output,
    #: relative to its squares
    score: float | None = None  #: K: standard deviation of the error of a score (scale * q.k), common shifts left out


@dataclass(frozen=True)
class Half:
    """K or V of one layer. "Rotated" is None where no block divides the head."""

    outlier: float  #: RMS of the largest channel over that of the median channel, in the worst block
    outlier_rotated: float | None
    kurtosis: float  #: mean of x^4 over that of x^2 squared, per block; 3n / (n + 2) for normal values, n at most
    kurtosis_rotated: float | None
    fit: float | None  #: Kolmogorov-Smirnov distance of rotated blocks of length 1 from N(0, 1/n), 0 ... 1
    effects: dict[str, Effect | None]  #: by type; None where the type cannot store such heads


@dataclass(frozen=True)
class Layer:
    """One layer's cache."""

    layer: int
    head_k: int
    head_v: int
    heads: int
    kv_heads: int
    k: Half
    v: Half
    balance: float  #: what share of K's noise in the scores is left if channels are balanced freely (see `convert`)


@dataclass(frozen=True)
class Analysis:
    """A whole file."""

    model: str
    text: str
    tokens: int
    queries: int  #: whose attention was measured
    types: tuple[str, ...]
    layers: list[Layer]

    def harms(self, half: str, type: str) -> dict[int, float]:
        """The harm of a type to K ("k") or V ("v"), by layer; without those that it cannot store."""
        effects = {layer.layer: getattr(layer, half).effects[type] for layer in self.layers}
        return {layer: effect.harm for layer, effect in effects.items() if effect}

    def protect(self, half: str, type: str) -> list[int]:
        """The layers whose K ("k") or V ("v") suffers more than `PROTECT` times what the median layer's does."""
        harms = self.harms(half, type)
        median = float(np.median(list(harms.values()))) if harms else 0.0
        return [layer for layer, harm in harms.items() if harm > PROTECT * median]


def check_types(types: Sequence[str]) -> None:
    """AnalyzeError if one of the types is unknown."""
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
    """Measure a file of `turboquant dump-kv`, one layer in memory at a time.

    Raises:
        AnalyzeError, DumpError: it is no such file, or a type is unknown.
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
            if f"v.{number}" in names:  # else V is a part of K, which only whole rows of one type can store
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
    """The block that turbo types have in a head of that size."""
    return next((n for n in (128, 64, 32) if head % n == 0), None)


def _shape(x: Array, n: int) -> tuple[float, float]:
    """Outlier ratio and kurtosis, see `Half`."""
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
    """x (tokens, KV heads, head) as it comes out of a cache of that type; None if the type cannot store such heads.

    `rotation`: for llama.cpp's own types, the largest power of two that it rotates by, if the head is a multiple.
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
    """Some queries of the heads that read one KV head."""

    kv_head: int
    q: Floats  #: (heads, queries, head), times the scale of the scores
    weights: Floats  #: (heads, queries, tokens), softmax of the scores
    seen: NDArray[np.bool_]  #: (queries, tokens): what a query attends to


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
        # KL(p || p̂) = log Σ p exp(e) - Σ p e, for scores that are off by e
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
    """See `Layer.balance`; second moments, (KV heads, head)."""
    head = cached.shape[1]
    place = np.arange(cached.size)
    problem = Problem(cached.ravel(), reader.ravel(), place // (_block(head) or head), place)
    before = noise(problem, np.ones(cached.size))
    return noise(problem, solve(problem)) / before if before else 1.0
