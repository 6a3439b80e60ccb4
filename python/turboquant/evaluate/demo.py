"""Some text, written by the model with a given cache: an answer of a chat model, a story of any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..measure.needle import generated_all
from ..measure.pairs import CachePair
from ..measure.programs import ProgramError, Programs

__all__ = ["OPENING", "REQUEST", "Written", "chat", "has_chat_template", "write_story"]

OPENING = "The lighthouse keeper had not spoken to anyone for eleven days when, towards evening,"
"""What a story begins with."""
REQUEST = "Give three tips for growing tomatoes on a balcony."
"""What a chat model is asked."""

_END = "[end of text]"  # llama-completion appends it where the model ends by itself
_CHAT = "chat template is available"  # llama-completion's word for it, as it chooses between chat and text


@dataclass(frozen=True)
class Written:
    """What the model wrote, and whether it ended there by itself."""

    text: str
    ended: bool


def has_chat_template(programs: Programs, model: Path) -> bool:
    """Whether llama-completion finds a chat template in the model's file. One token is evaluated."""
    arguments = ["-m", str(model), "-p", "a", "-n", "1", "-c", "256", "-fa", "on", *CachePair("f16", "f16").arguments]
    arguments += ["--single-turn", "--no-display-prompt", "--no-warmup", "--simple-io"]
    try:
        return _CHAT in programs.run("llama-completion", arguments, log="chat-template", complete=generated_all).log
    except ProgramError:  # a template that llama.cpp cannot apply, for instance; a story needs none
        return False


def chat(
    programs: Programs,
    model: Path,
    pair: CachePair,
    *,
    request: str = REQUEST,
    tokens: int = 200,
    seed: int = 1,
    on_text: Callable[[str], None] = lambda text: None,
) -> Written:
    """Put `request` into the model's own chat template and return the answer; otherwise as `write_story`.

    Raises:
        ProgramError: llama-completion failed.
    """
    options = ["-p", request, "--jinja", "-cnv", "--single-turn", "--temp", "0.2"]
    return _write(programs, model, pair, options, f"chat-{pair}", tokens, seed, on_text)


def write_story(
    programs: Programs,
    model: Path,
    pair: CachePair,
    *,
    opening: str = OPENING,
    tokens: int = 200,
    seed: int = 1,
    on_text: Callable[[str], None] = lambda text: None,
) -> Written:
    """Continue `opening` and return the continuation; `on_text` gets it piece by piece.

    The seed is fixed, so the same build and model write the same story. On a busy machine its end can be missing (see
    `Programs.run`): as it has been shown by then, it is not written again.

    Raises:
        ProgramError: llama-completion failed.
    """
    options = ["-p", opening, "--no-escape", "-no-cnv", "--temp", "0.7", "--repeat-penalty", "1.1"]
    return _write(programs, model, pair, options, f"story-{pair}", tokens, seed, on_text)


def _write(
    programs: Programs,
    model: Path,
    pair: CachePair,
    options: list[str],
    log: str,
    tokens: int,
    seed: int,
    on_text: Callable[[str], None],
) -> Written:
    arguments = [
        *("-m", str(model), "-c", "2048", "-n", str(tokens), "-fa", "on", *pair.arguments),
        *("--seed", str(seed), *options, "--no-display-prompt", "--no-warmup", "--simple-io"),
    ]
    stream = _WithoutEnd(on_text)
    out = programs.run("llama-completion", arguments, log=log, on_text=stream.write, env=pair.environment).out.rstrip()
    stream.flush()
    return Written(out.removesuffix(_END).rstrip(), out.endswith(_END))


class _WithoutEnd:
    """Pass text on without the `_END` that may stand at its end: the last characters wait until more is known."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text, self._held = on_text, ""

    def write(self, text: str) -> None:
        self._held += text
        cut = max(0, len(self._held) - len(_END) - 16)  # blank space around it
        self._on_text(self._held[:cut])
        self._held = self._held[cut:]

    def flush(self) -> None:
        self._on_text(self._held.rstrip().removesuffix(_END).rstrip())
