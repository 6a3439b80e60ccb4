"""Measure one thing at a time of a model and a cache type: every result comes from the results cache, or from a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import needle, perplexity, speed
from .kvsize import Caches
from .pairs import CachePair, bits_per_value
from .programs import ProgramError, Programs
from .results import Results, file_hash
from .scratch import scratch_folder

__all__ = ["BASELINE", "Measurer", "Progress", "Quality", "Run", "format_bits", "stepper"]

BASELINE = CachePair("f16", "f16")
_FORMAT = 2  # raise it when a stored result changes its meaning

Progress = Callable[[str, int, int], None]
"""Called with what is being measured, the steps done and the steps in all."""


_FEW = 32  # tokens of a batch that sees little more exactly than a token that is generated, and is not slow


@dataclass(frozen=True)
class Run:
    """One perplexity run: ``ctx`` tokens in each of ``chunks`` chunks, as batches or (`decode`) token by token.

    ``batch`` is how many tokens are computed at once (None: as llama.cpp does, 512).
    """

    pair: CachePair
    ctx: int
    chunks: int
    decode: bool = False
    batch: int | None = None

    @classmethod
    def as_generated(cls, pair: CachePair, ctx: int, chunks: int) -> Run:
        """Batches that lose what generated text loses: with an exact window a batch sees all of its own tokens exactly."""
        windowed = pair.may_have_window and (pair.window is None or pair.window.tokens > 0)
        return cls(pair, ctx, chunks, batch=_FEW if windowed else None)

    @property
    def label(self) -> str:
        how = ", token by token" if self.decode else ""
        how += f", window {self.pair.window}" if self.pair.window else ""
        return f"perplexity {self.pair} ({self.chunks} x {self.ctx}{how})"


@dataclass(frozen=True)
class Quality:
    """What a run found. The base's own run has a perplexity alone."""

    values: perplexity.Base | perplexity.Divergence
    caches: Caches

    @property
    def divergence(self) -> perplexity.Divergence | None:
        """None for the base's own run."""
        return self.values if isinstance(self.values, perplexity.Divergence) else None

    @property
    def failure(self) -> str | None:
        """Why the numbers are none, if they are not."""
        if self.divergence is None or math.isfinite(self.divergence.kld):
            return None
        return f"its predictions are not finite (KLD {self.divergence.kld})"

    def bits(self, f16: Quality) -> tuple[float, float]:
        """Bits per value of K and of V, where `f16` had the same cells."""
        size, whole = self.caches.total(), f16.caches.total()
        bits_k = format_bits(size.type_k, size.k_mib, whole.k_mib)
        return bits_k, format_bits(size.type_v, size.v_mib, whole.v_mib)


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
            "ctx": run.ctx, "chunks": run.chunks, "decode": run.decode, **({"batch": run.batch} if run.batch else {}),
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
            step = stepper(self.progress, f"{own.label}, base", chunks)
            limits = {"ctx": ctx, "chunks": chunks}
            values, caches = perplexity.run_base(self.programs, self.model, self.text, base, **limits, on_chunk=step)
            self.results.put(
                self._quality_key(own, base=True), {"values": asdict(values), "caches": caches.as_dict()}
            )
            for run in missing:
                step = stepper(self.progress, run.label, chunks)
                try:
                    divergence, caches = perplexity.run_divergence(
                        self.programs, self.model, base, run.pair, **limits, decode=run.decode, batch=run.batch,
                        on_chunk=step,
                    )  # fmt: skip
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
            step = stepper(self.progress, self.speed_label(pair, depth), 2)
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


def stepper(progress: Progress | None, what: str, total: int) -> Callable[[int], None] | None:
    """What to call with the steps done of `what`."""
    if progress is None:
        return None
    progress(what, 0, total)
    return lambda done: progress(what, min(done, total), total)


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
