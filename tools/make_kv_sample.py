#!/usr/bin/env python3
"""Make notebooks/data/kv-prose-8m.safetensors: real queries, keys and values for the notebooks.

The file is the dump of `turboquant dump-kv` for the bundled model and text, reduced to one layer and to 16 bits per
value, the precision of an f16 cache. The program needs `turboquant build`.
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
from turboquant.errors import TurboQuantError

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "notebooks" / "data" / "kv-prose-8m.safetensors"
TOKENS, LAYER = 2048, 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", "-o", type=Path, default=TARGET, metavar="FILE", help=f"default {TARGET}")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="default %(default)s")
    parser.add_argument("--layer", type=int, default=LAYER, help="default %(default)s")
    parser.add_argument("--bin", type=Path, help="programs of a build (default: the last build's)")
    given = parser.parse_args()
    model, text = ROOT / "models" / "prose-8m-q8_0.gguf", ROOT / "models" / "heldout.txt"
    try:
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "whole.safetensors"
            dump.dump(model, text, whole, tokens=given.tokens, bin=given.bin)
            names = [f"{role}.{given.layer}" for role in "qkv"]
            with safe_open(whole, framework="numpy") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name).astype(np.float16) for name in names}
    except (TurboQuantError, OSError) as error:
        print(f"make_kv_sample: {error}", file=sys.stderr)
        return 1
    metadata["scale"] = json.dumps({names[0]: json.loads(metadata["scale"])[names[0]]})
    partial = given.output.with_name(f".{given.output.name}.partial")
    try:
        save_file(tensors, partial, metadata)
        partial.chmod(0o644)
        os.replace(partial, given.output)
    finally:
        partial.unlink(missing_ok=True)
    print(given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
