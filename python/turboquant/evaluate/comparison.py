"""The result of a comparison: the fields of report.json, in the order of that file, with their meanings.

docs/compare.md has the same fields as a table; a test compares the two.
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
    path: Annotated[str, "path of the model, as given"]
    sha256: Annotated[str, "SHA-256 of the file"]
    name: Annotated[str, "name in the metadata"]
    architecture: Annotated[str, "architecture in the metadata"]
    context: Annotated[int, "context length that the model was trained for, in tokens"]
    vocabulary: Annotated[int, "number of tokens in the vocabulary"]
    layers: Annotated[int, "number of layers"]
    bytes: Annotated[int, "size of the file"]
    plan: Annotated[bool, "whether the metadata has a plan, which the pair auto uses"]
    type: Annotated[str | None, "type of the weights, as llama-bench prints it; null if no speed was measured"]
    parameters: Annotated[int | None, "number of parameters; null if no speed was measured"]


@dataclass(frozen=True)
class Text:
    path: Annotated[str, "path of the text, as given"]
    sha256: Annotated[str, "SHA-256 of the file"]
    bytes: Annotated[int, "size of the file"]


@dataclass(frozen=True)
class Build:
    bin: Annotated[str, "folder of the programs"]
    sha256: Annotated[str, "SHA-256 of the programs, their libraries, and the environment variables that they read"]
    commit: Annotated[str | None, "commit of llama.cpp; null if no speed was measured"]
    number: Annotated[int | None, "build number of llama.cpp; null if no speed was measured"]


@dataclass(frozen=True)
class Machine:
    cpu: Annotated[str, "name of the CPU"]
    gpu: Annotated[str | None, "name of the GPU; null if there is none or no speed was measured"]
    backends: Annotated[str | None, "backends of llama.cpp; null if no speed was measured"]
    system: Annotated[str, "name of the operating system"]
    threads: Annotated[int, "threads of llama.cpp"]
    gpu_layers: Annotated[int | None, "layers evaluated on a GPU; null if llama.cpp chose"]


@dataclass(frozen=True)
class Settings:
    ctx: Annotated[int, "tokens in a chunk, of which the second half is scored"]
    chunks: Annotated[int, "number of chunks"]
    decode_ctx: Annotated[int, "tokens in a chunk of the comparison of the paths"]
    decode_chunks: Annotated[int, "number of chunks of the comparison of the paths"]
    depths: Annotated[list[int], "tokens in the cache when speeds are measured"]
    prompt: Annotated[int, "tokens of a timed batch"]
    generated: Annotated[int, "tokens timed one by one"]
    repetitions: Annotated[int, "repetitions of both timings"]
    needle_depths: Annotated[list[int], "tokens of the prompts with needles"]
    positions: Annotated[int, "needles at each depth"]
    template: Annotated[str, "the prompt with a needle"]
    window: Annotated[
        str | None, "the exact window that was requested, such as 256:q8_0, or 0; null: llama.cpp's default"
    ]


@dataclass(frozen=True)
class Noise:
    same: Annotated[float, "KLD between two batched runs with an f16 cache"]
    decode: Annotated[float, "KLD of the token-by-token run from the batched run, both with an f16 cache"]
    decode_error: Annotated[float, "standard error of `noise.decode`"]
    floor: Annotated[float, "the noise floor: a KLD below it is not caused by the cache type"]


@dataclass(frozen=True)
class Band:
    name: Annotated[str, "none, small, moderate, large, severe"]
    up_to: Annotated[float | None, "the highest KLD of the band; null for the last one"]
    meaning: Annotated[str, "the loss in words"]


@dataclass(frozen=True)
class Paths:
    batched: Annotated[float, "KLD in batches, on the tokens of the token-by-token run, without a window"]
    decode: Annotated[float, "KLD token by token, without a window"]
    difference: Annotated[float, "KLD token by token minus KLD in batches"]
    allowed: Annotated[float, "greatest magnitude of the difference at which the paths agree"]
    agree: Annotated[bool, "whether the paths agree"]


@dataclass(frozen=True)
class Needle:
    depth: Annotated[int, "upper limit of the prompt's tokens, which the prompt nearly fills"]
    position: Annotated[float, "position of the needle: 0 at the start of the text, 1 at its end"]
    expected: Annotated[str | None, "the number; null if it was not asked for"]
    answer: Annotated[str | None, "what the model answered; null if it was not asked"]
    found: Annotated[bool | None, "whether the answer is the number; null if the model was not asked"]
    reason: Annotated[str | None, "why the model was not asked"]


@dataclass(frozen=True)
class Timing:
    depth: Annotated[int, "tokens in the cache before the timed ones"]
    prefill: Annotated[float | None, "tokens per second in a batch"]
    prefill_error: Annotated[float | None, "standard deviation of `prefill` over the repetitions"]
    decode: Annotated[float | None, "tokens per second one by one"]
    decode_error: Annotated[float | None, "standard deviation of `decode` over the repetitions"]
    reason: Annotated[str | None, "why the speed was not measured"]


@dataclass(frozen=True)
class Pair:
    """A pair of cache types; a pair that could not be measured has only these fields."""

    k: Annotated[str, "type of K, as requested"]
    v: Annotated[str, "type of V, as requested"]
    plan: Annotated[str | None, "the plan file that names the types of each layer (k and v are then auto), or null"]
    label: Annotated[str, "K/V, or one name for both; the first pair is always f16"]
    failure: Annotated[str | None, "why the pair could not be measured; null if it was"]


@dataclass(frozen=True)
class Measured(Pair):
    """A pair that was measured."""

    type_k: Annotated[str, "type of K in the cache: turbo4_64 for heads of 64, or turbo4+q8_0 where layers differ"]
    type_v: Annotated[str, "type of V in the cache"]
    bits_k: Annotated[float, "bits per value of K, mean over the layers"]
    bits_v: Annotated[float, "bits per value of V, mean over the layers"]
    bits: Annotated[float, "bits per value of K and V together, without the exact window"]
    k_mib: Annotated[float, "size of K for the model's whole context, in MiB"]
    v_mib: Annotated[float, "size of V for the model's whole context, in MiB"]
    window_tokens: Annotated[int, "number of the newest tokens in the exact window; 0 if there is none"]
    window_type: Annotated[str | None, "type of the exact window; null if there is none"]
    window_mib: Annotated[float, "size of the exact window for the model's whole context, in MiB"]
    mib: Annotated[float, "size of K, V and the exact window together, in MiB"]
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
    pair: Annotated[str | None, "label of the recommended pair; null if no pair is good enough"]
    arguments: Annotated[str, "options of llama.cpp's programs for this pair"]
    reason: Annotated[str, "the reason, in a sentence"]


@dataclass(frozen=True)
class Comparison:
    """All of report.json."""

    format: Annotated[str, '"turboquant-compare"']
    version: Annotated[int, "version of this format"]
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
        """The pairs that could not be measured, each with its `failure`."""
        return [row for row in self.pairs if not isinstance(row, Measured)]

    def to_json(self) -> str:
        """Indented JSON, ending with a newline."""
        return json.dumps(asdict(self), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
