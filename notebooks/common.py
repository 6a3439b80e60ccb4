"""What the notebooks share: the data beside them, and how figures look."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from turboquant import dump

DATA = Path(__file__).resolve().parent / "data"

plt.rcParams.update({
    "figure.dpi": 80, "figure.figsize": (9, 3.2), "figure.constrained_layout.use": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.axisbelow": True, "legend.frameon": False, "lines.markersize": 5,
})  # fmt: skip
np.set_printoptions(precision=4, suppress=True, linewidth=110)


def real_layer() -> dump.KVLayer:
    """Queries, keys and values of one layer of the bundled model: 4 heads, 2 KV heads of 128, 2048 tokens of a novel.

    data/kv-prose-8m.safetensors was made by tools/make_kv_sample.py.
    """
    (layer,) = dump.load(DATA / "kv-prose-8m.safetensors").values()
    return layer


def measured() -> dict[str, Any]:
    """data/measured.json, what tools/measure_notebooks.py measured with llama.cpp."""
    return json.loads((DATA / "measured.json").read_text(encoding="utf-8"))


def speed() -> dict[str, Any]:
    """data/speed.json, what tools/bench_attention.py measured."""
    return json.loads((DATA / "speed.json").read_text(encoding="utf-8"))


def outlier_vectors(count: int, channels: int, outliers: int = 5, factor: float = 20.0, seed: int = 0) -> NDArray[Any]:
    """(count, channels) of N(0,1), in each vector `outliers` channels at random times `factor`."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, channels))
    large = rng.permuted(np.tile(np.arange(channels) < outliers, (count, 1)), axis=1)
    return np.where(large, factor * x, x)


def column(rows: Iterable[dict[str, Any]], key: str) -> list[Any]:
    """One field of all rows."""
    return [row[key] for row in rows]


def table(*columns: tuple[str, str, Iterable[Any]]) -> None:
    """Print columns (heading, format, values) as text."""
    cells = [[heading, *(format(value, spec) for value in values)] for heading, spec, values in columns]
    widths = [max(map(len, column)) for column in cells]
    for row in zip(*cells):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def sliders(plot: Callable[..., None], **ranges: Any) -> None:
    """`plot` redrawn as the sliders move, one slider for every argument: (low, high, step) or a list of values."""
    from ipywidgets import interact

    interact(plot, **ranges)
