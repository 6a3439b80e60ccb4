"""The result of a conversion as a table and as a plot."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from rich.bar import Bar
from rich.console import Console, RenderableType
from rich.table import Table

from .._codec import dequantize, quantize
from .._plot import figure
from .plan import Balanced
from .run import Converted, reasons

__all__ = ["plot", "show", "unit_error"]

_TYPE = "turbo4"
_SCALES = {"exact": "exact scales", "pow2": "powers of two", "mixed": "exact scales and powers of two"}


def unit_error(type: str = _TYPE) -> float:
    """The relative squared error of a type on normal values; rotated blocks are nearly normal."""
    x = np.random.default_rng(0).standard_normal((512, 128), dtype=np.float32)
    return float(np.square(dequantize(quantize(x, type), type) - x).mean() / np.square(x).mean())


def show(done: Converted, console: Console) -> None:
    """Print the predicted noise of every layer before and after the conversion, and the result of the check."""
    say = functools.partial(console.print, markup=False, soft_wrap=True)
    error = unit_error()
    table = Table(box=None, pad_edge=False, header_style="bold", title=f"Predicted error with a {_TYPE} cache")
    table.add_column("\nlayer", justify="right")
    for heading in ("K scores", "V output"):
        table.add_column(f"{heading}\nbefore", justify="right", min_width=8)
        table.add_column("\nafter", justify="right")
        table.add_column("noise\nleft", width=8)
        table.add_column("\nscales", justify="right", no_wrap=True)
    for layer in sorted({part.layer for part in done.parts}):
        row: list[RenderableType] = [str(layer)]
        for what in "KV":
            part = _part(done, layer, what)
            if part is None or part.refused:
                row += ["–", "–", "–", "–"]
                continue
            for power in (part.before, part.after):
                root = np.sqrt(error * power)
                row.append(f"{root:.3f}" if what == "K" else f"{root:.1%}")
            row += [Bar(1, 0, part.ratio), f"{part.smallest:.2g}–{part.largest:.2g}"]
        table.add_row(*row)
    console.print(table)
    console.print()
    say("Standard deviations: of attention scores, before the softmax; of a layer's output, relative to it.")
    if refused := reasons(done.parts):
        say(f"Left alone:\n{refused}")
    say(
        f"Check: {done.kld:.1e} nats from the original with an f16 cache (limit {done.limit:.1e}); "
        f"{_SCALES[done.mode]}."
    )
    k_type, v_type = done.recommended
    say(f"Recommended: -ctk {k_type} -ctv {v_type}" + (", or -ctk auto -ctv auto" if done.layers else ""))
    if done.window_mib:
        say(
            f"The exact window, the newest {done.window.tokens} tokens in {done.window.type}, takes {done.window_mib:.2f} MiB "
            "more; the recommendation was made without it."
        )


def plot(done: Converted, path: Path, title: str) -> None:
    """Draw the predicted errors per layer before and after. The suffix of the file selects the format.

    Raises:
        OutputError: the file cannot be written, or its suffix is that of no picture format.
    """
    error = unit_error()
    with figure(path, 2, f"{title}: predicted error with a {_TYPE} cache") as axes:
        for axis, what in zip(axes, "KV", strict=True):
            parts = [part for part in done.parts if part.what == what and not part.refused]
            places = np.arange(len(parts))
            for shift, name, color in ((-0.2, "before", "#b0b0b0"), (0.2, "after", "#1f77b4")):
                heights = [np.sqrt(error * getattr(part, name)) for part in parts]
                axis.bar(places + shift, heights, 0.4, label=name, color=color)
            axis.set_xticks(places, [str(part.layer) for part in parts])
            axis.set(title="K: of a score" if what == "K" else "V: of the output, relative to it", xlabel="layer")
            if parts:
                axis.legend()
        axes[0].set_ylabel("standard deviation")


def _part(done: Converted, layer: int, what: str) -> Balanced | None:
    return next((part for part in done.parts if (part.layer, part.what) == (layer, what)), None)
