"""One-layer models, in which keys and values do not depend on attention, so rounding errors are not amplified.

Differences of 1e-2 in a deep model (see test_paths.py) are 1e-8 here. The whole model takes few lines of NumPy, so its
logits can be computed from the formulas, with keys and values that the Python package quantizes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from harness import Probe, kld, random_tokens
from make_model import Shape, write_model

gguf = pytest.importorskip("gguf")
turboquant = pytest.importorskip("turboquant")

#: KLD between two ways of summing the same numbers (measured: 2e-13 between kernels, 2e-8 between the paths).
ROUNDING = 1e-6
#: The same between the paths with trellis-coded types, where the last bit of one value, which depends on the size of
#: the batch, can change the path of its block (measured: up to 3e-6).
PATHS = 2e-5
#: KLD between fused and generic attention; some kernels round softmax weights to 8 bits (measured: up to 5e-6).
FUSED = 2e-5
#: KLD to the oracle, whose queries are not rounded to int8 (measured: 5e-5 to 8e-5, and 2e-9 with K in f16).
ORACLE = 1.5e-4
HEADS = (64, 96, 128, 192, 256, 512)
PAIRS = [
    ("turbo4", "turbo3"), ("turbo2", "turbo4"), ("q8_0", "turbo3"), ("turbo4", "f16"), ("turbo3_32", "turbo2_32"),
    ("turbo4_tcq", "turbo3_tcq"), ("turbo2_tcq_32", "turbo4_tcq_32"), ("turbo3_tcq", "turbo2"), ("q8_0", "turbo2_tcq"),
    ("turbo4_tcq", "f16"),
]  # fmt: skip
#: The trellis-coded types, which share all but the decoder, are tested with one head of each block size, and mixed pairs
#: with one head.
SHAPES = [(head, pair) for head in HEADS for pair in PAIRS[:5]]
SHAPES += [(head, pair) for head in (64, 96, 256) for pair in PAIRS[5:7]] + [(128, pair) for pair in PAIRS[5:]]
TOKENS = random_tokens(600, seed=11)
NAMES = [kernels.name for kernels in turboquant.kernels() if kernels.supported]


def shape(head: int) -> Shape:
    return Shape(head=head, layers=1, heads=8, kv_heads=2)


@pytest.mark.parametrize(
    ("head", "pair"),
    SHAPES,
    ids=lambda value: "/".join(value) if isinstance(value, tuple) else None,
)
def test_kernels_and_paths(build, tmp_path: Path, head: int, pair: tuple[str, str]) -> None:
    """All kernels agree, for the text in one batch, in pieces, and token by token, with one thread and with three."""
    model = write_model(tmp_path / "model.gguf", shape(head))
    expected: dict[int, np.ndarray] = {}  # by step
    limit = PATHS if "_tcq" in "".join(pair) else ROUNDING
    for name in NAMES:
        with Probe(build, model, tmp_path, {"TURBOQUANT_KERNELS": name}) as probe:
            ways = ((600, 1), (7, 1), (1, 1), (600, 3)) if name in (NAMES[0], "scalar") else ((600, 2), (1, 1))
            for step, threads in ways:
                probe.context(*pair, n_ctx=1024, n_batch=600, n_ubatch=600, threads=threads)
                logits = probe.logits(TOKENS, step=step)
                if not expected:
                    probe.context(n_ctx=1024, n_batch=600, n_ubatch=600)
                    assert kld(probe.logits(TOKENS), logits) > 1000 * ROUNDING
                assert kld(expected.setdefault(step, logits), logits) <= ROUNDING, (name, step, threads)
                assert kld(expected[600], logits) <= limit, (name, step, threads)


@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
@pytest.mark.parametrize("step", [None, 1], ids=["batched", "single"])
def test_fused_and_generic_attention(build, tmp_path: Path, pair: tuple[str, str], step) -> None:
    model = write_model(tmp_path / "model.gguf", shape(128))
    logits = []
    for generic in "01":
        with Probe(build, model, tmp_path, {"TURBOQUANT_GENERIC_ATTENTION": generic}) as probe:
            probe.context(*pair, n_ctx=1024, n_batch=600, n_ubatch=600)
            logits.append(probe.logits(TOKENS, step=step))
    assert 0 < kld(*logits) <= FUSED


def forward(path: Path, s: Shape, tokens: list[int], ctk: str, ctv: str) -> np.ndarray:
    """Logits of the one-layer model in float64, with K and V quantized as a cache of the types would hold them."""
    w = {t.name: np.array(t.data, np.float64) for t in gguf.GGUFReader(path).tensors}

    def norm(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def rope(x: np.ndarray) -> np.ndarray:
        """RoPE: pair i, channels 2i and 2i + 1, is rotated by position * 10000^(-2i/head)."""
        angle = np.arange(len(tokens))[:, None] * 10000.0 ** (-np.arange(0, s.head, 2) / s.head)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    def stored(x: np.ndarray, name: str) -> np.ndarray:
        rows = x.astype(np.float32)
        if name == "f16":
            return rows.astype(np.float16).astype(np.float64)
        return turboquant.dequantize(turboquant.quantize(rows, name), name).astype(np.float64)

    x = w["token_embd.weight"][tokens]
    h = norm(x)
    q = rope((h @ w["blk.0.attn_q.weight"].T).reshape(-1, s.heads, s.head))
    k = rope((h @ w["blk.0.attn_k.weight"].T).reshape(-1, s.kv_heads, s.head))
    v = (h @ w["blk.0.attn_v.weight"].T).reshape(-1, s.kv_heads, s.head)
    k, v = (np.repeat(stored(t, name), s.heads // s.kv_heads, axis=1) for t, name in ((k, ctk), (v, ctv)))
    scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(s.head)
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("hij,jhd->ihd", weights, v).reshape(len(tokens), -1)
    x = x + out @ w["blk.0.attn_output.weight"].T
    h = norm(x)
    gate = h @ w["blk.0.ffn_gate.weight"].T
    x = x + (gate / (1 + np.exp(-gate)) * (h @ w["blk.0.ffn_up.weight"].T)) @ w["blk.0.ffn_down.weight"].T
    return norm(x) @ w["output.weight"].T


@pytest.mark.parametrize(
    ("head", "ctk", "ctv"),
    [
        (128, "turbo4", "turbo4"),
        (128, "turbo3", "turbo2"),
        (128, "turbo2", "f16"),
        (256, "turbo3", "turbo3"),
        (64, "turbo4_64", "turbo2_64"),
        (192, "turbo3_64", "turbo4_64"),
        (96, "turbo4_32", "turbo3_32"),
        (128, "f16", "turbo3_32"),
        (128, "turbo4_tcq", "turbo3_tcq"),
        (256, "turbo2_tcq", "turbo2_tcq"),
        (64, "turbo3_tcq_64", "turbo4_tcq_64"),
        (192, "turbo4_tcq_64", "turbo2_tcq_64"),
        (96, "turbo3_tcq_32", "turbo2_tcq_32"),
        (128, "turbo4_tcq_32", "turbo4"),
        (128, "f16", "turbo2_tcq"),
    ],
)
@pytest.mark.parametrize("step", [None, 1], ids=["batched", "single"])
def test_logits_are_those_of_the_formulas(build, tmp_path: Path, head: int, ctk: str, ctv: str, step) -> None:
    s = shape(head)
    model = write_model(tmp_path / "model.gguf", s)
    tokens = TOKENS[:200]
    expected = forward(model, s, tokens, ctk, ctv)
    with Probe(build, model, tmp_path) as probe:
        probe.context(ctk, ctv)
        assert kld(expected, probe.logits(tokens, step=step)) <= ORACLE
        probe.context("f16", "f16")
        assert kld(expected, probe.logits(tokens, step=step)) > 10 * ORACLE, "the test cannot tell the types from f16"
