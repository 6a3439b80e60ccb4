"""What a comparison has found: the fields of report.json, in its order, with their meanings.

docs/compare.md has the same fields as a table; a test holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

from ..measure.perplexity import Divergence

__all__ = [
    "FORMAT",
    "VERSION",
    "Band",
    "Build",
    "Comparison",
    "Machine",
    "Measured",
    "Model",
    "Needle",
    "Noise",
    "Pair",
    "Paths",
    "Recommendation",
    "Settings",
    "Text",
    "Timing",
]

FORMAT, VERSION = "turboquant-compare", 2


@dataclass(frozen=True)
class Model:
    path: Annotated[str, "as given"]
    sha256: Annotated[str, "of the file"]
    name: Annotated[str, "as the file has it"]
    architecture: Annotated[str, "as the file has it"]
    context: Annotated[int, "tokens that it was trained for"]
    vocabulary: Annotated[int, "tokens"]
    layers: Annotated[int, ""]
    bytes: Annotated[int, "of the file"]
    plan: Annotated[bool, "whether its metadata has a plan, which the pair auto takes"]
    type: Annotated[str | None, "as llama-bench has it; null if no speed was measured"]
    parameters: Annotated[int | None, "likewise"]


@dataclass(frozen=True)
class Text:
    path: Annotated[str, "as given"]
    sha256: Annotated[str, "of the file"]
    bytes: Annotated[int, "of the file"]


@dataclass(frozen=True)
class Build:
    bin: Annotated[str, "folder of the programs"]
    sha256: Annotated[str, "of the programs, their libraries, and the environment variables that they read"]
    commit: Annotated[str | None, "of llama.cpp; null if no speed was measured"]
    number: Annotated[int | None, "likewise"]


@dataclass(frozen=True)
class Machine:
    cpu: Annotated[str, ""]
    gpu: Annotated[str | None, ""]
    backends: Annotated[str | None, "of llama.cpp"]
    system: Annotated[str, ""]
    threads: Annotated[int, ""]
    gpu_layers: Annotated[int | None, "null: llama.cpp's choice"]


@dataclass(frozen=True)
class Settings:
    ctx: Annotated[int, "tokens in a chunk, of which the second half is scored"]
    chunks: Annotated[int, ""]
    decode_ctx: Annotated[int, "the same for the comparison of the paths"]
    decode_chunks: Annotated[int, ""]
    depths: Annotated[list[int], "of the speeds"]
    prompt: Annotated[int, "tokens of a timed batch"]
    generated: Annotated[int, "tokens timed one by one"]
    repetitions: Annotated[int, "of both"]
    needle_depths: Annotated[list[int], ""]
    positions: Annotated[int, "needles at each depth"]
    template: Annotated[str, "the needles' prompt"]
    window: Annotated[str | None, "the exact window that was asked for, 256:q8_0 or 0; null: llama.cpp's default"]


@dataclass(frozen=True)
class Noise:
    same: Annotated[float, "f16's KLD from itself, in batches twice"]
    decode: Annotated[float, "f16's KLD from itself, token by token"]
    decode_error: Annotated[float, ""]
    floor: Annotated[float, "what says nothing of a cache"]


@dataclass(frozen=True)
class Band:
    name: Annotated[str, "none, small, moderate, large, severe"]
    up_to: Annotated[float | None, "the highest KLD of the band; null for the last one"]
    meaning: Annotated[str, ""]


@dataclass(frozen=True)
class Paths:
    batched: Annotated[float, "KLD in batches of the tokens that are measured token by token, without a window"]
    decode: Annotated[float, "KLD token by token, without a window"]
    difference: Annotated[float, "the latter less the former"]
    allowed: Annotated[float, "what it may be"]
    agree: Annotated[bool, ""]


@dataclass(frozen=True)
class Needle:
    depth: Annotated[int, "tokens that the prompt fills nearly"]
    position: Annotated[float, "0 at the start of the text, 1 at its end"]
    expected: Annotated[str | None, "the number; null if it was not asked for"]
    answer: Annotated[str | None, ""]
    found: Annotated[bool | None, ""]
    reason: Annotated[str | None, "why it was not asked for"]


@dataclass(frozen=True)
class Timing:
    depth: Annotated[int, ""]
    prefill: Annotated[float | None, "tokens per second"]
    prefill_error: Annotated[float | None, ""]
    decode: Annotated[float | None, "tokens per second"]
    decode_error: Annotated[float | None, ""]
    reason: Annotated[str | None, "why it was not measured"]


@dataclass(frozen=True)
class Pair:
    """A pair of cache types; one that could not be measured has these fields alone."""

    k: Annotated[str, "type of K, as asked for"]
    v: Annotated[str, "type of V"]
    plan: Annotated[str | None, "the plan file that names the types of each layer; k and v are auto then"]
    label: Annotated[str, "K/V, or one name for both; f16 is always the first"]
    failure: Annotated[str | None, "why it could not be measured"]


@dataclass(frozen=True)
class Measured(Pair):
    """A pair that was measured."""

    type_k: Annotated[str, "what the cache really has: turbo4_64 for heads of 64, or turbo4+q8_0 where layers differ"]
    type_v: Annotated[str, ""]
    bits_k: Annotated[float, "bits per value of K, mean over the layers"]
    bits_v: Annotated[float, "the same of V"]
    bits: Annotated[float, "of K and V together, without the window"]
    k_mib: Annotated[float, "size of K with the model's whole context"]
    v_mib: Annotated[float, "the same of V"]
    window_tokens: Annotated[int, "the newest tokens that the exact window keeps; 0: there is none"]
    window_type: Annotated[str | None, "what it keeps them in"]
    window_mib: Annotated[float, "its size with the model's whole context"]
    mib: Annotated[float, "of K, V and the window together"]
    quality: Annotated[Divergence, ""]
    decode: Annotated[Divergence, ""]
    paths: Annotated[Paths, ""]
    verdict: Annotated[str, "name of the band"]
    needles: Annotated[list[Needle], ""]
    speed: Annotated[list[Timing], ""]

    @property
    def found(self) -> int:
        """Needles found."""
        return sum(cell.found is True for cell in self.needles)

    @property
    def asked(self) -> int:
        """Needles asked for."""
        return sum(cell.found is not None for cell in self.needles)


@dataclass(frozen=True)
class Recommendation:
    pair: Annotated[str | None, "the label; null if none is good enough"]
    arguments: Annotated[str, "options of llama.cpp's programs"]
    reason: Annotated[str, ""]


@dataclass(frozen=True)
class Comparison:
    """All of report.json."""

    format: Annotated[str, '"turboquant-compare"']
    version: Annotated[int, "of this description"]
    created: Annotated[str, "date and time, ISO 8601"]
    turboquant: Annotated[str, "version of this package"]
    command: Annotated[list[str], "the command line"]
    model: Annotated[Model, ""]
    text: Annotated[Text, ""]
    build: Annotated[Build, ""]
    machine: Annotated[Machine, ""]
    settings: Annotated[Settings, ""]
    noise: Annotated[Noise, ""]
    bands: Annotated[list[Band], ""]
    pairs: Annotated[Sequence[Pair], ""]
    recommendation: Annotated[Recommendation, ""]

    @property
    def measured(self) -> list[Measured]:
        """The pairs that were measured, the f16 cache first."""
        return [row for row in self.pairs if isinstance(row, Measured)]

    @property
    def failed(self) -> list[Pair]:
        """The pairs that were not, each with its `failure`."""
        return [row for row in self.pairs if not isinstance(row, Measured)]

    def to_json(self) -> str:
        """Indented JSON, ending with a newline."""
        return json.dumps(asdict(self), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
