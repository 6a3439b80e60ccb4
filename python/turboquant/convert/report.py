"""What a conversion did, as a table and as a plot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from .._codec import dequantize, quantize
from .plan import Balanced
from .run import Converted, reasons

__all__ = ["plot", "show", "unit_error"]

_TYPE = "turbo4"


def unit_error(type: str = _TYPE) -> float:
    """The relative squared error of a type on normally distributed values, which a rotation makes of any."""
    x = np.random.default_rng(0).standard_normal((512, 128), dtype=np.float32)
    return float(np.square(dequantize(quantize(x, type), type) - x).mean() / np.square(x).mean())


def show(done: Converted, console: Console) -> None:
    """Print the predicted noise of every layer before and after, and the check."""
    error = unit_error()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("layer", f"K: score error, {_TYPE}", "after", "ratio", "V: noise ratio", "K scales", "V scales"):
        table.add_column(heading, justify="right")
    for layer in sorted({part.layer for part in done.parts}):
        k, v = (_part(done, layer, what) for what in "KV")
        row = [str(layer)]
        if k is None or k.refused:
            row += ["–", "–", "–"]
        else:
            row += [f"{np.sqrt(error * value):.3f}" for value in (k.before, k.after)] + [f"{k.ratio:.3f}"]
        row += ["–" if v is None or v.refused else f"{v.ratio:.3f}", _scales(k), _scales(v)]
        table.add_row(*row)
    console.print(table)
    console.print(f"\nScore error: predicted standard deviation of an attention score with K in {_TYPE}. Ratio: of the noise power.")
    if refused := reasons(done.parts):
        console.print(f"Left alone:\n{refused}", markup=False)
    console.print(
        f"Check: {done.kld:.1e} nats from the original with an f16 cache (limit {done.limit:.1e}); {done.mode} scales."
    )
    k_type, v_type = done.recommended
    console.print(f"Recommended: -ctk {k_type} -ctv {v_type}")


def plot(done: Converted, path: Path, title: str) -> None:
    """Draw the predicted noise per layer before and after; the file's suffix says in which format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, what in zip(axes, "KV", strict=True):
        parts = [part for part in done.parts if part.what == what and not part.refused]
        places = np.arange(len(parts))
        axis.bar(places - 0.2, [part.before for part in parts], 0.4, label="before", color="#b0b0b0")
        axis.bar(places + 0.2, [part.after for part in parts], 0.4, label="after", color="#1f77b4")
        axis.set_xticks(places, [str(part.layer) for part in parts])
        axis.set_yscale("log")
        axis.set(title=f"{what}: noise in {'the scores' if what == 'K' else 'the output'}", xlabel="layer")
        axis.legend()
    axes[0].set_ylabel("power, in units of the type's relative squared error")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _part(done: Converted, layer: int, what: str) -> Balanced | None:
    return next((part for part in done.parts if (part.layer, part.what) == (layer, what)), None)


def _scales(part: Balanced | None) -> str:
    return "–" if part is None or part.refused else f"{part.smallest:.3g}..{part.largest:.3g}"
