"""Head sizes, GQA, sliding windows, sinks, MLA and hybrids, on tiny random models and on both paths."""

from __future__ import annotations

import numpy as np
import pytest
from harness import TURBO, ProbeError, kld, kv_sizes, random_tokens

#: Head size -> suffix of the type that `-ctk turboN` resolves to.
RESOLVED = {64: "_64", 96: "_32", 128: "", 192: "_64", 256: "", 512: ""}

#: KLD on the random models. The largest measured over all shapes is 0.052, 0.214 and 0.728 (q4_0: 0.050),
#: and 0.033, 0.139 and 0.420 with trellis-coded types.
BOUND = {
    "turbo4": 0.065, "turbo3": 0.26, "turbo2": 0.88, "turbo4_tcq": 0.042, "turbo3_tcq": 0.17, "turbo2_tcq": 0.52
}
#: KLD of a sequence in a batch with others from the sequence alone: its rows have other positions in the cache, so the
#: order of sums and the rounding of weights differ. Measured: up to 1.1e-4, a hundredth of the least error of a type.
SAME = 4e-4
#: The same with trellis-coded types, where a small change of one value can change the path of its block: up to 1.8e-3.
SAME_PATH = 4e-3

TOKENS = random_tokens(160)


def compare(probe, ctk: str, ctv: str, **options: object) -> tuple[float, float]:
    """KLD of the batched path and of the one-token path against an f16 cache."""
    probe.context(**options)
    base = probe.logits(TOKENS)
    probe.context(ctk, ctv, **options)
    batched = probe.logits(TOKENS)
    probe.context(ctk, ctv, **options)
    single = probe.logits(TOKENS, step=1)
    return kld(base, batched), kld(base, single)


@pytest.mark.parametrize("name", TURBO)
@pytest.mark.parametrize("head", RESOLVED)
def test_head_size_resolves(probe, tiny, head: int, name: str) -> None:
    p = probe(tiny(f"head{head}"))
    batched, single = compare(p, name, name)
    assert batched <= BOUND[name] and single <= BOUND[name]
    resolved = name + RESOLVED[head]
    sizes = kv_sizes(p.log)[-1]
    assert (sizes["type_k"], sizes["type_v"]) == (resolved, resolved)
    said = [line for line in p.log.splitlines() if f"{name} -> {resolved}" in line]
    if resolved == name:
        assert "->" not in "".join(line for line in p.log.splitlines() if "turboquant" in line)
    else:
        assert len(said) == 4, p.log[-3000:]  # one line for K and one for V, in each of the two contexts
        assert all(f"head size is {head}" in line and "bits per value" in line for line in said)


@pytest.mark.parametrize("head", [80, 112])
@pytest.mark.parametrize(
    ("ctk", "ctv"), [("turbo4", "f16"), ("f16", "turbo3"), ("turbo2", "turbo2"), ("turbo3_tcq", "f16")]
)
def test_head_size_without_a_block_is_refused(probe, tiny, head: int, ctk: str, ctv: str) -> None:
    p = probe(tiny(f"head{head}"))
    with pytest.raises(ProbeError, match="no context") as refusal:
        p.context(ctk, ctv)
    lines = [line for line in refusal.value.log.splitlines() if str(head) in line and "turbo" in line]
    assert lines and any("64" in line and "128" in line for line in lines), refusal.value.log[-2000:]
    p.context("f16", "f16")  # the process is alive and the model usable
    assert np.isfinite(p.logits(TOKENS[:8])).all()


@pytest.mark.parametrize(
    "explicit", ["turbo4", "turbo3_64", "turbo2_32", "turbo4_tcq", "turbo2_tcq_64", "turbo3_tcq_32"]
)
def test_explicit_block_that_does_not_divide_the_head(probe, tiny, explicit: str) -> None:
    """An explicit block size is not changed: as 96 = 3 * 32, only _32 works; the plain name is resolved to it."""
    p = probe(tiny("head96"))
    if explicit.endswith("_64"):
        with pytest.raises(ProbeError, match="no context"):
            p.context(explicit, "f16")
        assert p.alive
    else:
        p.context(explicit, "f16")
        assert kv_sizes(p.log)[-1]["type_k"] == explicit.removesuffix("_32") + "_32"


@pytest.mark.parametrize(
    ("model", "ctk", "ctv"),
    [
        *((model, "turbo4", "turbo3") for model in ("mha", "gqa", "mqa", "iswa", "sinks", "partial", "hybrid")),
        *((model, "turbo4_tcq", "turbo3_tcq") for model in ("mha", "gqa", "mqa", "iswa", "sinks", "partial", "hybrid")),
        *((model, "turbo2", "f16") for model in ("gqa", "iswa", "sinks")),
        *((model, "q8_0", "turbo4") for model in ("mqa", "iswa", "hybrid")),
        *((model, "turbo2_tcq", "q8_0") for model in ("gqa", "iswa", "hybrid")),
    ],
)
def test_architecture(probe, tiny, model: str, ctk: str, ctv: str) -> None:
    p = probe(tiny(model))
    batched, single = compare(p, ctk, ctv)
    limit = max(BOUND.get(ctk, 0), BOUND.get(ctv, 0))
    assert batched <= limit and single <= limit


@pytest.mark.parametrize("name", TURBO)
def test_mla(probe, tiny, name: str) -> None:
    """MLA: V is a view of K's rows, so both must have the same type; a row of 576 takes blocks of 64."""
    p = probe(tiny("mla"))
    batched, single = compare(p, name, name)
    assert batched <= BOUND[name] and single <= BOUND[name]
    assert kv_sizes(p.log)[-1]["type_k"] == f"{name}_64"
    with pytest.raises(ProbeError, match="no context"):
        p.context(name, "f16")
    assert p.alive


@pytest.mark.parametrize("name", ["turbo3", "turbo3_tcq"])
def test_sliding_window_with_full_size_cache(probe, tiny, name: str) -> None:
    p = probe(tiny("iswa"))
    assert max(compare(p, name, name, swa_full=1)) <= BOUND[name]


@pytest.mark.parametrize("model", ["gqa", "hybrid", "iswa"])
def test_cache_in_host_memory(probe, tiny, model: str) -> None:
    """-nkvo gives the same result, because the CPU computes it in both cases."""
    p = probe(tiny(model))
    p.context("turbo4", "turbo3")
    default = p.logits(TOKENS)
    p.context("turbo4", "turbo3", offload=0)
    assert np.array_equal(p.logits(TOKENS), default)


@pytest.mark.parametrize("threads", [1, 3, 4])
def test_thread_count_does_not_matter(probe, tiny, threads: int) -> None:
    p = probe(tiny("gqa"))
    p.context("turbo4", "turbo3", threads=2)
    two = p.logits(TOKENS)
    p.context("turbo4", "turbo3", threads=threads)
    assert kld(two, p.logits(TOKENS)) <= 1e-4


@pytest.mark.parametrize("unified", [0, 1])
@pytest.mark.parametrize(
    ("ctk", "ctv"), [("turbo4", "turbo4"), ("q8_0", "turbo3"), ("turbo2", "f16"), ("turbo3_tcq", "turbo4_tcq")]
)
@pytest.mark.parametrize("model", ["gqa", "iswa"])
def test_parallel_sequences(probe, tiny, model: str, ctk: str, ctv: str, unified: int) -> None:
    """Two sequences decoded in one batch give the results of each alone."""
    p = probe(tiny(model))
    texts = [random_tokens(96, seed=1), random_tokens(80, seed=2)]
    alone = []
    for text in texts:
        p.context(ctk, ctv)
        alone.append(p.logits(text))
    p.context(ctk, ctv, n_seq=2, unified=unified, n_ctx=1024)
    together: list[list[np.ndarray]] = [[], []]
    for start in range(0, 96, 8):  # batches that hold a piece of both, as long as both last
        pieces = [text[start : start + 8] for text in texts]
        for seq, piece in enumerate(pieces):
            if piece:
                p.add(piece, start, seq)
        rows = p.run()
        together[0].append(rows[: len(pieces[0])])
        together[1].append(rows[len(pieces[0]) :])
    for seq in (0, 1):
        assert kld(alone[seq], np.concatenate(together[seq])) <= (SAME_PATH if "_tcq" in ctk else SAME)


@pytest.mark.parametrize("pair", [("turbo4", "turbo3"), ("turbo4_tcq", "turbo3_tcq")], ids="/".join)
def test_sequence_behind_another(probe, tiny, pair: tuple[str, str]) -> None:
    """A sequence whose cells come after another's sees none of the first cells of a shared cache."""
    p = probe(tiny("gqa"))
    text = random_tokens(40, seed=2)
    p.context(*pair)
    alone = p.logits(text, step=1)
    p.context(*pair, n_seq=2, unified=1, n_ctx=1024, threads=4)  # short chunks
    p.logits(random_tokens(200, seed=1))
    assert kld(alone, p.logits(text, seq=1, step=1)) <= (SAME_PATH if "_tcq" in pair[0] else SAME)
