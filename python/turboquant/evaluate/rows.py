"""The rows of the quickstart's table: loss and size of each cache type, for one model and text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..measure import needle
from ..measure.measurer import BASELINE, Measurer, Progress, Quality, Run, stepper
from ..measure.pairs import CachePair
from ..measure.programs import ProgramError, Programs
from ..measure.results import Results

__all__ = ["Options", "Row", "measure"]


@dataclass(frozen=True)
class Options:
    """The options of the table.

    Perplexity is measured on the first ``chunks`` pieces of ``ctx`` tokens of the text (the second half of each is
    scored). ``needles`` questions are asked, each about a number ``distance`` characters earlier, with the prompt
    ``template``; 0 asks no questions.
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
    """One row of the table. KLD and same top token are relative to the f16 cache, and None for the f16 cache itself.

    A pair that could not be measured has the reason in `failure`, and no numbers. A question that could not be asked
    has the answer None, and the reason is in `needle_failure`.
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
    window_tokens: int = 0  #: number of the newest tokens in the exact window
    window_type: str = ""
    window_mib: float = 0.0

    @property
    def label(self) -> str:
        return str(CachePair(self.k, self.v))

    @property
    def bits(self) -> float | None:
        """Bits per value, the mean of K and V, without the exact window."""
        return None if self.bits_k is None or self.bits_v is None else (self.bits_k + self.bits_v) / 2

    @property
    def mib(self) -> float | None:
        """Size of K, V and the exact window together, in MiB."""
        return None if self.k_mib is None or self.v_mib is None else self.k_mib + self.v_mib + self.window_mib

    @property
    def found(self) -> int:
        """Needles found."""
        return sum(got == wanted for got, wanted in zip(self.answers, self.expected, strict=True))

    @property
    def asked(self) -> int:
        """Needles asked for."""
        return sum(got is not None for got in self.answers)


def measure(
    options: Options, programs: Programs, results: Results, scratch: str | Path, progress: Progress | None = None
) -> list[Row]:
    """Measure every pair, the f16 cache first, because it is the base of the others. Stored results are not repeated.

    Args:
        options: the options of the table.
        programs: the programs of the build.
        results, scratch, progress: see `Measurer`.

    A measurement that fails becomes a row or a cell with the reason; the others are measured nevertheless.

    Raises:
        ProgramError: a program is missing or does not support a type, or the f16 cache could not be measured.
        OSError: the model or the text cannot be read.
    """
    measurer = Measurer(options.model, options.text, programs, results, scratch, progress)
    pairs = list(dict.fromkeys([BASELINE, *options.pairs]))
    runs = [Run.as_generated(pair, options.ctx, options.chunks) for pair in pairs if pair != BASELINE]
    missing = [run for run in runs if measurer.stored_quality(run) is None]
    for reason in measurer.unknown_types(missing).values():
        raise ProgramError(reason)
    failed: dict[Run, str] = {}
    found = measurer.quality(runs or [Run(BASELINE, options.ctx, options.chunks)], failed)
    base = measurer.base(options.ctx, options.chunks)
    assert base is not None
    quality = {BASELINE: base, **{run.pair: found[run] for run in runs if run in found}}
    failures = {run.pair: reason for run, reason in failed.items()}
    failures |= {pair: one.failure for pair, one in quality.items() if one.failure}

    needles, why = _needles(measurer, options)
    rows = []
    for pair in pairs:
        if pair in failures:
            rows.append(Row(pair.k, pair.v, failure=failures[pair]))
            continue
        answers, unanswered = _answers(measurer, pair, needles, options.needle_ctx)
        rows.append(_row(pair, quality, answers, needles, why or unanswered))
    return rows


def _needles(measurer: Measurer, options: Options) -> tuple[list[needle.Needle], str | None]:
    """The questions, or the reason why there are none."""
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
    """The answers, and the reason if an answer is missing."""
    answers: list[str | None] = []
    step = reason = None
    for done, one in enumerate(needles, 1):
        if measurer.stored_answer(one, pair, ctx) is None and step is None:
            step = stepper(measurer.progress, f"needle {pair}", len(needles))
        try:
            answers.append(measurer.answer(one, pair, ctx))
        except ProgramError as error:
            answers.append(None)
            reason = error.reason
        if step:
            step(done)
    return answers, reason


def _row(
    pair: CachePair,
    quality: dict[CachePair, Quality],
    answers: list[str | None],
    needles: list[needle.Needle],
    needle_failure: str | None,
) -> Row:
    values, divergence, size = quality[pair].values, quality[pair].divergence, quality[pair].caches.total()
    bits_k, bits_v = quality[pair].bits(quality[BASELINE])
    return Row(
        k=pair.k,
        v=pair.v,
        bits_k=bits_k,
        bits_v=bits_v,
        k_mib=size.k_mib,
        v_mib=size.v_mib,
        window_tokens=size.window_tokens,
        window_type=size.window_type,
        window_mib=size.window_mib,
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
