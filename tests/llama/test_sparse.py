"""--cache-sparse-v X: rows of V with very small weights are not read, and this does not change the quality."""

from __future__ import annotations

import pytest
from harness import kld
from test_cli import generate


@pytest.mark.parametrize("value", ["x", "-1e-6", "1", "1e-6x", "nan"])
@pytest.mark.parametrize("way", ["flag", "environment"])
def test_bad_values_are_refused(build, prose_model, value: str, way: str) -> None:
    extra = ("--cache-sparse-v", value) if way == "flag" else ()
    env = {"LLAMA_ARG_CACHE_SPARSE_V": value} if way == "environment" else {}
    result = generate(build, prose_model, "-ctv", "turbo3", *extra, env=env, n=4, check=False)
    assert result.status != 0 and not result.crashed, result.describe()
    assert "cache-sparse-v" in result.text and value in result.text


def test_flag_is_accepted(build, prose_model) -> None:
    generate(build, prose_model, "-ctk", "turbo4", "-ctv", "turbo3", "--cache-sparse-v", "1e-4", n=4)


def test_default_changes_nothing_that_matters(probe, prose_model, heldout) -> None:
    """The default (1e-6) differs from 0 by far less than the type's own error; a threshold of 0.5 does not."""
    logits = {}
    for value in ("0", "", "0.5"):
        p = probe(prose_model, LLAMA_ARG_CACHE_SPARSE_V=value)
        tokens = p.tokenize(heldout[:4000])[:400]
        p.context()
        base = p.logits(tokens)
        p.context("turbo4", "turbo4")
        logits[value] = p.logits(tokens)
    own = kld(base, logits["0"])
    assert kld(logits["0"], logits[""]) <= 0.02 * own
    assert kld(logits["0"], logits["0.5"]) > own
