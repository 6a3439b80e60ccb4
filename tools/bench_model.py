"""The benchmarks' models with random Q4_0 weights, as GGUF files. This module needs the standard library alone."""

from __future__ import annotations

import os
import random
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from bench_common import Problem

CONTEXT = 131072 + 4096
ALIGNMENT = 32
F32, Q4_0 = 0, 2  # types of tensors
U32, FLOAT, STRING = 4, 6, 8  # types of values


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(key: str, value: str | int | float) -> bytes:
    """One key with its value."""
    if isinstance(value, str):
        return text(key) + struct.pack("<I", STRING) + text(value)
    if isinstance(value, int):
        return text(key) + struct.pack("<II", U32, value)
    return text(key) + struct.pack("<If", FLOAT, value)


def q4_0(source: random.Random, rows: int, columns: int, gain: float) -> bytearray:
    """A matrix that maps `columns` inputs of unit variance to outputs of standard deviation `gain`.

    The mean of the integers -8 ... 7 is not zero, so every other block has a negative scale. Otherwise all rows would
    add the sum of their inputs, which grows from layer to layer, and scores of attention would be in the hundreds.
    """
    blocks = rows * columns // 32
    data = bytearray(blocks * 18)
    scale = gain / columns**0.5 / 4.61  # the standard deviation of the integers
    pair = struct.pack("<e", scale) + struct.pack("<e", -scale)
    for block in range(2):
        for i in range(2):
            data[18 * block + i :: 36] = pair[2 * block + i : 2 * block + i + 1] * len(data[18 * block + i :: 36])
    for i in range(2, 18):
        data[i::18] = source.randbytes(blocks)
    return data


def matrices(
    layers: int, width: int, q: int, kv: int, ff: int, vocabulary: int
) -> Iterator[tuple[str, int, int, float]]:
    """Name, rows, columns and gain of each matrix. The gains give scores and outputs of attention a normal size."""
    yield "token_embd.weight", vocabulary, width, width**0.5
    yield "output.weight", vocabulary, width, 2.0
    for i in range(layers):
        yield f"blk.{i}.attn_q.weight", q, width, 1.25
        yield f"blk.{i}.attn_k.weight", kv, width, 1.25
        yield f"blk.{i}.attn_v.weight", kv, width, 2.0
        yield f"blk.{i}.attn_output.weight", width, q, 2.0
        yield f"blk.{i}.ffn_gate.weight", ff, width, 1.0
        yield f"blk.{i}.ffn_up.weight", ff, width, 1.0
        yield f"blk.{i}.ffn_down.weight", width, ff, 0.5


def write_model(folder: Path, shape: list[int], head: int) -> Path:
    """The model with this shape and heads of `head` values, which is written once. K has the same size with all heads.

    shape: layers, width, query heads, KV heads, values of a head, width of the feed-forward layers, tokens of the
    vocabulary. The vocabulary has no text.
    """
    layers, width, heads, kv_heads, own, ff, vocabulary = shape
    if heads * own % head or kv_heads * own % head:
        raise Problem(f"heads of {head} do not divide the {kv_heads * own} values of K that --model-shape has")
    heads, kv_heads = heads * own // head, kv_heads * own // head
    name = "-".join(map(str, (layers, width, heads, kv_heads, head, ff, vocabulary)))
    target = folder / f"random-{name}-q4_0.gguf"
    if target.is_file():
        return target
    fields = {
        "general.architecture": "llama",
        "general.name": f"random {name}",
        "general.alignment": ALIGNMENT,
        "llama.block_count": layers,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": width,
        "llama.feed_forward_length": ff,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.key_length": head,
        "llama.attention.value_length": head,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": head,
        "llama.rope.freq_base": 500000.0,
        "llama.vocab_size": vocabulary,
        "tokenizer.ggml.model": "no_vocab",
    }
    source = random.Random(1)
    known: dict[tuple[int, int, float], bytearray] = {}  # one matrix of each shape, which saves most of the time
    norms = [f"blk.{i}.{norm}.weight" for i in range(layers) for norm in ("attn_norm", "ffn_norm")]
    tensors: list[tuple[str, list[int], int, bytes | bytearray]] = []
    for one in (*norms, "output_norm.weight"):
        tensors.append((one, [width], F32, struct.pack("<f", 1.0) * width))
    for one, rows, columns, gain in matrices(layers, width, heads * head, kv_heads * head, ff, vocabulary):
        if (rows, columns, gain) not in known:
            known[rows, columns, gain] = q4_0(source, rows, columns, gain)
        tensors.append((one, [columns, rows], Q4_0, known[rows, columns, gain]))

    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    header += b"".join(field(key, value) for key, value in fields.items())
    offset = 0
    for one, dimensions, kind, data in tensors:
        sizes = struct.pack(f"<{len(dimensions)}Q", *dimensions)
        header += text(one) + struct.pack("<I", len(dimensions)) + sizes + struct.pack("<IQ", kind, offset)
        offset += -(-len(data) // ALIGNMENT) * ALIGNMENT
    print(f"writing {target}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(header + bytes(-len(header) % ALIGNMENT))
            for _, _, _, data in tensors:
                file.write(data)
                file.write(bytes(-len(data) % ALIGNMENT))
        os.replace(temporary, target)
    except OSError as problem:
        temporary.unlink(missing_ok=True)
        raise Problem(f"{target} cannot be written: {problem.strerror}") from None
    return target
