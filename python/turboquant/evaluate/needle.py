"""Retrieval: hide a number in prose, ask for it thousands of characters later, compare the answer."""

from __future__ import annotations

import filecmp
import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..llama.paths import native_dir
from .pairs import CachePair
from .programs import ProgramError, Programs, Result

__all__ = [
    "NAMES",
    "TEMPLATES",
    "Needle",
    "answer",
    "ask",
    "bundled_model",
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
_GENERATED = 8  # tokens of an answer
_ANSWER = 16  # tokens that a prompt leaves free: llama-completion wants four, and an answer
_TRIALS = 6


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
        """The line of the prompt that has the number."""
        return next(line for line in self.prompt.splitlines() if self.number in line)

    @property
    def question(self) -> str:
        """The question as the prompt puts it: the line before the last, with the templates of this module."""
        return self.prompt.splitlines()[-2].removeprefix("Question: ")


def bundled_model() -> Path:
    """The model that comes with the package."""
    return native_dir() / "models" / "prose-8m-q8_0.gguf"


def template_for(model: Path) -> str:
    """The prompt that suits a model: "notes" for the bundled one and its copies, "plain" for any other."""
    return TEMPLATES["notes" if filecmp.cmp(model, bundled_model(), shallow=False) else "plain"]


def make_needles(
    text: str, count: int, distance: int = 6000, seed: int = 1, template: str = TEMPLATES["notes"]
) -> list[Needle]:
    """Build `count` prompts from different stretches of `text`, each with another name and number.

    Between the number and the question stand whole paragraphs of the text, together at least `distance` characters. A
    paragraph of more than half of that is cut, so that a prompt never grows with the length of a line.

    Raises:
        ValueError: the text is too short for the distance, or there are fewer names than questions.
    """
    if not 1 <= count <= len(NAMES):
        raise ValueError(f"needles: expected 1 to {len(NAMES)}, got {count}")
    text = re.sub(r"\r\n?", "\n", text)
    lead = min(_LEAD, distance)
    pieces = _pieces(text, distance // 2)
    # The last piece from which enough text follows.
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
    """`make_needles`, nearer than `distance` where a prompt and its answer would have more than `ctx` tokens.

    Raises:
        ValueError: as `make_needles`, or no prompt is short enough.
    """
    for _ in range(_TRIALS):
        needles = make_needles(text, count, distance, template=template)
        # No tokenizer makes more tokens than bytes, so short prompts need no counting.
        sizes = [(len(one.prompt.encode()), one.prompt) for one in needles]
        tokens = max(size if size <= ctx - _ANSWER else count_tokens(prompt) for size, prompt in sizes)
        if tokens <= ctx - _ANSWER:
            return needles
        # A little less than what fits: the other stretches of text may have more tokens for their characters.
        distance = int(0.9 * distance * (ctx - _ANSWER) / tokens)
        if distance < 1:
            break
    raise ValueError(f"text: no needle of it fits into {ctx} tokens")


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


def fit_grid_needle(
    text: str,
    depth: int,
    position: float,
    index: int,
    count_tokens: Callable[[str], int],
    *,
    template: str = TEMPLATES["plain"],
) -> Needle:
    """`make_grid_needle` with as many characters as nearly fill `depth` tokens, and leave room for the answer.

    Raises:
        ValueError: as `make_grid_needle`, or no number of characters fits.
    """
    characters = min(4 * depth, len(text))
    for trial in range(_TRIALS):
        one = make_grid_needle(text, characters, depth, position, index, template)
        tokens = count_tokens(one.prompt)
        if trial and tokens <= depth - _ANSWER:
            return one
        # Each length takes another stretch of the text, which may have more tokens for its characters.
        characters = int(((0.97 - 0.1 * trial) * depth - _ANSWER) * len(one.prompt) / max(1, tokens))
    raise ValueError(f"the text has no stretch that fills {depth} tokens")


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


def _pieces(text: str, limit: int) -> list[range]:
    """Where the paragraphs of a text stand; those of more than `limit` characters are cut at breaks, if they have any."""
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
        result = _complete(programs, model, needle.prompt, pair, ctx, tokens=_GENERATED)
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
