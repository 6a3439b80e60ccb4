"""State files, sequence state, and context shift."""

from __future__ import annotations

import json

import numpy as np
import pytest
from harness import TURBO, TURBO_ALL, ProbeError, kld, random_tokens

TOKENS = random_tokens(120, seed=3)
NEXT = random_tokens(24, seed=4)
#: Encoding again adds at most as much noise as the first encoding (measured: 0.9 to 1.9 times in total).
SHIFT = 2.5
#: A sequence in a batch with others gives the same with turbo types, except for the order of float sums.
SAME = 1e-4
#: The same with trellis-coded types, as in test_shapes.py (measured: 1.2e-4).
SAME_PATH = 2e-3
PAIRS = [(name, name) for name in TURBO_ALL] + [
    ("turbo4", "f16"), ("q8_0", "turbo3"), ("turbo2", "q4_0"), ("turbo4_tcq", "turbo3"), ("f16", "turbo2_tcq")
]  # fmt: skip


@pytest.mark.parametrize(("ctk", "ctv"), PAIRS)
def test_whole_state(probe, tiny, tmp_path, ctk: str, ctv: str) -> None:
    p = probe(tiny("gqa"))
    p.context(ctk, ctv)
    last = p.logits(TOKENS)[-1]
    p.command(f"save {tmp_path}/state")
    expected = p.greedy(last, 16, len(TOKENS))
    p.context(ctk, ctv)
    p.command(f"load {tmp_path}/state")
    tokens, rows = p.greedy(last, 16, len(TOKENS))
    assert tokens == expected[0]
    assert np.array_equal(rows, expected[1])


@pytest.mark.parametrize("name", ["turbo3", "turbo3_tcq"])
@pytest.mark.parametrize("model", ["gqa", "iswa", "mla", "hybrid", "head64"])
@pytest.mark.parametrize("unified", [0, 1])
def test_sequence_state(probe, tiny, tmp_path, model: str, unified: int, name: str) -> None:
    """Saved from sequence 0, restored into sequence 1 of another context."""
    p = probe(tiny(model))
    kv = (name, name)
    options = {"n_seq": 2, "unified": unified, "n_ctx": 1024}
    p.context(*kv, **options)
    p.logits(TOKENS)
    p.command(f"saveseq {tmp_path}/state 0")
    expected = p.logits(NEXT, pos=len(TOKENS))
    p.context(*kv, **options)
    p.logits(random_tokens(30, seed=9), seq=0)
    p.command(f"loadseq {tmp_path}/state 1")
    assert kld(expected, p.logits(NEXT, pos=len(TOKENS), seq=1)) <= (SAME_PATH if "_tcq" in name else SAME)


@pytest.mark.parametrize(
    ("saved", "restored"),
    [
        (("turbo4", "turbo4"), ("turbo3", "turbo4")),
        (("turbo4", "turbo4"), ("turbo4", "turbo3")),
        (("turbo4", "turbo4"), ("turbo4_64", "turbo4_64")),
        (("turbo4", "turbo4"), ("f16", "f16")),
        (("q8_0", "q8_0"), ("turbo4", "turbo4")),
        (("f16", "turbo3"), ("f16", "turbo3_32")),
        (("turbo4", "turbo3"), ("turbo4_tcq", "turbo3")),  # blocks of the same size
        (("turbo4_tcq", "turbo3_tcq"), ("turbo4_tcq", "turbo3")),
    ],
)
@pytest.mark.parametrize("what", ["", "seq"])
def test_another_type_is_refused(probe, tiny, tmp_path, saved, restored, what: str) -> None:
    p = probe(tiny("gqa"))
    p.context(*saved)
    p.logits(TOKENS)
    suffix = " 0" if what else ""
    p.command(f"save{what} {tmp_path}/state{suffix}")
    p.context(*restored)
    with pytest.raises(ProbeError, match="not restored") as refusal:
        p.command(f"load{what} {tmp_path}/state{suffix}")
    assert "mismatched" in refusal.value.log
    p.context(*restored)  # alive and usable
    assert np.isfinite(p.logits(TOKENS[:8])).all()


DROPPED = 40


def after_drop(p, name: str, moves: tuple[int, int] | None) -> np.ndarray:
    """Logits of NEXT after the first DROPPED of TOKENS are removed and the tokens in `moves` are moved to the front."""
    p.context(name, name)
    p.logits(TOKENS)
    p.command(f"rm 0 0 {DROPPED}")
    if moves:
        p.command(f"shift 0 {moves[0]} {moves[1]} -{DROPPED}")
    end = len(TOKENS) - (DROPPED if moves and moves[1] == len(TOKENS) else 0)
    return p.logits(NEXT, pos=end)


@pytest.mark.parametrize("model", ["gqa", "head64", "head96", "head256", "iswa", "hybrid"])
@pytest.mark.parametrize("name", TURBO)
def test_context_shift(probe, tiny, model: str, name: str) -> None:
    """RoPE is relative: moving all tokens by the same distance must change nothing but re-encode K once."""
    p = probe(tiny(model))
    everything = (DROPPED, len(TOKENS))
    base = after_drop(p, "f16", None)
    assert kld(base, after_drop(p, "f16", everything)) < 1e-4
    stay, move = (kld(base, after_drop(p, name, moves)) for moves in (None, everything))
    assert p.command("canshift") == "1"
    assert 0 < move <= SHIFT * stay
    if name in ("turbo4", "turbo4_tcq"):  # a shift of half of the tokens represents a wrong shift
        wrong = kld(base, after_drop(p, "f16", (DROPPED, 2 * DROPPED)))
        assert wrong > 1.2 * move, "the test cannot tell a wrong shift from a right one"


MIXED = [["q8_0", "turbo4", "f16"], ["f16", "q8_0", "q8_0"], ["turbo4", "f16", "q4_0"], ["f16", "turbo4_tcq", "q8_0"]]


@pytest.mark.parametrize("k", MIXED)
def test_context_shift_of_mixed_layers(probe, tiny, tmp_path, k: list[str]) -> None:
    """Before a shift, a layer is rotated back exactly if llama.cpp rotated it."""
    (tmp_path / "plan.json").write_text(
        json.dumps({"format": "turboquant-plan", "version": 1, "k": k, "v": ["turbo4"] * 3})
    )
    p = probe(tiny("gqa"), LLAMA_ARG_CACHE_PLAN=str(tmp_path / "plan.json"))
    base = after_drop(p, "f16", None)
    stay, move = (kld(base, after_drop(p, "auto", moves)) for moves in (None, (DROPPED, len(TOKENS))))
    wrong = kld(base, after_drop(p, "f16", (DROPPED, 2 * DROPPED)))
    assert 0 < move <= SHIFT * stay and wrong > 1.2 * move


@pytest.mark.parametrize("ctk", ["turbo4", "turbo3", "turbo2_32", "turbo4_tcq"])
def test_context_shift_is_refused_where_the_rope_is_partial(probe, tiny, ctk: str) -> None:
    p = probe(tiny("partial"))
    p.context(ctk, "f16")
    assert p.command("canshift") == "0"
    p.context("f16", ctk)  # V is not rotated: nothing to refuse
    assert p.command("canshift") == "1"
