"""Compare cache types on a model: quality on two paths, retrieval, memory and speed, in one report.

`comparison` has the fields of the report, and `page` renders it.
"""

from __future__ import annotations

import datetime
import platform
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import TurboQuantError
from ..measure import needle
from ..measure.measurer import BASELINE, Measurer, Quality, Run
from ..measure.pairs import CachePair, Window
from ..measure.perplexity import Divergence, base_bytes
from ..measure.programs import ProgramError, Programs
from ..measure.results import Results
from ..measure.speed import GENERATED, PROMPT, REPETITIONS
from . import comparison, verdict
from .comparison import Comparison, Measured, Pair

__all__ = ["CompareError", "CompareOptions", "Model", "above", "check", "compare", "read_model"]

_LEAST_TOKENS = 100  # llama-perplexity computes no statistics for fewer scored tokens
_DECODE_COST = 8  # approximate time of a single token relative to a token in a batch; only progress depends on it

Update = Callable[[str, float, float], None]
"""A callback with the name of the measurement, the work done, and all work, both in about tokens of a batch."""


class CompareError(TurboQuantError):
    """The comparison cannot be made. The text says what to do."""


@dataclass(frozen=True)
class CompareOptions:
    """The options of a comparison.

    Quality is measured on ``chunks`` pieces of ``ctx`` tokens, and token by token on ``decode_chunks`` pieces of
    ``decode_ctx`` tokens. ``depths`` are those of the speed and ``needle_depths`` those of retrieval, in tokens;
    what has no depths is not measured. There are ``positions`` needles at each depth. With ``time_again`` stored speeds
    are not used. ``window`` is the exact window of all pairs that may have one; None is llama.cpp's default.
    """

    model: Path
    text: Path
    pairs: list[CachePair]
    ctx: int = 2048
    chunks: int = 12
    decode_ctx: int = 512
    decode_chunks: int = 2
    depths: Sequence[int] = (0, 4096, 16384)
    needle_depths: Sequence[int] | None = None
    positions: int = 5
    template: str = needle.TEMPLATES["plain"]
    time_again: bool = False
    window: Window | None = None
    command: Sequence[str] = field(default_factory=list)

    @property
    def all_pairs(self) -> list[CachePair]:
        """The pairs with the f16 cache first, because the others are compared with it."""
        return list(dict.fromkeys([BASELINE, *(pair.with_window(self.window) for pair in self.pairs)]))


@dataclass(frozen=True)
class Model:
    """The description of the model in its file."""

    name: str
    architecture: str
    context: int
    vocabulary: int
    layers: int
    bytes: int
    plan: bool = False  #: whether its metadata have a plan of cache types, which `-ctk auto -ctv auto` uses


# ---- before anything is run ------------------------------------------------------------------------------------------


def read_model(path: Path) -> Model:
    """Read a model's metadata, and check that the file is complete.

    Raises:
        CompareError: the file does not exist, is no GGUF model, or is truncated. The text says what to do.
    """
    from ..models.modelfile import ModelFile

    if not path.is_file():
        raise CompareError(f"{path}: no such file; give a GGUF model with -m")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CompareError(
                f"{path} is not a GGUF model; convert it with llama.cpp's convert_hf_to_gguf.py, or get a GGUF"
            )
    with ModelFile(path) as opened:
        metadata, tensors = opened.metadata, opened.tensors
    architecture = str(metadata.get("general.architecture", ""))
    context = metadata.get(f"{architecture}.context_length")
    embedding = tensors.get("token_embd.weight")
    if not isinstance(context, int) or embedding is None or len(embedding.shape) != 2:
        raise CompareError(
            f"{path} holds no language model (architecture {architecture or 'unknown'!r}); give another with -m"
        )
    return Model(
        name=str(metadata.get("general.name", path.stem)),
        architecture=architecture,
        context=context,
        vocabulary=embedding.shape[1],
        layers=metadata.get(f"{architecture}.block_count", 0),
        bytes=path.stat().st_size,
        plan="turboquant.plan.version" in metadata,
    )


def check(options: CompareOptions, model: Model, scratch: Path) -> None:
    """Check the options first, because otherwise errors would occur after minutes.

    Raises:
        CompareError: an option is invalid, or the text or the disk space is too small. The text says what to do.
    """
    if not options.text.is_file():
        raise CompareError(f"{options.text}: no such file; give a UTF-8 text with -f")
    if not options.text.read_bytes().strip():
        raise CompareError(f"{options.text} is empty; give a text of at least {2 * options.ctx} tokens with -f")
    if options.ctx > model.context:
        raise CompareError(f"--ctx {options.ctx} is more than the model's context; give --ctx {model.context} or less")
    for ctx, chunks in ((options.ctx, options.chunks), (options.decode_ctx, options.decode_chunks)):
        if (ctx - 1 - ctx // 2) * chunks < _LEAST_TOKENS:
            raise CompareError(
                f"{chunks} chunks of {ctx} tokens have fewer than {_LEAST_TOKENS} scored ones; give a larger --ctx or "
                "--chunks"
            )
    # A token has at least one byte, so a text with fewer bytes than required tokens is too short.
    least = max(2, options.chunks) * options.ctx
    if options.text.stat().st_size < least:
        raise CompareError(
            f"{options.text} has {options.text.stat().st_size} bytes, too few for {max(2, options.chunks)} chunks of "
            f"{options.ctx} tokens; give a longer text, or smaller --chunks or --ctx"
        )
    needed = base_bytes(model.vocabulary, options.ctx, options.chunks)
    folder = next(path for path in (scratch, *scratch.parents) if path.is_dir())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise CompareError(
            f"f16's predictions take {needed / 1e9:.1f} GB in {scratch}, where {free / 1e9:.1f} GB are free; free "
            "some, give fewer --chunks, or set TURBOQUANT_CACHE to a folder on another disk"
        )


def needle_depths(options: CompareOptions, model: Model) -> list[int]:
    """The given depths, or a quarter, half and all of the context, limited to the deepest of the speed's depths."""
    if options.needle_depths is not None:
        return list(options.needle_depths)
    deepest = min(model.context, max([*options.depths, 4096]))
    return [deepest // 4, deepest // 2, deepest]


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    """One needle, or the reason why there is none."""

    depth: int
    position: float
    needle: needle.Needle | None
    reason: str = ""


class _Work:
    """Sums the measurements for the progress bar, by label. Stored results are not counted."""

    def __init__(self, update: Update | None) -> None:
        self._update = update
        self._costs: dict[str, float] = {}
        self._done = 0.0
        self._current = ""

    def plan(self, label: str, cost: float) -> None:
        self._costs[label] = self._costs.get(label, 0.0) + cost

    def drop(self, label: str) -> None:
        """Remove a step that turned out to be unnecessary."""
        self._costs.pop(label, None)

    def step(self, label: str, done: int, total: int) -> None:
        if label != self._current:
            self.end()
            self._current = label
        if self._update:
            part = self._costs.get(label, 0.0) * done / max(1, total)
            self._update(label, self._done + part, sum(self._costs.values()))

    def end(self) -> None:
        """Count the running measurement as done, whether it finished or failed."""
        self._done += self._costs.get(self._current, 0.0)
        self._current = ""


def compare(
    options: CompareOptions,
    model: Model,
    programs: Programs,
    results: Results,
    scratch: Path,
    update: Update | None = None,
) -> Comparison:
    """Measure every pair and return the report. Stored results are not measured again.

    Args:
        results, scratch: see `Measurer`.
        update: see `Update`.

    Raises:
        CompareError, ProgramError: the f16 cache, with which all pairs are compared, could not be measured.
        OSError: a file cannot be read or written.
    """
    work = _Work(update)
    measurer = Measurer(options.model, options.text, programs, results, scratch, work.step)
    depths = needle_depths(options, model)
    cells = _cells(measurer, options, model, depths)
    batched = {pair: Run.as_generated(pair, options.ctx, options.chunks) for pair in options.all_pairs}
    # The paths can only be compared without a window: a batch sees its own tokens exactly, a single token does not.
    plain = {pair: pair.with_window(Window(0)) for pair in options.all_pairs}
    ctx, chunks = options.decode_ctx, options.decode_chunks
    short = {pair: Run(plain[pair], ctx, chunks) for pair in options.all_pairs}
    single = {pair: Run(plain[pair], ctx, chunks, decode=True) for pair in options.all_pairs}
    decode = {pair: Run(pair, ctx, chunks, decode=True) for pair in options.all_pairs}
    path = list(dict.fromkeys(run[pair] for pair in options.all_pairs for run in (short, single, decode)))
    _plan(work, measurer, options, cells, list(batched.values()), path)

    failed: dict[Run, str] = {}
    found = measurer.quality(list(batched.values()), failed)
    alive = [pair for pair in options.all_pairs if batched[pair] not in failed]
    for pair in alive:
        if decode[pair] != single[pair] and not found[batched[pair]].caches.total().window_tokens:
            work.drop(decode[pair].label)
            decode[pair] = single[pair]
    path = list(dict.fromkeys(run[pair] for pair in alive for run in (short, single, decode)))
    found |= measurer.quality(path, failed)
    base = [run[BASELINE] for run in (batched, short, single)]
    for reason in [failed[run] for run in base if run in failed] or _not_finite([found[run] for run in base]):
        raise CompareError(f"the f16 cache, with which all are compared, could not be measured: {reason}")
    noise_decode = _divergence(found[single[BASELINE]])
    noise = verdict.Noise(
        max(_divergence(found[run[BASELINE]]).kld for run in (batched, short)), noise_decode.kld, noise_decode.kld_error
    )
    scale = verdict.bands(noise)

    rows: list[Pair] = []
    machine: dict[str, Any] = {}
    for pair in options.all_pairs:
        runs = [run[pair] for run in (batched, short, single, decode)]
        reasons = [failed[run] for run in runs if run in failed] or _not_finite([found[run] for run in runs])
        about = Pair(
            pair.k, pair.v, str(pair.plan) if pair.plan else None, str(pair), reasons[0] if reasons else None
        )
        if reasons:
            rows.append(about)
            continue
        main, *paths, alone = (found[run] for run in runs)
        rows.append(
            Measured(
                **vars(about),
                **_memory(pair, main, found[batched[BASELINE]], model),
                **_quality(pair, main, alone, (paths[0], paths[1]), noise, scale),
                needles=[_ask(measurer, pair, cell, work) for cell in cells],
                speed=[_speed(measurer, pair, depth, machine, options.time_again) for depth in options.depths],
            )
        )
    work.end()
    return Comparison(
        format=comparison.FORMAT,
        version=comparison.VERSION,
        created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        turboquant=__version__,
        command=list(options.command),
        model=comparison.Model(
            path=str(options.model),
            sha256=measurer.model_hash,
            **asdict(model),
            type=machine.get("model_type"),
            parameters=machine.get("model_n_params"),
        ),
        text=comparison.Text(str(options.text), measurer.text_hash, options.text.stat().st_size),
        build=comparison.Build(
            bin=str(programs.folder),
            sha256=measurer.build,
            commit=machine.get("build_commit"),
            number=machine.get("build_number"),
        ),
        machine=comparison.Machine(
            cpu=machine.get("cpu_info") or platform.processor(),
            gpu=machine.get("gpu_info") or None,
            backends=machine.get("backends"),
            system=platform.platform(),
            threads=programs.threads,
            gpu_layers=programs.gpu_layers,
        ),
        settings=comparison.Settings(
            ctx=options.ctx,
            chunks=options.chunks,
            decode_ctx=options.decode_ctx,
            decode_chunks=options.decode_chunks,
            depths=list(options.depths),
            prompt=PROMPT,
            generated=GENERATED,
            repetitions=REPETITIONS,
            needle_depths=depths,
            positions=options.positions,
            template=options.template,
            window=str(options.window) if options.window else None,
        ),
        noise=comparison.Noise(**asdict(noise), floor=noise.floor),
        bands=[comparison.Band(one.name, None if one is scale[-1] else one.up_to, one.meaning) for one in scale],
        pairs=rows,
        recommendation=_recommendation([row for row in rows if isinstance(row, Measured)], scale, options.window),
    )


def above(report: Comparison, limit: float) -> list[str]:
    """One line for each pair whose KLD exceeds `limit` on one of the paths, or that could not be measured."""
    lines = []
    for row in report.pairs:
        if not isinstance(row, Measured):
            lines.append(f"{row.label} could not be measured: {row.failure}")
        elif (worst := max(row.quality.kld, row.decode.kld)) > limit:
            lines.append(f"{row.label} has a KLD of {worst:.6f}, above {limit:g}")
    return lines


def _plan(
    work: _Work, measurer: Measurer, options: CompareOptions, cells: list[_Cell], main: list[Run], path: list[Run]
) -> None:
    """Count the measurements that are not stored."""
    for runs in (main, [run for run in path if run not in main]):
        missing = [run for run in runs if measurer.stored_quality(run) is None]
        for run in missing:
            work.plan(run.label, run.ctx * run.chunks * (_DECODE_COST if run.decode else 1))
        if missing:
            base = Run(BASELINE, missing[0].ctx, missing[0].chunks)
            work.plan(f"{base.label}, base", base.ctx * base.chunks)
    for pair in options.all_pairs:
        for cell in cells:
            if cell.needle and measurer.stored_answer(cell.needle, pair, cell.depth) is None:
                work.plan(_needle_label(pair, cell), cell.depth)
        for depth in options.depths:
            if options.time_again or measurer.stored_speed(pair, depth) is None:
                cost = depth + REPETITIONS * (PROMPT + GENERATED * _DECODE_COST)
                work.plan(measurer.speed_label(pair, depth), cost)


def _needle_label(pair: CachePair, cell: _Cell) -> str:
    return f"needle {pair} at depth {cell.depth}, {cell.position:.0%}"


def _cells(measurer: Measurer, options: CompareOptions, model: Model, depths: list[int]) -> list[_Cell]:
    text = options.text.read_text(encoding="utf-8", errors="replace") if depths else ""
    cells: list[_Cell] = []
    for depth in depths:
        for place in range(options.positions):
            position = (place + 0.5) / options.positions  # not at the very start or end
            try:
                if depth > model.context:
                    raise ValueError(f"beyond the model's context of {model.context} tokens")
                one = needle.fit_grid_needle(
                    text, depth, position, len(cells), measurer.count_tokens, template=options.template
                )
                cells.append(_Cell(depth, position, one))
            except (ValueError, ProgramError) as error:
                cells.append(
                    _Cell(depth, position, None, error.reason if isinstance(error, ProgramError) else str(error))
                )
    return cells


def _ask(measurer: Measurer, pair: CachePair, cell: _Cell, work: _Work) -> comparison.Needle:
    reason, answer = cell.reason, None
    if cell.needle is not None:
        if measurer.stored_answer(cell.needle, pair, cell.depth) is None:
            work.step(_needle_label(pair, cell), 0, 1)
        try:
            answer = measurer.answer(cell.needle, pair, cell.depth)
        except ProgramError as error:
            reason = error.reason
    expected = cell.needle.number if cell.needle else None
    found = None if answer is None else answer == expected
    return comparison.Needle(cell.depth, cell.position, expected, answer, found, reason or None)


def _speed(
    measurer: Measurer, pair: CachePair, depth: int, machine: dict[str, Any], again: bool
) -> comparison.Timing:
    try:
        speed, told = measurer.speed(pair, depth, again)
    except ProgramError as error:
        return comparison.Timing(depth, None, None, None, None, error.reason)
    machine |= told
    return comparison.Timing(**asdict(speed), reason=None)


# ---- rows of the report ----------------------------------------------------------------------------------------------


def _divergence(quality: Quality) -> Divergence:
    assert quality.divergence is not None
    return quality.divergence


def _not_finite(found: list[Quality]) -> list[str]:
    """The reasons of results without finite numbers."""
    return [quality.failure for quality in found if quality.failure]


def _memory(pair: CachePair, quality: Quality, f16: Quality, model: Model) -> dict[str, Any]:
    size, (bits_k, bits_v) = quality.caches.total(), quality.bits(f16)
    # From the size of f16, where the rounding of the log matters least.
    full = f16.caches.at(model.context)
    k_mib, v_mib = full.k_mib * bits_k / 16, full.v_mib * bits_v / 16
    window = quality.caches.at(model.context, pair.window.tokens if pair.window else None)
    return {
        "type_k": size.type_k,
        "type_v": size.type_v,
        "bits_k": bits_k,
        "bits_v": bits_v,
        "bits": round(16 * (k_mib + v_mib) / full.mib, 4),
        "k_mib": round(k_mib, 2),
        "v_mib": round(v_mib, 2),
        "window_tokens": window.window_tokens,
        "window_type": window.window_type or None,
        "window_mib": window.window_mib,
        "mib": round(k_mib + v_mib + window.window_mib, 2),
    }


def _quality(
    pair: CachePair,
    batched: Quality,
    decode: Quality,
    same: tuple[Quality, Quality],
    noise: verdict.Noise,
    scale: list[verdict.Band],
) -> dict[str, Any]:
    """The results of a pair. `same` has those of the two paths on the same tokens, without a window."""
    paths = verdict.agreement(_divergence(same[0]), _divergence(same[1]), noise)
    if pair == BASELINE:  # the difference of f16 is the noise itself, so it is judged by the band of small losses
        paths = verdict.Agreement(paths.batched, paths.decode, scale[1].up_to - scale[0].up_to)
    return {
        "quality": _divergence(batched),
        "decode": _divergence(decode),
        "paths": comparison.Paths(
            paths.batched, paths.decode, paths.decode - paths.batched, paths.allowed, paths.agree
        ),
        "verdict": verdict.band(_divergence(batched).kld, scale).name,
    }


def _recommendation(
    rows: list[Measured], scale: list[verdict.Band], window: Window | None
) -> comparison.Recommendation:
    candidates = [
        verdict.Candidate(row.label, row.bits, row.mib, row.quality.kld, row.found, row.asked, row.paths.agree)
        for row in rows
    ]
    best, reason = verdict.recommend(candidates, candidates[0], scale)
    row = next(row for row in rows if row.label == (best or candidates[0]).label)
    pair = CachePair(row.k, row.v).with_window(window)
    arguments = ["--cache-plan", shlex.quote(row.plan)] if row.plan else pair.arguments
    arguments += ["--cache-window", str(window)] if pair.window else []
    return comparison.Recommendation(best.label if best else None, " ".join(arguments), reason)
