"""--cache-boundary-v N[:TYPE]: the first and last N attention layers keep V in a better type."""

from __future__ import annotations

import re

import pytest
from harness import Result, kv_sizes
from test_cli import generate

#: Bytes of one V row of the 8M model's two heads of 128, by type.
ROW = {"f16": 512, "q8_0": 272, "q5_1": 192, "turbo4": 132, "turbo3": 100, "turbo2": 68}
LAYERS, CELLS = 6, 512


def sizes(result: Result) -> dict[str, object]:
    found = kv_sizes(result.text)
    assert found, result.describe()
    return found[-1]


@pytest.mark.parametrize(
    ("flag", "edge", "n"),
    [
        (None, "turbo3", 0),
        ("0", "turbo3", 0),
        ("1", "q8_0", 1),
        ("2", "q8_0", 2),
        ("1:f16", "f16", 1),
        ("2:turbo4", "turbo4", 2),
        ("1:q5_1", "q5_1", 1),
        ("3", "q8_0", 3),
    ],
)
def test_sizes(build, prose_model, flag: str | None, edge: str, n: int) -> None:
    extra = () if flag is None else ("--cache-boundary-v", flag)
    result = generate(build, prose_model, "-ctk", "turbo4", "-ctv", "turbo3", "-v", *extra, n=4)
    found = sizes(result)
    expected_v = CELLS * (2 * n * ROW[edge] + (LAYERS - 2 * n) * ROW["turbo3"]) / 2**20
    expected_k = CELLS * LAYERS * ROW["turbo4"] / 2**20
    assert found["v"] == pytest.approx(expected_v, abs=0.006)
    assert found["k"] == pytest.approx(expected_k, abs=0.006)
    said = re.findall(r"boundary V: (\d+) of (\d+) layers keep V in (\S+)", result.text)
    assert set(said) == ({(str(2 * n), str(LAYERS), edge)} if n else set()), said


def test_environment_variable(build, prose_model) -> None:
    flag = generate(build, prose_model, "-ctv", "turbo3", "--cache-boundary-v", "1:q8_0", "-v", n=4)
    variable = generate(build, prose_model, "-ctv", "turbo3", "-v", n=4, env={"LLAMA_ARG_CACHE_BOUNDARY_V": "1:q8_0"})
    assert sizes(flag) == sizes(variable)
    assert sizes(flag)["v"] != sizes(generate(build, prose_model, "-ctv", "turbo3", "-v", n=4))["v"]


@pytest.mark.parametrize("value", ["x", "-1", "1:", "1:turbo5", ":q8_0", "1:q8_0:f16", "1.5", "99999999999"])
@pytest.mark.parametrize("way", ["flag", "environment"])
def test_bad_values_are_refused(build, prose_model, value: str, way: str) -> None:
    extra = ("--cache-boundary-v", value) if way == "flag" else ()
    env = {"LLAMA_ARG_CACHE_BOUNDARY_V": value} if way == "environment" else {}
    result = generate(build, prose_model, "-ctv", "turbo3", *extra, env=env, n=4, check=False)
    assert result.status != 0 and not result.crashed, result.describe()
    assert "cache-boundary-v" in result.text and value in result.text


def test_quality_lies_between(probe, prose_model, heldout) -> None:
    """turbo2 for V is closer to f16 if the boundary layers are f16."""
    from harness import kld

    errors = []
    for value in (None, "1:f16", "2:f16"):
        p = probe(prose_model, **({"LLAMA_ARG_CACHE_BOUNDARY_V": value} if value else {}))
        tokens = p.tokenize(heldout[:4000])[:400]
        p.context()
        base = p.logits(tokens)
        p.context("f16", "turbo2")
        errors.append(kld(base, p.logits(tokens)))
    assert errors[0] > errors[1] > errors[2] > 0


def test_hybrid_counts_attention_layers(build, tiny) -> None:
    """With attention in layers 1, 3, 5 and 7 of eight, N = 1 selects layers 1 and 7, half of the V cache."""
    row = {"q8_0": 136, "turbo2": 34}
    result = generate(build, tiny("hybrid"), "-ctv", "turbo2", "--cache-boundary-v", "1", "-v", n=4)
    expected = CELLS * (2 * row["q8_0"] + 2 * row["turbo2"]) / 2**20
    assert sizes(result)["v"] == pytest.approx(expected, abs=0.006)
