"""Retrieval: hide a number in prose, ask for it thousands of characters later, compare the answer."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .pairs import CachePair
from .programs import ProgramError, Programs, Result

__all__ = [
    "NAMES",
    "TEMPLATES",
    "Needle",
    "answer",
    "ask",
    "check_template",
    "count_tokens",
    "fill",
    "generated_all",
    "make_grid_needle",
    "make_needles",
]

NAMES = (
    "Arthur Beatrice Cedric Dorothea Edmund Florence Gilbert Harriet Isaac Josephine Kenneth Lavinia Martin Nora "
    "Oswald Phoebe Quentin Rosalind Silas Theodora Ulric Violet Walter Yolanda Ambrose Bertha Clement Daphne Ernest "
    "Felicity"
).split()
"""The names that the bundled model was trained to look up."""

TEMPLATES = {
    "plain": (
        "Read the following text. One line in it tells a secret number.\n\n{before}\n\n"
        "Remember this: the secret number of {name} is {number}.\n\n{after}\n\n"
        "Question: What is the secret number of {name}, which the text above tells?\n"
        "Answer: The secret number of {name} is"
    ),
    "notes": (
        "{before}\n\nNote: The secret number of {name} is {number}.\n\n{after}\n\n"
        "Question: What is the secret number of {name}?\nAnswer: The secret number of {name} is"
    ),
}
"""Prompts by name: "plain" is for any model, "notes" is what the bundled model was trained with."""

_FIELDS = ("before", "name", "number", "after")
_LEAD = 600  # characters of prose before the note: the note is not the prompt's first line


@dataclass(frozen=True)
class Needle:
    """One question: the prompt ends where the number must follow."""

    name: str
    number: str
    prompt: str
    distance: int
    """Characters between the end of the note and the start of the question."""
    depth: int = 0
    """Tokens of context that the prompt is made to fill; 0 where it was made by distance."""
    position: float = 0.0
    """Where in the text the note stands: 0 at its start, 1 at its end."""

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
        hay = "\n\n".join(between)
        prompt = fill(TEMPLATES["notes"], before="\n\n".join(before), name=name, number=number, after=hay)
        needles.append(Needle(name, number, prompt, distance=len(hay)))
    return needles


def check_template(template: str) -> str:
    """Return a prompt template that has every field and ends where the number must follow.

    Raises:
        ValueError: a field is missing.
    """
    for field in _FIELDS:
        if f"{{{field}}}" not in template:
            raise ValueError(f"a needle template needs {{{field}}}, and this one has none: {template[:60]!r}")
    return template


def fill(template: str, **fields: str) -> str:
    """The prompt: each field of the template replaced, braces in the texts left alone."""
    return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), template)


def make_grid_needle(
    text: str, characters: int, depth: int, position: float, index: int, template: str = TEMPLATES["plain"]
) -> Needle:
    """Hide a number at `position` (0 to 1) of a stretch of `text`.

    Args:
        characters: of the prompt, roughly.
        depth: the tokens that it is meant to have; only noted.
        index: which name, number and stretch of the text to take.

    Raises:
        ValueError: the text is too short, or there are too few characters for a prompt at all.
    """
    chance = random.Random(index)
    name, number = NAMES[index % len(NAMES)], str(chance.randrange(10_000, 100_000))
    length = characters - len(template)
    if length < _LEAD:
        raise ValueError(f"{depth} tokens are too few for a needle")
    if length > len(text):
        raise ValueError(f"the text has {len(text)} characters, about {length} are needed for {depth} tokens")
    start = round(chance.random() * (len(text) - length))
    hay = text[start : start + length]
    cut = _break_near(hay, round(position * length))
    before, after = hay[:cut].strip(), hay[cut:].strip()
    prompt = fill(template, before=before, name=name, number=number, after=after).strip("\n")
    return Needle(name, number, prompt, distance=len(after), depth=depth, position=position)


def _break_near(text: str, place: int) -> int:
    """The paragraph break, line break or space nearest to `place`, whichever is found first nearby."""
    if not 0 < place < len(text):
        return place
    for mark in ("\n\n", "\n", " "):
        places = [text.rfind(mark, max(0, place - 300), place), text.find(mark, place, place + 300)]
        near = [found for found in places if found >= 0]
        if near:
            return min(near, key=lambda found: abs(found - place))
    return place


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
    for index, needle in enumerate(needles):
        result = _complete(programs, model, needle.prompt, pair, ctx, tokens=8)
        answers.append(answer(result.out))
        if on_answer:
            on_answer(index + 1)
    return answers


def count_tokens(programs: Programs, model: Path, prompt: str) -> int:
    """How many tokens the model makes of `prompt`, without evaluating it.

    llama-completion refuses a prompt that does not fit into the context before it evaluates anything, and says how
    long it is; so it is given a context that is too small. A prompt that fits even there is evaluated and counted.

    Raises:
        ProgramError: llama-completion failed otherwise, or printed no count.
    """
    try:
        result = _complete(programs, model, prompt, CachePair("f16", "f16"), ctx=256, tokens=1)
    except ProgramError as error:
        if refused := re.search(r"prompt is too long \((\d+) tokens", error.reason):
            return int(refused[1])
        raise
    counted = re.search(r"prompt eval time =.*?/\s*(\d+) tokens", result.log)
    if counted is None:
        what = "'prompt eval time = … / … tokens'"
        raise ProgramError(f"llama-completion printed no line {what}. Log: {result.log_path}")
    return int(counted[1])


def _complete(programs: Programs, model: Path, prompt: str, pair: CachePair, ctx: int, tokens: int) -> Result:
    with tempfile.TemporaryDirectory(prefix="turboquant-needle-") as folder:
        file = Path(folder) / "prompt.txt"
        file.write_bytes(prompt.encode())
        arguments = [
            *("-m", str(model), "-f", str(file), "--no-escape", "-c", str(ctx), "-n", str(tokens), "-fa", "on"),
            *pair.arguments,
            *("--temp", "0", "-no-cnv", "--no-display-prompt", "--no-warmup", "--simple-io"),
        ]
        return programs.run("llama-completion", arguments, log=f"needle-{pair}", complete=generated_all, env=pair.environment)
