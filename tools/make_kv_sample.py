#!/usr/bin/env python3
"""Make notebooks/data/kv-prose-8m.safetensors: real queries, keys and values for the notebooks.

`turboquant dump-kv` of the bundled model on the bundled text, cut down to what the notebooks use: two layers, all keys
and values, the queries of the last tokens, and 16 bits per value, which is what an f16 cache keeps. Needs
`turboquant build`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from turboquant import dump
from turboquant.llama.files import LlamaError

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "notebooks" / "data" / "kv-prose-8m.safetensors"
TOKENS, QUERIES, LAYERS = 2048, 128, (1, 4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", "-o", type=Path, default=TARGET, metavar="FILE", help=f"default {TARGET}")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="keys and values (default %(default)s)")
    parser.add_argument("--queries", type=int, default=QUERIES, help="of the last tokens (default %(default)s)")
    given = parser.parse_args()
    model, text = ROOT / "models" / "prose-8m-q8_0.gguf", ROOT / "models" / "heldout.txt"
    try:
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "whole.safetensors"
            dump.dump(model, text, whole, tokens=given.tokens)
            with safe_open(whole, framework="numpy") as file:
                metadata = file.metadata()
                tensors = {f"{role}.{layer}": file.get_tensor(f"{role}.{layer}") for layer in LAYERS for role in "qkv"}
    except (LlamaError, OSError) as error:
        print(f"make_kv_sample: {error}", file=sys.stderr)
        return 1
    scales = json.loads(metadata["scale"])
    metadata["scale"] = json.dumps({f"q.{layer}": scales[f"q.{layer}"] for layer in LAYERS})
    tensors = {name: np.ascontiguousarray(values[-given.queries:] if name.startswith("q") else values, np.float16)
               for name, values in tensors.items()}
    partial = given.output.with_name(f".{given.output.name}.partial")
    try:
        save_file(tensors, partial, metadata)
        os.replace(partial, given.output)
    finally:
        partial.unlink(missing_ok=True)
    print(given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
