"""TURBOQUANT_COUNT=1: which code computes attention, counted call by call."""

from __future__ import annotations

import re

from test_cli import generate


def counts(text: str) -> dict[tuple[str, int], int]:
    """Calls by code and tokens."""
    lines = re.findall(r"turboquant: count (\d+) (.*), tokens (\d+), streams 1$", text, re.MULTILINE)
    return {(what, int(tokens)): int(number) for number, what, tokens in lines}


def test_each_layer_of_each_step_is_counted(build, prose_model) -> None:
    turbo = ("-ctk", "turbo4", "-ctv", "turbo3")
    found = counts(generate(build, prose_model, *turbo, n=9, env={"TURBOQUANT_COUNT": "1"}).text)
    # 6 layers, and 8 steps after the prompt, which has more than one token
    assert found["attention by the tile engine", 1] == 6 * 8
    assert found["mask filled at once", 1] == 8
    prompt = max(tokens for _, tokens in found)
    assert prompt > 1 and found["attention by the tile engine", prompt] == 6
    assert found["mask filled at once", prompt] == 1
    env = {"TURBOQUANT_COUNT": "1", "TURBOQUANT_GENERIC_ATTENTION": "1"}
    found = counts(generate(build, prose_model, *turbo, n=9, env=env).text)
    assert found["attention by ggml's kernels", 1] == 6 * 8
    assert not any(what == "attention by the tile engine" for what, _ in found)


def test_nothing_is_counted_unasked(build, prose_model) -> None:
    for value in ("", "0"):
        asked = generate(build, prose_model, "-ctk", "turbo4", "-ctv", "turbo3", n=2, env={"TURBOQUANT_COUNT": value})
        assert "turboquant: count" not in asked.text
    stock = generate(build, prose_model, n=2, env={"TURBOQUANT_COUNT": "1"})
    assert "turboquant: count" not in stock.text
