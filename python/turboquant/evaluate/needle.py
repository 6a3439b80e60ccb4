"""Retrieval: hide a number in prose, ask for it thousands of characters later, compare the answer."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .pairs import CachePair
from .programs import Programs, Result

__all__ = ["NAMES", "Needle", "answer", "ask", "generated_all", "make_needles"]

NAMES = (
    "Arthur Beatrice Cedric Dorothea Edmund Florence Gilbert Harriet Isaac Josephine Kenneth Lavinia Martin Nora "
    "Oswald Phoebe Quentin Rosalind Silas Theodora Ulric Violet Walter Yolanda Ambrose Bertha Clement Daphne Ernest Felicity"
).split()
"""The names that the bundled model was trained to look up."""

_LEAD = 600  # characters of prose before the note: the note is not the prompt's first line


@dataclass(frozen=True)
class Needle:
    """One question: the prompt ends where the number must follow."""

    name: str
    number: str
    prompt: str
    distance: int
    """Characters between the end of the note and the start of the question."""

    @property
    def note(self) -> str:
        return f"Note: The secret number of {self.name} is {self.number}."

    @property
    def question(self) -> str:
        return f"What is the secret number of {self.name}?"


def make_needles(text: str, count: int, distance: int = 6000, seed: int = 1) -> list[Needle]:
    """Build `count` prompts from different stretches of `text`, each with another name and number.

    Between the note and the question stand whole paragraphs of the text, together at least `distance` characters.

    Raises:
        ValueError: the text is too short for the distance, or there are fewer names than questions.
    """
    if not 1 <= count <= len(NAMES):
        raise ValueError(f"needles: expected 1 to {len(NAMES)}, got {count}")
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]
    # The last paragraph from which enough text follows.
    room, last = 0, len(paragraphs)
    while last > 0 and room < _LEAD + distance:
        last -= 1
        room += len(paragraphs[last])
    if room < _LEAD + distance:
        raise ValueError(f"text: {len(text)} characters are too few for a needle {distance} characters back")
    chance = random.Random(seed)
    needles = []
    for index, name in enumerate(chance.sample(NAMES, count)):
        number = str(chance.randrange(10_000, 100_000))
        start = (last + 1) * index // count  # evenly over the text
        before, start = _take(paragraphs, start, _LEAD)
        between, _ = _take(paragraphs, start, distance)
        note = f"Note: The secret number of {name} is {number}."
        question = f"Question: What is the secret number of {name}?\nAnswer: The secret number of {name} is"
        hay = "\n\n".join(between)
        prompt = "\n\n".join([*before, note, hay, question])
        needles.append(Needle(name, number, prompt, distance=len(hay)))
    return needles


def _take(paragraphs: list[str], start: int, characters: int) -> tuple[list[str], int]:
    taken: list[str] = []
    length = 0
    while length < characters and start < len(paragraphs):
        taken.append(paragraphs[start])
        length += len(paragraphs[start])
        start += 1
    return taken, start


def answer(text: str) -> str:
    """The number at the start of a continuation, or the first line of whatever is there instead."""
    match = re.match(r"\s*(\d+)", text)
    return match[1] if match else text.strip().split("\n")[0]


def generated_all(result: Result) -> bool:
    """Whether llama-completion's output is whole: its last lines are the timings."""
    return re.search(r"total time\s*=", result.log) is not None


def ask(
    programs: Programs,
    model: Path,
    needles: list[Needle],
    pair: CachePair,
    *,
    ctx: int = 4096,
    on_answer: Callable[[int], None] | None = None,
) -> list[str]:
    """Ask every question in a run of its own (greedy decoding) and return the answers.

    Raises:
        ProgramError: llama-completion failed, for instance because a prompt does not fit into `ctx` tokens.
    """
    answers = []
    with tempfile.TemporaryDirectory(prefix="turboquant-needle-") as folder:
        for index, needle in enumerate(needles):
            prompt = Path(folder) / "prompt.txt"
            prompt.write_bytes(needle.prompt.encode())
            arguments = [
                *("-m", str(model), "-f", str(prompt), "-c", str(ctx), "-n", "8", "-fa", "on", "--temp", "0"),
                *pair.arguments,
                *("-no-cnv", "--no-display-prompt", "--no-warmup", "--simple-io"),
            ]
            result = programs.run("llama-completion", arguments, log=f"needle-{pair}", complete=generated_all)
            answers.append(answer(result.out))
            if on_answer:
                on_answer(index + 1)
    return answers
