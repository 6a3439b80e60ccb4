"""Some text, written by the model with a given cache: an answer of a chat model, a story of any other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from ..measure.measurer import Measurer
from ..measure.needle import fit_needles, generated_all
from ..measure.pairs import CachePair
from ..measure.programs import ProgramError, Programs
from .rows import Options

__all__ = ["OPENING", "REQUEST", "Written", "chat", "has_chat_template", "show_demo", "write_story"]

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


# ---- on the terminal -------------------------------------------------------------------------------------------------


def show_demo(console: Console, pair: CachePair, options: Options, measurer: Measurer) -> None:
    """Print some text and, unless `options` has no needles, one question and its answer; all are remembered.

    Raises:
        ProgramError: llama-completion failed.
    """
    programs, results = measurer.programs, measurer.results
    key = {
        "demo": 2, "build": measurer.build, "model": measurer.model_hash, "pair": str(pair),
        "threads": programs.threads, "what": "text", "request": REQUEST, "opening": OPENING,
    }  # fmt: skip
    known = results.get(key)
    chats = known["chat"] if known else has_chat_template(programs, options.model)
    what = f"{'An answer' if chats else 'A story'}, written with K in {pair.k} and V in {pair.v}"
    console.print(f"{what}{' (remembered)' if known else ''}:\n", markup=False, highlight=False)
    stream = _Stream()
    stream.write(f"> {REQUEST}\n\n" if chats else OPENING)
    if known is None:
        write = chat if chats else write_story
        written = write(programs, options.model, pair, on_text=stream.write)
        results.put(key, {"chat": chats, **asdict(written)})
    else:
        written = Written(known["text"], known["ended"])
        stream.write(written.text)
    stream.end(cut=not written.ended)
    if options.needles:
        _show_question(console, pair, options, measurer)


def _show_question(console: Console, pair: CachePair, options: Options, measurer: Measurer) -> None:
    text = options.text.read_text(encoding="utf-8", errors="replace")
    try:
        (needle,) = fit_needles(
            text, 1, options.distance, options.needle_ctx, measurer.count_tokens, template=options.template
        )
    except ValueError as error:
        console.print(f"No question is asked: {error}.\n", markup=False, highlight=False)
        return
    note = " (remembered)" if measurer.stored_answer(needle, pair, options.needle_ctx) is not None else ""
    console.print(f"Hidden {needle.distance:,} characters before the question: {needle.note}", highlight=False)
    console.print(f"Question: {needle.question}", highlight=False)
    answer = measurer.answer(needle, pair, options.needle_ctx)
    verdict = "right" if answer == needle.number else f"wrong, it is {needle.number}"
    console.print(f"Answer: {answer} ({verdict}){note}\n", highlight=False, markup=False)


class _Stream:
    """Write model output as it comes; off a terminal, control characters are dropped."""

    def __init__(self) -> None:
        self._trailing = ""

    def write(self, text: str) -> None:
        # Models may emit anything: escape sequences must not reach the terminal either.
        text = self._trailing + "".join(one for one in text if one.isprintable() or one == "\n")
        body = text.rstrip("\n")  # llama-completion ends with blank lines
        self._trailing = text[len(body) :]
        sys.stdout.write(body.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding))
        sys.stdout.flush()

    def end(self, cut: bool) -> None:
        dots = (" …" if "utf" in sys.stdout.encoding.lower() else " ...") if cut else ""
        sys.stdout.write(f"{dots}\n\n")
        sys.stdout.flush()
