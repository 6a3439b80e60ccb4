"""Speed at a depth: tokens per second of prefill and decode (llama-bench)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .pairs import CachePair
from .programs import ProgramError, Programs, Result

__all__ = ["GENERATED", "MACHINE", "PROMPT", "REPETITIONS", "Speed", "parse_speed", "run_speed"]

PROMPT, GENERATED, REPETITIONS = 512, 32, 3

#: The fields of llama-bench's output that describe the machine, the build and the model.
MACHINE = (
    "build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_type", "model_size", "model_n_params",
)  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """Tokens per second with `depth` tokens in the cache, and the standard deviations of the repetitions."""

    depth: int
    prefill: float
    prefill_error: float
    decode: float
    decode_error: float


def run_speed(
    programs: Programs, model: Path, pair: CachePair, depth: int, on_test: Callable[[int], None] | None = None
) -> tuple[Speed, dict[str, Any]]:
    """Time a batch of `PROMPT` tokens, and `GENERATED` single tokens, each with `depth` tokens in the cache.

    Returns:
        The speed, and llama-bench's description of the machine (`MACHINE`).

    Raises:
        ProgramError: llama-bench failed or printed unexpected output.
    """
    arguments = [
        *("-m", str(model), "-p", str(PROMPT), "-n", str(GENERATED), "-d", str(depth), "-r", str(REPETITIONS)),
        *("-fa", "1", *pair.arguments, "-o", "jsonl"),
    ]
    lines = 0

    def on_text(text: str) -> None:
        nonlocal lines
        lines += text.count("\n")
        if on_test:
            on_test(lines)

    result = programs.run(
        "llama-bench",
        arguments,
        log=f"bench-{pair}",
        on_text=on_text,
        complete=lambda result: len(_tests(result)) == 2,
        log_options=False,
        env=pair.environment,
    )
    try:
        return parse_speed(result.out, depth)
    except ValueError as error:
        raise ProgramError(f"cache {pair}: {error}. Log: {result.log_path}") from error


def parse_speed(text: str, depth: int) -> tuple[Speed, dict[str, Any]]:
    """Read llama-bench's JSON lines, one for the prompt and one for the generation.

    Raises:
        ValueError: a line is missing or has unexpected contents.
    """
    try:
        tests = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        prefill = next(test for test in tests if test["n_prompt"] and test["n_depth"] == depth)
        decode = next(test for test in tests if test["n_gen"] and test["n_depth"] == depth)
        speed = Speed(
            depth,
            float(prefill["avg_ts"]),
            float(prefill["stddev_ts"]),
            float(decode["avg_ts"]),
            float(decode["stddev_ts"]),
        )
    except (StopIteration, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"llama-bench printed no speeds at depth {depth} ({error!r})") from error
    return speed, {key: decode[key] for key in MACHINE if key in decode}


def _tests(result: Result) -> list[str]:
    return [line for line in result.out.splitlines() if line.startswith("{") and line.endswith("}")]
