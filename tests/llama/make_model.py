"""Tiny language models with random weights, as GGUF files, for the tests.

Every model is deterministic: the same arguments give the same bytes. The weights are scaled so that attention has a
large effect: its scores have a standard deviation near 1.5, and its output is as large as the residual stream. So a
broken cache changes the logits far beyond the bounds of the tests.

The vocabulary is byte-level BPE without a useful merge: 256 byte tokens, one merged token and an end-of-text token.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np

N_VOCAB = 258
EOS = 257


@dataclass(frozen=True)
class Shape:
    """The parameters of a model. `heads` and `kv_heads` are per attention layer; `head` is the size of a head."""

    arch: str = "llama"
    head: int = 128
    heads: int = 4
    kv_heads: int = 2
    layers: int = 3
    width: int = 64
    ff: int = 96
    rope: int | None = None  # rotated dimensions of a head; None = all
    context: int = 4096
    window: int = 0  # sliding window in tokens (gemma2, gpt-oss)
    bias: float = 0.0  # bias of one rotary pair of K in layer 1, which no query reads (qwen2)
    seed: int = 1


def byte_tokens() -> list[str]:
    """The 256 tokens of byte-level BPE in GPT-2's printable spelling, in byte order."""
    keep = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(256, 512))
    return [chr(b) if b in keep else chr(next(spare)) for b in range(256)]


class Builder:
    """A GGUF file while it is written: metadata of the architecture, then random tensors."""

    def __init__(self, path: Path, shape: Shape) -> None:
        self.path, self.shape = path, shape
        self.rng = np.random.default_rng(shape.seed)
        self.temporary = path.with_name(path.name + f".{os.getpid()}.tmp")
        self.w = gguf.GGUFWriter(self.temporary, shape.arch)
        w, s = self.w, shape
        w.add_name(f"random-{s.head}")  # llama.cpp has special rules for some names (phi3)
        w.add_context_length(s.context)
        w.add_embedding_length(s.width)
        w.add_block_count(s.layers)
        w.add_feed_forward_length(s.ff)
        w.add_head_count(s.heads)
        w.add_key_length(s.head)
        w.add_value_length(s.head)
        w.add_rope_dimension_count(s.rope or s.head)
        w.add_rope_freq_base(10000.0)
        w.add_layer_norm_rms_eps(1e-5)
        w.add_layer_norm_eps(1e-5)
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("gpt-2")
        w.add_token_list([*byte_tokens(), "th", "<|end|>"])
        w.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL])
        w.add_token_merges(["t h"])
        w.add_eos_token_id(EOS)
        w.add_bos_token_id(EOS)
        w.add_add_bos_token(False)

    def add(self, name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        """A matrix that maps `columns` inputs of unit variance to `rows` outputs of standard deviation `gain`."""
        scale = gain / np.sqrt(columns)
        self.w.add_tensor(name, (self.rng.standard_normal((rows, columns)) * scale).astype(np.float32))

    def ones(self, name: str, n: int) -> None:
        self.w.add_tensor(name, np.ones(n, np.float32))

    def zeros(self, name: str, n: int) -> None:
        self.w.add_tensor(name, np.zeros(n, np.float32))

    def ends(self, norm: str = "output_norm.weight", tied: bool = False) -> None:
        """Embedding, last norm and output matrix. A tied embedding has the scale of an output matrix."""
        s = self.shape
        embedding = self.rng.standard_normal((N_VOCAB, s.width)) * (2.0 / np.sqrt(s.width) if tied else 1.0)
        self.w.add_tensor("token_embd.weight", embedding.astype(np.float32))
        self.ones(norm, s.width)
        if not tied:
            self.add("output.weight", N_VOCAB, s.width, gain=2.0)

    def qkv(self, i: int, gain: float = 1.25) -> None:
        """Attention projections of layer i; q.k / sqrt(head) has a standard deviation of about gain squared."""
        s = self.shape
        self.add(f"blk.{i}.attn_q.weight", s.heads * s.head, s.width, gain)
        self.add(f"blk.{i}.attn_k.weight", s.kv_heads * s.head, s.width, gain)
        self.add(f"blk.{i}.attn_v.weight", s.kv_heads * s.head, s.width, 2.0)
        self.add(f"blk.{i}.attn_output.weight", s.width, s.heads * s.head, 2.0)

    def ffn(self, i: int) -> None:
        s = self.shape
        self.add(f"blk.{i}.ffn_gate.weight", s.ff, s.width)
        self.add(f"blk.{i}.ffn_up.weight", s.ff, s.width)
        self.add(f"blk.{i}.ffn_down.weight", s.width, s.ff, 0.5)

    def finish(self) -> Path:
        self.w.write_header_to_file()
        self.w.write_kv_data_to_file()
        self.w.write_tensors_to_file()
        self.w.close()
        os.replace(self.temporary, self.path)
        return self.path


def _llama(b: Builder) -> None:
    s = b.shape
    b.w.add_head_count_kv(s.kv_heads)
    b.ends()
    for i in range(s.layers):
        b.ones(f"blk.{i}.attn_norm.weight", s.width)
        b.qkv(i)
        b.ones(f"blk.{i}.ffn_norm.weight", s.width)
        b.ffn(i)


def _gemma2(b: Builder) -> None:
    """Alternating sliding-window and full attention, soft-capped scores."""
    s = b.shape
    b.w.add_head_count_kv(s.kv_heads)
    b.w.add_sliding_window(s.window)
    b.w.add_attn_logit_softcapping(30.0)
    b.w.add_final_logit_softcapping(30.0)
    b.ends(tied=True)
    for i in range(s.layers):
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            b.ones(f"blk.{i}.{norm}.weight", s.width)
        b.qkv(i)
        b.ffn(i)


def _stablelm(b: Builder) -> None:
    """Only the first `rope` dimensions of a head are rotated. Width must be heads * head."""
    s = b.shape
    b.w.add_head_count_kv(s.kv_heads)
    b.ends()
    b.zeros("output_norm.bias", s.width)
    for i in range(s.layers):
        for norm in ("attn_norm", "ffn_norm"):
            b.ones(f"blk.{i}.{norm}.weight", s.width)
            b.zeros(f"blk.{i}.{norm}.bias", s.width)
        b.qkv(i)
        b.ffn(i)


MLA_RANK, MLA_ROPE, MLA_HEAD = 512, 64, 32


def _deepseek2(b: Builder) -> None:
    """Multi-head latent attention: one K row of 512 + 64 channels per token; V is a view of its first 512."""
    s, w = b.shape, b.w
    w.add_head_count_kv(1)
    w.add_leading_dense_block_count(s.layers)
    w.add_expert_feed_forward_length(s.ff)
    w.add_expert_shared_count(0)
    w.add_q_lora_rank(48)
    w.add_kv_lora_rank(MLA_RANK)
    w.add_key_length_mla(MLA_HEAD + MLA_ROPE)
    w.add_value_length_mla(MLA_HEAD)
    b.ends()
    for i in range(s.layers):
        b.ones(f"blk.{i}.attn_norm.weight", s.width)
        b.ones(f"blk.{i}.attn_q_a_norm.weight", 48)
        b.ones(f"blk.{i}.attn_kv_a_norm.weight", MLA_RANK)
        b.add(f"blk.{i}.attn_q_a.weight", 48, s.width)
        b.add(f"blk.{i}.attn_q_b.weight", s.heads * (MLA_HEAD + MLA_ROPE), 48, 1.25)
        b.add(f"blk.{i}.attn_kv_a_mqa.weight", MLA_RANK + MLA_ROPE, s.width, 1.25)
        for name, rows, columns in (("k", MLA_RANK, MLA_HEAD), ("v", MLA_HEAD, MLA_RANK)):
            matrix = b.rng.standard_normal((s.heads, rows, columns)) * (1.5 / np.sqrt(MLA_RANK))
            w.add_tensor(f"blk.{i}.attn_{name}_b.weight", matrix.astype(np.float32))
        b.add(f"blk.{i}.attn_output.weight", s.width, s.heads * MLA_HEAD, 2.0)
        b.ones(f"blk.{i}.ffn_norm.weight", s.width)
        b.ffn(i)


def _lfm2(b: Builder) -> None:
    """Short convolutions on even layers, attention on odd ones. Width must be heads * head."""
    s = b.shape
    b.w.add_head_count_kv([s.kv_heads if i % 2 else 0 for i in range(s.layers)])
    b.w.add_shortconv_l_cache(3)
    b.ends(norm="token_embd_norm.weight")
    for i in range(s.layers):
        b.ones(f"blk.{i}.attn_norm.weight", s.width)
        b.ones(f"blk.{i}.ffn_norm.weight", s.width)
        b.ffn(i)
        if i % 2:
            b.ones(f"blk.{i}.attn_q_norm.weight", s.head)
            b.ones(f"blk.{i}.attn_k_norm.weight", s.head)
            b.qkv(i)
        else:
            b.add(f"blk.{i}.shortconv.in_proj.weight", 3 * s.width, s.width)
            b.add(f"blk.{i}.shortconv.out_proj.weight", s.width, s.width)
            b.add(f"blk.{i}.shortconv.conv.weight", s.width, 3)


def _gpt_oss(b: Builder) -> None:
    """Attention sinks, alternating sliding window, two experts."""
    s, w = b.shape, b.w
    experts = 2
    w.add_head_count_kv(s.kv_heads)
    w.add_sliding_window(s.window)
    w.add_expert_count(experts)
    w.add_expert_used_count(experts)
    w.add_expert_feed_forward_length(s.ff)
    b.ends()
    for i in range(s.layers):
        b.ones(f"blk.{i}.attn_norm.weight", s.width)
        b.ones(f"blk.{i}.post_attention_norm.weight", s.width)
        b.qkv(i)
        b.zeros(f"blk.{i}.attn_output.bias", s.width)
        w.add_tensor(f"blk.{i}.attn_sinks.weight", b.rng.standard_normal(s.heads).astype(np.float32))
        b.add(f"blk.{i}.ffn_gate_inp.weight", experts, s.width)
        b.zeros(f"blk.{i}.ffn_gate_inp.bias", experts)
        for name, rows, columns in (("gate", s.ff, s.width), ("up", s.ff, s.width), ("down", s.width, s.ff)):
            matrix = b.rng.standard_normal((experts, rows, columns)) * (0.5 / np.sqrt(columns))
            w.add_tensor(f"blk.{i}.ffn_{name}_exps.weight", matrix.astype(np.float32))
            w.add_tensor(f"blk.{i}.ffn_{name}_exps.bias", np.zeros((experts, rows), np.float32))


def _phi3(b: Builder) -> None:
    """Q, K and V are rows of one matrix, gate and up of another. Width must be heads * head."""
    s = b.shape
    b.w.add_head_count_kv(s.kv_heads)
    b.ends()
    for i in range(s.layers):
        b.ones(f"blk.{i}.attn_norm.weight", s.width)
        b.add(f"blk.{i}.attn_qkv.weight", (s.heads + 2 * s.kv_heads) * s.head, s.width, 1.25)
        b.add(f"blk.{i}.attn_output.weight", s.width, s.heads * s.head, 2.0)
        b.ones(f"blk.{i}.ffn_norm.weight", s.width)
        b.add(f"blk.{i}.ffn_up.weight", 2 * s.ff, s.width)
        b.add(f"blk.{i}.ffn_down.weight", s.width, s.ff, 0.5)


def _qwen2vl(b: Builder) -> None:
    """M-RoPE: positions of several kinds share a head. Width must be heads * head."""
    b.w.add_rope_dimension_sections([b.shape.head // 8, b.shape.head // 8, b.shape.head // 4, 0])
    _llama(b)


def _qwen2(b: Builder) -> None:
    """Biases of Q, K and V. The bias of K in layer 1 is large, as in Qwen 2.5; it changes scores only by its noise.

    Width must be heads * head.
    """
    s = b.shape
    half = s.head // 2
    b.w.add_head_count_kv(s.kv_heads)
    b.ends()
    for i in range(s.layers):
        b.ones(f"blk.{i}.attn_norm.weight", s.width)
        b.ones(f"blk.{i}.ffn_norm.weight", s.width)
        b.ffn(i)
        for name, count in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads)):
            weight = b.rng.standard_normal((count, s.head, s.width)) * (1.25 / np.sqrt(s.width))
            bias = b.rng.standard_normal((count, s.head)) * 0.1
            if name == "q":
                weight[:, [half - 1, s.head - 1]] = bias[:, [half - 1, s.head - 1]] = 0
            elif name == "k" and i == 1:
                bias[:, s.head - 1] = s.bias
            b.w.add_tensor(f"blk.{i}.attn_{name}.weight", weight.reshape(-1, s.width).astype(np.float32))
            b.w.add_tensor(f"blk.{i}.attn_{name}.bias", bias.ravel().astype(np.float32))
        b.add(f"blk.{i}.attn_output.weight", s.width, s.heads * s.head, 2.0)


def _qwen3(b: Builder) -> None:
    """Norms of each head's queries and keys, with weights."""
    s = b.shape
    _llama(b)
    for i in range(s.layers):
        for name in ("q", "k"):
            b.w.add_tensor(f"blk.{i}.attn_{name}_norm.weight", (b.rng.random(s.head) * 2).astype(np.float32))


_WRITERS: dict[str, Callable[[Builder], None]] = {
    "llama": _llama,
    "gemma2": _gemma2,
    "stablelm": _stablelm,
    "deepseek2": _deepseek2,
    "lfm2": _lfm2,
    "gpt-oss": _gpt_oss,
    "phi3": _phi3,
    "qwen2vl": _qwen2vl,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}

SHAPES: dict[str, Shape] = {
    **{f"head{n}": Shape(head=n) for n in (64, 80, 96, 112, 128, 192, 256, 512)},
    "mha": Shape(heads=4, kv_heads=4),
    "gqa": Shape(heads=8, kv_heads=2),
    "mqa": Shape(heads=8, kv_heads=1),
    "deep": Shape(layers=6),
    "iswa": Shape(arch="gemma2", layers=4, window=32),
    "sinks": Shape(arch="gpt-oss", layers=4, window=32),
    "partial": Shape(arch="stablelm", heads=2, kv_heads=1, width=256, rope=32),
    "mla": Shape(arch="deepseek2", head=MLA_RANK + MLA_ROPE, rope=MLA_ROPE),
    "fused": Shape(arch="phi3", heads=4, kv_heads=2, width=256, head=64),
    "mrope": Shape(arch="qwen2vl", heads=2, kv_heads=1, width=256),
    "biased": Shape(arch="qwen2", head=64, heads=4, kv_heads=2, width=256, bias=300.0),
    "qknorm": Shape(arch="qwen3"),
    "wide": Shape(width=256, ff=256, heads=4, kv_heads=2, layers=2),
    "hybrid": Shape(arch="lfm2", heads=2, kv_heads=1, width=256, layers=8),
}


def write_model(path: Path, shape: Shape) -> Path:
    """Write the model with the given shape to `path` atomically, and return the path."""
    path = Path(path)
    if shape.arch == "deepseek2":
        builder = Builder(path, replace(shape, kv_heads=1))
        builder.w.kv_data[0][f"{shape.arch}.attention.value_length"].value = MLA_RANK
    else:
        builder = Builder(path, shape)
    _WRITERS[shape.arch](builder)
    return builder.finish()
