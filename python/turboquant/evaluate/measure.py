"""Measure a list of cache types: the table's rows, each from the results cache or from a run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import needle, perplexity
from .kvsize import CacheSize
from .pairs import CachePair, bits_per_value
from .programs import ProgramError, Programs
from .results import Results, file_hash

__all__ = ["BASELINE", "Options", "Row", "measure"]

BASELINE = CachePair("f16", "f16")
_FORMAT = 1  # raise it when a stored result changes its meaning

Progress = Callable[[str, int, int], None]
"""Called with what is being measured, the steps done and the steps in all."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    The perplexity is that of the text's first ``chunks`` pieces of ``ctx`` tokens (the second half of each is scored).
    ``needles`` questions are asked, each about a number ``distance`` characters earlier; 0 asks none.
    """

    model: Path
    text: Path
    pairs: list[CachePair]
    ctx: int = 2048
    chunks: int = 6
    needles: int = 4
    distance: int = 6000
    needle_ctx: int = 4096


@dataclass(frozen=True)
class Row:
    """One line of the table. KLD and same top token are relative to the f16 cache and None for it."""

    k: str
    v: str
    bits_k: float
    bits_v: float
    k_mib: float
    v_mib: float
    ppl: float
    ppl_error: float
    kld: float | None
    kld_error: float | None
    same_top: float | None
    same_top_error: float | None
    answers: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        return str(CachePair(self.k, self.v))

    @property
    def bits(self) -> float:
        """Mean of K and V."""
        return (self.bits_k + self.bits_v) / 2

    @property
    def mib(self) -> float:
        return self.k_mib + self.v_mib

    @property
    def found(self) -> int:
        """Needles found."""
        return sum(got == wanted for got, wanted in zip(self.answers, self.expected, strict=True))


def measure(
    options: Options, programs: Programs, results: Results, scratch: str | Path, progress: Progress | None = None
) -> list[Row]:
    """Measure every pair, the f16 cache first (it is the base of the others); what is stored is not run again.

    Args:
        options: what to measure.
        programs: the build to measure with.
        results: where results are remembered, keyed by the build, the model, the text and the options.
        scratch: a folder for the f16 predictions, which can take gigabytes; they are deleted at the end.
        progress: see `Progress`; called only for what is really run.

    Raises:
        ProgramError: a program failed.
        OSError: the model or the text cannot be read.
        ValueError: the text is too short for the needles.
    """
    common = {
        "format": _FORMAT,
        "build": programs.fingerprint(),
        "model": file_hash(options.model, results),
        "text": file_hash(options.text, results),
        "threads": programs.threads,
    }
    pairs = list(dict.fromkeys([BASELINE, *options.pairs]))
    quality = _measure_quality(pairs, options, programs, results, Path(scratch), common, progress)

    needles: list[needle.Needle] = []
    if options.needles:
        text = options.text.read_text(encoding="utf-8", errors="replace")
        needles = needle.make_needles(text, options.needles, options.distance)
    answers: dict[CachePair, list[str]] = {}
    for pair in pairs if needles else []:
        key = {
            **common,
            "what": "needle",
            "pair": str(pair),
            "count": options.needles,
            "distance": options.distance,
            "ctx": options.needle_ctx,
        }
        stored = results.get(key)
        if stored is None:
            step = _stepper(progress, f"needle {pair}", len(needles))
            stored = needle.ask(programs, options.model, needles, pair, ctx=options.needle_ctx, on_answer=step)
            results.put(key, stored)
        answers[pair] = stored
    return [_row(pair, quality, answers.get(pair, []), needles) for pair in pairs]


def _measure_quality(
    pairs: list[CachePair],
    options: Options,
    programs: Programs,
    results: Results,
    scratch: Path,
    common: dict[str, Any],
    progress: Progress | None,
) -> dict[CachePair, dict[str, Any]]:
    def key(pair: CachePair) -> dict[str, Any]:
        return {**common, "what": "perplexity", "pair": str(pair), "ctx": options.ctx, "chunks": options.chunks}

    quality = {pair: stored for pair in pairs if (stored := results.get(key(pair))) is not None}
    missing = [pair for pair in pairs if pair not in quality]
    if not missing:
        return quality
    known = programs.cache_types()
    for name in dict.fromkeys(name for pair in missing for name in (pair.k, pair.v)):
        if known and name not in known:
            raise ProgramError(f"{programs.folder} knows no cache type {name!r}; it has {', '.join(known)}")
    limits = {"ctx": options.ctx, "chunks": options.chunks}
    with _scratch_folder(scratch) as folder:
        base = Path(folder) / "f16.kld"
        # The base is always made again: keeping it would cost hundreds of megabytes to save a few seconds.
        step = _stepper(progress, f"perplexity {BASELINE}", options.chunks)
        values, size = perplexity.run_base(programs, options.model, options.text, base, **limits, on_chunk=step)
        quality[BASELINE] = {"values": asdict(values), "size": asdict(size)}
        results.put(key(BASELINE), quality[BASELINE])
        for pair in missing:
            if pair == BASELINE:
                continue
            step = _stepper(progress, f"perplexity {pair}", options.chunks)
            divergence, size = perplexity.run_divergence(
                programs, options.model, base, pair, **limits, on_chunk=step
            )
            quality[pair] = {"values": asdict(divergence), "size": asdict(size)}
            results.put(key(pair), quality[pair])
    return quality


def _scratch_folder(parent: Path) -> tempfile.TemporaryDirectory[str]:
    parent.mkdir(parents=True, exist_ok=True)
    # A run that was killed leaves its predictions behind: remove those whose process is gone.
    for old in parent.glob("kld-base-*"):
        pid = old.name.split("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"kld-base-{os.getpid()}-", dir=parent)


def _alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # os.kill would end it there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _stepper(progress: Progress | None, what: str, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    progress(what, 0, total)
    return lambda done: progress(what, min(done, total), total)


def _row(
    pair: CachePair, quality: dict[CachePair, dict[str, Any]], answers: list[str], needles: list[needle.Needle]
) -> Row:
    values, size = quality[pair]["values"], CacheSize(**quality[pair]["size"])
    f16 = CacheSize(**quality[BASELINE]["size"])
    return Row(
        k=pair.k,
        v=pair.v,
        bits_k=_bits(size.type_k, size.k_mib, f16.k_mib),
        bits_v=_bits(size.type_v, size.v_mib, f16.v_mib),
        k_mib=size.k_mib,
        v_mib=size.v_mib,
        ppl=values["ppl"],
        ppl_error=values["ppl_error"],
        kld=values.get("kld"),
        kld_error=values.get("kld_error"),
        same_top=values.get("same_top"),
        same_top_error=values.get("same_top_error"),
        answers=answers,
        expected=[one.number for one in needles],
    )


def _bits(name: str, mib: float, f16_mib: float) -> float:
    """Bits per value: the format's own if the logged size agrees with it, else what the size says.

    The log rounds to 0.01 MiB. It disagrees when layers differ, as with --cache-boundary-v.
    """
    measured = 16 * mib / f16_mib
    known = bits_per_value(name)
    if known is not None and abs(known / 16 * f16_mib - mib) <= 0.0101:
        return known
    return round(measured, 2)
