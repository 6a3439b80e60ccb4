"""Single measurements of a model with a cache type; each result comes from the results cache or from a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import needle, perplexity, speed
from .kvsize import Caches
from .pairs import CachePair, bits_per_value, block_of
from .programs import ProgramError, Programs
from .results import Results, file_hash
from .scratch import scratch_folder

__all__ = ["BASELINE", "Measurer", "Progress", "Quality", "Run", "format_bits", "stepper"]

BASELINE = CachePair("f16", "f16")
_FORMAT = 2  # increase it when the meaning of stored results changes

Progress = Callable[[str, int, int], None]
"""A callback with three arguments: the name of the measurement, the steps done, and all steps."""


_FEW = 32  # batches of so many tokens are fast, and see few more tokens exactly than a generated token does


@dataclass(frozen=True)
class Run:
    """One perplexity run of ``chunks`` chunks of ``ctx`` tokens, in batches or (with `decode`) token by token.

    ``batch`` is the number of tokens that are evaluated together; None is llama.cpp's default of 512.
    """

    pair: CachePair
    ctx: int
    chunks: int
    decode: bool = False
    batch: int | None = None

    @classmethod
    def as_generated(cls, pair: CachePair, ctx: int, chunks: int) -> Run:
        """A run with small batches if the pair may have a window, since a batch sees all of its own tokens exactly."""
        windowed = pair.may_have_window and (pair.window is None or pair.window.tokens > 0)
        return cls(pair, ctx, chunks, batch=_FEW if windowed else None)

    @property
    def label(self) -> str:
        how = ", token by token" if self.decode else ""
        how += f", window {self.pair.window}" if self.pair.window else ""
        return f"perplexity {self.pair} ({self.chunks} x {self.ctx}{how})"


@dataclass(frozen=True)
class Quality:
    """The result of a run. The base run has only a perplexity."""

    values: perplexity.Base | perplexity.Divergence
    caches: Caches

    @property
    def divergence(self) -> perplexity.Divergence | None:
        """The comparison with the base run; None for the base run itself."""
        return self.values if isinstance(self.values, perplexity.Divergence) else None

    @property
    def failure(self) -> str | None:
        """The reason if the result has no finite numbers, else an empty text."""
        if self.divergence is None or math.isfinite(self.divergence.kld):
            return None
        return f"its predictions are not finite (KLD {self.divergence.kld})"

    def bits(self, f16: Quality) -> tuple[float, float]:
        """Bits per value of K and of V; `f16` is the f16 cache with the same cells."""
        size, whole = self.caches.total(), f16.caches.total()
        bits_k = format_bits(size.type_k, size.k_mib, whole.k_mib)
        return bits_k, format_bits(size.type_v, size.v_mib, whole.v_mib)


class Measurer:
    """Measures one model and text with one build. Stored results are not measured again."""

    def __init__(
        self,
        model: Path,
        text: Path,
        programs: Programs,
        results: Results,
        scratch: str | Path,
        progress: Progress | None = None,
    ) -> None:
        """Hash the inputs that the results depend on.

        Args:
            results: stores the results, keyed by the build, the model, the text and the options.
            scratch: folder for the f16 predictions, which can take gigabytes and are deleted at the end.
            progress: see `Progress`; it is called only for measurements that run.

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
        """The stored perplexity of the f16 run, or None; `quality` stores it."""
        return _quality(self.results.get(self._quality_key(Run(BASELINE, ctx, chunks), base=True)))

    def stored_quality(self, run: Run) -> Quality | None:
        """The stored result of a run, or None."""
        return _quality(self.results.get(self._quality_key(run)))

    def quality(self, runs: Sequence[Run], failed: dict[Run, str] | None = None) -> dict[Run, Quality]:
        """Compare every run with the batched f16 run of the same chunks.

        Args:
            runs: runs with the same chunks. A run with f16 compares a second f16 run with the first.
            failed: receives the reasons of runs that fail; without it the first failure is raised.

        Raises:
            ProgramError: the f16 run failed, or another run failed and `failed` was not given.
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
            # The base is always computed again: keeping it would take hundreds of megabytes to save seconds.
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
        """Why the build cannot run some of `runs`: its --help does not list one of their types."""
        known = self.programs.cache_types() if runs else []
        reasons = {}
        for run in runs:
            if known and (name := next((one for one in (run.pair.k, run.pair.v) if one not in known), None)):
                way_out = "; `turboquant build` makes one that has it" if block_of(name) else ""
                reasons[run] = f"{self.programs.folder} knows no cache type {name!r}; it has {', '.join(known)}{way_out}"
        return reasons

    # ---- needles ----

    def stored_answer(self, one: needle.Needle, pair: CachePair, ctx: int) -> str | None:
        """The stored answer to one question, or None."""
        stored = self.results.get(self._answer_key(one, pair, ctx))
        return stored if isinstance(stored, str) else None

    def answer(self, one: needle.Needle, pair: CachePair, ctx: int) -> str:
        """Ask one question. Raises ProgramError if llama-completion fails."""
        stored = self.stored_answer(one, pair, ctx)
        if stored is None:
            (stored,) = needle.ask(self.programs, self.model, [one], pair, ctx=ctx)
            self.results.put(self._answer_key(one, pair, ctx), stored)
        return stored

    def _answer_key(self, one: needle.Needle, pair: CachePair, ctx: int) -> dict[str, Any]:
        return {**self._common, "what": "answer", "pair": pair.identity, "prompt": one.prompt, "ctx": ctx}

    def count_tokens(self, prompt: str) -> int:
        """Number of tokens of `prompt` for the model. Raises ProgramError if llama-completion fails."""
        key = {"what": "tokens", "model": self.model_hash, "prompt": prompt}
        count = self.results.get(key)
        if not isinstance(count, int):
            count = needle.count_tokens(self.programs, self.model, prompt)
            self.results.put(key, count)
        return count

    # ---- speed ----

    def stored_speed(self, pair: CachePair, depth: int) -> tuple[speed.Speed, dict[str, Any]] | None:
        """The stored speed at a depth and llama-bench's description of the machine, or None."""
        stored = self.results.get(self._speed_key(pair, depth))
        try:
            return None if stored is None else (speed.Speed(**stored["speed"]), dict(stored["machine"]))
        except (KeyError, TypeError, ValueError):  # a damaged file: it is measured again
            return None

    def speed(self, pair: CachePair, depth: int, again: bool = False) -> tuple[speed.Speed, dict[str, Any]]:
        """Measure the speed at a depth, with `again` even if it is stored. Raises ProgramError if llama-bench fails."""
        known = None if again else self.stored_speed(pair, depth)
        if known is None:
            step = stepper(self.progress, self.speed_label(pair, depth), 2)
            known = speed.run_speed(self.programs, self.model, pair, depth, step)
            self.results.put(self._speed_key(pair, depth), {"speed": asdict(known[0]), "machine": known[1]})
        return known

    def speed_label(self, pair: CachePair, depth: int) -> str:
        """The name of this measurement for `progress`."""
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
    """A callback that takes the steps done and calls `progress` for the measurement `what`."""
    if progress is None:
        return None
    progress(what, 0, total)
    return lambda done: progress(what, min(done, total), total)


def format_bits(name: str, mib: float, f16_mib: float) -> float:
    """Bits per value of K or V: those of the format if the logged size agrees with them, else computed from the size.

    The log rounds to 0.01 MiB. The two disagree if layers have different types, as with --cache-boundary-v.
    """
    known = bits_per_value(name)
    if not f16_mib:  # there is no separate V, as with multi-head latent attention
        return known or 0.0
    if known is not None and abs(known / 16 * f16_mib - mib) <= 0.0101:
        return known
    return round(16 * mib / f16_mib, 2)
