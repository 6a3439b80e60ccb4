"""The table: for the terminal, as Markdown, as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from .rows import Options, Row

__all__ = [
    "COLUMNS",
    "cells",
    "code",
    "escape",
    "notes",
    "show",
    "table",
    "to_json",
    "to_markdown",
    "window_notes",
]

COLUMNS = ("cache K/V", "bits/value", "KV MiB", "perplexity", "KLD", "same top token", "needles found")
_NARROW = ("cache K/V", "bits/\nvalue", "KV MiB", "perplexity", "KLD", "same top\ntoken", "needles\nfound")


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `COLUMNS`; a dash stands for a missing value."""
    kld = "–" if row.kld is None else f"{row.kld:.5f} ± {row.kld_error:.5f}"
    top = "–" if row.same_top is None else f"{row.same_top:.2f} ± {row.same_top_error:.2f} %"
    found = f"{row.found}/{row.asked}" if row.asked else "–"
    numbers = [(row.bits, "g"), (row.mib, ".2f"), (row.ppl, ".3f")]
    return [row.label, *("–" if value is None else f"{value:{form}}" for value, form in numbers), kld, top, found]


def notes(rows: list[Row]) -> list[str]:
    """The reasons why rows or cells have no numbers, and what the sizes include, in sentences."""
    lines = [f"{row.label} could not be measured: {row.failure}." for row in rows if row.failure]
    without: dict[str, list[str]] = {}
    for row in rows:
        if row.needle_failure:
            without.setdefault(row.needle_failure, []).append(row.label)
    lines += [f"Needles of {', '.join(labels)} were not asked for: {why}." for why, labels in without.items()]
    return lines + window_notes([(row.label, row.window_tokens, row.window_type, row.window_mib) for row in rows])


def window_notes(rows: Sequence[tuple[str, int, str, float]]) -> list[str]:
    """Sentences about exact windows. A row has the label, and the window's tokens, type and MiB."""
    found: dict[str, list[str]] = {}
    for label, tokens, type, mib in rows:
        if tokens:
            found.setdefault(f"the newest {tokens} tokens in {type}, {mib:.2f} MiB", []).append(label)
    lines = [
        f"KV MiB of {', '.join(labels)} counts the exact window: {words}; bits/value does not."
        for words, labels in found.items()
    ]
    if found:
        lines.append(
            "KLDs with a window are those of batches of 32 tokens, because a batch also sees its own tokens exactly, and a "
            "larger one would see many more than a generated token does."
        )
    return lines


def table(rows: list[Row]) -> Table:
    """The rows as a rich table that fits into 80 columns."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for index, column in enumerate(_NARROW):
        result.add_column(column, justify="right" if index else "left", no_wrap=True, vertical="bottom")
    for row in rows:
        result.add_row(*(cell.replace(" ± ", "±").replace(" %", "%") for cell in cells(row)))
    return result


def show(console: Console, rows: list[Row], options: Options, threads: int, took: str) -> None:
    """Print the table with its description and notes; `took` is the time of the measurement, or why it took none."""
    title = f"{options.model.name}, {options.text.name}: {options.chunks} x {options.ctx} tokens"
    title += f", {threads} threads ({took})"
    caption = f"± standard error. Perplexity's own, ± {rows[0].ppl_error:.1f}, is that of the text and common to all."
    caption += "\nKLD (nats per token) and same top token: against the model's own f16 cache."
    if distances := [row.distance for row in rows if row.distance]:
        nearest = min(options.distance, *distances)
        caption += f"\nNeedle: a number {nearest:,} characters before the question, greedy decoding."
        if nearest < options.distance:
            caption += f" More do not fit into {options.needle_ctx} tokens."
    console.print(f"\n{title}\n", highlight=False, markup=False, soft_wrap=True)
    console.print(table(rows), highlight=False)
    console.print(f"\n{caption}", highlight=False, markup=False, soft_wrap=True)
    for line in notes(rows):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def to_markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table with notes, ending with a newline."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|--:" * (len(COLUMNS) - 1) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    lines += [line for note in notes(rows) for line in ("", escape(note))]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text escaped for Markdown, so that no HTML, link, code or table cell begins or ends in it."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return " ".join(re.sub(r"([\\|`\[\]])", r"\\\1", text).splitlines())


def code(text: str) -> str:
    """Any text as a code span of Markdown."""
    text = " ".join(text.splitlines())
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if "`" in (text[:1], text[-1:]) else ""
    return f"{fence}{space}{text}{space}{fence}"


def to_json(rows: list[Row], **about: object) -> str:
    """All measured numbers and the description `about` of the run, as indented JSON ending with a newline."""
    listed = [{**asdict(row), "bits": row.bits, "mib": row.mib, "found": row.found} for row in rows]
    return json.dumps({**about, "rows": listed}, indent=1) + "\n"
