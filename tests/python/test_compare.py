"""turboquant compare: measurements, stored results, verdicts, and the page in a real browser.

Scripts replace the programs here; tests/llama/test_compare.py runs the real ones.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import io
import json
import operator
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

import browser as browsers
import pytest
from browser import Browser
from fake_programs import write_programs
from make_model import Shape, write_model
from rich.console import Console
from test_evaluate import BASE, DIVERGENCE, HELP, SIZE, TEXTS, needs_posix, prose
from turboquant import cli
from turboquant.evaluate import compare, page, verdict
from turboquant.evaluate.comparison import VERSION, Comparison, Measured, Pair
from turboquant.measure import needle
from turboquant.measure.kvsize import Caches, parse_caches
from turboquant.measure.measurer import Run
from turboquant.measure.pairs import CachePair, Window
from turboquant.measure.perplexity import base_bytes, parse_divergence
from turboquant.measure.speed import parse_speed
from typer.testing import CliRunner, Result

ROOT = Path(__file__).parents[2]
TYPES = "q8_0,q4_0,turbo4,turbo3,turbo2,q8_0:turbo3"
KNOWN = HELP.replace("q5_1", "q5_1, turbo4, turbo3, turbo2")


# ---- what llama.cpp prints -------------------------------------------------------------------------------------------


def test_all_of_a_divergence():
    found = parse_divergence(DIVERGENCE)
    assert (found.ln_ratio, found.ln_ratio_error) == (0.00951, 0.002646)
    assert (found.kld_median, found.kld_999) == (0.00649, 0.267419)
    assert (found.rms_dp, found.rms_dp_error) == (2.1, 0.077)
    same = parse_divergence(DIVERGENCE.replace("2.100 ± 0.077", "0.000 ±  -nan"))
    assert (same.rms_dp, same.rms_dp_error) == (0, 0)


def test_cache_at_a_context():
    one = parse_caches(SIZE)
    assert one.at(4096).mib == 9.76 and one.at(2048) == one.total()
    assert Caches.from_dict(json.loads(json.dumps(one.as_dict()))) == one
    # A window of 1000 tokens and a batch of 512 need 1536 cells; other layers have more. Two streams have two caches.
    windowed = parse_caches(f"print_info: n_swa = 1000\n{SIZE}{SIZE.replace('1/1 seqs', '2/2 seqs')}")
    assert windowed.at(8192).k_mib == pytest.approx(1.69 * 4 + 1.69 * 1536 / 4096, abs=0.01)
    assert windowed.at(1024).k_mib == pytest.approx(1.69 / 2 + 1.69 / 4, abs=0.01)


EXACT = "0.00.001 I turboquant: window: the newest {} tokens in q8_0 (30 of 30 layers), {} MiB\n"


def test_window_at_a_context():
    """A cache's window is logged before its size: slots of every stream and one row more, whatever the context."""
    one = parse_caches(EXACT.format(256, 3.45) + SIZE)
    size = one.total()
    assert (size.window_tokens, size.window_type, size.window_mib) == (256, "q8_0", 3.45)
    assert size.mib == pytest.approx(1.69 + 3.19 + 3.45) and one.at(8192).window_mib == 3.45
    assert Caches.from_dict(json.loads(json.dumps(one.as_dict()))) == one
    # one stream's 256 of 512 rows, and 2048 where the run had no room for more than 256
    streams = parse_caches(EXACT.format(256, 5.13) + SIZE.replace("1/1 seqs", "2/2 seqs"))
    assert streams.at(4096).window_mib == pytest.approx(5.13 * 257 / 513, abs=0.005)
    assert one.at(4096, 2048).window_tokens == 2048
    assert one.at(4096, 2048).window_mib == pytest.approx(3.45 * 2049 / 257, abs=0.005)
    assert one.at(128).window_tokens == 128 and one.at(128).window_mib == pytest.approx(3.45 * 129 / 257, abs=0.005)

    two = parse_caches(EXACT.format(256, 1.5) + SIZE + EXACT.format(100, 0.5) + SIZE).total()
    assert (two.window_tokens, two.window_mib) == (256, 2.0)
    assert parse_caches(SIZE + EXACT.format(256, 1.5) + SIZE).caches[0].size.window_tokens == 0
    assert (parse_caches(SIZE).total().window_tokens, parse_caches(SIZE).total().window_type) == (0, "")


def test_windows_of_pairs(monkeypatch):
    turbo4, q8_0 = CachePair.parse("turbo4"), CachePair.parse("q8_0")
    monkeypatch.delenv(Window.VARIABLE, raising=False)
    assert (turbo4.identity, q8_0.identity) == ("turbo4", "q8_0")
    monkeypatch.setenv(Window.VARIABLE, "0")  # results of one window are not those of another
    assert (turbo4.identity, q8_0.identity) == ("turbo4, window 0", "q8_0")
    assert turbo4.with_window(Window(64)).identity == "turbo4, window 64:q8_0"
    monkeypatch.delenv(Window.VARIABLE)
    assert turbo4.with_window(Window(64)).environment == {"LLAMA_ARG_CACHE_WINDOW": "64:q8_0"}
    assert turbo4.with_window(Window(0, "f16")).environment == {"LLAMA_ARG_CACHE_WINDOW": "0"}
    assert q8_0.with_window(Window(64)) == q8_0 and turbo4.with_window(None) == turbo4
    assert turbo4.environment == {} and str(turbo4.with_window(Window(64))) == "turbo4"
    identities = [turbo4.with_window(window).identity for window in (None, Window(0), Window(64), Window(64, "f16"))]
    assert identities == ["turbo4", "turbo4, window 0", "turbo4, window 64:q8_0", "turbo4, window 64:f16"]
    assert [CachePair.parse(text).may_have_window for text in ("q8_0/turbo2", "auto", "f16/q4_0")] == [True, True, False]


@pytest.mark.parametrize("text", ["", "x", "-1", "256:", "256:q4_0", "1000000", "5 "])
def test_windows_that_are_none(text):
    with pytest.raises(ValueError, match="wanted tokens and a type, q8_0 or f16"):
        Window.parse(text)


def test_default_window_is_that_of_llama(monkeypatch):
    options = ROOT / "ggml_types" / "ggml"
    defaults = (options / "turbo-options.h").read_text(encoding="utf-8")
    assert re.search(rf"\bwindow = {Window().tokens};", defaults)
    assert re.search(rf"\bwindow_type = GGML_TYPE_{Window().type.upper()};", defaults)
    names = (options / "turbo-options.cpp").read_text(encoding="utf-8")
    assert f'"--cache-window", "{Window.VARIABLE}", "N[:TYPE]"' in names
    monkeypatch.delenv(Window.VARIABLE, raising=False)
    assert Window.default() == Window(256, "q8_0") == Window.parse("256")
    monkeypatch.setenv(Window.VARIABLE, "64:f16")
    assert Window.default() == Window(64, "f16")


def test_speed():
    common = '"cpu_info": "A CPU", "n_depth": 4096'
    lines = (
        f'{{{common}, "n_prompt": 512, "n_gen": 0, "avg_ts": 900.5, "stddev_ts": 1.5}}\n'
        f'{{{common}, "n_prompt": 0, "n_gen": 32, "avg_ts": 90.5, "stddev_ts": 0.5}}\n'
    )
    speed, machine = parse_speed(f"some warning\n{lines}", 4096)
    assert (speed.prefill, speed.prefill_error, speed.decode, speed.decode_error) == (900.5, 1.5, 90.5, 0.5)
    assert machine == {"cpu_info": "A CPU"}
    for broken in (lines.splitlines()[0], lines.replace("n_depth", "x"), lines[:-9], ""):
        with pytest.raises(ValueError, match="no speeds at depth 4096"):
            parse_speed(broken, 4096)


# ---- needles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", needle.TEMPLATES)
@pytest.mark.parametrize("position", [0.0, 0.4, 1.0])
def test_grid_needle(template, position):
    text = prose(2000).replace("very", "{number}")  # braces in the text are text
    one = needle.make_grid_needle(text, 9000, 2048, position, 7, needle.TEMPLATES[template])
    assert 8500 < len(one.prompt) <= 9100
    assert one.prompt.count(one.number) == 1 and one.prompt.endswith(f"The secret number of {one.name} is")
    place = one.prompt.index(one.number) / len(one.prompt)
    assert place == pytest.approx(position, abs=0.07)
    assert "{number}" in one.prompt and "{name}" not in one.prompt
    assert one == needle.make_grid_needle(text, 9000, 2048, position, 7, needle.TEMPLATES[template])


def test_grid_needle_does_not_fit():
    with pytest.raises(ValueError, match="the text has .* about 8.* are needed for 2048 tokens"):
        needle.make_grid_needle("x " * 2000, 9000, 2048, 0.5, 0)
    with pytest.raises(ValueError, match="64 tokens are too few"):
        needle.make_grid_needle(prose(), 256, 64, 0.5, 0)


# ---- verdicts --------------------------------------------------------------------------------------------------------

NOISE = verdict.Noise(same=0.0, decode=0.0004, decode_error=0.00002)


def test_bands_follow_the_noise():
    edges = [one.up_to for one in verdict.bands(NOISE)]
    assert edges[:2] == pytest.approx([2 * 0.00046, 2 * 0.00046 + 0.01])
    noisy = [one.up_to for one in verdict.bands(verdict.Noise(0.0, 0.004, 0.0002))]
    assert all(b > a for a, b in zip(edges[:-1], noisy[:-1], strict=True))
    names = [verdict.band(kld, verdict.bands(NOISE)).name for kld in (0, 0.0009, 0.001, 0.02, 0.1, 5)]
    assert names == ["none", "none", "small", "moderate", "large", "severe"]


def test_agreement():
    values = parse_divergence(DIVERGENCE)

    def agree(batched: float, decode: float) -> bool:
        changed = (parse_divergence(DIVERGENCE.replace("0.010706", f"{kld:.6f}")) for kld in (batched, decode))
        return verdict.agreement(*changed, NOISE).agree

    allowed = 3 * values.kld_error * 2**0.5 + 2 * NOISE.floor
    assert agree(0.01, 0.01 + 0.95 * allowed) and agree(0.01 + 0.95 * allowed, 0.01)
    assert not agree(0.01, 0.01 + 1.05 * allowed) and not agree(0.01 + 1.05 * allowed, 0.01)


def candidate(
    label: str, bits: float, kld: float, found: int = 6, agree: bool = True, window: float = 0.0
) -> verdict.Candidate:
    return verdict.Candidate(label, bits, bits + window, kld, found, 6, agree)


F16 = candidate("f16", 16, 0.0)


@pytest.mark.parametrize(
    "others, choice, words",
    [
        (
            [candidate("a", 8.5, 0.0007), candidate("b", 4.5, 0.009), candidate("c", 3, 0.04)],
            "b",
            "c, is out because its KLD",
        ),
        ([candidate("a", 8.5, 0.0007), candidate("b", 4.5, 0.009, found=5)], "a", "b, is out because it finds 5 of 6"),
        (
            [candidate("a", 8.5, 0.0007), candidate("b", 4.5, 0.009, agree=False)],
            "a",
            "b, is out because its two paths",
        ),
        ([candidate("a", 5, 0.0007), candidate("b", 4.5, 0.0007, window=1)], "a", "loss is not measurable"),
        ([candidate("a", 3.0, 0.4), candidate("b", 4.0, 0.1)], None, "b comes nearest, but its KLD of 0.1000 is above"),
        ([], None, "keep f16"),
    ],
)
def test_recommendation(others, choice, words):
    best, reason = verdict.recommend([F16, *others], F16, verdict.bands(NOISE))
    assert (best and best.label) == choice
    assert words in reason


# ---- the command, with stand-ins for the programs --------------------------------------------------------------------


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs, a model, a text."""
    root = tmp_path_factory.mktemp("compare")
    write_programs(root / "bin", KNOWN, BASE, DIVERGENCE)
    write_model(root / "model.gguf", Shape())
    (root / "text.txt").write_text(prose(1200), encoding="utf-8")
    return root


@pytest.fixture
def place(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workshop with an empty cache, which tests may change."""
    monkeypatch.setenv("TURBOQUANT_CACHE", str(tmp_path / "cache"))
    for name in ("bin", "model.gguf", "text.txt"):
        (tmp_path / name).symlink_to(workshop / name)
    (tmp_path / "bin").unlink()
    write_programs(tmp_path / "bin", KNOWN, BASE, DIVERGENCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*more: object) -> Result:
    options = ["--bin", "bin", "-m", "model.gguf", "-f", "text.txt", "--chunks", 4, "--depths", "0,1000", "-t", 1]
    options += ["--needle-depths", "600,1200", "--positions", 2, "--out", "out", *more]
    return CliRunner().invoke(cli.app, ["compare", *map(str, options)])


def report(folder: str = "out") -> dict:
    return json.loads(Path(folder, "report.json").read_text(encoding="utf-8"))


def runs() -> list[str]:
    """The runs since the last call."""
    file = Path("bin/runs.txt")
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


@pytest.fixture(scope="module")
def finished(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a report on all TYPES, a type that the build lacks, and a type that this model cannot have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TURBOQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(workshop)
        done = run("--types", f"{TYPES},q5_0,turbo9")
        assert done.exit_code == 0, done.output
    return workshop / "out"


@needs_posix
def test_report(finished):
    data = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    assert (data["format"], data["version"]) == ("turboquant-compare", 2)
    rows = {row["label"]: row for row in data["pairs"]}
    assert list(rows) == ["f16", "q8_0", "q4_0", "turbo4", "turbo3", "turbo2", "q8_0/turbo3", "q5_0", "turbo9"]
    assert rows["q5_0"]["failure"].endswith("K type q5_0 does not work with this model: use -ctk f16")
    assert "knows no cache type 'turbo9'" in rows["turbo9"]["failure"]

    turbo3 = rows["turbo3"]
    assert (turbo3["quality"]["kld"], turbo3["decode"]["kld"]) == (0.0434, 0.0441)
    assert turbo3["verdict"] == "moderate" and turbo3["paths"]["agree"]
    assert (turbo3["bits"], turbo3["mib"]) == (3.125, 6.25)  # 32 MiB in f16: twice the 2048 tokens that were measured
    assert [speed["decode"] for speed in turbo3["speed"]] == [100, 50]
    assert [(cell["depth"], cell["position"], cell["found"]) for cell in turbo3["needles"]] == [
        (600, 0.25, True), (600, 0.75, True), (1200, 0.25, True), (1200, 0.75, True),
    ]  # fmt: skip
    assert [cell["found"] for cell in rows["turbo2"]["needles"]] == [False] * 4

    assert data["noise"] == {"same": 0, "decode": 0.0004, "decode_error": 0.00001, "floor": pytest.approx(0.00043)}
    assert data["recommendation"]["pair"] == "turbo4"
    assert data["recommendation"]["arguments"] == "-ctk turbo4 -ctv turbo4"
    assert data["machine"]["cpu"] == "A CPU" and data["build"]["commit"] == "abc1234"
    assert re.fullmatch("[0-9a-f]{64}", data["model"]["sha256"]) and data["model"]["context"] == 4096


NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def unfold(kind: object) -> tuple[type, str]:
    """The class of a field, and the suffix of its path: for list[Band], Band and "[]"."""
    if get_origin(kind) in (list, collections.abc.Sequence):
        (kind,), mark = get_args(kind), "[]"
    else:
        mark = ""
    return Measured if kind is Pair else kind, mark  # all fields of a pair


def documentation(kind: type = Comparison, path: str = "") -> list[str]:
    """The rows of the table of fields in docs/compare.md."""
    rows, described = [], set()
    for name, annotated in get_type_hints(kind, include_extras=True).items():
        full, meaning = get_args(annotated)
        inner, mark = unfold(full)
        if dataclasses.is_dataclass(inner):
            if inner not in described:  # the three divergences have the same fields, which are described once
                rows += documentation(inner, f"{path}{name}{mark}.")
            described.add(inner)
            continue
        words = f"list of {NAMES[inner]}s" if mark else " or ".join(NAMES[one] for one in get_args(full) or (full,))
        rows.append(f"| `{path}{name}` | {words} | {meaning} |".replace("|  |", "| |"))
    return rows


def test_schema_is_documented():
    """docs/compare.md has every field of a report with its type and meaning, and no others."""
    text = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    rows = documentation()
    assert re.findall(r"^\| `.*", text, re.MULTILINE) == rows, "\n".join(["it should be:", *rows])
    assert f"`version` is {VERSION}" in text


def typed(value: object, kind: object = Comparison) -> Any:
    """Convert JSON values to the classes of a report. Raises AssertionError, KeyError or TypeError if they differ."""
    inner, mark = unfold(kind)
    if mark:
        assert isinstance(value, list)
        return [typed(item, inner) for item in value]
    if dataclasses.is_dataclass(inner):
        assert isinstance(value, dict)
        inner = Pair if inner is Measured and value["failure"] else inner
        hints = get_type_hints(inner)
        return inner(**{name: typed(item, hints[name]) for name, item in value.items()})
    kinds = get_args(kind) or (kind,)
    assert type(value) in kinds or (type(value) is int and float in kinds), (value, kind)
    return value


@needs_posix
def test_report_has_the_schema(finished):
    """Every field has its type, no field is missing or additional, and the order is that of the classes."""
    text = (finished / "report.json").read_text(encoding="utf-8")
    assert typed(json.loads(text)).to_json() == text
    for path in (["bands", 0, "name"], ["pairs", 1, "needles", 0, "depth"], ["machine", "threads"]):
        *above, last = path
        for change in ({last: 1.5}, {last: None}, {"more": 1}):
            data = json.loads(text)
            functools.reduce(operator.getitem, above, data).update(change)
            with pytest.raises((AssertionError, KeyError)):
                typed(data)
        data = json.loads(text)
        del functools.reduce(operator.getitem, above, data)[last]
        with pytest.raises(TypeError, match=last):
            typed(data)


@needs_posix
def test_markdown(finished):
    text = (finished / "report.md").read_text(encoding="utf-8")
    assert "- For this model: -ctk turbo4 -ctv turbo4, because it is the smallest of these caches" in text
    assert re.search(r"^\| turbo3 \| 3\.125 \| – \| 6\.25 \| 37\.506 ± 1\.717 \|", text, re.MULTILINE)
    assert "| turbo2 | `--` | `--` |" in text and "| f16 | `++` | `++` |" in text
    assert "**Warning:**" not in text and "q5_0 could not be measured" in text


@needs_posix
def test_short_table(finished):
    data = typed(json.loads((finished / "report.json").read_text(encoding="utf-8")))
    stream = io.StringIO()
    Console(file=stream, width=80).print(page.table(data))
    lines = stream.getvalue().splitlines()
    assert lines[3].split() == ["f16", "16", "32.00", "0.000000", "92.9%", "4/4", "–", "50.0"]
    assert lines[-3].split() == ["q8_0/turbo3", "5.8125", "11.62", "0.01120", "92.9%", "4/4", "moderate", "50.0"]
    assert lines[-1].split() == ["turbo9", "–", "–", "–", "–", "–", "not", "run"]
    assert "…" not in stream.getvalue()


@needs_posix
def test_remembered(place):
    assert run("--types", "q8_0").exit_code == 0
    first = runs()
    assert first.count("llama-perplexity q8_0") == 2 and first.count("llama-perplexity q8_0 token by token") == 1
    before = report()
    assert run("--types", "q8_0").exit_code == 0
    assert runs() == []
    assert {**report(), "created": 0} == {**before, "created": 0}

    assert run("--types", "q8_0", "--time-again").exit_code == 0
    assert sorted(runs()) == ["llama-bench f16"] * 2 + ["llama-bench q8_0"] * 2

    assert run("--types", "q8_0,turbo4").exit_code == 0
    assert {line.partition(" ")[2].split()[0] for line in runs()} == {
        "f16",
        "turbo4",
    }  # f16 is what turbo4 is compared with


@needs_posix
def test_paths_that_disagree(place):
    (place / "bin" / "broken").write_text("turbo4")
    done = run("--types", "turbo4,q8_0")
    assert done.exit_code == 0
    rows = {row["label"]: row for row in report()["pairs"]}
    assert not rows["turbo4"]["paths"]["agree"] and rows["q8_0"]["paths"]["agree"]
    assert report()["recommendation"]["pair"] == "q8_0"
    words = "turbo4: the batched and the one-token path disagree"
    assert words in done.stdout
    assert f"> **Warning:** {words}" in Path("out/report.md").read_text(encoding="utf-8")
    assert f'class="alarm" role="alert">{words}' in Path("out/report.html").read_text(encoding="utf-8")


@needs_posix
def test_window(place):
    """Its bytes count, quality has it on both paths, and the check of the paths has none."""
    (place / "bin" / "window").touch()
    assert run("--types", "q8_0,turbo3").exit_code == 0
    made = runs()
    assert made.count("llama-perplexity turbo3") == 1 and made.count("llama-perplexity turbo3 token by token") == 1
    assert made.count("llama-perplexity turbo3 window 0") == 1
    assert made.count("llama-perplexity turbo3 token by token window 0") == 1
    assert not any("window" in line for line in made if "turbo3" not in line)
    data = report()
    q8_0, turbo3 = data["pairs"][1:]
    assert data["settings"]["window"] is None and q8_0["window_tokens"] == 0 and q8_0["window_type"] is None
    assert (turbo3["window_tokens"], turbo3["window_type"], turbo3["window_mib"]) == (256, "q8_0", 0.5)
    assert (turbo3["bits"], turbo3["mib"]) == (3.125, 6.75)
    assert (turbo3["quality"]["kld"], turbo3["decode"]["kld"]) == (0.00434, 0.00882)
    paths = turbo3["paths"]
    assert (paths["batched"], paths["decode"], paths["agree"]) == (0.0434, 0.0441, True)
    sizes = Path("bin/batches.txt").read_text().split("\n")
    assert sizes.count("turbo3 32") == 1 and sizes.count("turbo3 1") == 2 and sizes.count("turbo3 -") == 1
    assert sizes.count("q8_0 -") == 2
    assert data["recommendation"]["arguments"] == "-ctk turbo3 -ctv turbo3"
    text = Path("out/report.md").read_text(encoding="utf-8")
    assert re.search(r"^\| turbo3 \| 3\.125 \| 256 q8_0, 0\.50 MiB \| 6\.75 \|", text, re.MULTILINE)
    words = "KV MiB of turbo3 counts the exact window: the newest 256 tokens in q8_0, 0.50 MiB; bits/value does not."
    assert words in text and words in Path("out/report.html").read_text(encoding="utf-8")
    assert typed(data).to_json() == Path("out/report.json").read_text(encoding="utf-8")


def test_batches_with_a_window_are_small():
    """They see their own tokens exactly. Those of the check of the paths have no window, and are as large as others."""
    pairs = [CachePair.parse("turbo4").with_window(window) for window in (None, Window(64), Window(0))]
    assert [Run.as_generated(pair, 2048, 4).batch for pair in [*pairs, CachePair.parse("q8_0")]] == [32, 32, None, None]


@needs_posix
def test_windows_are_remembered_apart(place):
    (place / "bin" / "window").touch()
    options = ("--types", "turbo4,q8_0", "--depths", "0", "--needle-depths", "600")
    assert run(*options).exit_code == 0
    assert runs()
    done = run(*options, "--window", "64:f16")
    assert done.exit_code == 0, done.output
    assert {line.split("turbo4")[-1] for line in runs() if "f16" not in line.split()[1]} == {
        " window 64:f16", " token by token window 64:f16"
    }  # what has no window was measured before, and so was the check of the paths
    row = report()["pairs"][1]
    assert (row["window_tokens"], row["window_type"], report()["settings"]["window"]) == (64, "f16", "64:f16")
    assert report()["recommendation"]["arguments"] == "-ctk turbo4 -ctv turbo4 --cache-window 64:f16"
    assert run(*options, "--window", "64:f16").exit_code == 0 and runs() == []

    assert run(*options, "--window", 0).exit_code == 0
    assert {line.split("turbo4")[-1] for line in runs() if "turbo4" in line} == {" window 0"}
    row = report()["pairs"][1]
    assert (row["window_tokens"], row["quality"]["kld"], row["decode"]["kld"]) == (0, 0.0092, 0.0093)


@needs_posix
def test_a_wrong_kernel_is_seen_with_a_window(place):
    """Though a window hides most of it."""
    (place / "bin" / "window").touch()
    (place / "bin" / "broken").write_text("turbo4")
    done = run("--types", "turbo4", "--depths", "", "--needle-depths", "")
    assert "turbo4: the batched and the one-token path disagree" in done.stdout
    assert not report()["pairs"][1]["paths"]["agree"]


@needs_posix
def test_windows_that_a_build_or_the_option_has_not(place):
    done = run("--types", "turbo4", "--window", 64)
    assert done.exit_code == 1 and "--window: the build in" in done.stderr and "turboquant build" in done.stderr
    assert run("--types", "q8_0", "--window", 64, "--depths", "", "--needle-depths", "").exit_code == 0
    done = run("--types", "turbo4", "--window", "64:q4_0")
    assert done.exit_code == 1 and "--window: got '64:q4_0', wanted tokens and a type, q8_0 or f16" in done.stderr


@needs_posix
@pytest.mark.parametrize(
    "limit, code, words", [(0.02, 0, ""), (0.0134, 3, "q4_0 has a KLD of 0.013500, above 0.0134"), (0.0, 3, "q4_0 has")]
)
def test_fail_above(place, limit, code, words):
    """Both paths are checked: q4_0 has 0.0132 in batches and 0.0135 token by token."""
    done = run("--types", "q4_0", "--fail-above", limit, "--depths", "", "--needle-depths", "")
    assert done.exit_code == code
    assert words in done.stderr and Path("out/report.html").is_file()


@needs_posix
def test_what_cannot_be_measured(place):
    (place / "bin" / "nan").write_text("turbo4")
    done = run("--types", "q5_0,turbo4,q8_0", "--fail-above", 1, "--depths", "", "--needle-depths", "9000")
    assert done.exit_code == 3
    assert "q5_0 could not be measured" in done.stderr and "turbo4 could not be measured" in done.stderr
    rows = {row["label"]: row for row in report()["pairs"]}
    assert rows["turbo4"]["failure"] == "its predictions are not finite (KLD nan)"
    cell = rows["q8_0"]["needles"][0]
    assert cell["found"] is None and cell["reason"] == "beyond the model's context of 4096 tokens"
    (place / "bin" / "nan").write_text("f16")
    done = run("--types", "q8_0", "--chunks", 3)
    assert done.exit_code == 1 and "the f16 cache, with which all are compared, could not be measured" in done.stderr


@needs_posix
def test_what_cannot_be_asked_or_timed(place):
    """Cells that could not be measured have reasons; the rest of the row and the other pairs have numbers."""
    (place / "bin" / "unasked").write_text("turbo4")
    assert run("--types", "turbo4,q8_0").exit_code == 0
    rows = {row["label"]: row for row in report()["pairs"]}
    assert [row["failure"] for row in rows.values()] == [None] * 3
    why = "llama-completion exited with 1: no kernel for this type"
    assert {cell["reason"] for cell in rows["turbo4"]["needles"]} == {why}
    assert all(cell["found"] for cell in rows["q8_0"]["needles"])
    assert rows["turbo4"]["speed"][0]["decode"] is None and rows["q8_0"]["speed"][0]["decode"] == 100
    text = Path("out/report.md").read_text(encoding="utf-8")
    assert "| turbo4 | `??` | `??` |" in text and f"`?`: {why}." in text
    assert "turbo4 at 1,000: llama-bench exited with 1" in text
    assert "turbo4 at 1,000: llama-bench exited with 1" in Path("out/report.html").read_text(encoding="utf-8")


@needs_posix
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_needles_of_any_text(place, text):
    Path("text.txt").unlink()
    Path("text.txt").write_bytes(text.encode())
    assert run("--types", "q8_0", "--depths", "").exit_code == 0
    assert [cell["found"] for cell in report()["pairs"][1]["needles"]] == [True] * 4


@needs_posix
def test_interrupted(place):
    """After a kill in the token-by-token run earlier results are kept, and the same command continues."""
    slow, sleeping = place / "bin" / "slow", place / "bin" / "sleeping"
    slow.touch()
    options = ["--bin", "bin", "-m", "model.gguf", "-f", "text.txt", "--types", "q8_0", "--chunks", "4", "-t", "1"]
    options += ["--depths", "", "--needle-depths", "", "--out", "out"]
    command = [sys.executable, "-m", "turboquant.cli", "compare", *options]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while not sleeping.exists():
            assert child.poll() is None, child.communicate()
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=60)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    assert child.returncode == 130
    assert "the same command goes on from here" in errors and "Traceback" not in errors
    assert not Path("out/report.json").exists()
    assert not list((place / "cache" / "evaluate").glob("kld-base-*"))
    slow.unlink()
    runs()
    done = CliRunner().invoke(cli.app, ["compare", *options])
    assert done.exit_code == 0, done.output
    assert "llama-perplexity q8_0 token by token" in runs()
    assert report()["pairs"][1]["quality"]["kld"] == 0.0007


@needs_posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_without_a_folder_of_its_own(place, number):
    """After every end, the same command can use its folder again."""
    slow, sleeping = place / "bin" / "slow", place / "bin" / "sleeping"
    slow.touch()
    options = ["--bin", "bin", "-m", "model.gguf", "-f", "text.txt", "--types", "q8_0", "--chunks", "4", "-t", "1"]
    options += ["--depths", "", "--needle-depths", ""]
    child = subprocess.Popen(
        [sys.executable, "-m", "turboquant.cli", "compare", *options], stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        while not sleeping.exists():
            assert child.poll() is None, child.communicate()
            time.sleep(0.05)
        child.send_signal(number)
        child.communicate(timeout=60)
    finally:
        if child.poll() is None or number == signal.SIGKILL:
            os.killpg(child.pid, signal.SIGKILL)
    assert not list(place.glob("compare-*"))
    slow.unlink()
    Path("compare-model").mkdir()  # as older versions left one behind
    for _ in range(2):
        assert CliRunner().invoke(cli.app, ["compare", *options]).exit_code == 0
        assert [path.name for path in place.glob("compare-*")] == ["compare-model"]
    Path("compare-model/report.json").write_text("mine")
    assert CliRunner().invoke(cli.app, ["compare", *options]).exit_code == 0
    assert Path("compare-model/report.json").read_text() == "mine" and Path("compare-model-2/report.json").is_file()


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@needs_posix
@pytest.mark.parametrize(
    "options, words",
    [
        (["-m", "none.gguf"], "none.gguf: no such file; give a GGUF model, or the name of one"),
        (["-m", "text.txt"], "text.txt is not a GGUF model"),
        (["-m", "half.gguf"], "half.gguf is truncated or damaged"),
        (["-m", "start.gguf"], "start.gguf is truncated or damaged"),
        (["-f", "none.txt"], "none.txt: no such file; give a UTF-8 text with -f"),
        (["-f", "empty.txt"], "empty.txt is empty; give a text of at least 4096 tokens"),
        (["-f", "short.txt"], "short.txt has 5000 bytes, too few for 4 chunks of 2048 tokens; give a longer text"),
        (["--ctx", 8192], "--ctx 8192 is more than the model's context; give --ctx 4096 or less"),
        (["--ctx", 128, "--chunks", 1], "fewer than 100 scored ones; give a larger --ctx or --chunks"),
        (["--types", "f16:"], "expected TYPE or TYPE_K/TYPE_V, got 'f16:'"),
        (["--depths", "1,x"], "--depths: expected whole numbers with commas between"),
        (["--needle-template", "none"], "--needle-template none: neither one of plain, notes, nor a file"),
        (["--needle-template", "text.txt"], "a needle template needs {before}"),
        (
            ["--out", "text.txt/report"],
            "cannot write to text.txt/report (Not a directory); give another folder with --out",
        ),
        (["--out", "taken"], "taken/report.md exists and is no report of this program; give another folder with --out"),
        (["--bin", "nowhere"], "nowhere: no such folder; `turboquant build` makes one"),
    ],
)
def test_mistakes(place, options, words):
    """Each error is one sentence at the start: no program runs, and no file is written."""
    whole = Path("model.gguf").read_bytes()
    Path("half.gguf").write_bytes(whole[: len(whole) // 2])
    Path("start.gguf").write_bytes(whole[:100])
    Path("empty.txt").write_text("\n \n")
    Path("short.txt").write_text("word " * 1000)
    Path("taken").mkdir()
    Path("taken/report.md").write_text("mine")
    done = run(*options)
    assert done.exit_code == 1
    assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert runs() == [] and not Path("out/report.json").exists()
    assert Path("taken/report.md").read_text() == "mine"


@needs_posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(place):
    Path("out").mkdir(mode=0o555)
    done = run()
    assert done.exit_code == 1
    assert done.stderr == "turboquant: cannot write to out (Permission denied); give another folder with --out\n"


@needs_posix
def test_text_shorter_than_it_looks(place):
    """llama-perplexity reports a text with enough bytes but too few tokens."""
    program = place / "bin" / "llama-perplexity"
    program.write_text(program.read_text().replace("over {value('--chunks')} chunks", "over 3 chunks"))
    done = run()
    assert done.exit_code == 1
    assert "text.txt has 3 chunks of 2048 tokens, 4 were asked for: give a longer text" in done.stderr


@needs_posix
def test_full_disk_for_predictions(place, monkeypatch):
    free = base_bytes(258, 2048, 4) - 1
    monkeypatch.setattr(compare.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    done = run()
    assert done.exit_code == 1 and runs() == []
    assert "give fewer --chunks, or set TURBOQUANT_CACHE to a folder on another disk" in done.stderr


@needs_posix
def test_full_disk_for_the_report(place):
    """With a limit of 1 MiB for files the page does not fit, and the old report stays."""
    assert run("--types", "q8_0").exit_code == 0
    before = Path("out/report.html").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        done = run("--types", "q8_0,q4_0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.exit_code == 1
    assert "cannot write out/report.html (File too large); make room or give another --out" in done.stderr
    assert Path("out/report.html").read_bytes() == before
    assert sorted(path.name for path in Path("out").iterdir()) == ["report.html", "report.json", "report.md"]


# ---- the page --------------------------------------------------------------------------------------------------------


@needs_posix
def test_page_is_self_contained(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|img|iframe|link)[^>]*(src|href)=[\"'](?!data:)", text)
    assert "@import" not in text and "url(" not in text.partition("</style>")[0]


@needs_posix
def test_page_escapes(finished):
    """Names come from files of others."""
    data = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    evil = "</script><script>alert(1)</script><img src=x>|"
    data["model"]["name"] = data["pairs"][-1]["failure"] = data["pairs"][1]["needles"][0]["answer"] = evil
    page_text, markdown = page.to_html(typed(data)), page.to_markdown(typed(data))
    assert "<script>alert(1)" not in page_text and "<img src=x>" not in page_text
    assert "<script>" not in markdown and "&lt;img src=x>\\|" in markdown


@needs_posix
def test_markdown_escapes(finished):
    """Names are untrusted, and none of them ends a code span, a cell or a line, or begins HTML or a link."""
    data = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    evil = "<img src=x>`<b>`` [x](javascript:0)\n# &lt;|"
    data["model"]["path"] = data["text"]["path"] = f"/models/{evil}"
    data["model"]["name"] = data["machine"]["cpu"] = data["build"]["bin"] = evil
    data["pairs"][-1]["failure"] = data["pairs"][1]["label"] = evil
    data["pairs"][1]["needles"][0]["reason"] = data["pairs"][1]["speed"][0]["reason"] = evil
    data["pairs"][1]["speed"][0]["decode"] = None
    clean = page.to_markdown(typed(json.loads((finished / "report.json").read_text(encoding="utf-8"))))
    text = page.to_markdown(typed(data))
    assert len(text.splitlines()) == len(clean.splitlines()) + 1  # the reason of a needle
    spans, outside = re.findall(r"(?<!`)(?P<fence>`+)(?!`)(.*?)(?<!`)\1(?!`)", re.sub(r"\\`", "", text), re.DOTALL), text
    for fence, inside in spans:
        outside = outside.replace(f"{fence}{inside}{fence}", "")
    assert "<" not in outside and "](" not in re.sub(r"\\[\[\]]", "", outside)
    assert sum("<img src=x>" in inside for _, inside in spans) == 4  # model, text, build, CPU


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsers.start(tmp_path_factory.mktemp("profile")) as one:
        yield one


MARKS = {"quality-bits": ".scatterlayer .point", "kld": ".barlayer .point", "needles": ".heatmaplayer image",
         "speed-decode": ".scatterlayer .point", "speed-prefill": ".scatterlayer .point"}  # fmt: skip


@needs_posix
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_page_in_a_browser(finished, browser, width, dark):
    browser.open(finished / "report.html", width=width, prefers_color_scheme="dark" if dark else "light")
    counts = browser.run(
        "return Object.fromEntries([...document.querySelectorAll('.chart')].map((chart) => "
        "[chart.id, chart.querySelectorAll(arguments[0][chart.id]).length]));",
        MARKS,
    )
    # As many marks as there are numbers: 6 pairs beside f16, 7 pairs on two paths, 2 depths each.
    assert counts == {"quality-bits": 6, "kld": 14, "needles": 1, "speed-decode": 14, "speed-prefill": 14}
    assert browser.console() == []

    assert browser.run("return [innerWidth, document.documentElement.scrollWidth];") == [width, width]
    inside = browser.run(
        "return [...document.querySelectorAll('.chart .main-svg')].map((one) => one.getBoundingClientRect())"
        ".every((box) => box.left >= 0 && box.right <= innerWidth && box.width > 250);"
    )
    assert inside
    for what in ("body", ".soft", ".advice code", ".notice", "td", "th", "td .badge", "#kld .xtick text"):
        assert contrast(browser, what) >= 4.5, what


def contrast(browser: Browser, selector: str) -> float:
    """WCAG contrast of an element's text with the nearest background behind it."""
    colors = browser.run(
        """
        let one = document.querySelector(arguments[0]);
        const style = getComputedStyle(one);
        const text = one instanceof SVGElement ? style.fill : style.color;
        let back = "rgba(0, 0, 0, 0)";
        for (; one && /, 0\\)$/.test(back); one = one.parentElement) back = getComputedStyle(one).backgroundColor;
        return [text, back];
        """,
        selector,
    )
    light, dark = sorted((luminance(color) for color in colors), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color: str) -> float:
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", color)[:3])
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@needs_posix
def test_disagreement_is_red(finished, browser, tmp_path):
    data = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    data["pairs"][3]["paths"]["agree"] = False
    file = tmp_path / "report.html"
    file.write_text(page.to_html(typed(data)), encoding="utf-8")
    browser.open(file, width=800)
    color = browser.run("return getComputedStyle(document.querySelector('.alarm')).color;")
    red, green, blue = map(int, re.findall(r"\d+", color)[:3])
    assert red > 2 * max(green, blue)
    assert browser.run("return document.querySelectorAll('#kld .shapelayer path').length;") == 1
