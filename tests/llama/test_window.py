"""The exact window: what attention reads after everything that changes a cell, compared with window_oracle.py.

Each test of an event has a second oracle that keeps its tags there: what the test would see if the hook were missing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from harness import Probe, ProbeError, kld, random_tokens, same_top
from make_model import Shape, write_model
from window_oracle import Cache, Model, Twin, max_kld

ONE = Shape(layers=1, heads=8, kv_heads=2)
#: The largest KLD of a token to the oracle, whose sums are float64: 3e-6, and 8e-5 where another sum rounds a value to
#: another level. A window of one cell less: 2e-2.
LIMIT = 5e-4
#: q8_0 is rotated by llama.cpp before it is rounded, which the oracle does not do (measured: 2e-3).
ROTATED = 5e-3
#: A stale slot must stand out at least as far as this.
FAR = 1e-2
KV = ("turbo2", "turbo2")  # the blocks that differ most from the slots
SMALL = 8


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("window") / "one.gguf", ONE)


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return Model(path, ONE)


@pytest.fixture
def twin(probe, path: Path, model: Model):
    """Opens a context and its oracle: twin(window, **options of Twin)."""

    def open_twin(window: int = SMALL, ctk: str = KV[0], ctv: str = KV[1], slot: str = "q8_0", **options) -> Twin:
        one = probe(path, LLAMA_ARG_CACHE_WINDOW=f"{window}:{slot}")
        return Twin(one, model, ctk, ctv, window, slot, **options)

    return open_twin


# ---- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 1, SMALL, 256, 999999])
@pytest.mark.parametrize(
    ("ctk", "ctv", "slot"),
    [
        ("turbo2", "turbo2", "q8_0"), ("turbo4", "turbo3", "f16"), ("turbo2", "f16", "q8_0"), ("turbo3", "f16", "f16"),
        ("f16", "turbo2", "q8_0"), ("q8_0", "turbo2", "q8_0"), ("turbo2", "q8_0", "f16"),
    ],
)  # fmt: skip
def test_attention_is_that_of_the_rule(twin, window: int, ctk: str, ctv: str, slot: str) -> None:
    """One token, a few, more than the window, one by one; then all of it with three threads."""
    worst = {}
    for threads in (1, 3):
        t = twin(window, ctk, ctv, slot, threads=threads)
        for n, single in ((1, False), (5, False), (2 * SMALL + 4, True), (4 * SMALL, False), (3, True), (90, False), (5, True)):
            t.decode(n, single=single)
        worst[threads] = t.worst
    assert max(worst.values()) <= (ROTATED if "q8_0" in (ctk, ctv) else LIMIT), worst


@pytest.mark.parametrize("head", [64, 96, 128, 256])
def test_heads(probe, tmp_path: Path, head: int) -> None:
    shape = Shape(layers=1, heads=4, kv_heads=1, head=head)
    path = write_model(tmp_path / "model.gguf", shape)
    block = 128 if head % 128 == 0 else 64 if head % 64 == 0 else 32
    name = "turbo3" if block == 128 else f"turbo3_{block}"
    t = Twin(probe(path, LLAMA_ARG_CACHE_WINDOW="8"), Model(path, shape), name, name, 8)
    for n in (3, 20, 1, 1, 40, 1):
        t.decode(n)
    assert t.worst <= LIMIT


def test_a_window_that_is_off_by_one_would_be_seen(twin, model: Model) -> None:
    """The bound of these tests is below the effect of one cell more or less in the window."""
    t = twin(SMALL)
    t.oracles.append(Cache(model, *KV, SMALL - 1))
    for _ in range(3):
        t.decode(SMALL)
        t.decode(6, single=True)
    assert t.worst <= LIMIT and t.far > FAR


@pytest.mark.parametrize("kernels", ["scalar", "default"])
@pytest.mark.parametrize("window", [SMALL, 100])
def test_single_and_batched(probe, path: Path, kernels: str, window: int) -> None:
    """What was stored token by token is read by one token and by many alike."""
    env = {"LLAMA_ARG_CACHE_WINDOW": str(window), **({"TURBOQUANT_KERNELS": kernels} if kernels == "scalar" else {})}
    p = probe(path, **env)
    last = []
    for threads in (1, 2, 3):
        for batch in (1, 2):
            p.context(*KV, threads=threads)
            p.logits(random_tokens(60), step=1)
            last.append(p.logits(random_tokens(batch, seed=5), pos=60)[0])
    assert max(max_kld(last[0][None], one[None]) for one in last) <= LIMIT


# ---- events ------------------------------------------------------------------------------------------------------------


def check(t: Twin) -> None:
    assert t.worst <= LIMIT, f"{t.worst:.1e} (a stale slot: {t.far:.1e})"
    if len(t.oracles) > 1:
        assert t.far >= FAR, f"a stale slot would not be seen: {t.far:.1e}"


@pytest.mark.parametrize("n", [1, 5, SMALL, 3 * SMALL])
def test_other_tokens_after_a_rollback(twin, n: int) -> None:
    """The cells of the tokens that were rolled back get other tokens: by one batch, and one by one."""
    t = twin(stale=["store"])
    t.decode(30)
    for single in (False, True, False):
        t.decode(4, single=True)
        t.rollback(n)
        t.decode(n, single=single)
        t.decode(2, single=True)
    check(t)


def test_a_rollback_alone(twin) -> None:
    t = twin()
    t.decode(30)
    for n in (3, 12):
        t.rollback(n)
        t.decode(1)
    check(t)


def test_speculation_costs_no_older_token_its_slot(twin) -> None:
    """Drafts that are rejected again and again: the accepted tokens keep their slots."""
    t = twin()
    t.decode(12)
    for _ in range(10):
        t.decode(4)
        t.rollback(3)
    check(t)
    tagged = {slot.cell for slot in t.oracles[0].streams[0].slots}
    assert len(tagged) == SMALL and min(tagged) >= t.end() + 3 - SMALL


@pytest.mark.parametrize("n", [SMALL + 1, 4 * SMALL, 100])
def test_a_batch_larger_than_the_window(twin, n: int) -> None:
    t = twin(stale=["store"], n_ubatch=512)
    t.decode(20)
    t.rollback(7)
    t.decode(n)
    t.decode(3, single=True)
    t.rollback(n)
    t.decode(n)
    t.decode(1)
    check(t)


@pytest.mark.parametrize("n_ubatch", [3, SMALL, 32])
def test_ubatches(twin, n_ubatch: int) -> None:
    t = twin(n_ubatch=n_ubatch)
    for n in (50, 1, 33, 7, 1):
        t.decode(n)
    check(t)


def test_a_window_as_large_as_the_cache(twin) -> None:
    """Every cell keeps its slot, also when the cache goes round."""
    t = twin(10000, size=256)
    for _ in range(5):
        t.decode(50)
    t.rm(0, 0, 120)
    t.decode(60)
    t.decode(20, single=True)
    t.decode(40)
    check(t)


@pytest.mark.parametrize("data", [False, True])
def test_clear(twin, data: bool) -> None:
    t = twin(64, stale=["clear", "store"])
    t.decode(40)
    t.clear(data)
    t.decode(1)
    t.decode(20, single=True)
    t.clear(data)
    t.decode(20)
    t.decode(1)
    check(t)


def test_cells_removed_in_the_middle(twin) -> None:
    t = twin(16, stale=["store"])
    t.decode(40)
    t.rm(0, 26, 33)
    t.decode(1)
    t.decode(12)
    t.rm(0, 0, 5)
    t.decode(1)
    t.decode(20)
    check(t)


@pytest.mark.parametrize(("p0", "p1"), [(20, 1000), (20, 36), (36, 1000)])
def test_context_shift(twin, p0: int, p1: int) -> None:
    """All tokens after the removed ones move, or some: those that move have no slots until they are stored again."""
    t = twin(16, stale=["shift"])
    t.decode(40)
    t.rm(0, 10, 20)
    t.add(0, p0, p1, -10)
    t.decode(1)
    t.decode(12)
    t.decode(5, single=True)
    check(t)


def test_context_shift_again_and_again(twin) -> None:
    t = twin(16, stale=["shift"])
    t.decode(60)
    for _ in range(4):
        t.rm(0, 4, 24)
        t.add(0, 24, 1000, -20)
        t.decode(10)
        t.decode(10, single=True)
    check(t)


def test_positions_divided(twin) -> None:
    t = twin(16, stale=["shift"])
    t.decode(40)
    t.div(0, 8, 1000, 4)
    t.decode(1)
    t.decode(10)
    check(t)


@pytest.mark.parametrize("slot", ["q8_0", "f16"])
def test_streams_of_their_own(twin, slot: str) -> None:
    t = twin(n_seq=3, slot=slot)
    for seqs in ((0, 1, 2), (1,), (1, 2), (2,), (0, 1, 2)):
        t.decode(11, *seqs)
        t.decode(3, *seqs, single=True)
        t.rollback(2, seqs[-1])
    t.decode(20, 0, 1, 2)
    check(t)


def test_sequences_in_one_stream(twin) -> None:
    """The newest tokens of all sequences share the window."""
    t = twin(n_seq=3, unified=True)
    for seqs in ((0, 1, 2), (1,), (1, 0), (2,), (0, 1, 2)):
        t.decode(11, *seqs)
        t.decode(3, *seqs, single=True)
        t.rollback(2, seqs[-1])
    t.rm(1)
    t.decode(6, 1)
    t.decode(1, 0)
    check(t)


def test_copy_between_streams(twin) -> None:
    t = twin(16, n_seq=3, stale=["copy"])
    t.decode(40, 0)
    t.decode(30, 1)
    t.cp(0, 1)
    t.decode(1, 0, 1)
    t.decode(10, 1)
    t.cp(1, 2)
    t.cp(1, 0)
    t.decode(4, 0, 1, 2)
    check(t)


def test_copy_between_streams_before_a_shift(twin) -> None:
    t = twin(16, n_seq=2, stale=["copy", "shift"])
    t.decode(40, 0)
    t.decode(44, 1)
    t.rm(0, 4, 24)
    t.add(0, 24, 1000, -20)
    t.cp(0, 1)
    t.decode(4, 0, 1)
    t.decode(4, 0, 1, single=True)
    check(t)


def test_copy_within_a_stream(twin) -> None:
    """The sequences share cells; one of them moves on, is thrown away, keeps its cells alone."""
    t = twin(16, n_seq=3, unified=True)
    t.decode(30, 0)
    t.cp(0, 1)
    t.cp(0, 2)
    t.decode(5, 0, 1, 2)
    t.decode(3, 1, 2, single=True)
    t.rm(0, 20)
    t.decode(2, 0)
    t.keep(2)
    t.decode(6, 2)
    t.decode(5, 0)
    t.decode(1, 0, 2)
    check(t)


# ---- saved states ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [SMALL, 32, 1, 0])
def test_whole_state_into_a_context_of_another_window(twin, tmp_path: Path, again: int) -> None:
    """Slots are not saved: a restored context reads blocks, until new tokens fill its window."""
    t = twin()
    t.decode(40)
    t.save(tmp_path / "state")
    other = twin(again)
    other.decode(25)
    other.load(tmp_path / "state", of=t)
    for n in (1, 3, 20, 1):
        other.decode(n)
    check(other)


@pytest.mark.parametrize("unified", [False, True])
def test_whole_state_in_place(twin, tmp_path: Path, unified: bool) -> None:
    t = twin(16, n_seq=2, unified=unified, stale=["clear", "restore"])
    t.decode(20, 0, 1)
    t.save(tmp_path / "state")
    t.clear(data=False)
    t.decode(16, 0, 1)
    t.load(tmp_path / "state")
    t.decode(1, 0)
    t.decode(6, 0, 1)
    check(t)


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("to", [0, 1])
def test_sequence_state(twin, tmp_path: Path, unified: bool, to: int) -> None:
    """Restored over the same cells, and into another sequence; the others keep their slots."""
    t = twin(24, n_seq=3, unified=unified, stale=["restore"])
    t.decode(12, 0, 1, 2)
    t.save(tmp_path / "state", 0)
    t.rollback(6, to)
    t.decode(9, to)
    t.load(tmp_path / "state", to)
    t.decode(1, to)
    t.decode(5, 0, 1, 2)
    t.decode(4, to, single=True)
    check(t)


def test_sequence_state_of_another_window(twin, tmp_path: Path) -> None:
    t = twin(4, n_seq=2)
    t.decode(30, 0)
    t.save(tmp_path / "state", 0)
    other = twin(32, n_seq=2)
    other.decode(20, 0, 1)
    other.load(tmp_path / "state", 1, of=t)
    for n in (1, 6, 40, 1):
        other.decode(n, 0, 1)
    check(other)


def test_a_refused_state_leaves_a_usable_window(twin, probe, path: Path, tmp_path: Path) -> None:
    p = probe(path)
    p.context("f16", "f16", n_seq=2)
    p.logits(random_tokens(20))
    p.command(f"saveseq {tmp_path}/f16 0")
    t = twin(16, n_seq=2)
    t.decode(20, 0, 1)
    with pytest.raises(ProbeError, match="not restored"):
        t.probe.command(f"loadseq {tmp_path}/f16 1")
    t.oracles[0].rm(1, 0, -1)
    t.decode(12, 1)
    t.decode(3, 0, 1)
    check(t)


# ---- whole models ------------------------------------------------------------------------------------------------------


def distance(p: Probe, base: list[np.ndarray], ctk: str, ctv: str, story) -> float:
    return kld(np.concatenate(base), np.concatenate(story(p, ctk, ctv)))


def tell(p: Probe, ctk: str, ctv: str, **options: object) -> list[np.ndarray]:
    """A prompt, tokens one by one, rejected drafts, a second sequence, a long batch."""
    p.context(ctk, ctv, n_ctx=512, n_seq=2, **options)
    rows = [p.logits(random_tokens(24, seed=1)), p.logits(random_tokens(6, seed=2), pos=24, step=1)]
    for seed in range(3, 6):
        p.logits(random_tokens(5, seed=seed), pos=30)
        if p.command("canrollback") == "1":
            p.command("rm 0 31 -1")
        else:
            p.command("rm 0 -1 -1")
            p.logits(random_tokens(31, seed=9))
        rows.append(p.logits(random_tokens(4, seed=seed + 10), pos=31))
        p.command("rm 0 -1 -1")
        p.logits(random_tokens(30, seed=1))
    rows.append(p.logits(random_tokens(40, seed=7), seq=1))
    rows.append(p.logits(random_tokens(3, seed=8), pos=40, seq=1, step=1))
    return rows
