"""Perplexity, and the KL divergence of a cache type's predictions from those of the f16 cache (llama-perplexity)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from .kvsize import Caches, parse_caches
from .pairs import CachePair
from .programs import ProgramError, Programs

__all__ = [
    "Base",
    "Divergence",
    "base_bytes",
    "parse_base",
    "parse_divergence",
    "run_base",
    "run_divergence",
]

_NUMBER = r"(-?(?:\d+(?:\.\d+)?|nan|inf))"
_FINAL = re.compile(rf"Final estimate: PPL = {_NUMBER} \+/- {_NUMBER}")
_PPL = re.compile(rf"Mean PPL\(Q\)\s*:\s*{_NUMBER} ±\s*{_NUMBER}")
_RATIO = re.compile(rf"Mean ln\(PPL\(Q\)/PPL\(base\)\)\s*:\s*{_NUMBER} ±\s*{_NUMBER}")
_KLD = re.compile(rf"Mean\s+KLD:\s*{_NUMBER} ±\s*{_NUMBER}")
_MEDIAN = re.compile(rf"Median\s+KLD:\s*{_NUMBER}")
_TAIL = re.compile(rf"99\.9%\s+KLD:\s*{_NUMBER}")
_RMS = re.compile(rf"RMS Δp\s*:\s*{_NUMBER} ±\s*{_NUMBER} %")
_TOP = re.compile(rf"Same top p:\s*{_NUMBER} ±\s*{_NUMBER} %")
_BROKEN = re.compile(r"Unexpected negative standard deviation")  # its message if a probability is NaN
_SHORT = re.compile(r"you need at least \d+ tokens")
_CHUNKS = re.compile(r"calculating perplexity over (\d+) chunks")
_VOCABULARY = re.compile(r"n_vocab\s*=\s*(\d+)")


@dataclass(frozen=True)
class Base:
    """The run with an f16 cache: perplexity, and its standard error."""

    ppl: float
    ppl_error: float


@dataclass(frozen=True)
class Divergence:
    """The comparison of a run with the f16 predictions. KL divergences and logarithms are in nats per token."""

    ppl: Annotated[float, "perplexity"]
    ppl_error: Annotated[float, "standard error of `ppl`; it comes from the text and is common to all pairs"]
    ln_ratio: Annotated[float, "ln(perplexity / perplexity of f16)"]
    ln_ratio_error: Annotated[float, "standard error of `ln_ratio`"]
    kld: Annotated[float, "mean KL divergence from f16"]
    kld_error: Annotated[float, "standard error of `kld`"]
    kld_median: Annotated[float, "median of the KL divergence"]
    kld_999: Annotated[float, "99.9th percentile of the KL divergence"]
    rms_dp: Annotated[float, "root mean square change of the probability of the text's token, in percent"]
    rms_dp_error: Annotated[float, "standard error of `rms_dp`"]
    same_top: Annotated[float, "share of tokens whose likeliest prediction is that of f16, in percent"]
    same_top_error: Annotated[float, "standard error of `same_top`"]


def _numbers(pattern: re.Pattern[str], text: str, what: str) -> list[float]:
    match = pattern.search(text)
    if match is None:
        raise ValueError(f"llama-perplexity printed no line '{what}'")
    return [float(number) for number in match.groups()]


def parse_base(text: str) -> Base:
    """Read the output of a run without --kl-divergence.

    Raises:
        ValueError: the line is missing (the text has fewer tokens than two contexts, or the run was interrupted).
    """
    return Base(*_numbers(_FINAL, text, "Final estimate: PPL = … +/- …"))


def parse_divergence(text: str) -> Divergence:
    """Read the output of a run with --kl-divergence.

    Raises:
        ValueError: one of the lines is missing.
    """
    found = Divergence(
        *_numbers(_PPL, text, "Mean PPL(Q) : … ± …"),
        *_numbers(_RATIO, text, "Mean ln(PPL(Q)/PPL(base)) : … ± …"),
        *_numbers(_KLD, text, "Mean KLD: … ± …"),
        *_numbers(_MEDIAN, text, "Median KLD: …"),
        *_numbers(_TAIL, text, "99.9% KLD: …"),
        *_numbers(_RMS, text, "RMS Δp : … ± … %"),
        *_numbers(_TOP, text, "Same top p: … ± … %"),
    )
    # If two runs agree to the last digit, llama-perplexity may divide by zero when it computes an error; the error is
    # 0.
    errors = {name: 0.0 for name, value in vars(found).items() if name.endswith("_error") and not math.isfinite(value)}
    return replace(found, **errors)


def base_bytes(vocabulary: int, ctx: int, chunks: int) -> int:
    """The size of the file of f16 predictions in bytes, without its small header.

    The file has one uint16 for each vocabulary entry and scored token. The second half of each chunk is scored.
    """
    entry = 2 * (2 * ((vocabulary + 1) // 2) + 4)
    return chunks * (ctx - 1 - ctx // 2) * entry


def _arguments(model: Path, pair: CachePair, ctx: int, chunks: int, base: Path) -> list[str]:
    # Flash attention in every run: a quantized V needs it, and f16 must be measured in the same way.
    return [
        *("-m", str(model), "-c", str(ctx), "--chunks", str(chunks), "-fa", "on"),
        *pair.arguments,
        *("--kl-divergence-base", str(base)),
    ]


def _chunk_counter(pattern: str, on_chunk: Callable[[int], None] | None) -> Callable[[str], None] | None:
    if on_chunk is None:
        return None
    seen = ""

    def on_text(text: str) -> None:
        nonlocal seen
        seen += text
        on_chunk(len(re.findall(pattern, seen, re.MULTILINE)))

    return on_text


def run_base(
    programs: Programs,
    model: Path,
    text: Path,
    base: Path,
    *,
    ctx: int,
    chunks: int,
    on_chunk: Callable[[int], None] | None = None,
) -> tuple[Base, Caches]:
    """Measure the f16 cache and write its predictions to `base` (about ``ctx * vocabulary`` bytes per chunk).

    Raises:
        ProgramError: the run failed, the text is too short, the model predicts no finite probabilities, or the file is
            shorter than it must be (a full disk).
    """
    pair = CachePair("f16", "f16")
    arguments = [*_arguments(model, pair, ctx, chunks, base), "-f", str(text)]
    result = programs.run(
        "llama-perplexity",
        arguments,
        log=f"perplexity-{pair}",
        on_text=_chunk_counter(r"\[\d+\]-?[\dni]", on_chunk),
        complete=lambda result: any(one.search(result.out + result.log) for one in (_FINAL, _SHORT, _BROKEN)),
    )
    printed = result.out + result.log
    # llama-perplexity needs at least two chunks of text, and scores fewer than requested if the text has fewer.
    counted = _CHUNKS.search(printed)
    if _SHORT.search(printed) or (counted and int(counted[1]) < chunks):
        available = f"has {counted[1]} chunks" if counted else "is shorter than two chunks"
        raise ProgramError(
            f"{text} {available} of {ctx} tokens, {chunks} were asked for: give a longer text, or smaller --chunks or "
            "--ctx"
        )
    broken = _BROKEN.search(printed) is not None
    try:
        values, size = Base(math.nan, math.nan) if broken else parse_base(printed), parse_caches(result.log)
    except ValueError as error:
        raise ProgramError(f"cache {pair}: {error}. Log: {result.log_path}") from error
    if not math.isfinite(values.ppl):
        raise ProgramError(f"{model}: its predictions of {text} are not finite; is the model damaged?")
    if vocabulary := _VOCABULARY.search(result.log):
        expected = base_bytes(int(vocabulary[1]), ctx, chunks)
        if (written := base.stat().st_size) < expected:
            raise ProgramError(f"{base}: {written} bytes written, {expected} expected; is the disk full?")
    return values, size


def run_divergence(
    programs: Programs,
    model: Path,
    base: Path,
    pair: CachePair,
    *,
    ctx: int,
    chunks: int,
    decode: bool = False,
    batch: int | None = None,
    on_chunk: Callable[[int], None] | None = None,
) -> tuple[Divergence, Caches]:
    """Measure a pair of cache types against the predictions in `base` (made by `run_base` with the same model).

    With `decode` every token is evaluated alone, as when text is generated. Other kernels run then than for a batch.
    Without it, batches have `batch` tokens, or llama.cpp's default number.

    Raises:
        ProgramError: the run failed or printed unexpected output.
    """
    arguments = [*_arguments(model, pair, ctx, chunks, base), "--kl-divergence"]
    arguments += ["-b", "1", "-ub", "1"] if decode else ["-ub", str(batch)] if batch else []
    result = programs.run(
        "llama-perplexity",
        arguments,
        log=f"perplexity-{pair}",
        on_text=_chunk_counter(r"^ +\d+ +", on_chunk),
        complete=lambda result: _TOP.search(result.out + result.log) is not None,
        env=pair.environment,
    )
    try:
        return parse_divergence(result.out + result.log), parse_caches(result.log)
    except ValueError as error:
        raise ProgramError(f"cache {pair}: {error}. Log: {result.log_path}") from error
