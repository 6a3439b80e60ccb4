"""The exact window: what attention reads after everything that changes a cell, compared with window_oracle.py.

Each test of an event has a second oracle that keeps its tags there: what the test would see if the hook were missing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from harness import HERE, Probe, ProbeError, kld, random_tokens
from make_model import Shape, write_model
from window_oracle import Cache, Model, Twin, max_kld

ONE = Shape(layers=1, heads=8, kv_heads=2)
#: The largest KLD of a token to the oracle, whose sums are float64: 3e-6. Where another sum rounds a value to another
#: level, mostly up to 3e-3 (once in 200 runs of the soak). A window of one cell less: 2e-2.
LIMIT = 4e-3
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


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 1, SMALL, 256, 999999])
@pytest.mark.parametrize(
    ("ctk", "ctv", "slot"),
    [
        ("turbo2", "turbo2", "q8_0"), ("turbo4", "turbo3", "f16"), ("turbo2", "f16", "q8_0"), ("turbo3", "f16", "f16"),
        ("f16", "turbo2", "q8_0"), ("q8_0", "turbo2", "q8_0"), ("turbo2", "q8_0", "f16"),
        ("turbo2_tcq", "turbo2_tcq", "q8_0"), ("turbo4_tcq", "turbo3_tcq", "f16"), ("turbo2_tcq", "turbo4", "q8_0"),
        ("f16", "turbo2_tcq", "q8_0"),
    ],
)  # fmt: skip
def test_attention_is_that_of_the_rule(twin, window: int, ctk: str, ctv: str, slot: str) -> None:
    """One token, a few, more than the window, one by one; then all of it with three threads."""
    worst = {}
    for threads in (1, 3):
        t = twin(window, ctk, ctv, slot, threads=threads)
        for n, single in ((1, 0), (5, 0), (2 * SMALL + 4, 1), (4 * SMALL, 0), (3, 1), (90, 0), (5, 1)):
            t.decode(n, single=bool(single))
        worst[threads] = t.worst
    assert max(worst.values()) <= (ROTATED if "q8_0" in (ctk, ctv) else LIMIT), worst


@pytest.mark.parametrize("family", ["turbo3", "turbo3_tcq"])
@pytest.mark.parametrize("head", [64, 96, 128, 256])
def test_heads(probe, tmp_path: Path, head: int, family: str) -> None:
    shape = Shape(layers=1, heads=4, kv_heads=1, head=head)
    path = write_model(tmp_path / "model.gguf", shape)
    block = 128 if head % 128 == 0 else 64 if head % 64 == 0 else 32
    name = family if block == 128 else f"{family}_{block}"
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


# ---- events ----------------------------------------------------------------------------------------------------------


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


def test_a_batch_that_does_not_fit(twin) -> None:
    t = twin(16)
    t.decode(245)
    t.probe.add(random_tokens(20), t.end())
    with pytest.raises(ProbeError, match="llama_decode gave 1"):
        t.probe.run()
    t.decode(6, single=True)
    t.rollback(40)
    t.decode(20)
    t.decode(1)
    check(t)


@pytest.mark.parametrize("n", [1, 5, 30])
@pytest.mark.parametrize("nodes", [0, 8, 10, 12, 14, 16, 18, 20])
def test_a_batch_that_is_aborted(twin, nodes: int, n: int) -> None:
    """Its cells are given back; some of its rows may be in slots by then, and others may not."""
    t = twin(16)
    t.decode(30)
    t.decode(3, single=True)
    tokens = random_tokens(n, seed=5)
    t.probe.add(tokens, t.end())
    t.probe.command(f"abort {nodes}")
    with pytest.raises(ProbeError, match="llama_decode gave 2"):
        t.probe.run()
    for oracle in t.oracles:
        oracle.decode([(token, oracle.end(0) + i, 0) for i, token in enumerate(tokens)])
        oracle.rm(0, 33, -1)
    t.decode(1)
    t.decode(12)
    t.decode(3, single=True)
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


# ---- saved states ----------------------------------------------------------------------------------------------------


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


# ---- slots and tags alone --------------------------------------------------------------------------------------------


def test_slots_and_tags(build, tmp_path: Path) -> None:
    program = tmp_path / "window_slots"
    glue = build.source.parent / "native"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", str(HERE / "window_slots.cpp")]
    command.append(str(glue / "ggml_types" / "llama" / "turbo-window.cpp"))
    command += [f"-I{build.source / folder}" for folder in ("src", "include", "ggml/include", "ggml/src")]
    command += [f"-I{folder}" for folder in (glue / "ggml_types", glue / "cpp" / "include")]
    command += [f"-L{build.bin}", "-lllama", "-lggml", "-lggml-base", "-lggml-cpu"]
    command += [f"-Wl,-rpath,{build.bin}", f"-Wl,-rpath-link,{build.bin}", "-o", str(program)]
    compiled = subprocess.run(command, check=False, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    for seed in "123":
        done = subprocess.run([program, seed], check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"seed {seed}: {done.stdout}{done.stderr}"


# ---- whole models ----------------------------------------------------------------------------------------------------

TURBO4 = ("turbo4", "turbo4")


def story(p: Probe, ctk: str, ctv: str, rollback: bool = True, **options: object) -> np.ndarray:
    """A prompt, tokens one by one, rejected drafts, a long batch, another sequence. Returns the logits."""
    p.context(ctk, ctv, n_ctx=1024, n_seq=2, **options)
    rows = [p.logits(random_tokens(24, seed=1)), p.logits(random_tokens(6, seed=2), pos=24, step=1)]
    if rollback:
        p.logits(random_tokens(5, seed=3), pos=30)
        p.command("rm 0 30 -1")
    rows.append(p.logits(random_tokens(5, seed=4), pos=30))
    rows.append(p.logits(random_tokens(3, seed=5), pos=35, step=1))
    rows.append(p.logits(random_tokens(40, seed=6), pos=38))
    rows.append(p.logits(random_tokens(28, seed=7), seq=1))
    rows.append(p.logits(random_tokens(3, seed=8), pos=28, seq=1, step=1))
    return np.concatenate(rows)


MODELS = ["gqa", "head64", "head96", "iswa", "sinks", "hybrid", "fused", "mrope", "biased", "qknorm", "partial", "deep"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("unified", [0, 1])
def test_the_window_brings_a_model_nearer_to_f16(probe, tiny, model: str, unified: int) -> None:
    options = {"rollback": model != "hybrid", "unified": unified}  # its other layers cannot go back
    base = story(probe(tiny(model)), "f16", "f16", **options)
    without, small, whole = (
        kld(base, story(probe(tiny(model), LLAMA_ARG_CACHE_WINDOW=str(n)), *TURBO4, **options)) for n in (0, SMALL, 512)
    )
    assert small <= 0.6 * without and whole <= 0.15 * without, (without, small, whole)


@pytest.mark.parametrize("model", ["iswa", "sinks"])
@pytest.mark.parametrize("swa_full", [0, 1])
def test_cells_that_a_sliding_window_left(probe, tiny, model: str, swa_full: int) -> None:
    """300 tokens through a sliding window of 32: its cache uses its cells again."""
    rows = []
    for kv, window in ((("f16", "f16"), 0), (TURBO4, 0), (TURBO4, 20), (TURBO4, 512)):
        p = probe(tiny(model), LLAMA_ARG_CACHE_WINDOW=str(window))
        p.context(*kv, swa_full=swa_full, n_ubatch=64)
        prompt = p.logits(random_tokens(250, seed=3))
        rows.append(np.concatenate([prompt, p.logits(random_tokens(50, seed=4), pos=250, step=1)]))
    without, small, whole = (kld(rows[0], other) for other in rows[1:])
    assert small <= 0.8 * without and whole <= 0.15 * without, (without, small, whole)


def shift(p: Probe, folder: Path) -> np.ndarray:
    p.logits(random_tokens(40, seed=1))
    p.command("rm 0 4 20")
    p.command("shift 0 20 40 -16")
    return p.logits(random_tokens(6, seed=2), pos=24)


def copy(p: Probe, folder: Path) -> np.ndarray:
    p.logits(random_tokens(28, seed=1))
    p.logits(random_tokens(28, seed=2), seq=1)
    p.command("cp 0 1 -1 -1")
    return p.logits(random_tokens(6, seed=3), pos=28, seq=1)


def restore(p: Probe, folder: Path) -> np.ndarray:
    p.logits(random_tokens(28, seed=1))
    p.command(f"save {folder}/state")
    p.command("clear 0")
    p.logits(random_tokens(28, seed=2))
    p.command(f"load {folder}/state")
    return p.logits(random_tokens(6, seed=3), pos=28)


def restore_sequence(p: Probe, folder: Path) -> np.ndarray:
    p.logits(random_tokens(28, seed=1), seq=1)
    p.command(f"saveseq {folder}/state 1")
    p.command("rm 1 -1 -1")
    p.logits(random_tokens(28, seed=2), seq=1)
    p.command(f"loadseq {folder}/state 1")
    return p.logits(random_tokens(6, seed=3), pos=28, seq=1)


def clear(p: Probe, folder: Path) -> np.ndarray:
    p.logits(random_tokens(28, seed=1))
    p.command("clear 1")
    p.logits(random_tokens(3, seed=2))
    return p.logits(random_tokens(6, seed=3), pos=3)


EVENTS = [shift, copy, restore, restore_sequence, clear]


@pytest.mark.parametrize(
    ("model", "event"),
    # llama.cpp does not shift a hybrid model: a recurrent state cannot drop its first tokens
    [pytest.param(model, event, id=f"{model}-{event.__name__}")
     for model in ("gqa", "iswa", "hybrid") for event in EVENTS if (model, event) != ("hybrid", shift)],
)  # fmt: skip
def test_events(probe, tiny, tmp_path: Path, model: str, event) -> None:
    """No farther from f16 than without a window. A stale slot is another token's: far above."""
    rows = []
    for kv, window in ((("f16", "f16"), 0), (TURBO4, 0), (TURBO4, 512)):
        p = probe(tiny(model), LLAMA_ARG_CACHE_WINDOW=str(window))
        p.context(*kv, n_ctx=512, n_seq=2, unified=0)
        rows.append(event(p, tmp_path))
    without, window = (kld(rows[0], other) for other in rows[1:])
    assert window <= 1.2 * without, (without, window)


PLANS = {
    "a layer of f16 between": (["turbo4", "f16", "turbo4"], ["turbo4", "f16", "turbo4"]),
    "a layer of q8_0 first": (["q8_0", "turbo4", "turbo3"], ["q8_0", "turbo4", "turbo3"]),
    "a layer of f16 last": (["turbo4", "turbo4", "f16"], ["turbo4", "turbo4", "f16"]),
    "K of f16 or V of f16": (["f16", "turbo4", "f16"], ["turbo4", "f16", "f16"]),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("unified", [0, 1])
def test_layers_without_a_window_see_all_cells(probe, tiny, tmp_path: Path, plan: str, unified: int) -> None:
    file = tmp_path / "plan.json"
    k, v = PLANS[plan]
    file.write_text(json.dumps({"format": "turboquant-plan", "version": 1, "k": k, "v": v}))
    base = story(probe(tiny("gqa")), "f16", "f16", unified=unified)
    distances = []
    for window in (0, SMALL, 512):
        p = probe(tiny("gqa"), LLAMA_ARG_CACHE_WINDOW=str(window), LLAMA_ARG_CACHE_PLAN=str(file))
        distances.append(kld(base, story(p, "auto", "auto", unified=unified)))
    without, small, whole = distances
    assert small <= 0.7 * without and whole <= 0.15 * without, distances


def test_guard(probe, tiny) -> None:
    """The guard keeps K of a layer in a better type; V of that layer is turbo and has a window, as the others have."""
    base = story(probe(tiny("biased")), "f16", "f16")
    distances = []
    for window in (0, 512):
        p = probe(tiny("biased"), LLAMA_ARG_CACHE_WINDOW=str(window), LLAMA_ARG_CACHE_GUARD="1")
        distances.append(kld(base, story(p, "turbo2", "turbo2")))
        assert ("turboquant: window: the newest 512 tokens in q8_0 (3 of 3 layers)" in p.log) == (window > 0)
    assert distances[1] <= 0.15 * distances[0], distances


# ---- no window -------------------------------------------------------------------------------------------------------


def nodes(p: Probe) -> str:
    return re.findall(r"graph: nodes = (\d+)", p.log)[-1]


def test_without_a_window_the_graph_has_nothing_more(probe, tiny) -> None:
    """The same nodes and inputs as with f16, whatever the window, and the sizes of the cache."""
    counts = {}
    for kv, window in ((("f16", "f16"), "256"), (TURBO4, "0"), (TURBO4, "0:f16"), (TURBO4, "1"), (TURBO4, "")):
        p = probe(tiny("gqa"), LLAMA_ARG_CACHE_WINDOW=window)
        p.context(*kv)
        counts[kv, window] = nodes(p), re.findall(r"input tensors = (\d+)", p.log)[-1]
        assert ("turboquant: window:" in p.log) == (kv == TURBO4 and window in ("1", ""))
        assert ("attn_inp_window" in p.log) == (kv == TURBO4 and window in ("1", ""))
    plain = counts[("f16", "f16"), "256"]
    assert counts[TURBO4, "0"] == counts[TURBO4, "0:f16"] == plain
    assert counts[TURBO4, "1"] == counts[TURBO4, ""] != plain


@pytest.mark.parametrize("kv", [("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "f16")])
def test_types_of_llama_cpp_have_no_window(probe, tiny, kv: tuple[str, str]) -> None:
    rows = [story(probe(tiny("gqa"), LLAMA_ARG_CACHE_WINDOW=window), *kv) for window in ("0", "256")]
    assert np.array_equal(*rows)


def test_a_window_that_cannot_be_read(probe, tiny) -> None:
    for window in ("x", "-1", "8:q4_0", "8:"):
        p = probe(tiny("gqa"), LLAMA_ARG_CACHE_WINDOW=window)
        with pytest.raises(ProbeError, match="no context") as refusal:
            p.context(*TURBO4)
        assert f"--cache-window '{window}': must be a number of tokens" in refusal.value.log


@pytest.mark.parametrize("other", ["f32", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "q8_0"])
@pytest.mark.parametrize("which", ["k", "v"])
def test_beside_every_type_of_llama_cpp(probe, tiny, other: str, which: str) -> None:
    """ggml's own attention, which computes some of these pairs, reads no slots: nothing may be hidden from it."""
    kv = (other, "turbo4") if which == "k" else ("turbo4", other)
    rows = [story(probe(tiny("gqa"), LLAMA_ARG_CACHE_WINDOW=window), *kv) for window in ("0", str(SMALL))]
    base = story(probe(tiny("gqa")), "f16", "f16")
    assert kld(base, rows[1]) <= 1.05 * kld(base, rows[0])


def test_generic_attention_has_no_window(probe, tiny) -> None:
    rows = []
    for window in ("0", str(SMALL)):
        p = probe(tiny("gqa"), LLAMA_ARG_CACHE_WINDOW=window, TURBOQUANT_GENERIC_ATTENTION="1")
        rows.append(story(p, *TURBO4))
    assert np.array_equal(*rows)
