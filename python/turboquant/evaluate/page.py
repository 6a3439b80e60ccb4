"""The report of a comparison: in the terminal, as Markdown, and as an HTML page without external resources."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table

from ..measure.perplexity import Divergence
from .comparison import Comparison, Measured
from .report import code, escape, window_notes

__all__ = ["alarms", "failures", "table", "to_html", "to_markdown", "verdict"]

_BANDS = {"none": "#2f9e74", "small": "#7cab3a", "moderate": "#d9a021", "large": "#e0742c", "severe": "#d43d3d"}
_LINES = ("#8a8f98", "#3b7dd8", "#e0742c", "#2f9e74", "#b357c6", "#d43d3d", "#17a2b8", "#a67c2d", "#6b5bd2", "#c2508a")


# ---- words -----------------------------------------------------------------------------------------------------------


def alarms(report: Comparison) -> list[str]:
    """Warnings about pairs whose paths disagree."""
    lines = []
    for row in report.measured:
        paths = row.paths
        if not paths.agree:
            lines.append(
                f"{row.label}: the batched and the one-token path disagree. On the same tokens the KLD is "
                f"{_kld(paths.batched)} in batches and {_kld(paths.decode)} token by token; their "
                f"noise allows a difference of {_kld(paths.allowed)}. This is a bug of a kernel: do not use this pair "
                "with this build."
            )
    return lines


def failures(report: Comparison) -> list[str]:
    """The pairs that could not be measured, with the reasons."""
    return [f"{row.label} could not be measured: {row.failure}." for row in report.failed]


def verdict(report: Comparison) -> list[str]:
    """The results in sentences; the first is the recommendation."""
    advice, rows, f16 = report.recommendation, report.measured, report.measured[0]
    lead = f"For this model: {advice.arguments}, because " if advice.pair else "Recommended: f16, because "
    lines = [lead + advice.reason + "."]
    for band in report.bands:
        names = [row.label for row in rows if row.verdict == band.name and row is not f16]
        if names:
            loss = "No loss" if band.name == "none" else f"{band.name.capitalize()} loss"
            lines.append(f"{loss} ({band.meaning}): {', '.join(names)}.")
    lines += _needle_words(rows)
    others = rows[1:]
    if others:
        least = min(others, key=lambda row: row.mib)
        lines.append(
            f"At the model's context of {report.model.context:,} tokens the cache takes {f16.mib:,.1f} MiB in "
            f"f16 and {least.mib:,.1f} MiB in {least.label}, the smallest of these."
        )
    lines += window_notes([(row.label, row.window_tokens, row.window_type or "", row.window_mib) for row in rows])
    lines += _speed_words(rows)
    return lines


def _needle_words(rows: list[Measured]) -> list[str]:
    if not rows[0].asked:
        return []
    by_count: dict[int, list[str]] = {}
    for row in rows:
        by_count.setdefault(row.found, []).append(row.label)
    parts = [f"{', '.join(names)}: {count}" for count, names in sorted(by_count.items(), reverse=True)]
    return [f"Needles found, of {rows[0].asked}: {'; '.join(parts)}."]


def _speed_words(rows: list[Measured]) -> list[str]:
    f16 = [speed for speed in rows[0].speed if speed.decode]
    if not f16:
        return []
    deepest = f16[-1]
    speeds = {}
    for row in rows[1:]:
        for speed in row.speed:
            if speed.depth == deepest.depth and speed.decode:
                speeds[row.label] = speed.decode
    if not speeds:
        return []
    best = max(speeds, key=lambda label: speeds[label])
    worst = min(speeds, key=lambda label: speeds[label])
    told = [f"{label} {speeds[label]:.0f}" for label in dict.fromkeys([best, worst])]
    return [
        f"Decoding behind {deepest.depth:,} tokens: f16 {deepest.decode:.0f} tokens/s, fastest and slowest of "
        f"the others {', '.join(told)}."
    ]


# ---- tables ----------------------------------------------------------------------------------------------------------


def _needles(row: Measured) -> str:
    return f"{row.found}/{row.asked}" if row.asked else "–"


def _window(row: Measured) -> str:
    if not row.window_tokens:
        return "–"
    return f"{row.window_tokens} {row.window_type}, {row.window_mib:.2f} MiB"


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _kld(value: float) -> str:
    value = max(value, 0.0)  # that of f16 may be -0.0000001, because predictions are stored rounded
    return f"{value:.6f}" if value < 0.001 else f"{value:.5f}"


def _kld_pm(values: Divergence) -> str:
    value, error = max(values.kld, 0.0), values.kld_error
    return f"{value:.6f} ± {error:.6f}" if value < 0.001 else f"{value:.5f} ± {error:.5f}"


def _pm(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def quality_table(report: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and rows as text. A pair that could not be measured has the reason in place of the numbers."""
    heads = ["cache K/V", "bits/value", "window", f"KV MiB at {report.model.context:,}", "perplexity", "ln ratio", "KLD",
             "median KLD", "99.9% KLD", "RMS Δp %", "same top token %", "KLD token by token", "needles",
             "loss"]  # fmt: skip
    rows = []
    for row in report.pairs:
        if not isinstance(row, Measured):
            rows.append([row.label, row.failure or ""])
            continue
        values, single = row.quality, row.decode
        is_f16 = row is report.pairs[0]
        rows.append([
            row.label, f"{row.bits:g}", _window(row), f"{row.mib:,.2f}", _pm(values.ppl, values.ppl_error, 3),
            _pm(values.ln_ratio, values.ln_ratio_error, 5),
            _kld_pm(values), _kld(values.kld_median), _kld(values.kld_999),
            _pm(values.rms_dp, values.rms_dp_error, 2), _pm(values.same_top, values.same_top_error, 2),
            f"{_kld_pm(single)}{'' if row.paths.agree else ' (!)'}",
            _needles(row), "–" if is_f16 else row.verdict,
        ])  # fmt: skip
    return heads, rows


def speed_table(report: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of prefill and decode in tokens per second, as text."""
    depths = report.settings.depths
    heads = ["cache K/V", *(f"prefill at {depth:,}" for depth in depths), *(f"decode at {depth:,}" for depth in depths)]
    rows = [
        [row.label, *(_rate(speed.prefill) for speed in row.speed), *(_rate(speed.decode) for speed in row.speed)]
        for row in report.measured
    ]
    return heads, rows if depths else []


def table(report: Comparison) -> Table:
    """The short table for a terminal of 80 columns."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    depths = report.settings.depths
    heads = ["cache K/V", "bits/\nvalue", "KV MiB", "KLD", "same\ntop", "needles", "loss"]
    heads += [f"t/s at\n{depths[-1]}"] if depths else []
    for index, head in enumerate(heads):
        result.add_column(head, justify="right" if index else "left", no_wrap=True, vertical="bottom")
    for row in report.pairs:
        if not isinstance(row, Measured):
            result.add_row(row.label, *["–"] * 5, "not run")
            continue
        values = row.quality
        cells = [row.label, f"{row.bits:g}", f"{row.mib:,.2f}", _kld(values.kld),
                 f"{values.same_top:.1f}%", _needles(row),
                 "–" if row is report.pairs[0] else row.verdict]  # fmt: skip
        cells += [_rate(row.speed[-1].decode)] if depths else []
        result.add_row(*cells, style=None if row.paths.agree else "bold red")
    return result


# ---- Markdown --------------------------------------------------------------------------------------------------------


def to_markdown(report: Comparison) -> str:
    """The report as Markdown, ending with a newline."""
    parts = [f"# KV-cache comparison: {escape(report.model.name)}", escape(_about(report))]
    parts += [f"> **Warning:** {escape(line)}" for line in alarms(report)]
    parts.append("\n".join(f"- {escape(line)}" for line in verdict(report) + failures(report)))
    parts += ["## Quality, retrieval, memory", _markdown_table(*quality_table(report)), _method(report)]
    if report.measured[0].speed:
        parts += ["## Speed, tokens per second", _markdown_table(*speed_table(report)), escape(_speed_method(report))]
    if grid := _grid(report):
        parts += ["## Needles", grid]
    parts += ["## How this was measured", "\n".join(f"- {name}: {code(value)}" for name, value in _facts(report))]
    return "\n\n".join(parts) + "\n"


def _markdown_table(heads: list[str], rows: list[list[str]], shown: Callable[[str], str] = escape) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for row in rows:
        cells = [shown(cell) for cell in row] + [""] * (len(heads) - len(row))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _grid(report: Comparison) -> str:
    """The needles that were found: a row for each pair, a column for each depth, and all positions in a cell."""
    rows = [row for row in report.measured if row.needles]
    if not rows:
        return ""
    depths = list(dict.fromkeys(cell.depth for cell in rows[0].needles))
    marks = {True: "+", False: "-", None: "?"}
    body = []
    for row in rows:
        cells = ["".join(marks[cell.found] for cell in row.needles if cell.depth == depth) for depth in depths]
        body.append([escape(row.label), *(f"`{cell}`" for cell in cells)])
    reasons = dict.fromkeys(cell.reason for row in rows for cell in row.needles if cell.reason)
    note = "From the start of the text to its end: `+` found, `-` not found, `?` not asked."
    note += "".join(f"\n`?`: {escape(reason)}." for reason in reasons)
    return _markdown_table(["cache K/V", *(f"{depth:,} tokens" for depth in depths)], body, str) + f"\n\n{note}"


# ---- what both formats say -------------------------------------------------------------------------------------------


def _about(report: Comparison) -> str:
    settings = report.settings
    return (
        f"{Path(report.model.path).name} with {Path(report.text.path).name}: {settings.chunks} chunks "
        f"of {settings.ctx} tokens, and {settings.decode_chunks} of {settings.decode_ctx} token by token. "
        f"{report.created[:10]}, {report.machine.gpu or report.machine.cpu}."
    )


def _method(report: Comparison) -> str:
    noise, edges = report.noise, report.bands
    bands = "; ".join(f"{one.name} up to {_kld(one.up_to)}" for one in edges if one.up_to is not None)
    return (
        "KLD: mean Kullback-Leibler divergence of the predicted distributions from those of the model's own f16 cache, "
        "in nats per token; ± is the standard error. ln ratio: ln(perplexity / f16's). RMS Δp: root mean square change of "
        "the probability of the text's token. Perplexity's own error is that of the text, and common to all. "
        f"The noise: f16 against itself has a KLD of {_kld(noise.same)} in batches and {_kld(noise.decode)} ± "
        f"{_kld(noise.decode_error)} token by token, so that less than {_kld(noise.floor)} says nothing of a "
        f"cache. Losses begin at twice that: {bands}; {edges[-1].name} above. A KLD of 0.01 costs about 1 % of perplexity."
    )


def _speed_method(report: Comparison) -> str:
    settings = report.settings
    reasons = {
        f"{row.label} at {speed.depth:,}: {speed.reason}."
        for row in report.measured for speed in row.speed if speed.reason
    }  # fmt: skip
    method = (
        f"llama-bench: a batch of {settings.prompt} tokens (prefill) and {settings.generated} single ones "
        f"(decode) behind that many others, mean of {settings.repetitions}, {report.machine.threads} threads."
    )
    return " ".join([method, *sorted(reasons)])


def _facts(report: Comparison) -> list[tuple[str, str]]:
    """Names and values that identify the measurement."""
    model, build, machine = report.model, report.build, report.machine
    number = f"{build.number} ({build.commit}), " if build.number is not None else ""
    facts = [
        ("model", f"{model.path}, {model.bytes:,} bytes, SHA-256 {model.sha256}"),
        ("text", f"{report.text.path}, {report.text.bytes:,} bytes, SHA-256 {report.text.sha256}"),
        ("llama.cpp build", f"{number}{build.bin}, SHA-256 {build.sha256}"),
        ("CPU", machine.cpu),
        ("GPU", machine.gpu or "none"),
        ("system", f"{machine.system}, {machine.threads} threads"),
        ("turboquant", report.turboquant),
        ("made", report.created),
    ]
    command = [("command", shlex.join(report.command))] if report.command else []
    return [*facts, *command]


# ---- the page --------------------------------------------------------------------------------------------------------


def to_html(report: Comparison) -> str:
    """The page, which includes tables, charts and the library that draws them."""
    from jinja2 import Environment, PackageLoader
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    environment = Environment(
        loader=PackageLoader(__package__, ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    advice = report.recommendation
    return environment.get_template("page.html.j2").render(
        report=asdict(report),
        plotly=get_plotlyjs(),
        title=f"KV-cache comparison: {report.model.name}",
        about=_about(report),
        alarms=alarms(report),
        failures=failures(report),
        arguments=advice.arguments,
        verdict=verdict(report),
        quality=quality_table(report),
        speed=speed_table(report),
        method=_method(report),
        speed_method=_speed_method(report),
        facts=_facts(report),
        bands=_BANDS,
        charts=_charts(report),
    )


def _charts(report: Comparison) -> list[dict[str, Any]]:
    """A chart: an id, a title, a caption, and traces and layout for plotly, without the colours of a theme."""
    rows = report.measured
    charts = [_scatter(report, rows), _bars(report, rows)]
    if any(cell.found is not None for row in rows for cell in row.needles):
        charts.append(_heat_map(rows))
    if any(speed.decode for row in rows for speed in row.speed):
        charts += [_speed_lines(rows, "decode"), _speed_lines(rows, "prefill")]
    return charts


def _edges(report: Comparison, axis: str) -> list[dict[str, Any]]:
    """A dotted line at the upper end of each band."""
    other = "x" if axis == "y" else "y"
    return [
        {
            "type": "line",
            f"{other}ref": "paper",
            f"{other}0": 0,
            f"{other}1": 1,
            "layer": "below",
            f"{axis}0": one.up_to,
            f"{axis}1": one.up_to,
            "line": {"color": _BANDS[one.name], "width": 1.5, "dash": "dot"},
        }
        for one in report.bands
        if one.up_to
    ]


def _scatter(report: Comparison, rows: list[Measured]) -> dict[str, Any]:
    noise = report.noise.floor
    others = sorted(rows[1:], key=lambda row: row.bits)
    klds = [max(row.quality.kld, 1e-7) for row in others]
    labels: list[dict[str, Any]] = [
        {"x": one.up_to, "text": one.name, "color": _BANDS[one.name]}
        for one in report.bands
        if one.up_to
    ]
    low, high = math.log10(min([noise, *klds])) - 0.4, math.log10(max([0.3, *klds])) + 0.4
    return {
        "id": "quality-bits",
        "title": "Quality against size",
        "caption": "Lower left is better. Dotted: where the loss stops being none, small, moderate, large. "
        "Bits are those of K and V, without the exact window.",
        "height": 420,
        "traces": [{
            "type": "scatter", "mode": "markers+text", "x": [row.bits for row in others], "y": klds,
            "error_y": {"type": "data", "array": [row.quality.kld_error for row in others], "thickness": 1.5},
            "text": [row.label for row in others],
            "textposition": ["top center" if index % 2 else "bottom center" for index in range(len(others))],
            "marker": {"size": 13, "color": [_BANDS[row.verdict] for row in others], "line": {"width": 1}},
            "hovertemplate": "%{text}<br>%{x} bits per value<br>KLD %{y:.5f}<extra></extra>",
            "cliponaxis": False,
        }],
        "layout": {
            "xaxis": {"title": {"text": "bits per value"}, "type": "log", "tickvals": [2, 3, 4, 5, 6, 8, 12, 16],
                      "range": [math.log10(1.8), math.log10(max([9.5, *(1.15 * row.bits for row in others)]))]},
            "yaxis": {"title": {"text": "KLD, nats per token"}, "type": "log", "range": [low, high], "dtick": 1,
                      "exponentformat": "power"},
            "shapes": _edges(report, "y"),
            "margin": {"l": 62, "r": 62, "t": 14, "b": 52},
            "annotations": [
                {"xref": "paper", "x": 1.01, "xanchor": "left", "y": math.log10(label["x"]), "yanchor": "middle",
                 "text": label["text"], "showarrow": False, "font": {"color": label["color"], "size": 11}}
                for label in labels
            ],
        },
    }  # fmt: skip


def _bars(report: Comparison, rows: list[Measured]) -> dict[str, Any]:
    names = [row.label for row in rows][::-1]
    traces = []
    single, batched = [row.decode for row in rows], [row.quality for row in rows]
    for name, found, opacity in (("token by token", single, 0.5), ("in batches", batched, 1.0)):
        values = found[::-1]
        traces.append({
            "type": "bar", "orientation": "h", "name": name, "y": names, "opacity": opacity,
            "x": [max(value.kld, 1e-7) for value in values],
            "error_x": {"type": "data", "array": [value.kld_error for value in values], "thickness": 1.5},
            "marker": {"color": [_BANDS[row.verdict] for row in rows][::-1]},
            "hovertemplate": f"%{{y}} {name}<br>KLD %{{x:.6f}}<extra></extra>",
        })  # fmt: skip
    low = math.floor(math.log10(report.noise.floor)) - 1
    high = max(report.noise.floor, *(max(row.quality.kld, row.decode.kld) for row in rows))
    return {
        "id": "kld",
        "title": "KLD on both paths",
        "caption": "With standard errors, on a logarithmic scale. Full: in batches, as a prompt is read. Pale: token by "
        "token, as text is generated, on fewer tokens. Red frame: the two disagree.",
        "height": 120 + 46 * len(rows),
        "traces": traces,
        "layout": {
            "xaxis": {"title": {"text": "KLD, nats per token"}, "type": "log", "dtick": 1, "exponentformat": "power",
                      "range": [low, math.log10(high) + 0.2]},
            "yaxis": {"automargin": True},
            "barmode": "group",
            "shapes": [
                {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": index - 0.47, "y1": index + 0.47,
                 "line": {"color": _BANDS["severe"], "width": 2}}
                for index, row in enumerate(rows[::-1]) if not row.paths.agree
            ],
            "legend": {"traceorder": "reversed"},
        },
    }  # fmt: skip


def _heat_map(rows: list[Measured]) -> dict[str, Any]:
    cells = rows[0].needles
    values, marks = {True: 1.0, False: 0.0, None: 0.5}, {True: "✓", False: "✗", None: "?"}
    return {
        "id": "needles",
        "wide": True,
        "title": "Needles",
        "caption": "A number hidden in the text, at that depth of context and place: ✓ found, ✗ not, ? not asked.",
        "height": 150 + 30 * len(rows),
        "traces": [{
            "type": "heatmap",
            "x": [[f"{cell.depth:,} tokens" for cell in cells], [f"{cell.position:.0%}" for cell in cells]],
            "y": [row.label for row in rows][::-1],
            "z": [[values[cell.found] for cell in row.needles] for row in rows][::-1],
            "text": [[marks[cell.found] for cell in row.needles] for row in rows][::-1],
            "texttemplate": "%{text}",
            "textfont": {"color": "#ffffff"},
            "hovertext": [
                [cell.reason or f"{cell.answer} (it is {cell.expected})" for cell in row.needles]
                for row in rows
            ][::-1],
            "hovertemplate": "%{y}, %{x}<br>%{hovertext}<extra></extra>",
            "colorscale": [[0, _BANDS["severe"]], [0.5, "#9aa0a6"], [1, _BANDS["none"]]],
            "zmin": 0, "zmax": 1, "showscale": False, "xgap": 2, "ygap": 2,
        }],
        "layout": {"xaxis": {"automargin": True, "tickangle": -90}, "yaxis": {"automargin": True}},
    }  # fmt: skip


def _speed_lines(rows: list[Measured], what: Literal["decode", "prefill"]) -> dict[str, Any]:
    marks = ("circle", "square", "diamond", "triangle-up", "cross")
    traces = []
    for index, row in enumerate(rows):
        decode = [(speed.depth, speed.decode, speed.decode_error) for speed in row.speed]
        prefill = [(speed.depth, speed.prefill, speed.prefill_error) for speed in row.speed]
        points = [point for point in (decode if what == "decode" else prefill) if point[1]]
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": row.label,
            "x": [depth for depth, _, _ in points],
            "y": [rate for _, rate, _ in points],
            "error_y": {"type": "data", "array": [error for _, _, error in points], "thickness": 1},
            "line": {"color": _LINES[index % len(_LINES)], "width": 2, "dash": "dash" if index == 0 else "solid"},
            "marker": {"symbol": marks[index % len(marks)], "size": 8},
            "hovertemplate": f"{row.label} at %{{x:,}}<br>%{{y:.1f}} tokens/s<extra></extra>",
        })  # fmt: skip
    depths = [speed.depth for speed in rows[0].speed]
    return {
        "id": f"speed-{what}",
        "title": f"{'Decode' if what == 'decode' else 'Prefill'} speed over depth",
        "caption": "Tokens per second behind that many tokens of context; higher is better.",
        "height": 420,
        "traces": traces,
        "layout": {
            "xaxis": {"title": {"text": "tokens in the cache"}, "tickvals": depths, "tickformat": ","},
            "yaxis": {"title": {"text": "tokens per second"}, "rangemode": "tozero"},
        },
    }
