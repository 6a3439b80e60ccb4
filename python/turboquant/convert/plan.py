"""Measure a model on a text, and plan the scales of its weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..measure.capture import Attention, Capture, CaptureError, Data, Route
from ..models.modelfile import ModelFile, Scaling
from ..models.weights import FLOATS, LARGEST, block, exponents, largest
from . import balance
from .balance import Problem, groups
from .paths import Leaf, Refusal, Trace, trace, trace_output

__all__ = ["Balanced", "Measurement", "Plan", "make_plan", "measure", "ranges"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_EXACT = ("F32", "F16")  # a factor that is no power of two costs these types almost no precision


@dataclass
class Measurement:
    """Second moments per channel, and the routes of the channels to the weights."""

    tokens: int
    available: int
    attentions: list[Attention] = field(default_factory=list)
    #: by role, and number of the attention operation (q, o) or layer (k, v)
    routes: dict[tuple[str, int], list[Route]] = field(default_factory=dict)
    moments: dict[tuple[str, int], Floats] = field(default_factory=dict)  #: (channels,), by the same

    def layers(self) -> list[int]:
        """The layers that have a cache."""
        return sorted({attention.layer for attention in self.attentions})


def measure(
    model: Path,
    text: Path,
    *,
    tokens: int,
    context: int,
    bin: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    gpu_layers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measurement:
    """Run `model` on the first `tokens` tokens of `text`, `context` at a time, and sum the squares of q, k and v.

    Raises:
        CaptureError: the model or the text cannot be used.
    """
    capture = Capture(
        model, text, tokens=tokens, context=context, bin=bin, threads=threads, gpu_layers=gpu_layers
    )
    with capture:
        found = Measurement(capture.tokens, capture.available)
        for item in capture:
            if isinstance(item, Attention):
                found.attentions.append(item)
            elif isinstance(item, Route):
                found.routes.setdefault(_key(item), []).append(item)
            else:
                squares = np.square(item.values, dtype=np.float64).sum(axis=0).ravel()
                key = _key(item)
                found.moments[key] = found.moments.get(key, 0) + squares / capture.tokens
                progress(item.first + len(item.values), capture.tokens)
    if not found.attentions:
        raise CaptureError(f"{model} has no attention with a cache: there is nothing to convert")
    if any(attention.layer < 0 for attention in found.attentions):
        raise CaptureError(f"{model} keeps its keys in a cache that this program does not know")
    return found


def _key(item: Route | Data) -> tuple[str, int]:
    return item.role, item.use if item.role in "qo" else item.layer


@dataclass(frozen=True)
class Balanced:
    """The scaling of K (with Q) or V (with the output) of one layer. Noise is per unit of the type's relative error."""

    layer: int
    what: str  #: "K" or "V"
    exact: bool = True
    before: float = 0.0  #: variance of a score's error (K), or of the output's error relative to the output (V)
    after: float = 0.0
    largest: float = 1.0  #: the largest and the smallest scale
    smallest: float = 1.0
    refused: str = ""  #: why it stays unchanged, else empty

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else 1.0


@dataclass
class Plan:
    """The scalings of all tensors, and their predicted effects."""

    scalings: dict[str, list[Scaling]] = field(default_factory=dict)
    parts: list[Balanced] = field(default_factory=list)

    @property
    def mode(self) -> str:
        """ "exact", "pow2", or "mixed": the scales of the parts that are balanced."""
        kinds = {part.exact for part in self.parts if not part.refused}
        return "mixed" if len(kinds) > 1 else "exact" if True in kinds else "pow2"


@dataclass(frozen=True)
class _Side:
    """One trace of a balance: cached channels are multiplied by the scale, reading channels by its inverse."""

    trace: Trace
    channel: Ints  #: for each channel of the trace the number of its cached channel
    reads: bool


def make_plan(model: ModelFile, measured: Measurement, mode: str, values: bool = True) -> Plan:
    """Plan the balance of every layer of `measured` that allows it.

    Args:
        mode: "auto" takes exact scales where the weights are f32 or f16 and stay in their range, and powers of two
            elsewhere; "exact" and "pow2" take exact scales or powers of two everywhere.
        values: whether to balance V as well.
    """
    plan = Plan()
    sides: dict[tuple[int, str], list[_Side] | Refusal] = {}
    for layer in measured.layers():
        for what, follow in (("K", _sides_k), ("V", _sides_v)):
            try:
                sides[layer, what] = follow(measured, layer)
            except Refusal as refusal:
                sides[layer, what] = refusal
    shared = _shared(sides) | _opaque(measured)
    for (layer, what), found in sides.items():
        if what == "V" and not values:
            continue
        try:
            if isinstance(found, Refusal):
                raise found
            for tensor in sorted(shared & {leaf.tensor for side in found for leaf in side.trace.leaves}):
                raise Refusal(f"{tensor} has another use, too")
            part = _balance(model, measured, layer, what, found, mode, plan.scalings)
        except Refusal as refusal:
            part = Balanced(layer, what, refused=str(refusal))
        plan.parts.append(part)
    return plan


def ranges(layers: list[int]) -> str:
    """Layer numbers as text, such as "layers 0-3, 7"."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1][1:] = [layer]
        else:
            parts.append([layer])
    return f"layer{'s' * (len(layers) > 1)} " + ", ".join("-".join(map(str, part)) for part in parts)


# ---- where the channels come from ------------------------------------------------------------------------------------


def _uses(measured: Measurement, layer: int) -> list[Attention]:
    return [attention for attention in measured.attentions if attention.layer == layer]


def _route(measured: Measurement, role: str, number: int) -> Route:
    routes = measured.routes.get((role, number), [])
    if len(routes) != 1:
        what = {"v": "V is not cached on its own", "o": "its output goes through more than a matrix"}
        raise Refusal(what.get(role, f"{role.upper()} is computed {len(routes)} times"))
    return routes[0]


def _rows(count: int) -> Ints:
    return np.stack([np.arange(count), *[np.zeros(count, np.int64)] * 3], axis=1)


def _reading(attention: Attention, head: int) -> Ints:
    """For every channel of every query head the number of the channel of K or V that it is multiplied with."""
    heads = np.arange(attention.heads) // (attention.heads // attention.kv_heads)
    return (heads[:, None] * head + np.arange(head)).ravel()


def _sides_k(measured: Measurement, layer: int) -> list[_Side]:
    uses = _uses(measured, layer)
    count = uses[0].kv_heads * uses[0].head_k
    sides = [_Side(trace(_route(measured, "k", layer).steps, _rows(count)), np.arange(count), False)]
    for use in uses:
        at = np.zeros((use.heads * use.head_k, 4), np.int64)
        at[:, 2], at[:, 0] = np.divmod(np.arange(len(at)), use.head_k)
        sides.append(_Side(trace(_route(measured, "q", use.use).steps, at), _reading(use, use.head_k), True))
    return sides


def _sides_v(measured: Measurement, layer: int) -> list[_Side]:
    uses = _uses(measured, layer)
    count = uses[0].kv_heads * uses[0].head_v
    sides = [_Side(trace(_route(measured, "v", layer).steps, _rows(count)), np.arange(count), False)]
    for use in uses:
        leaf = trace_output(_route(measured, "o", use.use).steps, use.heads, use.head_v)
        sides.append(_Side(Trace([leaf]), _reading(use, use.head_v), True))
    return sides


def _shared(sides: dict[tuple[int, str], list[_Side] | Refusal]) -> set[str]:
    """The tensors with an element that would be scaled twice."""
    taken: dict[str, list[Leaf]] = {}
    for found in sides.values():
        for side in [] if isinstance(found, Refusal) else found:
            for leaf in side.trace.leaves:
                taken.setdefault(leaf.tensor, []).append(leaf)
    result = set()
    for tensor, leaves in taken.items():
        distinct = [np.unique(leaf.index) for leaf in leaves]
        together = np.concatenate(distinct)
        if len(np.unique(together)) < len(together) or len({leaf.axis for leaf in leaves}) > 1:
            result.add(tensor)
    return result


def _opaque(measured: Measurement) -> set[str]:
    """Weights that determine V on a path that cannot be followed. If they also determine K, K must stay unchanged."""
    result = set()
    for (role, _), routes in measured.routes.items():
        for route in routes if role == "v" else ():
            try:
                trace(route.steps, _rows(route.steps[0]["ne"][0]))
            except Refusal:
                result |= {step["weight"] for step in route.steps if "weight" in step}
    return result


# ---- one layer -------------------------------------------------------------------------------------------------------


def _balance(
    model: ModelFile,
    measured: Measurement,
    layer: int,
    what: str,
    sides: list[_Side],
    mode: str,
    scalings: dict[str, list[Scaling]],
) -> Balanced:
    uses = _uses(measured, layer)
    head = uses[0].head_k if what == "K" else uses[0].head_v
    cached = measured.moments["k" if what == "K" else "v", layer]
    reader = np.zeros_like(cached)
    for use, side in zip(uses, sides[1:], strict=True):
        moments = measured.moments["q", use.use] if what == "K" else _columns(model, side.trace.leaves[0])
        np.add.at(reader, side.channel, moments * (use.scale**2 / use.heads if what == "K" else 1))
    exact, pairs = _constraints(model, sides, mode)
    size = next((n for n in (128, 64, 32) if head % n == 0), head)
    problem = Problem(cached, reader, np.arange(len(cached)) // size, groups(len(cached), pairs))
    signal = 1.0 if what == "K" else max(float(cached @ reader), 1e-30)
    before = balance.noise(problem, np.ones_like(cached))
    if exact:
        scale = balance.solve(problem)
        if outside := _outside(model, sides, scale):
            if mode == "exact":
                raise Refusal(f"its scales take {outside} out of the range of its type: convert without --exact")
            exact = False
    if not exact:
        scale = balance.solve_powers(problem, *_limits(model, sides, len(cached)))
        if outside := _outside(model, sides, scale):  # a weight that is already outside the limits
            raise Refusal(f"{outside} has weights that are not finite")
    after = balance.noise(problem, scale)
    if after < before:
        for side in sides:
            factors = (1 / scale if side.reads else scale)[side.channel]
            for leaf in side.trace.leaves:
                _add(model, scalings, leaf, factors)
    else:
        scale = np.ones_like(scale)
    before, after = before / signal, min(before, after) / signal
    return Balanced(layer, what, exact, before, after, float(scale.max()), float(scale.min()))


def _constraints(model: ModelFile, sides: list[_Side], mode: str) -> tuple[bool, list[tuple[Ints, Ints]]]:
    """Whether all factors are possible, and the pairs of cached channels that must have the same scale."""
    exact = mode != "pow2"
    pairs: list[tuple[Ints, Ints]] = []
    for side in sides:
        pairs += [(side.channel[a], side.channel[b]) for a, b in side.trace.pairs]
        for leaf in side.trace.leaves:
            if leaf.tensor not in model.tensors:
                raise Refusal(f"{leaf.tensor!r} is not a tensor of the file")
            type = model.tensors[leaf.tensor].type
            layout = block(type)
            if type not in FLOATS and (layout is None or leaf.axis == "elements"):
                raise Refusal(f"{leaf.tensor} is {type}, which cannot be scaled")
            if layout and leaf.axis == "columns" and layout.values > 32:
                raise Refusal(f"{leaf.tensor} is {type}, whose columns cannot be scaled on their own")
            if type not in FLOATS and mode == "exact":
                raise Refusal(f"{leaf.tensor} is {type}, which takes powers of two only: convert without --exact")
            if type not in _EXACT and mode != "exact":
                exact = False
            place = leaf.index // layout.values if layout and leaf.axis == "columns" else leaf.index
            order = np.argsort(place, kind="stable")
            same = place[order[1:]] == place[order[:-1]]
            pairs.append((side.channel[order[:-1][same]], side.channel[order[1:][same]]))
    return exact, pairs


def _limits(model: ModelFile, sides: list[_Side], channels: int) -> tuple[Ints, Ints]:
    """The lowest and the highest exponent that the weights of each cached channel allow."""
    low, high = np.full(channels, -100), np.full(channels, 100)
    for side in sides:
        for leaf in side.trace.leaves:
            found = [exponents(rows, type, axis) for rows, type, axis in _pieces(model, leaf)]
            if leaf.axis != "columns":
                least, most = (np.concatenate(parts)[leaf.index] for parts in zip(*found, strict=True))
            else:
                least = np.max([part[0] for part in found], axis=0)[leaf.index]
                most = np.min([part[1] for part in found], axis=0)[leaf.index]
            if side.reads:
                least, most = -most, -least
            np.maximum.at(low, side.channel, least)
            np.minimum.at(high, side.channel, most)
    return low, high


def _outside(model: ModelFile, sides: list[_Side], scale: Floats) -> str:
    """The name of a tensor of floats with values that would leave the range of their type; empty if there is none."""
    for side in sides:
        factors = (1 / scale if side.reads else scale)[side.channel]
        for leaf in side.trace.leaves:
            found = [largest(rows, type, axis) for rows, type, axis in _pieces(model, leaf) if type in FLOATS]
            if not found:
                continue
            magnitudes = np.max(found, axis=0) if leaf.axis == "columns" else np.concatenate(found)
            if not (magnitudes[leaf.index] * factors <= LARGEST[model.tensors[leaf.tensor].type]).all():
                return leaf.tensor
    return ""


def _pieces(model: ModelFile, leaf: Leaf) -> Iterator[tuple[NDArray[np.uint8], str, str]]:
    """The tensor of a leaf, several rows at a time, with its type and axis. Elements are columns of one row."""
    tensor = model.tensors[leaf.tensor]
    for _, rows in model.pieces(tensor):
        if leaf.axis == "elements":
            yield rows.reshape(1, -1), tensor.type, "columns"
        else:
            yield rows, tensor.type, leaf.axis


def _columns(model: ModelFile, leaf: Leaf) -> Floats:
    """The squared lengths of the columns of a leaf, in the order of its channels."""
    tensor = model.tensors.get(leaf.tensor)
    if tensor is None:
        raise Refusal(f"{leaf.tensor!r} is not a tensor of the file")
    total = np.zeros(tensor.shape[0])
    try:
        for values in model.floats(tensor):
            total += np.square(values, dtype=np.float64).sum(axis=0)
    except NotImplementedError:
        raise Refusal(f"{leaf.tensor} is {tensor.type}, which cannot be read") from None
    return total[leaf.index]


def _add(model: ModelFile, scalings: dict[str, list[Scaling]], leaf: Leaf, factors: Floats) -> None:
    tensor = model.tensors[leaf.tensor]
    count = {"rows": tensor.rows, "columns": tensor.shape[0], "elements": int(np.prod(tensor.shape))}[leaf.axis]
    full = np.ones(count)
    full[leaf.index] = factors
    scalings.setdefault(leaf.tensor, []).append(Scaling(leaf.axis, full))
