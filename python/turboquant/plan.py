"""Plans: the cache types of K and V of each layer, as files and as metadata of a model; and the size of such caches.

docs/tune.md describes the format. A plan file is JSON, and libllama reads it with ``--cache-plan FILE``::

    {"format": "turboquant-plan", "version": 1, "model": {...}, "k": ["q8_0", "turbo4", null], "v": [...], "about": {}}
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ._output import explain, partial_file, publish
from ._types import types
from .errors import TurboQuantError
from .measure.pairs import Window, bits_per_value, block_of
from .measure.results import write_text

__all__ = [
    "FORMAT",
    "VERSION",
    "CacheShape",
    "Layer",
    "Plan",
    "PlanError",
    "compact",
    "expand",
    "fitting",
    "read_plan",
    "read_shape",
    "shape_of",
    "write_plan",
]

FORMAT, VERSION = "turboquant-plan", 1
#: The metadata keys of a plan inside a model file.
KEYS = ("turboquant.plan.version", "turboquant.plan.type_k", "turboquant.plan.type_v", "turboquant.plan.model")

_MOST_BYTES = 1 << 20  # greatest size of a plan file, also in libllama
_MOST_LAYERS = 4096
_MAGIC = "a plan is a JSON file with \"format\": \"turboquant-plan\", such as `turboquant tune` writes"
_UBATCH, _CELLS = 512, 256  # llama.cpp's default batch, and the unit in which it allocates cells of a window
_RUN = re.compile(r"(-|[a-z][a-z0-9_]*)(?:\*([1-9][0-9]{0,3}))?")

Types = tuple["str | None", ...]


class PlanError(TurboQuantError):
    """A plan could not be read, written or used. The text names the file and the value, and says what to do."""


# ---- compact syntax --------------------------------------------------------------------------------------------------


def compact(types: Sequence[str | None]) -> str:
    """The types as text: ``q8_0*2,turbo4,-`` for two layers of q8_0, one of turbo4 and one without a cache."""
    runs: list[tuple[str, int]] = []
    for type in types:
        name = type or "-"
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1] + 1)
        else:
            runs.append((name, 1))
    return ",".join(name if count == 1 else f"{name}*{count}" for name, count in runs)


def expand(text: str, where: str = "the types") -> Types:
    """The inverse of `compact`.

    Raises:
        PlanError: the text is no such list; `where` names the text in the message.
    """
    types: list[str | None] = []
    for item in text.split(","):
        match = _RUN.fullmatch(item.strip())
        if match is None:
            raise PlanError(
                f"{where}: {_short(item)} is neither a cache type, nor NAME*COUNT, nor '-' for a layer without a cache"
            )
        types += [None if match[1] == "-" else match[1]] * int(match[2] or 1)
        if len(types) > _MOST_LAYERS:
            raise PlanError(f"{where}: the list has more than {_MOST_LAYERS} layers, and no model has")
    _check_types(types, where)
    return tuple(types)


def fitting(type: str, head: int) -> str | None:
    """The type that stores heads of `head` values: ``turbo4_64`` for turbo4 and 64. None if there is none."""
    for name in [info.name for info in types() if info.family == type] or [type]:
        block = block_of(name)
        if block and head % block[0] == 0:
            return name
    return None


# ---- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The types of K and of V, one for each layer of a model; None where a layer has no cache of its own.

    Raises:
        PlanError: the lists are empty, have different lengths, or name a type that does not exist.
    """

    k: Types
    v: Types
    model: Mapping[str, Any] | None = None  #: the model, as libllama identifies it; None matches every model
    about: Mapping[str, Any] = field(default_factory=dict)  #: any values, such as the author and the measurements

    def __post_init__(self) -> None:
        _check_types(self.k, "k")
        _check_types(self.v, "v")
        if len(self.k) != len(self.v):
            raise PlanError(f"k has {len(self.k)} layers and v has {len(self.v)}: both need one type for each layer")

    @property
    def layers(self) -> int:
        return len(self.k)

    def to_json(self) -> str:
        """The content of a plan file."""
        value: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        if self.model is not None:
            value["model"] = dict(self.model)
        value |= {"k": list(self.k), "v": list(self.v), "about": dict(self.about)}
        lines = [f" {json.dumps(key)}: {json.dumps(item, allow_nan=False)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Plan:
        """Read the content of a plan file; `where` names it in messages. Raises PlanError if it is no plan."""
        try:
            value = json.loads(text, parse_constant=_not_json)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{where} is not a plan ({_first_line(error)}): {_MAGIC}") from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise PlanError(f"{where} is not a plan: {_MAGIC}")
        version = value.get("version")
        if type(version) is not int or version != VERSION:
            raise PlanError(
                f"{where} is a plan of version {_short(version)}, and this TurboQuant reads version {VERSION}: make it "
                "again with `turboquant tune`, or install the TurboQuant that wrote it"
            )
        lists = {}
        for side in "kv":
            types = value.get(side)
            if not isinstance(types, list):
                raise PlanError(f"{where}: \"{side}\" must be a list with one type for each layer, got {_short(types)}")
            lists[side] = tuple(types)
        model, about = value.get("model"), value.get("about", {})
        if model is not None and not isinstance(model, dict):
            raise PlanError(f"{where}: \"model\" must be an object, got {_short(model)}; without it, any model fits")
        if not isinstance(about, dict):
            raise PlanError(f"{where}: \"about\" must be an object, got {_short(about)}; it may be left out")
        try:
            return cls(lists["k"], lists["v"], model, about)
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from None

    def to_metadata(self) -> dict[str, Any]:
        """The metadata of a model file with this plan; they do not contain ``about``."""
        values: dict[str, Any] = dict(zip(KEYS, (VERSION, compact(self.k), compact(self.v)), strict=False))
        if self.model is not None:
            values[KEYS[3]] = json.dumps(self.model, separators=(",", ":"), allow_nan=False)
        return values

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], where: str) -> Plan | None:
        """The plan in the metadata of a model file, or None. Raises PlanError if it is damaged."""
        if KEYS[0] not in metadata:
            return None
        if metadata[KEYS[0]] != VERSION:
            raise PlanError(
                f"{where} holds a plan of version {_short(metadata[KEYS[0]])}, and this TurboQuant reads version "
                f"{VERSION}: install the TurboQuant that wrote it"
            )
        lists = []
        for key in KEYS[1:3]:
            if not isinstance(text := metadata.get(key), str):
                raise PlanError(f"{where}: {key} must be a string such as q8_0*2,turbo4*22, got {_short(text)}")
            lists.append(expand(text, f"{where}: {key}"))
        model = None
        if KEYS[3] in metadata:
            try:
                model = json.loads(metadata[KEYS[3]], parse_constant=_not_json)
            except (TypeError, ValueError, RecursionError):
                model = False
            if not isinstance(model, dict):
                raise PlanError(f"{where}: {KEYS[3]} must be a JSON object, got {_short(metadata[KEYS[3]])}")
        try:
            return cls(lists[0], lists[1], model)
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from None


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: the file cannot be read or is no plan of this version. The text names the file and says what to do.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise PlanError(f"{path} cannot be read ({error.strerror}): give a plan file") from None
    if len(data) > _MOST_BYTES:
        raise PlanError(f"{path} is not a plan, as it has more than {_MOST_BYTES} bytes: {_MAGIC}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise PlanError(f"{path} is not a plan, as it is not UTF-8 text: {_MAGIC}") from None
    return Plan.from_json(text, str(path))


def check_target(path: Path) -> bool:
    """Check, before long work, that a plan can be written to `path`. Returns whether it would replace a plan.

    Raises:
        PlanError: the file exists and is no plan.
        OutputError: the folder is not writable.
    """
    from ._output import check_new

    if not os.path.lexists(path):
        check_new(path)
        return False
    if path.is_file() and not path.is_symlink():
        try:
            read_plan(path)
            return True
        except PlanError:
            pass
    raise PlanError(f"{path} exists and is no plan of this version: remove it, or give another name")


def write_plan(path: Path, plan: Plan) -> bool:
    """Write a plan file, completely or not at all. Returns whether it replaced another plan.

    Raises:
        PlanError: the file exists and is no plan.
        OutputError: the file cannot be written.
    """
    replaces = check_target(path)
    if not replaces:  # a link does not replace a file that was created in the meantime, a rename would
        with partial_file(path) as partial:
            partial.write_text(plan.to_json(), encoding="utf-8")
            publish(partial, path)
        return False
    try:
        write_text(path, plan.to_json())
    except OSError as error:
        raise explain(path, error) from error
    return True


# ---- the size of a cache ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """The cache of one layer. `window` says whether it holds only the model's sliding window."""

    heads: int
    head_k: int
    head_v: int
    window: bool = False

    def head(self, side: str) -> int:
        return self.head_k if side == "k" else self.head_v

    def bits(self, side: str, type: str) -> float:
        """Bits of K or V of one token. Raises PlanError if no block of the type divides the heads."""
        name = fitting(type, self.head(side))
        bits = bits_per_value(name) if name else None
        if bits is None:
            raise PlanError(
                f"{side.upper()} in {type} does not fit heads of {self.head(side)} values: use f16 for this model"
            )
        return bits * self.heads * self.head(side)


@dataclass(frozen=True)
class CacheShape:
    """The caches of a model: one entry per layer, None for a layer without its own cache."""

    layers: tuple[Layer | None, ...]
    window: int = 0  #: the sliding window in tokens, 0 if there is none
    context: int = 0  #: tokens that the model was trained for

    def cached(self) -> Iterator[tuple[int, Layer]]:
        """The layers that have a cache, by their numbers."""
        return ((number, layer) for number, layer in enumerate(self.layers) if layer is not None)

    def cells(self, layer: Layer, context: int) -> int:
        """Tokens that the cache of a layer holds in a context of `context` tokens, for one sequence."""
        if not (layer.window and self.window):
            return context
        return min(context, -(-(self.window + _UBATCH) // _CELLS) * _CELLS)

    def total_bits(self, plan: Plan, context: int, sides: str = "kv") -> float:
        """Size of a cache with `plan` in bits. Raises PlanError if the plan does not fit the layers."""
        self.check(plan)
        total = 0.0
        for number, layer in self.cached():
            for side in sides:
                type = (plan.k if side == "k" else plan.v)[number]
                assert type is not None
                total += layer.bits(side, type) * self.cells(layer, context)
        return total

    def mib(self, plan: Plan, context: int, sides: str = "kv") -> float:
        """Size of a cache with `plan` in MiB."""
        return self.total_bits(plan, context, sides) / 8 / (1 << 20)

    def window_mib(self, plan: Plan, context: int, window: Window) -> float:
        """The size in MiB of the exact window with that plan: only layers with a turbo type have one."""
        bits = 0.0
        for number, layer in self.cached():
            if any((types[number] or "").startswith("turbo") for types in (plan.k, plan.v)):
                rows = min(window.tokens, self.cells(layer, context)) + 1  # one more row receives tokens without a slot
                bits += rows * sum(layer.bits(side, window.type) for side in "kv")
        return bits / 8 / (1 << 20) if window.tokens else 0.0

    def mean_bits(self, plan: Plan, context: int, sides: str = "kv") -> float:
        """Bits per stored value, over the whole cache, or over K or V."""
        return self.total_bits(plan, context, sides) / self.values(context, sides)

    def values(self, context: int, sides: str = "kv") -> int:
        """Number of values that the cache stores."""
        return sum(
            layer.heads * layer.head(side) * self.cells(layer, context) for _, layer in self.cached() for side in sides
        )

    def check(self, plan: Plan) -> None:
        """Raise PlanError if the plan does not fit these layers."""
        if plan.layers != len(self.layers):
            raise PlanError(
                f"the plan has types for {plan.layers} layers, and the model has {len(self.layers)}: it was made for "
                "another model"
            )
        for number, layer in self.cached():
            for side, types in (("k", plan.k), ("v", plan.v)):
                type = types[number]
                if type is None:
                    raise PlanError(f"the plan names no type of {side.upper()} for layer {number}, which has a cache")
                layer.bits(side, type)


def read_shape(path: Path) -> CacheShape:
    """The caches of a model file, as its metadata describes them.

    Raises:
        PlanError: the metadata do not describe attention with a cache whose types a plan can set.
        ModelError: the file is no complete GGUF file.
    """
    from .models.modelfile import ModelFile  # needs gguf, unlike the rest of this module

    with ModelFile(path) as model:
        return shape_of(model.metadata, str(path))


def shape_of(metadata: Mapping[str, Any], where: str) -> CacheShape:
    """As `read_shape`, from metadata that have been read."""
    architecture = str(metadata.get("general.architecture", ""))

    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    count = value("block_count")
    if type(count) is not int or not 0 < count <= _MOST_LAYERS:
        raise PlanError(f"{where} names no number of layers ({architecture}.block_count is {_short(count)}): is it a "
                        "language model?")  # fmt: skip
    if value("attention.kv_lora_rank"):
        raise PlanError(f"{where} has multi-head latent attention, whose K and V must have the same type: no plan helps")
    heads = _per_layer(value("attention.head_count"), count, "attention.head_count", where)
    heads_kv = _per_layer(value("attention.head_count_kv", heads), count, "attention.head_count_kv", where)
    width = value("embedding_length")
    head = width // max(heads) if type(width) is int and max(heads) else None
    window = value("attention.sliding_window", 0)
    pattern = value("attention.sliding_window_pattern", [])
    windows = [bool(one) for one in pattern] if isinstance(pattern, list) and len(pattern) == count else [False] * count
    layers: list[Layer | None] = []
    for number in range(count):
        sizes = []
        for name in ("key_length", "value_length"):
            size = value(f"attention.{name}_swa") if windows[number] else None
            size = value(f"attention.{name}", head) if size is None else size
            if type(size) is not int or size < 1:
                raise PlanError(f"{where}: {architecture}.attention.{name} is {_short(size)}, wanted a number of values")
            sizes.append(size)
        own = heads_kv[number] > 0
        layers.append(Layer(heads_kv[number], sizes[0], sizes[1], windows[number]) if own else None)
    if not any(layers):
        raise PlanError(f"{where} has no layer with a cache of keys and values: there is nothing to plan")
    context = value("context_length", 0)
    return CacheShape(tuple(layers), window if type(window) is int else 0, context if type(context) is int else 0)


def _per_layer(value: Any, count: int, key: str, where: str) -> list[int]:
    values = value if isinstance(value, list) else [value] * count
    if len(values) < count or not all(type(one) is int and 0 <= one < 1 << 20 for one in values):
        raise PlanError(f"{where}: {key} is {_short(value)}, wanted one number or one for each of {count} layers")
    return values[:count]


# ---- messages --------------------------------------------------------------------------------------------------------


def _check_types(types: Sequence[Any], where: str) -> None:
    if not 0 < len(types) <= _MOST_LAYERS:
        raise PlanError(f"{where} has {len(types)} layers, wanted 1 to {_MOST_LAYERS}")
    for number, type in enumerate(types):
        if type is not None and not (isinstance(type, str) and bits_per_value(type)):
            raise PlanError(
                f"{where}: layer {number} has {_short(type)}, which is no cache type (a layer without a cache has null "
                "in a plan file and - in metadata)"
            )


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _short(value: Any, most: int = 60) -> str:
    """A value, shortened for messages."""
    text = repr(value) if not isinstance(value, float) or math.isfinite(value) else str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _first_line(error: Exception) -> str:
    return _short_text(str(error).splitlines()[0] if str(error) else type(error).__name__)


def _short_text(text: str, most: int = 100) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
