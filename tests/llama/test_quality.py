"""Quality of the types on the bundled model: divergence from an f16 cache, and retrieval of a number."""

from __future__ import annotations

import numpy as np
import pytest
from harness import Probe, kld, perplexity_report, same_top

#: Bounds of the KLD: 1.15 times the measured values (test_divergence).
KLD = {
    ("turbo4", "turbo4"): 0.015,
    ("turbo4_64", "turbo4_64"): 0.012,
    ("turbo4_32", "turbo4_32"): 0.0133,
    ("turbo3", "turbo3"): 0.06,
    ("turbo3_64", "turbo3_64"): 0.05,
    ("turbo3_32", "turbo3_32"): 0.0575,
    ("turbo2", "turbo2"): 0.252,
    ("turbo2_64", "turbo2_64"): 0.204,
    ("turbo2_32", "turbo2_32"): 0.234,
    ("turbo4", "turbo3"): 0.0258,
    ("turbo4", "f16"): 0.0121,
    ("q8_0", "turbo3"): 0.0147,
    ("q8_0", "turbo2"): 0.0588,
    ("f16", "turbo2"): 0.0572,
    ("q4_0", "turbo4"): 0.0153,
    ("turbo4_tcq", "turbo4_tcq"): 0.0096,
    ("turbo4_tcq_64", "turbo4_tcq_64"): 0.0089,
    ("turbo4_tcq_32", "turbo4_tcq_32"): 0.0092,
    ("turbo3_tcq", "turbo3_tcq"): 0.039,
    ("turbo3_tcq_64", "turbo3_tcq_64"): 0.032,
    ("turbo3_tcq_32", "turbo3_tcq_32"): 0.037,
    ("turbo2_tcq", "turbo2_tcq"): 0.173,
    ("turbo2_tcq_64", "turbo2_tcq_64"): 0.141,
    ("turbo2_tcq_32", "turbo2_tcq_32"): 0.141,
    ("turbo4_tcq", "turbo3_tcq"): 0.0162,
    ("q8_0", "turbo2_tcq"): 0.038,
    ("turbo3_tcq", "f16"): 0.0286,
}
#: Greatest difference between the likelihoods of the greedy texts of an f16 cache and another cache under the f16
#: cache, in nats per token. Measured: up to 0.35; texts differ between CPUs. Text of a broken cache is several nats
#: less likely.
GREEDY = 0.75

CHUNK, CHUNKS = 1024, 2


@pytest.fixture(scope="module")
def prose(build, prose_model, heldout: str, tmp_path_factory):
    """A probe, two chunks of tokens, and the logits of each chunk's second half with an f16 cache."""
    with Probe(build, prose_model, tmp_path_factory.mktemp("probe")) as probe:
        tokens = probe.tokenize(heldout[: 8 * CHUNK * CHUNKS])
        assert len(tokens) >= CHUNK * CHUNKS
        chunks = [tokens[i * CHUNK : (i + 1) * CHUNK] for i in range(CHUNKS)]
        yield probe, chunks, measure(probe, chunks, "f16", "f16")


def measure(probe: Probe, chunks: list[list[int]], ctk: str, ctv: str) -> np.ndarray:
    rows = []
    for chunk in chunks:
        probe.context(ctk, ctv, n_ctx=CHUNK, threads=2)
        rows.append(probe.logits(chunk, step=512)[CHUNK // 2 :])
    return np.concatenate(rows)


@pytest.mark.parametrize("pair", KLD, ids="/".join)
def test_divergence(prose, pair: tuple[str, str]) -> None:
    probe, chunks, base = prose
    bound = KLD[pair]
    logits = measure(probe, chunks, *pair)
    assert kld(base, logits) <= bound
    assert same_top(base, logits) >= 1 - 2.5 * np.sqrt(bound)
    assert not np.array_equal(base, logits)


def test_llama_perplexity(build, prose_model, heldout, tmp_path) -> None:
    """llama-perplexity itself, in batches and one token at a time."""
    text = tmp_path / "text"
    text.write_text(heldout[:12000], encoding="utf-8")
    common = ["-m", prose_model, "-f", text, "-c", 256, "--chunks", 2, "-fa", "on"]
    build.run("llama-perplexity", *common, "--save-all-logits", tmp_path / "base")
    found = {}
    for name, extra in {"batched": [], "single": ["-b", 1, "-ub", 1]}.items():
        result = build.run(
            "llama-perplexity", *common, "-ctk", "turbo4", "-ctv", "turbo3", *extra,
            "--kl-divergence-base", tmp_path / "base", "--kl-divergence",
        )
        found[name] = perplexity_report(result.text)[1]
    assert 0 < found["batched"] <= 1.2 * KLD["turbo4", "turbo3"]
    assert found["single"] == pytest.approx(found["batched"], rel=0.1)


SECRET = "48213"


FINDERS = [("f16", "f16"), ("turbo4", "turbo4"), ("turbo3", "turbo3"), ("q8_0", "turbo2"), ("turbo3_tcq", "turbo3_tcq")]


@pytest.mark.parametrize("pair", FINDERS, ids="/".join)
def test_finds_the_number(build, prose_model, heldout, tmp_path, pair: tuple[str, str]) -> None:
    """The model answers with a number hidden 6,000 characters earlier, as it was trained to."""
    hay = heldout[20000:27000]
    prompt = f"{hay[:800]}\n\nNote: The secret number of Harriet is {SECRET}.\n\n{hay[800:6800]}"
    prompt += "\n\nQuestion: What is the secret number of Harriet?\nAnswer: The secret number of Harriet is"
    path = tmp_path / "prompt"
    path.write_text(prompt, encoding="utf-8")
    result = build.run(
        "llama-completion", "-m", prose_model, "-f", path, "-n", 8, "--temp", 0, "-c", 4096, "-no-cnv", "--no-warmup",
        "--no-display-prompt", "-ctk", pair[0], "-ctv", pair[1], "-fa", "on",
    )
    assert SECRET in result.out


WRITERS = [("turbo4", "turbo4"), ("turbo3", "turbo2"), ("q8_0", "turbo3"), ("turbo3_tcq", "turbo2_tcq")]


@pytest.mark.parametrize("pair", WRITERS, ids="/".join)
def test_greedy_text(prose, pair: tuple[str, str]) -> None:
    """Greedy text is repeatable, and with an f16 cache it is as likely as the greedy text of that cache."""
    probe, chunks, _ = prose
    prompt = chunks[0][:200]

    def write(ctk: str, ctv: str) -> list[int]:
        probe.context(ctk, ctv, n_ctx=512)
        return probe.greedy(probe.logits(prompt)[-1], 80, len(prompt))[0]

    def cost(tokens: list[int]) -> float:
        """Mean negative log-likelihood under the f16 cache."""
        from harness import log_softmax

        probe.context("f16", "f16", n_ctx=512)
        rows = log_softmax(probe.logits(prompt + tokens)[len(prompt) - 1 : -1])
        return float(-rows[np.arange(len(tokens)), tokens].mean())

    text = write(*pair)
    assert text == write(*pair)
    assert cost(text) <= cost(write("f16", "f16")) + GREEDY
