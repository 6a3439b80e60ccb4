"""Retrieval: a number is hidden in prose, and a question asks for it thousands of characters later."""

from __future__ import annotations

import filecmp
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..llama.paths import bundled_model
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
    "fit_grid_needle",
    "fit_needles",
    "generated_all",
    "make_grid_needle",
    "make_needles",
    "template_for",
]

NAMES = (
    "Arthur Beatrice Cedric Dorothea Edmund Florence Gilbert Harriet Isaac Josephine Kenneth Lavinia Martin Nora "
    "Oswald Phoebe Quentin Rosalind Silas Theodora Ulric Violet Walter Yolanda Ambrose Bertha Clement Daphne Ernest "
    "Felicity"
).split()
"""The names that the bundled model was trained to retrieve numbers for."""

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
"""Prompt templates by name: "plain" is for any model, "notes" is the form that the bundled model was trained on."""

_FIELDS = ("before", "name", "number", "after")
_LEAD = 600  # characters of prose before the note, so that the note is not the first line
_GENERATED = 8  # greatest number of tokens of an answer
_ANSWER = 16  # tokens of the context that a prompt leaves free: four for llama-completion, and an answer
_TRIALS = 6


@dataclass(frozen=True)
class Needle:
    """One question. The prompt ends where the number must follow."""

    name: str
    number: str
    prompt: str
    distance: int
    """Characters between the end of the note and the start of the question."""
    depth: int = 0
    """Tokens that the prompt is meant to have; 0 if it was made for a distance in characters."""
    position: float = 0.0
    """Position of the note in the text: 0 at its start, 1 at its end."""

    @property
    def note(self) -> str:
        """The line of the prompt with the number."""
        return next(line for line in self.prompt.splitlines() if self.number in line)

    @property
    def question(self) -> str:
        """The question in the prompt, which is the last line but one in the templates of this module."""
        return self.prompt.splitlines()[-2].removeprefix("Question: ")


def template_for(model: Path) -> str:
    """The template for a model: "notes" for the bundled model and its copies, "plain" for other models."""
    return TEMPLATES["notes" if filecmp.cmp(model, bundled_model(), shallow=False) else "plain"]


def make_needles(
    text: str, count: int, distance: int = 6000, seed: int = 1, template: str = TEMPLATES["notes"]
) -> list[Needle]:
    """Build `count` prompts from different stretches of `text`, each with another name and number.

    Between the number and the question are whole paragraphs of the text with at least `distance` characters in total. A
    paragraph of more than half of `distance` is divided, so that prompts do not grow with the length of a paragraph.

    Raises:
        ValueError: the text is too short for the distance, or there are fewer names than questions.
    """
    if not 1 <= count <= len(NAMES):
        raise ValueError(f"needles: expected 1 to {len(NAMES)}, got {count}")
    text = re.sub(r"\r\n?", "\n", text)
    lead = min(_LEAD, distance)
    pieces = _pieces(text, distance // 2)
    # The last piece that is followed by enough text.
    room, last = 0, len(pieces)
    while last > 0 and room < lead + distance:
        last -= 1
        room += len(pieces[last])
    if room < lead + distance:
        raise ValueError(f"text: {len(text)} characters are too few for a needle {distance} characters back")
    chance = random.Random(seed)
    needles = []
    for index, name in enumerate(chance.sample(NAMES, count)):
        number = str(chance.randrange(10_000, 100_000))
        start = (last + 1) * index // count  # evenly over the text
        before, start = _take(pieces, start, lead)
        between, _ = _take(pieces, start, distance)
        hay = text[between[0].start : between[-1].stop]
        opening = text[before[0].start : before[-1].stop]
        prompt = fill(template, before=opening, name=name, number=number, after=hay)
        needles.append(Needle(name, number, prompt, distance=len(hay)))
    return needles


def fit_needles(
    text: str, count: int, distance: int, ctx: int, count_tokens: Callable[[str], int], *, template: str
) -> list[Needle]:
    """As `make_needles`, with a shorter distance if a prompt and its answer would have more than `ctx` tokens.

    Raises:
        ValueError: as in `make_needles`, or no prompt is short enough.
    """
    for _ in range(_TRIALS):
        needles = make_needles(text, count, distance, template=template)
        # A prompt has at most as many tokens as bytes, so the tokens of short prompts need not be counted.
        sizes = [(len(one.prompt.encode()), one.prompt) for one in needles]
        tokens = max(size if size <= ctx - _ANSWER else count_tokens(prompt) for size, prompt in sizes)
        if tokens <= ctx - _ANSWER:
            return needles
        # Slightly less than what fits, because other stretches of the text may have more tokens per character.
        distance = int(0.9 * distance * (ctx - _ANSWER) / tokens)
        if distance < 1:
            break
    raise ValueError(f"text: no needle of it fits into {ctx} tokens")


def check_template(template: str) -> str:
    """The prompt template `template`, after checking that it has every field.

    Raises:
        ValueError: a field is missing.
    """
    for field in _FIELDS:
        if f"{{{field}}}" not in template:
            raise ValueError(f"a needle template needs {{{field}}}, and this one has none: {template[:60]!r}")
    return template


def fill(template: str, **fields: str) -> str:
    """The prompt: the template with its fields replaced. Braces in the texts are not fields."""
    return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), template)


def make_grid_needle(
    text: str, characters: int, depth: int, position: float, index: int, template: str = TEMPLATES["plain"]
) -> Needle:
    """Hide a number at `position` (0 to 1) of a stretch of `text`.

    Args:
        characters: approximate length of the prompt.
        depth: number of tokens that the prompt is meant to have; it is only stored in the result.
        index: selects the name, the number and the stretch of the text.

    Raises:
        ValueError: the text is too short, or `characters` is too small for a prompt.
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


def fit_grid_needle(
    text: str,
    depth: int,
    position: float,
    index: int,
    count_tokens: Callable[[str], int],
    *,
    template: str = TEMPLATES["plain"],
) -> Needle:
    """As `make_grid_needle`, with so many characters that prompt and answer nearly fill `depth` tokens.

    Raises:
        ValueError: as in `make_grid_needle`, or no number of characters fits.
    """
    characters = min(4 * depth, len(text))
    for trial in range(_TRIALS):
        one = make_grid_needle(text, characters, depth, position, index, template)
        tokens = count_tokens(one.prompt)
        if trial and tokens <= depth - _ANSWER:
            return one
        # Each length takes another stretch of the text, which may have more tokens per character.
        characters = int(((0.97 - 0.1 * trial) * depth - _ANSWER) * len(one.prompt) / max(1, tokens))
    raise ValueError(f"the text has no stretch that fills {depth} tokens")


def _break_near(text: str, place: int) -> int:
    """A break near `place`: the nearest paragraph break, else the nearest line break, else the nearest space."""
    if not 0 < place < len(text):
        return place
    for mark in ("\n\n", "\n", " "):
        places = [text.rfind(mark, max(0, place - 300), place), text.find(mark, place, place + 300)]
        near = [found for found in places if found >= 0]
        if near:
            return min(near, key=lambda found: abs(found - place))
    return place


def _pieces(text: str, limit: int) -> list[range]:
    """The positions of the paragraphs of a text. Paragraphs of more than `limit` characters are divided at breaks."""
    pieces = []
    most = max(1, limit // 6)
    bounds = [0, *(place for gap in re.finditer(r"\n\s*\n", text) for place in gap.span()), len(text)]
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        paragraph = text[start:end]
        end = start + len(paragraph.rstrip())
        start += len(paragraph) - len(paragraph.lstrip())
        long = end - start > limit
        while long and end - start > most:
            cut = max(text.rfind(mark, start + most // 2, start + most) for mark in "\n ") + 1 or start + most
            pieces.append(range(start, cut))
            start = cut
        if start < end:
            pieces.append(range(start, end))
    return pieces


def _take(pieces: list[range], start: int, characters: int) -> tuple[list[range], int]:
    taken: list[range] = []
    length = 0
    while length < characters and start < len(pieces):
        taken.append(pieces[start])
        length += len(pieces[start])
        start += 1
    return taken, start


def answer(text: str) -> str:
    """The number at the start of a continuation; without a number, the first line of the continuation."""
    match = re.match(r"\s*(\d+)", text)
    return match[1] if match else text.strip().split("\n")[0]


def generated_all(result: Result) -> bool:
    """Whether llama-completion's output is complete, which is the case if it ends with the timings."""
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
    """Ask every question in a separate run with greedy decoding, and return the answers.

    Raises:
        ProgramError: llama-completion failed, for instance because a prompt has more than `ctx` tokens.
    """
    answers = []
    for index, needle in enumerate(needles):
        result = _complete(programs, model, needle.prompt, pair, ctx, tokens=_GENERATED)
        answers.append(answer(result.out))
        if on_answer:
            on_answer(index + 1)
    return answers


def count_tokens(programs: Programs, model: Path, prompt: str) -> int:
    """Number of tokens of `prompt` for the model, if possible without evaluating it.

    llama-completion refuses a prompt that does not fit into the context before it evaluates anything, and prints the
    prompt's length. Therefore the context is chosen too small. A prompt that fits nevertheless is evaluated.

    Raises:
        ProgramError: llama-completion failed for another reason, or printed no count.
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
