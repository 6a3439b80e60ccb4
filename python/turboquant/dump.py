"""`turboquant dump-kv`: the queries, keys and values of a model for a text in a safetensors file; `load` reads it.

The tensors are float32, as attention reads them (after RoPE, biases and norms):

- ``q.LAYER`` (tokens, heads, head); ``q.LAYER.N`` for further attention operations that read the cache of the same
  layer
- ``k.LAYER``, ``v.LAYER`` (tokens, KV heads, head)

The metadata are ``format`` ("turboquant-kv 1"), ``model``, ``text``, ``tokens``, and ``scale``, a JSON object with the
factor of q·k for each name of a q.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._output import check_new, partial_file, publish
from .errors import TurboQuantError
from .measure.capture import Attention, Capture, CaptureError, Data

__all__ = ["FORMAT", "DumpError", "KVLayer", "check_dump", "dump", "load"]

#: The value of the file's `format`.
FORMAT = "turboquant-kv 1"
_NAME = re.compile(r"[qkv]\.(0|[1-9]\d{0,5})|q\.(0|[1-9]\d{0,5})\.\d{1,6}")
_FLOATS = ("F16", "F32", "F64")


class DumpError(TurboQuantError):
    """The file could not be written or read. The text says what to do."""


@dataclass(frozen=True)
class KVLayer:
    """One layer of a dump, float32, heads first as `turboquant.attention` takes them."""

    q: NDArray[np.float32]  #: (n_head, tokens, head_k)
    k: NDArray[np.float32]  #: (n_kv_head, tokens, head_k)
    v: NDArray[np.float32]  #: (n_kv_head, tokens, head_v)
    scale: float  #: factor of the scores q·k in attention


def load(path: str | os.PathLike[str]) -> dict[int, KVLayer]:
    """Read a file that `dump` wrote, or a file with some of its layers in 16-bit floats.

    Further attention operations over a layer's cache (q.LAYER.N) are not read.

    Returns:
        The layers by their number.

    Raises:
        DumpError: the file is no dump, is damaged, or has a layer without a separate V (multi-head latent attention).
        OSError: the file cannot be read.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise DumpError("a dump is read with the package safetensors: pip install 'turboquant[convert]'") from error
    layers: dict[int, KVLayer] = {}
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise DumpError(f"{path} is not a dump of queries, keys and values: its format is "
                                f"{metadata.get('format')!r}, wanted {FORMAT!r}")
            scales, numbers = check_dump(file, path)
            names = set(file.keys())
            for number in numbers:
                missing = [f"{role}.{number}" for role in "qkv" if f"{role}.{number}" not in names]
                if missing:
                    raise DumpError(f"{path} has no {missing[0]}")
                q, k, v = (np.ascontiguousarray(file.get_tensor(f"{role}.{number}").swapaxes(0, 1), dtype=np.float32)
                           for role in "qkv")
                layers[number] = KVLayer(q, k, v, scales[f"q.{number}"])
    except SafetensorError as error:
        raise DumpError(f"{path} is not a safetensors file: {error}") from error
    return layers


def check_dump(file: Any, path: str | os.PathLike[str]) -> tuple[dict[str, float], list[int]]:
    """Check that the metadata and shapes of an open dump are such as `dump` writes. No tensor is read.

    Returns:
        The factors of the scores by the name of q, and the layers that have a K.

    Raises:
        DumpError: the text names the file and what is wrong.
    """
    scales = _scales(file, path)
    tokens: dict[int, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in filter(_NAME.fullmatch, list(file.keys())):
        part = file.get_slice(name)
        shape, kind = tuple(part.get_shape()), part.get_dtype()
        if len(shape) != 3 or min(shape) < 1 or kind not in _FLOATS:
            raise DumpError(f"{path}: {name} is {kind} of shape {shape}, wanted floats (tokens, heads, head)")
        shapes[name] = shape
        tokens.setdefault(shape[0], name)
        if name.startswith("q.") and name not in scales:
            raise DumpError(f"{path} names no scale of {name}")
    if len(tokens) > 1:
        raise DumpError(f"{path} has different numbers of tokens: " + ", ".join(f"{n} in {of}" for n, of in tokens.items()))
    for name, (_, heads, head) in shapes.items():
        role, layer = name.split(".")[:2]
        key = shapes.get(f"k.{layer}")
        if key and ((role == "q" and (head != key[2] or heads % key[1])) or (role == "v" and heads != key[1])):
            raise DumpError(f"{path}: {name} has {heads} heads of {head}, which do not go with {key[1]} of {key[2]} in K")
    return scales, sorted(int(name[2:]) for name in shapes if name.startswith("k."))


def _scales(file: Any, path: str | os.PathLike[str]) -> dict[str, float]:
    try:
        scales = json.loads((file.metadata() or {}).get("scale", ""))
    except (ValueError, RecursionError):
        scales = None
    if not isinstance(scales, dict) or not all(type(x) in (int, float) and math.isfinite(x) for x in scales.values()):
        raise DumpError(f"{path} names no scales of its queries: make it again with `turboquant dump-kv`")
    return scales


def dump(
    model: Path,
    text: Path,
    target: Path,
    *,
    tokens: int,
    bin: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    gpu_layers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, tuple[int, ...]]:
    """Evaluate the first `tokens` tokens of `text` in one context and write q, k and v of every layer to `target`.

    All tensors are held in memory: 4 bytes per token and channel, which is 0.8 MiB per token for an 8B model.

    Returns:
        The shapes of the tensors by name.

    Raises:
        DumpError, CaptureError: the text says what to do. No file is left behind.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ModuleNotFoundError as error:
        raise DumpError("dump-kv needs the package safetensors: pip install 'turboquant[convert]'") from error
    check_new(target)
    pieces: dict[tuple[str, int, int], list[NDArray[np.float32]]] = {}
    attentions: list[Attention] = []
    with Capture(
        model, text, tokens=tokens, context=tokens, bin=bin, threads=threads, gpu_layers=gpu_layers
    ) as capture:
        if capture.tokens < tokens:
            raise CaptureError(
                f"{text} has {capture.tokens} tokens, {tokens} were asked for: give a longer text or fewer --tokens"
            )
        for item in capture:
            if isinstance(item, Attention):
                attentions.append(item)
            elif isinstance(item, Data):
                pieces.setdefault((item.role, item.layer, item.use), []).append(item.values)
                progress(item.first + len(item.values), tokens)
    if not attentions:
        raise CaptureError(f"{model} has no attention with a cache: there is nothing to dump")
    tensors, scales = _tensors(pieces, attentions)
    metadata = {
        "model": model.name,
        "text": text.name,
        "tokens": str(tokens),
        "scale": json.dumps(scales),
        "format": FORMAT,
    }
    with partial_file(target) as partial:
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:  # the error of safetensors for a full disk
            raise DumpError(
                f"{target} cannot be written ({error}): make room, or give a file on another disk"
            ) from error
        publish(partial, target)
    return {name: tensor.shape for name, tensor in tensors.items()}


def _tensors(
    pieces: dict[tuple[str, int, int], list[NDArray[np.float32]]], attentions: list[Attention]
) -> tuple[dict[str, NDArray[np.float32]], dict[str, float]]:
    tensors: dict[str, NDArray[np.float32]] = {}
    scales: dict[str, float] = {}
    for attention in attentions:
        layer, number = attention.layer, sum(name.split(".")[1] == str(attention.layer) for name in scales)
        name = f"q.{layer}.{number}" if number else f"q.{layer}"
        tensors[name] = np.concatenate(pieces.pop(("q", layer, attention.use)))
        scales[name] = attention.scale
        for role, head in (("k", attention.head_k), ("v", attention.head_v)):
            if (role, layer, -1) in pieces:  # the first attention operation of the layer; V may be a part of K
                values = np.concatenate(pieces.pop((role, layer, -1)))
                tensors[f"{role}.{layer}"] = values.reshape(len(values), -1, head)
    return tensors, scales
