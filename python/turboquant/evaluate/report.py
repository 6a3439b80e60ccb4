"""The table: for the terminal, as Markdown, as JSON."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

from rich import box
from rich.table import Table

from .measure import Row

__all__ = ["COLUMNS", "cells", "code", "escape", "notes", "table", "to_json", "to_markdown"]

COLUMNS = ("cache K/V", "bits/value", "KV MiB", "perplexity", "KLD", "same top token", "needles found")
_NARROW = ("cache K/V", "bits/\nvalue", "KV MiB", "perplexity", "KLD", "same top\ntoken", "needles\nfound")


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `COLUMNS`; what does not apply or was not measured is a dash."""
    kld = "–" if row.kld is None else f"{row.kld:.5f} ± {row.kld_error:.5f}"
    top = "–" if row.same_top is None else f"{row.same_top:.2f} ± {row.same_top_error:.2f} %"
    found = f"{row.found}/{row.asked}" if row.asked else "–"
    numbers = [(row.bits, "g"), (row.mib, ".2f"), (row.ppl, ".3f")]
    return [row.label, *("–" if value is None else f"{value:{form}}" for value, form in numbers), kld, top, found]


def notes(rows: list[Row]) -> list[str]:
    """Why rows or cells have no numbers, in sentences."""
    lines = [f"{row.label} could not be measured: {row.failure}." for row in rows if row.failure]
    without: dict[str, list[str]] = {}
    for row in rows:
        if row.needle_failure:
            without.setdefault(row.needle_failure, []).append(row.label)
    return lines + [f"Needles of {', '.join(labels)} were not asked for: {why}." for why, labels in without.items()]


def table(rows: list[Row]) -> Table:
    """The rows as a rich table that fits into 80 columns."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for index, column in enumerate(_NARROW):
        result.add_column(column, justify="right" if index else "left", no_wrap=True, vertical="bottom")
    for row in rows:
        result.add_row(*(cell.replace(" ± ", "±").replace(" %", "%") for cell in cells(row)))
    return result


def to_markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table, and what is to be said of it, ending with a newline."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|--:" * (len(COLUMNS) - 1) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    lines += [line for note in notes(rows) for line in ("", escape(note))]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text as Markdown that shows it: no HTML, link, code or cell of a table begins or ends in it."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return " ".join(re.sub(r"([\\|`\[\]])", r"\\\1", text).splitlines())


def code(text: str) -> str:
    """Text as a code span of Markdown, whatever is in it."""
    text = " ".join(text.splitlines())
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if "`" in (text[:1], text[-1:]) else ""
    return f"{fence}{space}{text}{space}{fence}"


def to_json(rows: list[Row], **about: object) -> str:
    """Every measured number, and whatever `about` says of the run, as indented JSON ending with a newline."""
    listed = [{**asdict(row), "bits": row.bits, "mib": row.mib, "found": row.found} for row in rows]
    return json.dumps({**about, "rows": listed}, indent=1) + "\n"
