"""`turboquant convert`: measure, plan, write, check, and only then give the file its name."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from ..llama.files import LlamaError
from ..llama.paths import native_dir
from ..llama.progress import Reporter
from .check import Checker, CheckError, checker, shape
from .modelfile import ModelFile, replace_text
from .plan import Balanced, Plan, make_plan, measure
from .stream import check_model

__all__ = ["MARK", "ConvertError", "Converted", "convert", "default_text", "reasons"]

#: The metadata key that a converted model is known by.
MARK = "turboquant.convert.version"
#: A conversion without rounding may differ by this much, in nats: what storing the predictions in 16 bits costs.
EXACT = 1e-5
#: Cache types from few bits to many; the first under GOOD is recommended.
CANDIDATES = (
    ("turbo4", "turbo2"), ("turbo3", "turbo3"), ("turbo4", "turbo3"), ("turbo4", "turbo4"), ("q8_0", "turbo3"),
    ("q8_0", "turbo4"), ("q8_0", "q8_0"),
)  # fmt: skip
GOOD = 0.02
_CONTEXT = 512
_TYPE, _WIDTH = "turboquant.cache_type_", 10  # written with spaces first, as they are known last


class ConvertError(LlamaError):
    """The model was not converted, and no file was written. The text says why."""


@dataclass(frozen=True)
class Converted:
    """What was done."""

    parts: list[Balanced]
    mode: str  #: "exact", "pow2" or "mixed"
    kld: float  #: of the converted model from the original, both with an f16 cache
    limit: float  #: that it had to keep to
    tokens: int  #: that were measured
    recommended: tuple[str, str]  #: cache types for K and V: the fewest bits with a KLD of at most GOOD


def default_text() -> Path:
    """The bundled text."""
    return native_dir() / "models" / "heldout.txt"


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
    """Write to `target` the model `source` with balanced K and Q, and V and output.

    Args:
        text: what to measure and to check on (default: `default_text`).
        mode: "auto", "exact" or "pow2", see `plan.make_plan`. "auto" falls back to powers of two if exact scales cost
            more than the check allows.
        values: balance V, too.
        tokens: how much of the text to measure on.

    Raises:
        ConvertError, ModelError, CaptureError, CheckError: nothing is written.
        OSError: as a full disk; nothing is left behind.
    """
    reporter = reporter or Reporter()
    text = text or default_text()
    check_model(source)
    if not target.parent.is_dir():
        raise ConvertError(f"{target.parent}: no such folder")
    if target.exists():
        raise ConvertError(f"{target} exists already: remove it, or give another name")
    with ModelFile(source) as model:
        _refuse(model)
        free = shutil.disk_usage(target.parent).free
        if free < model.size:
            raise ConvertError(
                f"{target.parent} has {free / 1e9:.1f} GB left, and {target.name} will have {model.size / 1e9:.1f} GB"
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
            raise ConvertError(f"{source}: nothing in it can be balanced:\n{reasons(plan.parts)}")
        about = {
            "turboquant.convert.calibration_sha256": _sha256(text),
            "turboquant.convert.calibration_tokens": measured.tokens,
        }
        reporter.say(f"predicting {chunks * context} tokens with the original")
        with checker(source, text, context, chunks, bin, threads) as check:
            partial, kld, limit = _written(model, target, plan, about, check, reporter)
            if kld > limit and mode == "auto" and plan.mode != "pow2":
                reporter.say(f"exact scales cost {kld:.1e} nats, over {limit:.0e}: trying powers of two")
                partial.unlink()
                plan = make_plan(model, measured, "pow2", values)
                partial, kld, limit = _written(model, target, plan, about, check, reporter)
            try:
                if kld > limit:
                    raise ConvertError(
                        f"the converted model differs from the original by {kld:.2g} nats with an f16 cache, and "
                        f"{limit:.2g} is the limit: it was not written"
                    )
                k, v = _recommend(partial, check, reporter)
                for key, value in (("k", k), ("v", v)):
                    replace_text(partial, f"{_TYPE}{key}", value)
                os.link(partial, target)  # unlike a rename this cannot replace a file that came in the meantime
            finally:
                partial.unlink(missing_ok=True)
    return Converted(plan.parts, plan.mode, kld, limit, measured.tokens, (k, v))


def _written(
    model: ModelFile, target: Path, plan: Plan, about: dict[str, Any], check: Checker, reporter: Reporter
) -> tuple[Path, float, float]:
    """Write the file under a temporary name and measure it: its path, its KLD, and what that may be."""
    metadata = {MARK: _version(), **about, "turboquant.convert.mode": plan.mode, **_summary(plan)}
    metadata |= {f"{_TYPE}{key}": " " * _WIDTH for key in "kv"}
    with reporter.track("writing", model.size, "bytes") as track:
        partial = model.write(target, plan.scalings, metadata, track.update)
    try:
        reporter.say("predicting with the converted model")
        kld, limit = check.kld(partial), EXACT
        if kld > limit and plan.mode == "pow2":
            # The weights are the same but for powers of two; what is left is how rounding in fp16 falls out. A cache of
            # f32 changes the original's own rounding: that is the floor.
            limit = max(limit, check.kld(model.path, "f32", "f32"))
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return partial, kld, limit


def _recommend(model: Path, check: Checker, reporter: Reporter) -> tuple[str, str]:
    """The pair of cache types with the fewest bits that is good, or the best there is."""
    reporter.say("looking for the smallest good cache")
    for k, v in CANDIDATES:
        try:
            if check.kld(model, k, v) <= GOOD:
                return k, v
        except CheckError:  # heads that no block divides, or other types that this model cannot have
            continue
    return "f16", "f16"


def _refuse(model: ModelFile) -> None:
    if MARK in model.metadata:
        raise ConvertError(
            f"{model.path} is converted already (by turboquant {model.metadata[MARK]}): there is nothing left to do"
        )
    if model.metadata.get("split.count", 0) > 1:
        raise ConvertError(f"{model.path} is one of several parts: join them first with `llama-gguf-split --merge`")


def reasons(parts: list[Balanced]) -> str:
    """Why parts are left alone, one line for each reason."""
    found: dict[str, list[int]] = {}
    for part in parts:
        if part.refused:
            reason = part.refused.replace(f"blk.{part.layer}.", "blk.*.")
            found.setdefault(f"{part.what}: {reason}", []).append(part.layer)
    return "\n".join(f"  {reason} ({_ranges(layers)})" for reason, layers in found.items())


def _ranges(layers: list[int]) -> str:
    """layers 0-3, 7"""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1][1:] = [layer]
        else:
            parts.append([layer])
    return f"layer{'s' * (len(layers) > 1)} " + ", ".join("-".join(map(str, part)) for part in parts)


def _summary(plan: Plan) -> dict[str, Any]:
    """What the file says about its scales, by layer."""
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
    except PackageNotFoundError:  # run from a checkout
        return "unknown"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()
