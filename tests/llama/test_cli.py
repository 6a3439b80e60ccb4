"""Command lines of the programs: help, benchmarks, draft model, kernels."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from harness import TURBO, TURBO_ALL, ProbeError, Server, kld, kv_sizes

PROMPT = "The old man looked at the sea and"


def generate(build, model, *args: object, env: dict[str, str] | None = None, n: int = 48, check: bool = True):
    """Greedy text after PROMPT, with llama-completion."""
    return build.run(
        "llama-completion", "-m", model, "-p", PROMPT, "-n", n, "--temp", 0, "-c", 512, "-no-cnv", "--no-warmup",
        "--no-display-prompt", *args, env=env, check=check,
    )


@pytest.mark.parametrize("program", ["llama-completion", "llama-server", "llama-perplexity", "llama-cli"])
def test_help_lists_the_types(build, program: str) -> None:
    text = build.run(program, "--help").text
    for flag in ("--cache-type-k ", "--cache-type-v "):
        start = text.index(flag)
        section = text[start : start + 600]
        listed = re.search(r"allowed values:(.*?)\(default", section, re.DOTALL)
        assert listed and set(TURBO_ALL) <= set(re.split(r"[,\s]+", listed[1])), section
    assert "--cache-boundary-v" in text and "LLAMA_ARG_CACHE_BOUNDARY_V" in text


def test_unknown_type_is_still_refused(build, prose_model) -> None:
    result = generate(build, prose_model, "-ctk", "turbo5", check=False)
    assert result.status not in (0,) and not result.crashed
    assert "turbo5" in result.text


@pytest.mark.parametrize("name", TURBO_ALL)
def test_bench_accepts(build, prose_model, name: str) -> None:
    args = ("-fa", 1, "-p", 16, "-n", 2, "-r", 1, "-o", "json")
    result = build.run("llama-bench", "-m", prose_model, "-ctk", name, "-ctv", name, *args)
    rows = json.loads(result.out)
    assert rows and all((row["type_k"], row["type_v"]) == (name, name) for row in rows)


def test_bench_refuses_unknown(build, prose_model) -> None:
    result = build.run("llama-bench", "-m", prose_model, "-ctk", "turbo5", "-p", 1, "-n", 0, check=False)
    assert result.status != 0 and not result.crashed


@pytest.mark.parametrize(("ctk", "ctv"), [("turbo4", "turbo3"), ("q8_0", "turbo2_64")])
def test_batched_bench_accepts(build, prose_model, ctk: str, ctv: str) -> None:
    """Two further rows follow the checked ones, because llama.cpp's logger does not flush at exit."""
    result = build.run("llama-batched-bench", "-m", prose_model, "-ctk", ctk, "-ctv", ctv, "-fa", "on", "-c", 512,
                       "-npp", 16, "-ntg", 4, "-npl", "1,2,2,2")
    assert re.findall(r"^\|\s+16 \|\s+4 \|\s+(\d+) \|", result.text, re.MULTILINE)[:2] == ["1", "2"], result.text


@pytest.mark.parametrize("draft", [("turbo4", "turbo3"), ("f16", "turbo2")])
def test_draft_model(build, prose_model, tmp_path, draft: tuple[str, str]) -> None:
    """The model is its own draft model. The draft's cache has separate types, and the text is that without a draft."""
    texts = []
    cache = ("-ctkd", draft[0], "-ctvd", draft[1])
    extra = ("-md", prose_model, *cache, "--spec-type", "draft-simple", "--spec-draft-n-max", 4)
    for args in ((), extra):
        log = tmp_path / f"server{len(args)}.log"
        with Server(build, prose_model, "-c", 512, "-np", 1, "-v", *args, log=log) as server:
            reply = server.complete(PROMPT, 24)
            texts.append(reply["content"])
            assert (reply["timings"].get("draft_n", 0) > 0) == bool(args), "whether the draft model was used"
            types = [(size["type_k"], size["type_v"]) for size in kv_sizes(server.log)]
    assert draft in types and ("f16", "f16") in types, types
    assert texts[0][:20] == texts[1][:20]


@pytest.mark.parametrize("program", ["llama-completion", "llama-perplexity", "llama-bench"])
def test_unknown_kernels_fail_loudly(build, prose_model, heldout, tmp_path, program: str) -> None:
    env = {"TURBOQUANT_KERNELS": "nonsense"}
    text = tmp_path / "text"
    text.write_text(heldout[:6000], encoding="utf-8")
    args = {
        "llama-completion": ["-p", PROMPT, "-n", 4, "-no-cnv"],
        "llama-perplexity": ["-f", text, "-c", 128, "--chunks", 1],
        "llama-bench": ["-p", 8, "-n", 0, "-r", 1, "-v"],  # without -v it suppresses the log of the library
    }[program]
    types = ("-ctk", "turbo4", "-ctv", "turbo4", "-fa", 1 if program == "llama-bench" else "on")
    result = build.run(program, "-m", prose_model, *types, *args, env=env, check=False)
    assert result.status != 0, result.describe()
    assert "TURBOQUANT_KERNELS" in result.text and "nonsense" in result.text, result.describe()


@pytest.mark.parametrize("pair", [("turbo4", "turbo3"), ("q8_0", "turbo4_64")], ids="/".join)
def test_every_kernel_writes_the_same_text(probe, prose_model, heldout, pair: tuple[str, str]) -> None:
    """The text has no near ties, because kernels round differently and other texts would diverge."""
    import turboquant

    names = [kernels.name for kernels in turboquant.kernels() if kernels.supported]
    assert "scalar" in names
    prompt = f"Note: The secret number of Harriet is 48213.\n\n{heldout[1000:2500]}\n\nQuestion: What is the secret "
    prompt += "number of Harriet?\nAnswer: The secret number of Harriet is"
    texts = {}
    for name in names:
        p = probe(prose_model, TURBOQUANT_KERNELS=name)
        tokens, answer = p.tokenize(prompt), p.tokenize(" 48213")
        p.context(*pair, n_ctx=1024, n_batch=1024)
        assert f"{name} kernels" in p.log, "forcing did not take effect"
        texts[name] = p.greedy(p.logits(tokens)[-1], len(answer), len(tokens))[0]
        assert texts[name] == answer
    assert len({tuple(text) for text in texts.values()}) == 1


@pytest.mark.parametrize("name", TURBO)
def test_no_flash_attention(probe, prose_model, heldout, name: str) -> None:
    """Quantized V requires flash attention, which llama.cpp reports; quantized K alone works without it."""
    p = probe(prose_model)
    with pytest.raises(ProbeError, match="no context") as refusal:
        p.context("f16", name, fa=0)
    assert "quantized V cache requires flash_attn" in refusal.value.log
    # Over 256 tokens, the ratio of the errors has a standard deviation of 0.08 between texts and kernels.
    tokens, chunk = p.tokenize(heldout[:12000])[:2048], 256
    assert len(tokens) == 2048

    def logits(ctk: str, fa: int) -> np.ndarray:
        parts = []
        for at in range(0, len(tokens), chunk):
            p.context(ctk, "f16", fa=fa)
            parts.append(p.logits(tokens[at : at + chunk]))
        return np.concatenate(parts)

    base = logits("f16", 1)
    fused, separate = (kld(base, logits(name, fa)) for fa in (1, 0))
    assert separate <= 1.2 * fused


def test_cache_in_host_memory(build, prose_model) -> None:
    types = ("-ctk", "turbo4", "-ctv", "turbo3")
    texts = [generate(build, prose_model, *types, *more).out.rstrip() for more in ((), ("-nkvo",))]
    # llama-completion sometimes exits before it prints its last token
    assert texts[0][:100] == texts[1][:100] and min(map(len, texts)) >= 100
