"""The result of `tune` as tables and as a plot."""

from __future__ import annotations

import functools
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .._plot import figure
from ..plan import compact
from .run import Candidate, Tuned

__all__ = ["plot", "show"]


def show(done: Tuned, console: Console) -> None:
    """Print the types of every layer with their losses, and compare the plan with uniform pairs."""
    say = functools.partial(console.print, markup=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold", title="What the types cost")
    table.add_column("layer", justify="right")
    for side in "KV":
        table.add_column(side)
        table.add_column("KLD", justify="right")
    for number, _ in done.shape.cached():
        row = [str(number)]
        for side, types in (("k", done.plan.k), ("v", done.plan.v)):
            type = types[number]
            assert type is not None
            row += [type, f"{done.costs[side, number][type]:.5f}"]
        table.add_row(*row)
    console.print(table)
    console.print()

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("cache K/V")
    for heading in ("bits K", "bits V", "mean", f"MiB at {done.context}", "KLD", "same top token"):
        table.add_column(heading, justify="right")
    rows = sorted([done.result, *done.uniform], key=lambda one: (one.bits, one is not done.result))
    for one in rows:
        table.add_row(*_cells(one), style="bold" if one is done.result else None)
    console.print(table)
    console.print()
    say(
        f"KLD on {done.scored[1]} tokens that the plan was not tuned on, and {done.predicted:.4f} predicted for the text "
        f"that it was tuned on, where any change of the cache costs {done.floor:.4f}."
    )
    if windows := [one.window_mib for one in rows if one.window_mib]:
        say(
            f"MiB counts the exact window, the newest {done.window.tokens} tokens in {done.window.type}: "
            f"{max(windows):.2f} MiB where every layer has a turbo type. Bits are those of K and V, and the KLD is without "
            "a window."
        )
    better = [
        one for one in done.uniform
        if one.measured and done.result.measured and one.bits <= done.result.bits + 1e-9
        and one.measured.kld < done.result.measured.kld
    ]  # fmt: skip
    for one in better:
        say(f"Note: {one.label} has no more bits and a smaller KLD; tune on more text (-f, --chunks).")
    say(f"K {compact(done.plan.k)}\nV {compact(done.plan.v)}")


def _cells(one: Candidate) -> list[str]:
    found = one.measured
    quality = [f"{found.kld:.4f} ± {found.error:.4f}", f"{found.same_top:.1%}"] if found else ["–", "–"]
    return [one.label, f"{one.bits_k:.3f}", f"{one.bits_v:.3f}", f"{one.bits:.3f}", f"{one.mib:.2f}", *quality]


def plot(done: Tuned, path: Path, title: str) -> None:
    """Draw KLD against bits: measured values of the plan and the uniform pairs, and predicted values for other budgets.

    Raises:
        OutputError: the file cannot be written, or its suffix is that of no picture format.
    """
    with figure(path, 1, title, size=(7, 5)) as (axis,):
        assert done.result.measured is not None
        # The prediction is for another text, so it is scaled to agree with the measured plan.
        scale = done.result.measured.kld / done.predicted if done.predicted > 0 else 1.0
        axis.plot(
            [bits for bits, _ in done.frontier], [kld * scale for _, kld in done.frontier], color="#1f77b4", alpha=0.5,
            label="plans for other budgets, predicted",
        )  # fmt: skip
        for one in done.uniform:
            if one.measured:
                axis.errorbar(one.bits, one.measured.kld, one.measured.error, fmt="o", color="#808080")
                axis.annotate(one.label, (one.bits, one.measured.kld), xytext=(5, 5), textcoords="offset points")
        axis.errorbar(
            done.result.bits, done.result.measured.kld, done.result.measured.error, fmt="D", color="#d62728",
            label="this plan, measured",
        )  # fmt: skip
        axis.set(xlabel="bits per value, mean of K and V", ylabel="KLD from the f16 cache (nats)", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
