"""Some prose, written by the model with a given cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .pairs import CachePair
from .programs import Programs

__all__ = ["OPENING", "write"]

OPENING = "The lighthouse keeper had not spoken to anyone for eleven days when, towards evening,"


def write(
    programs: Programs,
    model: Path,
    pair: CachePair,
    *,
    opening: str = OPENING,
    tokens: int = 200,
    seed: int = 1,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Continue `opening` and return the continuation; `on_text` gets it piece by piece.

    The seed is fixed, so the same build and model write the same story. On a busy machine its end can be missing (see
    `Programs.run`): as it has been shown by then, it is not written again.

    Raises:
        ProgramError: llama-completion failed.
    """
    arguments = [
        *("-m", str(model), "-p", opening, "--no-escape", "-c", "2048", "-n", str(tokens), "-fa", "on"),
        *pair.arguments,
        *("--seed", str(seed), "--temp", "0.7", "--repeat-penalty", "1.1"),
        *("-no-cnv", "--no-display-prompt", "--no-warmup", "--simple-io"),
    ]
    return programs.run("llama-completion", arguments, log=f"story-{pair}", on_text=on_text, env=pair.environment).out.rstrip()
