"""The benchmarks' models with random Q4_0 weights. Writing one needs NumPy and gguf."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bench_common import Problem

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 131072 + 4096


def write_model(folder: Path, shape: list[int], head: int) -> Path:
    """The model with this shape and heads of `head` values, which is written once. K has the same size with all heads.

    shape: layers, width, query heads, KV heads, values of a head, width of the feed-forward layers, tokens of the
    vocabulary.
    """
    layers, width, heads, kv_heads, own, ff, vocabulary = shape
    if heads * own % head or kv_heads * own % head:
        raise Problem(f"heads of {head} do not divide the {kv_heads * own} values of K that --model-shape has")
    heads, kv_heads = heads * own // head, kv_heads * own // head
    name = "-".join(map(str, (layers, width, heads, kv_heads, head, ff, vocabulary)))
    target = folder / f"bench-{name}-q4_0.gguf"
    if target.is_file():
        return target
    try:
        import gguf  # noqa: PLC0415
        import numpy as np  # noqa: PLC0415
    except ImportError as missing:
        raise Problem(f"writing the model needs {missing.name}: pip install {missing.name}") from None
    sys.path.insert(0, str(ROOT / "tests" / "llama"))
    from make_model import Builder, Shape  # noqa: PLC0415

    class Random(Builder):
        """Matrices of the same shape have the same weights, so that the file is written in seconds."""

        known: dict[tuple[int, int, float], Any] = {}

        def add(self, name: str, rows: int, columns: int, gain: float = 1.0) -> None:
            key = rows, columns, gain
            if key not in self.known:
                blocks = np.empty((rows * columns // 32, 18), np.uint8)
                blocks[:, 2:] = np.frombuffer(self.rng.bytes(blocks.shape[0] * 16), np.uint8).reshape(-1, 16)
                scale = gain / np.sqrt(columns) / 4.61  # the standard deviation of the integers -8 ... 7
                blocks[:, :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
                self.known[key] = blocks.reshape(rows, columns // 32 * 18)
            self.w.add_tensor(name, self.known[key], raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    print(f"writing {target}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    model = Random(
        target, Shape(head=head, heads=heads, kv_heads=kv_heads, layers=layers, width=width, ff=ff, context=CONTEXT)
    )
    values = model.w.kv_data[0]
    more = vocabulary - len(values["tokenizer.ggml.tokens"].value)
    values["tokenizer.ggml.tokens"].value += [f"<{i}>" for i in range(more)]
    values["tokenizer.ggml.token_type"].value += [int(gguf.TokenType.NORMAL)] * more
    model.w.add_head_count_kv(kv_heads)
    model.add("token_embd.weight", vocabulary, width)
    model.ones("output_norm.weight", width)
    model.add("output.weight", vocabulary, width)
    for i in range(layers):
        model.ones(f"blk.{i}.attn_norm.weight", width)
        model.qkv(i)
        model.ones(f"blk.{i}.ffn_norm.weight", width)
        model.ffn(i)
    return model.finish()
