"""Types of llama.cpp itself: bit for bit what the unpatched build computes."""

from __future__ import annotations

import numpy as np
import pytest
from harness import Probe, random_tokens


@pytest.mark.parametrize("model", ["prose", "gqa", "head64", "head192", "iswa", "mla", "hybrid", "partial"])
def test_logits_are_bit_identical(build, stock, prose_model, tiny, tmp_path, heldout, model: str) -> None:
    path = prose_model if model == "prose" else tiny(model)
    pairs = [("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"), ("bf16", "f16"), ("q8_0", "q4_0"), ("f16", "q5_1")]
    if model == "mla":
        pairs = [(k, v) for k, v in pairs if k == v]
    with Probe(build, path, tmp_path) as ours, Probe(stock, path, tmp_path) as theirs:
        tokens = ours.tokenize(heldout[:3000])[:256] if model == "prose" else random_tokens(200)
        seen = []
        for ctk, ctv in pairs:
            for step in (None, 1):
                both = []
                for probe in (ours, theirs):
                    probe.context(ctk, ctv)
                    both.append(probe.logits(tokens[: 256 if step is None else 64], step=step))
                assert np.array_equal(both[0].view(np.uint32), both[1].view(np.uint32)), (ctk, ctv, step)
            seen.append(both[0])
        assert not np.array_equal(seen[0], seen[-1]), "the cache type should show in the logits"


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_shifted_cache_is_bit_identical(build, stock, tiny, tmp_path, name: str) -> None:
    results = []
    for one in (build, stock):
        with Probe(one, tiny("gqa"), tmp_path) as probe:
            probe.context(name, name)
            probe.logits(random_tokens(100))
            probe.command("rm 0 0 30")
            probe.command("shift 0 30 100 -30")
            results.append(probe.logits(random_tokens(20, seed=5), pos=70))
    assert np.array_equal(results[0], results[1])


def test_unpatched_build_has_no_turbo_types(stock, tiny, tmp_path) -> None:
    """The other build really has no hooks."""
    from harness import ProbeError

    with Probe(stock, tiny("gqa"), tmp_path) as probe:
        with pytest.raises(ProbeError, match="no type turbo4"):
            probe.context("turbo4", "turbo4")
