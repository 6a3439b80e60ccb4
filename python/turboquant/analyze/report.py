"""An analysis as tables, JSON and a picture."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .._plot import figure
from ..convert.plan import ranges
from .measure import PROTECT, Analysis

__all__ = ["plot", "show", "to_json", "verdict"]

#: Layers are listed if `convert` leaves less than this share of their noise.
WORTH = 0.7
_COLUMN = 8  # least width of a type's column
_WIDTH = 110  # greatest width of columns of types side by side


def to_json(found: Analysis) -> str:
    """All figures as JSON: the fields of `Analysis`, and the layers to protect, by "k" or "v" and type."""
    protect = {half: {type: found.protect(half, type) for type in found.types} for half in "kv"}
    return json.dumps({"format": "turboquant-analysis 1", **asdict(found), "protect": protect}, indent=1)


def show(found: Analysis, console: Console) -> None:
    """Print the tables and the verdict."""
    console.print(f"{found.model} on {found.tokens} tokens of {found.text}\n", markup=False)
    console.print(_distributions(found))
    console.print(
        "\nOutlier: the largest channel's RMS over the median channel's, before and after the rotation, in the worst "
        "block. Kurtosis: of a block; 3 is normal. Fit: distance of rotated blocks from N(0,1/d), 0 to 1. Balanced: "
        "what share of K's noise would be left with `turboquant convert`, at best.\n"
    )
    for title, *groups in (
        ("Squared error relative to the values", ("K", "k", "mse"), ("V", "v", "mse")),
        ("Attention", ("scores", "k", "score"), ("KLD", "k", "harm")),
        ("", ("output", "v", "harm")),
    ):
        side_by_side = len(groups) * sum(max(len(type), _COLUMN) + 1 for type in found.types) < _WIDTH
        for number, part in enumerate([groups] if side_by_side else [[group] for group in groups]):
            console.print(_by_type(found, "" if number else title, *part))
            console.print()
    console.print(
        "Scores: standard deviation of their errors that K makes. KLD: of attention's weights, in nats. Output: "
        f"squared error of attention's output that V makes, relative to it. {found.queries} queries of every head. *: "
        f"a layer to protect, more than {PROTECT:g} times as bad as the median one.\n"
    )
    for line in verdict(found):
        console.print(line, markup=False, soft_wrap=True)


def verdict(found: Analysis) -> list[str]:
    """The layers to protect and the remedies in sentences, judged by the first type."""
    type = found.types[0]
    k, v = found.protect("k", type), found.protect("v", type)
    lines = [f"Layers to protect, by {type}:", f"  K: {_list(k)}", f"  V: {_list(v)}"]
    better = {layer.layer: layer.balance for layer in found.layers if layer.balance < WORTH}
    if better:
        least, most = (f"{share:.0%}" for share in (min(better.values()), max(better.values())))
        lines.append(
            f"`turboquant convert` could leave {least if least == most else f'{least} to {most}'} of the noise of K in "
            f"{ranges(list(better))}."
        )
    if k:
        lines.append("K has the same type in all layers: -ctk q8_0 protects those above.")
    if v:
        first, last = found.layers[0].layer, found.layers[-1].layer
        numbers = [layer.layer for layer in found.layers]
        depth = max(min(numbers.index(layer), len(numbers) - 1 - numbers.index(layer)) + 1 for layer in v)
        if 2 * depth < len(numbers):
            lines.append(f"--cache-boundary-v {depth} protects V there, at the ends ({first} and {last}).")
        else:
            lines.append("They are not at the ends, where --cache-boundary-v protects V: a type with more bits does.")
    return lines


def plot(found: Analysis, path: Path) -> None:
    """Draw outliers, normality and errors of all types by layer. Raises OutputError if the file cannot be written."""
    numbers = [layer.layer for layer in found.layers]
    with figure(path, 3, f"{found.model}, {found.tokens} tokens of {found.text}", rows=2) as axes:
        for row, half in enumerate("kv"):
            halves = [getattr(layer, half) for layer in found.layers]
            shape, mse, harm = axes[3 * row : 3 * row + 3]
            for name, label in (("outlier", "outlier ratio"), ("kurtosis", "kurtosis")):
                (line,) = shape.plot(numbers, [getattr(one, name) for one in halves], marker="o", label=label)
                after = [_number(getattr(one, f"{name}_rotated")) for one in halves]
                style = {"marker": "o", "linestyle": "--", "color": line.get_color()}
                shape.plot(numbers, after, label=f"{label}, rotated", **style)
            for type in found.types:
                effects = [one.effects[type] for one in halves]
                mse.plot(numbers, [_number(one and one.mse) for one in effects], marker="o", label=type)
                harm.plot(numbers, [_number(one and one.harm) for one in effects], marker="o", label=type)
            name = half.upper()
            shape.set(title=f"{name}: outliers and kurtosis")
            mse.set(title=f"{name}: relative squared error")
            harm.set(title="K: KLD of attention (nats)" if half == "k" else "V: error of attention's output")
            for axis in (shape, mse, harm):
                axis.set(xlabel="layer", yscale="log")
                axis.xaxis.get_major_locator().set_params(integer=True)
                axis.grid(alpha=0.3)
                axis.legend(fontsize="small")


def _distributions(found: Analysis) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title="Distribution")
    table.add_column("\nlayer", justify="right")
    for half in ("K", "V"):
        for number, heading in enumerate(("outlier", "rotated", "kurtosis", "rotated", "fit")):
            table.add_column(f"{half if number == 0 else ''}\n{heading}", justify="right")
    table.add_column("\nbalanced", justify="right")
    for layer in found.layers:
        row = [str(layer.layer)]
        for one in (layer.k, layer.v):
            row += [f"{one.outlier:.1f}", _text(one.outlier_rotated, ".1f"), f"{one.kurtosis:.1f}"]
            row += [_text(one.kurtosis_rotated, ".1f"), _text(one.fit, ".3f")]
        table.add_row(*row, f"{layer.balance:.0%}")
    return table


def _by_type(found: Analysis, title: str, *groups: tuple[str, str, str]) -> Table:
    """Columns of all types for each group: its heading, the half ("k" or "v") and the field of `Effect`."""
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold", title=title or None)
    table.add_column("\nlayer", justify="right")
    for heading, _, _ in groups:
        for number, type in enumerate(found.types):
            table.add_column(f"{heading if number == 0 else ''}\n{type}", justify="right", min_width=_COLUMN)
    protected = {(half, type): found.protect(half, type) for half in "kv" for type in found.types}
    for layer in found.layers:
        row = [str(layer.layer)]
        for _, half, field in groups:
            for type in found.types:
                effect = getattr(layer, half).effects[type]
                mark = "*" if field == "harm" and layer.layer in protected[half, type] else ""
                row.append("–" if effect is None else f"{getattr(effect, field):.2g}{mark}")
        table.add_row(*row)
    return table


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _list(layers: list[int]) -> str:
    return ranges(layers) if layers else "none stands out"
