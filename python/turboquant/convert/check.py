"""The effect of a conversion, measured with llama-perplexity: the KLD from the original model with an f16 cache."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import TurboQuantError
from ..llama.build import where
from ..llama.files import last_lines
from ..llama.paths import cache_dir
from ..llama.progress import Reporter
from ..measure.kvsize import Caches
from ..measure.pairs import CachePair, Window
from ..measure.perplexity import run_base, run_divergence
from ..measure.programs import ProgramError, Programs

__all__ = ["CheckError", "Checker", "checker", "shape"]

CHUNKS = 4
_MEASURE = "turboquant-measure"


class CheckError(TurboQuantError):
    """llama-perplexity failed. The text has its error message."""


def shape(text: Path, available: int) -> tuple[int, int]:
    """The context and the number of chunks for a text of `tokens` tokens.

    Raises:
        CheckError: the text is too short.
    """
    for context in (512, 256, 128):
        if available >= 2 * context:
            return context, min(CHUNKS, available // context)
    raise CheckError(f"{text} has {available} tokens, and at least 256 are needed: give a longer text with -f")


class _Unfused(CachePair):
    """A cache without flash attention. The option `-fa off` follows `-fa on`, and the last one is effective."""

    @property
    def arguments(self) -> list[str]:
        return [*super().arguments, "-fa", "off"]


class Checker:
    """Measures KLDs from the predictions of one model with an f16 cache, on the first tokens of a text."""

    def __init__(self, programs: Programs, base: Path, context: int, chunks: int, reporter: Reporter) -> None:
        self._programs, self._base, self._context, self._chunks = programs, base, context, chunks
        self._reporter = reporter

    def kld(self, model: Path, k: str = "f16", v: str = "f16", *, what: str) -> float:
        """The KLD of `model` with the cache `pair` from the original, in nats per token.

        It is infinite if a prediction is not finite. `what` describes the run in the progress display.

        Raises:
            CheckError: the run failed.
        """
        return self._kld(model, CachePair(k, v), what)[0]

    def kld_and_types(self, model: Path, k: str, v: str, *, what: str) -> tuple[float, tuple[str, str]]:
        """As `kld`; also returns the types of K and V by layer in compact syntax ("" if all are as requested)."""
        kld, caches = self._kld(model, CachePair(k, v), what)
        return kld, (caches.types_k, caches.types_v)

    def identity(self, model: Path, text: Path) -> dict[str, Any]:
        """The description of `model` in a plan. Raises CheckError if the program does not print it."""
        with tempfile.TemporaryDirectory(dir=self._base.parent) as scratch:
            command = [str(self._programs.path(_MEASURE)), str(model), str(text), "0", "1", "128"]
            command += [str(self._programs.threads), "0", str(Path(scratch) / "f16.kld")]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace")
        try:
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[0])["model"]
        except (IndexError, KeyError, ValueError):
            raise CheckError(f"{_MEASURE} does not describe {model}:\n{last_lines(done.stderr, 6)}") from None
        return found

    def floor(self, model: Path) -> float:
        """The KLD between the original `model` with and without flash attention, which differ only by rounding.

        With quantized weights activations are quantized as well, and every change, however small, changes the rounding
        of some activations.
        """
        found, _ = self._kld(model, _Unfused("f16", "f16"), "the original, rounded otherwise")
        if not math.isfinite(found):
            raise CheckError(f"{model}: its predictions without flash attention are not finite; is the model damaged?")
        return found

    def _kld(self, model: Path, pair: CachePair, what: str) -> tuple[float, Caches]:
        with self._reporter.track(f"predicting with {what}", self._chunks) as track:
            try:
                # There is no window, because these few tokens would all be read from it, unlike a long context.
                found, caches = run_divergence(
                    self._programs, model, self._base, pair.with_window(Window(0)), ctx=self._context,
                    chunks=self._chunks, on_chunk=track.update,
                )  # fmt: skip
            except ProgramError as error:
                raise CheckError(str(error)) from error
        return (found.kld if math.isfinite(found.kld) else math.inf), caches


@contextmanager
def checker(
    model: Path,
    text: Path,
    context: int,
    chunks: int,
    bin: str | os.PathLike[str] | None,
    threads: int | None,
    reporter: Reporter,
) -> Iterator[Checker]:
    """Store the predictions of `model` for comparisons; they are deleted at the end."""
    folder = cache_dir() / "convert"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        programs = Programs(Path(bin) if bin else where(), folder / "logs", threads)
        with tempfile.TemporaryDirectory(prefix="check-", dir=folder) as scratch:
            base = Path(scratch) / "f16.kld"
            with reporter.track("predicting with the original", chunks) as track:
                run_base(programs, model, text, base, ctx=context, chunks=chunks, on_chunk=track.update)
            yield Checker(programs, base, context, chunks, reporter)
    except ProgramError as error:
        raise CheckError(str(error)) from error
