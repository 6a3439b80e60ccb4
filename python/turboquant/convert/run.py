"""`turboquant convert`: measure, plan, write and check a model. The file gets its name after the check succeeded."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from .._output import check_new, partial_file, publish
from .._types import types
from ..errors import TurboQuantError
from ..llama.paths import bundled_text
from ..llama.progress import Reporter
from ..measure.capture import check_model
from ..measure.pairs import Window
from ..models.modelfile import ModelFile, replace_metadata
from ..plan import KEYS, VERSION, CacheShape, PlanError, Types, expand, shape_of
from ..plan import Plan as CachePlan
from .check import Checker, CheckError, checker, shape
from .plan import Balanced, Plan, make_plan, measure, ranges

__all__ = ["MARK", "ConvertError", "Converted", "convert", "reasons"]

#: The metadata key that identifies a converted model.
MARK = "turboquant.convert.version"
#: Greatest KLD of a conversion without rounding in nats per token, because predictions are stored in 16 bits.
EXACT = 1e-5
#: Cache types in ascending order of bits; the first with a KLD of at most GOOD is recommended. GPUs
#: are slower with trellis-coded types, so they get the Lloyd-Max types with as many bits. So does a device that has no
#: kernels for the former.
CANDIDATES = (
    ("turbo4_tcq", "turbo2_tcq"), ("turbo3_tcq", "turbo3_tcq"), ("turbo4_tcq", "turbo3_tcq"),
    ("turbo4_tcq", "turbo4_tcq"), ("q8_0", "turbo3_tcq"), ("q8_0", "turbo4_tcq"), ("q8_0", "q8_0"),
)  # fmt: skip
GOOD = 0.02
_CONTEXT = 512
_WIDTH = max(len(info.family) for info in types())  # greatest length of a recommended type's name
_TYPES = 1 + max(len(info.name) for info in types())  # greatest bytes per layer in the types of a plan
_MODEL = 64  # and in its model
_NOTE = "K is balanced against Q, and V against the output, inside the weights"
_ADVICE = {
    "auto": "with --no-v only K is balanced",
    "exact": "without --exact, powers of two are used where that is better",
    "pow2": "with --no-v only K is balanced",
}


class ConvertError(TurboQuantError):
    """The model was not converted, and no file was written. The text gives the reason."""


@dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    parts: list[Balanced]
    mode: str  #: "exact", "pow2" or "mixed"
    kld: float  #: KLD of the converted model from the original, both with an f16 cache, in nats per token
    limit: float  #: limit of that KLD
    tokens: int  #: number of measured tokens
    recommended: tuple[str, str]  #: recommended types of K and V: those with the fewest bits and a KLD of at most GOOD
    layers: tuple[Types, Types] | None  #: the plan in the file: types of K and V by layer; None if there is no plan
    window: Window  #: the exact window that llama.cpp adds; the check runs without it
    window_mib: float | None  #: size of the window with those types, in MiB; None if it is unknown


def convert(
    source: Path,
    target: Path,
    text: Path | None = None,
    *,
    mode: str = "auto",
    values: bool = True,
    tokens: int = 4096,
    bin: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    gpu_layers: int = 0,
    reporter: Reporter | None = None,
) -> Converted:
    """Write the model `source` with balanced K and Q, and V and output, to the file `target`.

    Args:
        text: the text for measuring and for the check (default: the bundled text).
        mode: "auto", "exact" or "pow2"; see `plan.make_plan`. "auto" takes powers of two if exact scales fail the
            check.
        values: whether to balance V as well.
        tokens: number of tokens of the text for measuring.

    Raises:
        ConvertError, ModelError, CaptureError, CheckError, OutputError: the text gives the reason. No file is left
            behind.
    """
    reporter = reporter or Reporter()
    text = text or bundled_text()
    check_model(source)
    check_new(target)
    try:
        window = Window.default()
    except ValueError as error:
        raise ConvertError(f"{Window.VARIABLE}: {error}") from error
    with ModelFile(source) as model:
        _refuse(model)
        free = shutil.disk_usage(target.parent).free
        if free < model.size:
            raise ConvertError(
                f"{target.parent} has {free / 1e9:.2f} GB left, and {target.name} needs {model.size / 1e9:.2f} GB: "
                "make room, or give a file on another disk"
            )
        with reporter.track(f"measuring {tokens} tokens", tokens) as track:
            measured = measure(
                source, text, tokens=tokens, context=_CONTEXT, bin=bin, threads=threads, gpu_layers=gpu_layers,
                progress=track.update,
            )  # fmt: skip
        context, chunks = shape(text, measured.available)
        with reporter.busy("planning"):
            plan = make_plan(model, measured, mode, values)
        if not plan.scalings:
            raise ConvertError(
                f"{source}: nothing in it can be balanced, so nothing was written:\n{reasons(plan.parts)}"
            )
        about = {
            MARK: _version(),
            "turboquant.convert.calibration_sha256": _sha256(text),
            "turboquant.convert.calibration_tokens": measured.tokens,
        }
        with checker(source, text, context, chunks, bin, threads, reporter) as check, partial_file(target) as partial:
            kld, limit, metadata = _write(model, partial, plan, about, check, reporter)
            if kld > limit and mode == "auto" and plan.mode != "pow2":
                reporter.say(f"exact scales cost {kld:.1e} nats, over {limit:.0e}: trying powers of two")
                plan = make_plan(model, measured, "pow2", values)
                kld, limit, metadata = _write(model, partial, plan, about, check, reporter)
            if kld > limit:
                raise ConvertError(
                    f"the converted model differs from the original by {kld:.2g} nats with an f16 cache, over the "
                    f"limit of {limit:.2g}, so it was not written: {_ADVICE[mode]}"
                )
            recommended, layers = _recommend(partial, check, _shape(model), gpu=gpu_layers > 0)
            known = _with_types(metadata, *recommended)
            if layers:  # for -ctk auto -ctv auto: the recommended types, with those that the guard chose
                known |= CachePlan(*layers, check.identity(partial, text)).to_metadata()
            replace_metadata(partial, metadata, known)
            size, window_mib = _shape(model), None
            if size and layers:
                window_mib = size.window_mib(CachePlan(*layers), size.context or window.tokens, window)
            publish(partial, target)
    return Converted(
        plan.parts, plan.mode, kld, limit, measured.tokens, recommended, layers, window, window_mib
    )


def _write(
    model: ModelFile, partial: Path, plan: Plan, about: dict[str, Any], check: Checker, reporter: Reporter
) -> tuple[float, float, dict[str, Any]]:
    """Write the file under a temporary name and measure it. Returns its KLD, the limit of the KLD, and its metadata."""
    metadata = {**about, "turboquant.convert.mode": plan.mode, **_summary(plan)}
    metadata = _with_types(metadata, " " * _WIDTH, " " * _WIDTH)  # placeholders for values that are known last
    if shape := _shape(model):
        count = len(shape.layers)
        metadata |= dict(zip(KEYS, (VERSION, *[" " * _TYPES * count] * 2, " " * (_MODEL * (4 + count))), strict=True))
    with reporter.track("writing", model.size, "bytes") as track:
        model.write(partial, plan.scalings, metadata, track.update)
    kld, limit = check.kld(partial, what="the converted model"), EXACT
    if kld > limit and plan.mode == "pow2":
        # The weights differ only by powers of two, so the KLD comes from rounding alone.
        limit = max(limit, check.floor(model.path))
    return kld, limit, metadata


def _with_types(metadata: dict[str, Any], k: str, v: str) -> dict[str, Any]:
    return {**metadata, "turboquant.cache_type_k": k, "turboquant.cache_type_v": v, "turboquant.convert.note": _NOTE}


def _shape(model: ModelFile) -> CacheShape | None:
    """The caches of the model; None if the model cannot have a plan."""
    try:
        return shape_of(model.metadata, str(model.path))
    except PlanError:
        return None


def _recommend(
    model: Path, check: Checker, shape: CacheShape | None, gpu: bool
) -> tuple[tuple[str, str], tuple[Types, Types] | None]:
    """The pair of cache types with the fewest bits and a KLD of at most GOOD, or f16; and its types of each layer."""
    for candidate in CANDIDATES:
        scalar = tuple(name.removesuffix("_tcq") for name in candidate)
        for k, v in (scalar,) if gpu else dict.fromkeys((candidate, scalar)):
            try:
                kld, found = check.kld_and_types(model, k, v, what=f"a cache of {k}/{v}")
            except CheckError:  # no block divides the heads, or the model or the device does not allow this type
                continue
            if kld <= GOOD:
                return (k, v), _by_layer(shape, (k, v), found)
            break
    return ("f16", "f16"), _by_layer(shape, ("f16", "f16"), ("", ""))


def _by_layer(shape: CacheShape | None, pair: tuple[str, str], logged: tuple[str, str]) -> tuple[Types, Types] | None:
    if shape is None:
        return None
    k, v = (
        expand(types) if types else tuple(type if layer else None for layer in shape.layers)
        for type, types in zip(pair, logged, strict=True)
    )
    return k, v


def _refuse(model: ModelFile) -> None:
    if MARK in model.metadata:
        raise ConvertError(
            f"{model.path} is converted already (by turboquant {model.metadata[MARK]}): there is nothing left to do"
        )
    if model.metadata.get("split.count", 0) > 1:
        raise ConvertError(f"{model.path} is one of several parts: join them first with `llama-gguf-split --merge`")


def reasons(parts: list[Balanced]) -> str:
    """Why parts stay unchanged, one line for each reason."""
    found: dict[str, list[int]] = {}
    for part in parts:
        if part.refused:
            reason = part.refused.replace(f"blk.{part.layer}.", "blk.*.")
            found.setdefault(f"{part.what}: {reason}", []).append(part.layer)
    return "\n".join(f"  {reason} ({ranges(layers)})" for reason, layers in found.items())


def _summary(plan: Plan) -> dict[str, Any]:
    """The metadata about the scales, by layer."""
    found: dict[str, Any] = {}
    for what in "KV":
        parts = [part for part in plan.parts if part.what == what and not part.refused]
        if parts:
            prefix = f"turboquant.convert.{what.lower()}_"
            found |= {
                f"{prefix}layers": [part.layer for part in parts],
                f"{prefix}noise": [part.ratio for part in parts],
                f"{prefix}scale_min": [part.smallest for part in parts],
                f"{prefix}scale_max": [part.largest for part in parts],
            }
    return found


def _version() -> str:
    try:
        return package_version("turboquant")
    except PackageNotFoundError:  # the package runs from a checkout
        return "unknown"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()
