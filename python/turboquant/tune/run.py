"""`turboquant tune`: measure every layer, choose the types for a budget, check the choice on other text."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from .._output import check_new, partial_file, publish
from ..errors import TurboQuantError
from ..llama.build import where
from ..llama.paths import bundled_text, cache_dir
from ..llama.progress import Reporter, Track, duration
from ..measure.capture import check_model
from ..measure.pairs import CachePair, Window
from ..measure.programs import Programs
from ..measure.results import Results, file_hash
from ..models.modelfile import ModelFile
from ..plan import CacheShape, Plan, check_target, fitting, write_plan
from .allocate import Choice, allocate, allocate_for_loss, least, most
from .losses import PROBES, estimate, finer, relative_error
from .meter import Measured, Meter, Span

__all__ = ["DEFAULT_TYPES", "GPU_TYPES", "UNIFORM", "Goal", "TuneError", "TuneOptions", "Tuned", "tune"]

#: Types to choose from. Only K may be f16, because V never needs it. A trellis-coded type has a smaller error than the
#: Lloyd-Max type with as many bits.
DEFAULT_TYPES = ("turbo2_tcq", "turbo3_tcq", "turbo4_tcq", "q8_0", "f16")
#: The same for layers on a GPU, where attention over trellis-coded types is slower.
GPU_TYPES = ("turbo2", "turbo3", "turbo4", "q8_0", "f16")
#: Pairs that the result is compared with; on a GPU with the Lloyd-Max types.
UNIFORM = ("q8_0", "q8_0/turbo4_tcq", "q8_0/turbo3_tcq", "turbo4_tcq", "turbo3_tcq")
#: The type of all other layers while one layer is measured. Its own loss is part of the noise floor.
BASE = "q8_0"

_CONTEXT, _CHECK_CONTEXT = 512, 2048
_TRIES = 4  # greatest number of attempts to meet --kld on the text of the check
_LEAST = 0.1  # least assumed cost of a layer as a share of the median cost of K or V, because small costs are noise
_NOTICE = 0.0005  # a layer's K is measured in f16 if its KLD in q8_0, in nats, exceeds this


class TuneError(TurboQuantError):
    """No plan was found, and no file was written. The text gives the reason."""


@dataclass(frozen=True)
class Goal:
    """The goal; exactly one field is set."""

    bits: float | None = None  #: mean bits per value of K and V
    mib: float | None = None  #: size of the cache at the context, including the exact window, in MiB
    kld: float | None = None  #: KLD on the text of the check, in nats per token

    def __post_init__(self) -> None:
        given = [value for value in (self.bits, self.mib, self.kld) if value is not None]
        if len(given) != 1:
            raise TuneError("give one of --bits (mean bits per value), --mib with --ctx (the cache's size) and --kld")
        if not 0 < given[0] < 1e9:
            raise TuneError(f"{self} cannot be met: give a number above 0")

    def __str__(self) -> str:
        name, value = next((name, value) for name, value in vars(self).items() if value is not None)
        return f"--{name} {value:g}"


@dataclass(frozen=True)
class TuneOptions:
    """The options of `tune`. `context` is the number of tokens that the cache is planned for (default: the model's)."""

    model: Path
    goal: Goal
    target: Path
    text: Path | None = None
    context: int | None = None
    types: Sequence[str] | None = None
    chunks: int = 2
    check_chunks: int = 2
    write_into: Path | None = None
    bin: Path | None = None
    threads: int | None = None
    gpu_layers: int = 0
    command: Sequence[str] = field(default_factory=list)


@dataclass(frozen=True)
class Candidate:
    """A cache and its loss; `measured` is None if it was not measured."""

    label: str
    bits_k: float
    bits_v: float
    bits: float
    mib: float  #: size of K, V and the exact window
    measured: Measured | None
    window_mib: float = 0.0


@dataclass(frozen=True)
class Tuned:
    """The plan, and the measurements that it is based on."""

    plan: Plan
    shape: CacheShape
    context: int
    costs: dict[tuple[str, int], dict[str, float]]  #: KLD of every type, by side and layer
    floor: float  #: noise floor: KLD that every change of the cache causes on the tuning text
    predicted: float  #: predicted KLD on the tuning text
    result: Candidate
    uniform: list[Candidate]
    frontier: list[tuple[float, float]]  #: bits per value and predicted KLD, for many budgets
    scored: tuple[int, int]  #: tokens scored by a run, for tuning and for the check
    window: Window  #: the exact window that the sizes include; all measurements are made without one
    replaced: bool  #: whether a plan of that name was replaced


def tune(options: TuneOptions, reporter: Reporter | None = None) -> Tuned:
    """Find the plan, write it, and write it into a copy of the model if requested.

    Results are stored, so the same call continues after an interruption.

    Raises:
        TuneError, MeasureError, PlanError, OutputError, ModelError: the text gives the reason. No incomplete file is
            left.
    """
    reporter = reporter or Reporter()
    text = options.text or bundled_text()
    check_model(options.model)
    if not text.is_file():
        raise TuneError(f"{text}: no such file; give a text with -f")
    check_target(options.target)
    with ModelFile(options.model) as model:
        metadata, size = model.metadata, model.size
    if options.write_into:
        _check_copy(options.model, options.write_into, metadata, size)
    scratch = cache_dir() / "evaluate"
    results = Results(scratch / "results")
    programs = Programs(options.bin or where(), scratch / "logs", options.threads, options.gpu_layers)
    most_context = int(metadata.get(f"{metadata.get('general.architecture')}.context_length", _CHECK_CONTEXT))
    spans = (
        Span("50%", options.chunks, min(_CONTEXT, most_context)),
        Span("0", options.check_chunks, min(_CHECK_CONTEXT, most_context)),
    )
    tuning, check = (Meter(options.model, text, span, programs, results, scratch, metadata) for span in spans)
    with reporter.track("starting", 1, "work") as track, tuning, check:
        tuner = _Tuner(options, text, tuning, check, _Work(track, reporter))
        done = tuner.run(file_hash(text, results))
    replaced = write_plan(options.target, done.plan)
    if options.write_into:
        _write_copy(options.model, options.write_into, done.plan, reporter)
    return replace(done, replaced=replaced)


class _Work:
    """The progress bar, which counts tokens. After the first run it prints an estimate of the total time."""

    def __init__(self, track: Track, reporter: Reporter) -> None:
        self._track, self._reporter = track, reporter
        self.left = 0  # tokens of the remaining runs
        self._done = 0
        self._told = False

    def run(self, label: str, tokens: int, work: Callable[[Callable[[int, int], None]], Measured]) -> Measured:
        """Run `work`, which evaluates `tokens` tokens."""
        start = time.monotonic()
        self.left = max(self.left, tokens)
        total = self._done + self.left
        self._track.update(self._done, total, label)
        found = work(lambda done, of: self._track.update(self._done + tokens * done // of, total, label))
        self._done, self.left = self._done + tokens, self.left - tokens
        if not self._told and self.left:
            seconds = (time.monotonic() - start) / tokens * self.left
            self._reporter.say(f"{self.left} tokens are still to be evaluated: about {duration(seconds)}")
        self._told = True
        return found


class _Tuner:
    def __init__(self, options: TuneOptions, text: Path, tuning: Meter, check: Meter, work: _Work) -> None:
        self.options, self.text, self.tuning, self.check, self.work = options, text, tuning, check, work
        self.shape = tuning.shape()
        self.context = options.context or min(self.shape.context or _CHECK_CONTEXT, 32768)
        try:
            self.window = Window.default()
        except ValueError as error:
            raise TuneError(f"{Window.VARIABLE}: {error}") from error
        self.slots = [(side, number) for side in "kv" for number, _ in self.shape.cached()]
        gpu = options.gpu_layers > 0
        given = tuple(options.types or (GPU_TYPES if gpu else DEFAULT_TYPES))
        self.uniform = [CachePair.parse(text.replace("_tcq", "") if gpu else text) for text in UNIFORM]
        self.types = {"k": given, "v": given if options.types else tuple(type for type in given if type != "f16")}

    def run(self, text_hash: str) -> Tuned:
        self._refuse_early()
        pairs = [pair for pair in self.uniform if self._fits(pair)]
        self._expect(pairs)
        costs, floor = self._measure_layers()
        items = [self._choices(slot, costs[slot]) for slot in self.slots]
        self._check_text()
        uniform = [self._candidate(str(pair), *self._uniform(pair)) for pair in pairs]
        chosen, result = self._solve(items, floor, uniform)
        k, v = self._types_of(chosen)
        predicted = floor + sum(choice.loss for choice in chosen)
        plan = Plan(k, v, self.tuning.info().model or None, self._about(result, predicted, text_hash))
        scored = (self.tuning.scored, self.check.scored)
        return Tuned(
            plan, self.shape, self.context, costs, floor, predicted, result, uniform, self._frontier(items, floor),
            scored, self.window, False,
        )  # fmt: skip

    # ---- before the long work ----

    def _refuse_early(self) -> None:
        for side in "kv":
            if not self.types[side]:
                raise TuneError("--types names no type for V: f16 is for K alone")
            for type in self.types[side]:
                relative_error(type)
                for number, layer in self.shape.cached():
                    if fitting(type, layer.head(side)) is None:
                        raise TuneError(
                            f"{type} does not fit the heads of {layer.head(side)} values of layer {number}: leave it out "
                            "with --types"
                        )
        goal = self.options.goal
        if goal.kld is None:
            items = [self._choices(slot, {type: -relative_error(type) for type in self.types[slot[0]]})
                     for slot in self.slots]  # fmt: skip
            cheapest = sum(min(choice.cost for choice in item) for item in items)
            dearest = sum(max(choice.cost for choice in item) for item in items)
            if self._budget(self._most_window()) < cheapest * (1 - 1e-9):
                unit, scale = ("bits per value", 1 / self.shape.values(self.context)) if goal.bits else (
                    f"MiB at a context of {self.context} tokens", 1 / 8 / (1 << 20))  # fmt: skip
                window = 0.0 if goal.bits else self._most_window()
                more = f", and up to {window:.4g} MiB for the exact window of {self.window}" if window else ""
                raise TuneError(
                    f"{goal} cannot be met: with {', '.join(self.types['k'])} this model's cache takes from "
                    f"{cheapest * scale:.4g} to {dearest * scale:.4g} {unit}{more}"
                )

    def _check_text(self) -> None:
        """Check that the text is long enough. The check uses its first tokens, the tuning those from the middle on."""
        info, tuning, check = self.tuning.info(), self.tuning.span, self.check.span
        before = info.first * tuning.context
        if check.count * check.context > before:
            raise TuneError(
                f"{self.text} is too short to check the plan on text that it was not tuned on: its first half has "
                f"{before} tokens, and {check.count} chunks of {check.context} are needed; give a longer text with -f, or "
                "fewer --check-chunks"
            )

    def _fits(self, pair: CachePair) -> bool:
        return all(
            fitting(pair.k, layer.head_k) and fitting(pair.v, layer.head_v) for _, layer in self.shape.cached()
        )

    def _expect(self, pairs: Sequence[CachePair]) -> None:
        """Count the tokens of the runs that are certain to be needed."""
        self._check_text()
        tuning, check = self.tuning.span.tokens, self.check.span.tokens
        runs = [self._base(), *(self._one(slot, PROBES[slot[0]]) for slot in self.slots)]
        new = sum(self.tuning.stored(k, v) is None for k, v in runs)
        beside = sum(self.check.stored(*self._uniform(pair)) is None for pair in pairs)
        # Each first run includes an f16 run. 2: the plan is checked, and perhaps one more plan.
        self.work.left = (new + bool(new)) * tuning + (beside + 2) * check

    # ---- measuring ----

    def _measure_layers(self) -> tuple[dict[tuple[str, int], dict[str, float]], float]:
        """The loss of each type in each layer, and the noise floor."""
        base = self._run(self.tuning, self._base(), f"all layers in {BASE}").kld
        measured: dict[tuple[str, int], dict[str, float]] = {}
        for side, number in self.slots:
            found: dict[str, float] = {}
            type: str | None = PROBES[side]
            while type:
                label = f"{side.upper()} of layer {number} in {type}"
                found[type] = self._run(self.tuning, self._one((side, number), type), label).kld - base
                type = finer(found)
            measured[side, number] = found
        for side in "kv":
            sides = [slot for slot in self.slots if slot[0] == side]
            probe = PROBES[side]
            median = sorted(measured[slot][probe] for slot in sides)[len(sides) // 2]
            for slot in sides:
                measured[slot] = {
                    type: max(kld, _LEAST * max(median, 1e-6) * relative_error(type) / relative_error(probe))
                    for type, kld in measured[slot].items()
                }
        costs = {}
        for slot in self.slots:
            if slot[0] == "k" and "f16" in self.types["k"] and estimate(measured[slot], [BASE])[BASE] > _NOTICE:
                exact = self._run(self.tuning, self._one(slot, "f16"), f"K of layer {slot[1]} in f16").kld
                measured[slot][BASE] = max(base - exact, 0.0)
            costs[slot] = estimate(measured[slot], list(dict.fromkeys([*self.types[slot[0]], BASE])))
        floor = max(0.0, base - sum(costs[slot][BASE] for slot in self.slots))
        return costs, floor

    def _run(self, meter: Meter, types: tuple[list[str | None], list[str | None]], label: str) -> Measured:
        if known := meter.stored(*types):
            return known
        tokens = meter.span.tokens * (1 if meter.ready else 2)
        return self.work.run(label, tokens, lambda step: meter.measure(*types, step))

    def _base(self) -> tuple[list[str | None], list[str | None]]:
        return self._uniform(CachePair(BASE, BASE))

    def _uniform(self, pair: CachePair) -> tuple[list[str | None], list[str | None]]:
        k: list[str | None] = [pair.k if layer else None for layer in self.shape.layers]
        v: list[str | None] = [pair.v if layer else None for layer in self.shape.layers]
        return k, v

    def _one(self, slot: tuple[str, int], type: str) -> tuple[list[str | None], list[str | None]]:
        """The base plan with another type in one place."""
        k, v = self._base()
        (k if slot[0] == "k" else v)[slot[1]] = type
        return k, v

    # ---- choosing ----

    def _choices(self, slot: tuple[str, int], costs: dict[str, float]) -> list[Choice]:
        side, number = slot
        layer = self.shape.layers[number]
        assert layer is not None
        cells = self.shape.cells(layer, self.context)
        return [Choice(type, layer.bits(side, type) * cells, costs[type]) for type in self.types[side]]

    def _budget(self, window_mib: float) -> float:
        """The bits per value that remain for K and V with an exact window of that size."""
        goal = self.options.goal
        if goal.bits is not None:
            return goal.bits * self.shape.values(self.context)
        assert goal.mib is not None
        return (goal.mib - window_mib) * 8 * (1 << 20)

    def _allocate(self, items: list[list[Choice]]) -> list[Choice]:
        """The best choices for the budget. A plan without turbo types has no window, so all bits are for K and V."""
        chosen = allocate(items, self._budget(0.0))
        plan = Plan(*self._types_of(chosen))
        window, spent = self.shape.window_mib(plan, self.context, self.window), self.shape.mib(plan, self.context)
        if self.options.goal.mib is None or spent + window <= self.options.goal.mib:
            return chosen
        return allocate(items, self._budget(self._most_window()))

    def _most_window(self) -> float:
        """The size of the exact window in MiB if every layer has a turbo type."""
        turbo = next((type for types in self.types.values() for type in types if type.startswith("turbo")), None)
        if turbo is None:
            return 0.0
        k, v = self._uniform(CachePair(turbo, turbo))
        return self.shape.window_mib(Plan(tuple(k), tuple(v)), self.context, self.window)

    def _solve(
        self, items: list[list[Choice]], floor: float, uniform: Sequence[Candidate]
    ) -> tuple[list[Choice], Candidate]:
        limit = self.options.goal.kld
        if limit is None:
            chosen = self._allocate(items)
            return chosen, self._candidate("plan", *self._types_of(chosen))
        # After the first attempt the ratio of the KLDs on the two texts is known.
        own_floor = min([one.measured.kld for one in uniform if one.measured], default=floor)
        wanted, best, lowest = max(limit - own_floor, 0.0), None, float("inf")
        for _ in range(_TRIES):
            try:
                chosen = allocate_for_loss(items, wanted)
            except ValueError:
                chosen = allocate(items, most(items))
            result = self._candidate("plan", *self._types_of(chosen))
            assert result.measured is not None
            kld, loss = result.measured.kld, sum(choice.loss for choice in chosen)
            lowest = min(lowest, kld)
            if kld <= limit and (best is None or result.bits < best[1].bits):
                best = (chosen, result)
            if loss <= 0 or limit <= own_floor or 0.85 * limit <= kld <= limit:
                break
            wanted = 0.95 * (limit - own_floor) * loss / max(kld - own_floor, 1e-9)
        if best is None:
            raise TuneError(
                f"{self.options.goal} cannot be met: the best plan of {', '.join(self.types['k'])} has a KLD of {lowest:.4f} "
                f"on this text, of which {own_floor:.4f} are what any quantized cache costs this model"
            )
        return best

    def _types_of(self, chosen: Sequence[Choice]) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
        sides: dict[str, list[str | None]] = {side: [None] * len(self.shape.layers) for side in "kv"}
        for (side, number), choice in zip(self.slots, chosen, strict=True):
            sides[side][number] = choice.name
        return tuple(sides["k"]), tuple(sides["v"])

    def _candidate(self, label: str, k: Sequence[str | None], v: Sequence[str | None]) -> Candidate:
        measured = self._run(self.check, (list(k), list(v)), f"checking {label}")
        plan, shape, context = Plan(tuple(k), tuple(v)), self.shape, self.context
        k_bits, v_bits, bits = (shape.mean_bits(plan, context, sides) for sides in ("k", "v", "kv"))
        window = shape.window_mib(plan, context, self.window)
        return Candidate(label, k_bits, v_bits, bits, shape.mib(plan, context) + window, measured, window)

    def _frontier(self, items: list[list[Choice]], floor: float) -> list[tuple[float, float]]:
        low, high, values = least(items), most(items), self.shape.values(self.context)
        points = []
        for part in range(33):
            budget = low + (high - low) * part / 32
            chosen = allocate(items, budget)
            cost = sum(choice.cost for choice in chosen)
            points.append((cost / values, floor + sum(choice.loss for choice in chosen)))
        return points

    def _about(self, result: Candidate, predicted: float, text_hash: str) -> dict[str, Any]:
        measured = result.measured
        assert measured is not None
        spans = {"tuning": self.tuning.span, "check": self.check.span}
        return {
            "tool": f"turboquant {_version()}",
            "command": list(self.options.command),
            "goal": {name: value for name, value in vars(self.options.goal).items() if value is not None},
            "model": self.options.model.name,
            "text": self.text.name,
            "text_sha256": text_hash,
            "tokens": {name: span.tokens for name, span in spans.items()},
            "context": self.context,
            "bits": {"k": round(result.bits_k, 4), "v": round(result.bits_v, 4), "mean": round(result.bits, 4)},
            "mib": round(result.mib, 3),
            "window": {"counted": str(self.window), "mib": round(result.window_mib, 3)},
            "kld": {"predicted": round(predicted, 6), "measured": round(measured.kld, 6), "error": round(measured.error, 6)},
            "same_top": round(measured.same_top, 4),
        }


# ---- the plan inside a model -----------------------------------------------------------------------------------------


def _check_copy(model: Path, target: Path, metadata: dict[str, Any], size: int) -> None:
    check_new(target)
    if metadata.get("split.count", 0) > 1:
        raise TuneError(f"{model} is one of several parts: join them first with `llama-gguf-split --merge`")
    if (free := shutil.disk_usage(target.parent).free) < size:
        raise TuneError(
            f"{target.parent} has {free / 1e9:.2f} GB left, and {target.name} needs {size / 1e9:.2f} GB: make room, or "
            "give a file on another disk"
        )


def _write_copy(model: Path, target: Path, plan: Plan, reporter: Reporter) -> None:
    with ModelFile(model) as source, partial_file(target) as partial:
        with reporter.track(f"writing {target}", source.size, "bytes") as track:
            source.write(partial, {}, plan.to_metadata(), track.update)
        publish(partial, target)


def _version() -> str:
    try:
        return package_version("turboquant")
    except PackageNotFoundError:  # the package runs from a checkout
        return "unknown"

