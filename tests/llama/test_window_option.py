"""--cache-window N[:TYPE]: its default, its values, the bytes in the log, and where there is no window."""

from __future__ import annotations

import re

import pytest
from harness import Result
from test_cli import generate

#: Bytes of one row of K or V of the 8M model's two heads of 128, by type.
ROW = {"q8_0": 272, "f16": 512}
LAYERS, CELLS = 6, 512
TURBO = ("-ctk", "turbo4", "-ctv", "turbo4", "-v")


def window(result: Result) -> tuple[int, str, float] | None:
    """Tokens, type and MiB of the window that the log names."""
    found = re.findall(r"window: the newest (\d+) tokens in (\S+) \(6 of 6 layers\), ([\d.]+) MiB", result.text)
    return (int(found[0][0]), found[0][1], float(found[0][2])) if found else None


@pytest.mark.parametrize(
    ("flag", "tokens", "name"),
    [
        ("", 256, "q8_0"),
        ("64", 64, "q8_0"),
        ("64:f16", 64, "f16"),
        ("1:q8_0", 1, "q8_0"),
        ("999999", CELLS, "q8_0"),
    ],
)
@pytest.mark.parametrize("way", ["flag", "environment"])
def test_sizes(build, prose_model, flag: str, tokens: int, name: str, way: str) -> None:
    extra = ("--cache-window", flag) if flag and way == "flag" else ()
    result = generate(build, prose_model, *TURBO, *extra, n=4, env={"LLAMA_ARG_CACHE_WINDOW": "" if extra else flag})
    rows = LAYERS * 2 * (tokens + 1)  # K and V; one row more for what gets no slot
    found = window(result)
    assert found, result.describe()
    assert found == (tokens, name, pytest.approx(rows * ROW[name] / 2**20, abs=0.006))


@pytest.mark.parametrize(
    "arguments",
    [
        ("-ctk", "turbo4", "-ctv", "turbo4", "--cache-window", "0"),
        ("-ctk", "q8_0", "-ctv", "q8_0"),
        ("-ctk", "f16", "-ctv", "f16", "--cache-window", "64"),
    ],
    ids=" ".join,
)
def test_off(build, prose_model, arguments: tuple[str, ...]) -> None:
    result = generate(build, prose_model, *arguments, "-v", n=4, env={"LLAMA_ARG_CACHE_WINDOW": ""})
    assert "window: the newest" not in result.text


@pytest.mark.parametrize("value", ["x", "-1", "64:", "64:q4_0", "64:turbo4", ":q8_0", "64:q8_0:f16", "1.5", "9999999"])
@pytest.mark.parametrize("way", ["flag", "environment"])
def test_bad_values_are_refused(build, prose_model, value: str, way: str) -> None:
    extra = ("--cache-window", value) if way == "flag" else ()
    env = {"LLAMA_ARG_CACHE_WINDOW": value} if way == "environment" else {}
    result = generate(build, prose_model, *TURBO, *extra, env=env, n=4, check=False)
    assert result.status != 0 and not result.crashed, result.describe()
    assert f"--cache-window '{value}': must be a number of tokens" in result.text
