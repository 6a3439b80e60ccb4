"""The table: for the terminal, as Markdown, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich import box
from rich.table import Table

from .measure import Row

__all__ = ["COLUMNS", "cells", "table", "to_json", "to_markdown"]

COLUMNS = ("cache (K/V)", "bits/value", "KV MiB", "perplexity", "KLD", "same top token", "needles found")


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `COLUMNS`; what does not apply is a dash."""
    kld = "–" if row.kld is None else f"{row.kld:.5f} ± {row.kld_error:.5f}"
    top = "–" if row.same_top is None else f"{row.same_top:.2f} ± {row.same_top_error:.2f} %"
    found = f"{row.found}/{len(row.expected)}" if row.expected else "–"
    return [row.label, f"{row.bits:g}", f"{row.mib:.2f}", f"{row.ppl:.3f}", kld, top, found]


def table(rows: list[Row], title: str | None = None, caption: str | None = None) -> Table:
    """The rows as a rich table."""
    result = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, caption_justify="left", title_justify="left")
    for index, column in enumerate(COLUMNS):
        result.add_column(column, justify="left" if index == 0 else "right", no_wrap=index != len(COLUMNS) - 1)
    for row in rows:
        result.add_row(*cells(row))
    return result


def to_markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table, ending with a newline."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|--:" * (len(COLUMNS) - 1) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def to_json(rows: list[Row], **about: object) -> str:
    """Every measured number, and whatever `about` says of the run, as indented JSON ending with a newline."""
    listed = [{**asdict(row), "bits": row.bits, "mib": row.mib, "found": row.found} for row in rows]
    return json.dumps({**about, "rows": listed}, indent=1) + "\n"
