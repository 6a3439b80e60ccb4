"""Measure a model with a list of cache types: every result comes from the results cache, or from a run.

`Measurer` measures one thing at a time; `measure` makes the quickstart's table of it, `compare` a whole report.
"""

from __future__ import annotations

import math
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..llama.files import lock
from . import needle, perplexity, speed
from .kvsize import Caches
from .pairs import CachePair, bits_per_value
from .programs import ProgramError, Programs
from .results import Results, file_hash

__all__ = ["BASELINE", "Measurer", "Options", "Quality", "Row", "Run", "format_bits", "measure"]

BASELINE = CachePair("f16", "f16")
_FORMAT = 2  # raise it when a stored result changes its meaning

Progress = Callable[[str, int, int], None]
"""Called with what is being measured, the steps done and the steps in all."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    The perplexity is that of the text's first ``chunks`` pieces of ``ctx`` tokens (the second half of each is scored).
    ``needles`` questions are asked, each about a number ``distance`` characters earlier, with the prompt ``template``;
    0 asks none.
    """

    model: Path
    text: Path
    pairs: list[CachePair]
    ctx: int = 2048
    chunks: int = 6
    needles: int = 4
    distance: int = 6000
    needle_ctx: int = 4096
    template: str = needle.TEMPLATES["plain"]


@dataclass(frozen=True)
class Row:
    """One line of the table. KLD and same top token are relative to the f16 cache and None for it.

    A pair that could not be measured has the reason as its `failure`, and no numbers. A question that could not be
    asked has None for its answer, and `needle_failure` says why.
    """

    k: str
    v: str
    bits_k: float | None = None
    bits_v: float | None = None
    k_mib: float | None = None
    v_mib: float | None = None
    ppl: float | None = None
    ppl_error: float | None = None
    kld: float | None = None
    kld_error: float | None = None
    same_top: float | None = None
    same_top_error: float | None = None
    answers: list[str | None] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    distance: int | None = None  #: the fewest characters between a number and its question
    failure: str | None = None
    needle_failure: str | None = None

    @property
    def label(self) -> str:
        return str(CachePair(self.k, self.v))

    @property
    def bits(self) -> float | None:
        """Mean of K and V."""
        return None if self.bits_k is None or self.bits_v is None else (self.bits_k + self.bits_v) / 2

    @property
    def mib(self) -> float | None:
        return None if self.k_mib is None or self.v_mib is None else self.k_mib + self.v_mib

    @property
    def found(self) -> int:
        """Needles found."""
        return sum(got == wanted for got, wanted in zip(self.answers, self.expected, strict=True))

    @property
    def asked(self) -> int:
        """Needles asked for."""
        return sum(got is not None for got in self.answers)


@dataclass(frozen=True)
class Run:
    """One perplexity run: ``ctx`` tokens in each of ``chunks`` chunks, as batches or (`decode`) token by token."""

    pair: CachePair
    ctx: int
    chunks: int
    decode: bool = False

    @property
    def label(self) -> str:
        how = ", token by token" if self.decode else ""
        return f"perplexity {self.pair} ({self.chunks} x {self.ctx}{how})"


@dataclass(frozen=True)
class Quality:
    """What a run found. The base's own run has a perplexity alone."""

    values: perplexity.Base | perplexity.Divergence
    caches: Caches


class Measurer:
    """Measures one model and text with one build. What is stored already is not run again."""

    def __init__(
        self,
        model: Path,
        text: Path,
        programs: Programs,
        results: Results,
        scratch: str | Path,
        progress: Progress | None = None,
    ) -> None:
        """Hash what the results depend on.

        Args:
            results: where results are remembered, keyed by the build, the model, the text and the options.
            scratch: a folder for the f16 predictions, which can take gigabytes; they are deleted at the end.
            progress: see `Progress`; called only for what is really run.

        Raises:
            OSError: the model, the text or the build cannot be read.
        """
        self.model, self.text, self.programs, self.results = model, text, programs, results
        self.progress = progress
        self._scratch = Path(scratch)
        self.model_hash, self.text_hash = file_hash(model, results), file_hash(text, results)
        self.build = programs.fingerprint()
        self._common = {
            "format": _FORMAT,
            "build": self.build,
            "model": self.model_hash,
            "threads": programs.threads,
            "gpu_layers": programs.gpu_layers,
        }

    # ---- perplexity ----

    def _quality_key(self, run: Run, base: bool = False) -> dict[str, Any]:
        return {
            **self._common,
            "what": "base" if base else "perplexity", "text": self.text_hash, "pair": run.pair.identity,
            "ctx": run.ctx, "chunks": run.chunks, "decode": run.decode,
        }

    def base(self, ctx: int, chunks: int) -> Quality | None:
        """The f16 run's own perplexity, if it is stored: `quality` stores it."""
        return _quality(self.results.get(self._quality_key(Run(BASELINE, ctx, chunks), base=True)))

    def stored_quality(self, run: Run) -> Quality | None:
        """The result of a run, if it is stored."""
        return _quality(self.results.get(self._quality_key(run)))

    def quality(self, runs: Sequence[Run], failed: dict[Run, str] | None = None) -> dict[Run, Quality]:
        """Compare every run with the batched f16 run of the same chunks.

        Args:
            runs: all with the same chunks; those of f16 compare it with itself.
            failed: gets the reasons of runs that fail; without it the first failure is raised.

        Raises:
            ProgramError: the f16 run failed, or another without `failed`.
        """
        found = {run: stored for run in runs if (stored := self.stored_quality(run)) is not None}
        missing = [run for run in runs if run not in found]
        ctx, chunks = runs[0].ctx, runs[0].chunks
        if not missing and self.base(ctx, chunks):
            return found
        for run, reason in self.unknown_types(missing).items():
            if failed is None:
                raise ProgramError(reason)
            failed[run] = reason
            missing.remove(run)
        if not missing and self.base(ctx, chunks):
            return found
        with scratch_folder(self._scratch) as folder:
            base = folder / "f16.kld"
            # The base is always made again: keeping it would cost hundreds of megabytes to save a few seconds.
            own = Run(BASELINE, ctx, chunks)
            step = _stepper(self.progress, f"{own.label}, base", chunks)
            limits = {"ctx": ctx, "chunks": chunks}
            values, caches = perplexity.run_base(self.programs, self.model, self.text, base, **limits, on_chunk=step)
            self.results.put(
                self._quality_key(own, base=True), {"values": asdict(values), "caches": caches.as_dict()}
            )
            for run in missing:
                step = _stepper(self.progress, run.label, chunks)
                try:
                    divergence, caches = perplexity.run_divergence(
                        self.programs, self.model, base, run.pair, **limits, decode=run.decode, on_chunk=step
                    )
                except ProgramError as error:
                    if failed is None:
                        raise
                    failed[run] = error.reason
                    continue
                found[run] = Quality(divergence, caches)
                self.results.put(
                    self._quality_key(run), {"values": asdict(divergence), "caches": caches.as_dict()}
                )
        return found

    def unknown_types(self, runs: Sequence[Run]) -> dict[Run, str]:
        """Why the build cannot run some of `runs`: it does not know a type, as far as it tells."""
        known = self.programs.cache_types() if runs else []
        reasons = {}
        for run in runs:
            if known and (name := next((one for one in (run.pair.k, run.pair.v) if one not in known), None)):
                reasons[run] = f"{self.programs.folder} knows no cache type {name!r}; it has {', '.join(known)}"
        return reasons

    # ---- needles ----

    def stored_answer(self, one: needle.Needle, pair: CachePair, ctx: int) -> str | None:
        """The answer to one question, if it is stored."""
        stored = self.results.get(self._answer_key(one, pair, ctx))
        return stored if isinstance(stored, str) else None

    def answer(self, one: needle.Needle, pair: CachePair, ctx: int) -> str:
        """Ask one question. ProgramError if llama-completion fails."""
        stored = self.stored_answer(one, pair, ctx)
        if stored is None:
            (stored,) = needle.ask(self.programs, self.model, [one], pair, ctx=ctx)
            self.results.put(self._answer_key(one, pair, ctx), stored)
        return stored

    def _answer_key(self, one: needle.Needle, pair: CachePair, ctx: int) -> dict[str, Any]:
        return {**self._common, "what": "answer", "pair": pair.identity, "prompt": one.prompt, "ctx": ctx}

    def count_tokens(self, prompt: str) -> int:
        """How many tokens the model makes of `prompt`. ProgramError if llama-completion fails."""
        key = {"what": "tokens", "model": self.model_hash, "prompt": prompt}
        count = self.results.get(key)
        if not isinstance(count, int):
            count = needle.count_tokens(self.programs, self.model, prompt)
            self.results.put(key, count)
        return count

    # ---- speed ----

    def stored_speed(self, pair: CachePair, depth: int) -> tuple[speed.Speed, dict[str, Any]] | None:
        """The speed at a depth, and what llama-bench says of the machine, if they are stored."""
        stored = self.results.get(self._speed_key(pair, depth))
        try:
            return None if stored is None else (speed.Speed(**stored["speed"]), dict(stored["machine"]))
        except (KeyError, TypeError, ValueError):  # a damaged file: it is measured again
            return None

    def speed(self, pair: CachePair, depth: int, again: bool = False) -> tuple[speed.Speed, dict[str, Any]]:
        """Measure the speed at a depth, with `again` even if it is stored. ProgramError if llama-bench fails."""
        known = None if again else self.stored_speed(pair, depth)
        if known is None:
            step = _stepper(self.progress, self.speed_label(pair, depth), 2)
            known = speed.run_speed(self.programs, self.model, pair, depth, step)
            self.results.put(self._speed_key(pair, depth), {"speed": asdict(known[0]), "machine": known[1]})
        return known

    def speed_label(self, pair: CachePair, depth: int) -> str:
        """What `progress` calls this measurement."""
        return f"speed {pair} at depth {depth}"

    def _speed_key(self, pair: CachePair, depth: int) -> dict[str, Any]:
        settings = {"depth": depth, "tests": [speed.PROMPT, speed.GENERATED, speed.REPETITIONS]}
        return {**self._common, "what": "speed", "pair": pair.identity, **settings}


def _quality(stored: Any) -> Quality | None:
    if stored is None:
        return None
    try:
        values = stored["values"]
        kind = perplexity.Divergence if "kld" in values else perplexity.Base
        return Quality(kind(**values), Caches.from_dict(stored["caches"]))
    except (KeyError, TypeError):  # a damaged file: it is measured again
        return None


def measure(
    options: Options, programs: Programs, results: Results, scratch: str | Path, progress: Progress | None = None
) -> list[Row]:
    """Measure every pair, the f16 cache first (it is the base of the others); what is stored is not run again.

    Args:
        options: what to measure.
        programs: the build to measure with.
        results, scratch, progress: see `Measurer`.

    What fails is a row or a cell with its reason, and the others are measured all the same.

    Raises:
        ProgramError: a program is missing or knows no such type, or the f16 cache could not be measured.
        OSError: the model or the text cannot be read.
    """
    measurer = Measurer(options.model, options.text, programs, results, scratch, progress)
    pairs = list(dict.fromkeys([BASELINE, *options.pairs]))
    runs = [Run(pair, options.ctx, options.chunks) for pair in pairs if pair != BASELINE]
    missing = [run for run in runs if measurer.stored_quality(run) is None]
    for reason in measurer.unknown_types(missing).values():
        raise ProgramError(reason)
    failed: dict[Run, str] = {}
    found = measurer.quality(runs or [Run(BASELINE, options.ctx, options.chunks)], failed)
    base = measurer.base(options.ctx, options.chunks)
    assert base is not None
    quality = {BASELINE: base, **{run.pair: found[run] for run in runs if run in found}}
    failures = {run.pair: reason for run, reason in failed.items()}
    for pair, one in quality.items():
        if isinstance(one.values, perplexity.Divergence) and not math.isfinite(one.values.kld):
            failures[pair] = f"its predictions are not finite (KLD {one.values.kld})"

    needles, why = _needles(measurer, options)
    rows = []
    for pair in pairs:
        if pair in failures:
            rows.append(Row(pair.k, pair.v, failure=failures[pair]))
            continue
        answers, reason = _answers(measurer, pair, needles, options.needle_ctx)
        rows.append(_row(pair, quality, answers, needles, why or reason))
    return rows


def _needles(measurer: Measurer, options: Options) -> tuple[list[needle.Needle], str | None]:
    """The questions, or why there are none."""
    if not options.needles:
        return [], None
    text = options.text.read_text(encoding="utf-8", errors="replace")
    try:
        return needle.fit_needles(
            text, options.needles, options.distance, options.needle_ctx, measurer.count_tokens,
            template=options.template,
        ), None  # fmt: skip
    except ProgramError as error:
        return [], error.reason
    except ValueError as error:
        return [], str(error)


def _answers(
    measurer: Measurer, pair: CachePair, needles: list[needle.Needle], ctx: int
) -> tuple[list[str | None], str | None]:
    """The answers, and why one could not be got."""
    answers: list[str | None] = []
    step = reason = None
    for done, one in enumerate(needles, 1):
        if measurer.stored_answer(one, pair, ctx) is None and step is None:
            step = _stepper(measurer.progress, f"needle {pair}", len(needles))
        try:
            answers.append(measurer.answer(one, pair, ctx))
        except ProgramError as error:
            answers.append(None)
            reason = error.reason
        if step:
            step(done)
    return answers, reason


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder for predictions, which is deleted in the end.

    A run that was killed leaves its own behind, so those of this machine that no process holds are deleted. The cache
    may be shared with other machines: whether theirs are in use cannot be told for certain from here.
    """
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f"kld-base-{re.sub(r'[^A-Za-z0-9.]', '_', platform.node())}-"
    for old in parent.glob(f"{prefix}*"):
        if old.is_dir():
            with _held(old) as held:
                if held:
                    shutil.rmtree(old, ignore_errors=True)
            if held:
                _lock_file(old).unlink(missing_ok=True)
    folder = parent / f"{prefix}{secrets.token_hex(6)}"
    try:
        with _held(folder):  # before the folder is there, so that it never is without
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        _lock_file(folder).unlink(missing_ok=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Whether this process has the lock of a folder; on a file system without locks it never has."""
    with ExitStack() as stack:
        try:
            held = stack.enter_context(lock(_lock_file(folder), block=False)) is not None
        except OSError:
            held = False
        yield held


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _stepper(progress: Progress | None, what: str, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    progress(what, 0, total)
    return lambda done: progress(what, min(done, total), total)


def _row(
    pair: CachePair,
    quality: dict[CachePair, Quality],
    answers: list[str | None],
    needles: list[needle.Needle],
    needle_failure: str | None,
) -> Row:
    values, size, f16 = quality[pair].values, quality[pair].caches.total(), quality[BASELINE].caches.total()
    divergence = values if isinstance(values, perplexity.Divergence) and pair != BASELINE else None
    return Row(
        k=pair.k,
        v=pair.v,
        bits_k=format_bits(size.type_k, size.k_mib, f16.k_mib),
        bits_v=format_bits(size.type_v, size.v_mib, f16.v_mib),
        k_mib=size.k_mib,
        v_mib=size.v_mib,
        ppl=values.ppl,
        ppl_error=values.ppl_error,
        kld=divergence.kld if divergence else None,
        kld_error=divergence.kld_error if divergence else None,
        same_top=divergence.same_top if divergence else None,
        same_top_error=divergence.same_top_error if divergence else None,
        answers=answers,
        expected=[one.number for one in needles],
        distance=min((one.distance for one in needles), default=None),
        needle_failure=needle_failure,
    )


def format_bits(name: str, mib: float, f16_mib: float) -> float:
    """Bits per value of K or V: the format's own if the logged size agrees with it, else what the size says.

    The log rounds to 0.01 MiB. It disagrees when layers differ, as with --cache-boundary-v.
    """
    known = bits_per_value(name)
    if not f16_mib:  # there is no V of its own, as with multi-head latent attention
        return known or 0.0
    if known is not None and abs(known / 16 * f16_mib - mib) <= 0.0101:
        return known
    return round(16 * mib / f16_mib, 2)
