#!/usr/bin/env python3
"""Write the golden vectors of tests/vectors: one file per format, with blocks and their decoded floats.

This program does not use the C++ code. The NumPy codec (python/turboquant/reference.py) decodes. Encode lines follow
the encoder of cpp/FORMAT.md: the transform is in float32 here, operation by operation, and the NumPy codec assigns the
levels, which are integers. Decode lines never change, because that would change the format. Encode lines may change
when the encoder improves.

  python3 tools/make_vectors.py            write tests/vectors/*.txt
  python3 tools/make_vectors.py --check    compare with the present files; exit with status 1 if one differs
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
VECTORS = ROOT / "tests" / "vectors"
F32 = np.float32


def load_reference():
    """Import the NumPy codec by its path, because importing the package needs the compiled module."""
    spec = importlib.util.spec_from_file_location("turboquant_reference", ROOT / "python/turboquant/reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


reference = load_reference()


def butterflies(y: np.ndarray) -> np.ndarray:
    """H y for each row in float32, with the stages in the order 1, 2, 4, ..., which determines the rounding."""
    n, h = y.shape[-1], 1
    while h < n:
        pairs = y.reshape(len(y), -1, 2, h)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = np.stack([a + b, a - b], axis=2).reshape(len(y), n)
        h *= 2
    return y


def encode(name: str, x: np.ndarray) -> np.ndarray:
    """Blocks, float32 [blocks, n], encoded as FORMAT.md describes: uint8 [blocks, block_bytes]."""
    family, n = reference.FORMATS[name]
    largest = np.abs(x).max(axis=1)
    encoded = np.isfinite(largest) & (largest > 0)
    x, largest = np.where(encoded[:, None], x, F32(1)), np.where(encoded, largest, F32(1))
    # Scale to [1, 4), rotate, round to integers.
    k = np.clip(np.frexp(largest)[1] - 1, -126, 126)
    y = np.ldexp(x, -k[:, None]) * reference.signs(1, n).astype(F32)
    y = butterflies(y) * reference.signs(2, n).astype(F32)
    lanes = np.zeros((len(y), 16), F32)
    for part in np.split(y * y, n // 16, axis=1):
        lanes = lanes + part
    while lanes.shape[1] > 1:
        lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
    rms = np.sqrt(lanes * F32(1.0 / n))
    z = np.rint(y * (F32(reference.RMS_UNIT) / rms)).astype(np.int64)
    # Assign levels; compute the scale that preserves inner products.
    assigned, levels = family.assign(z)
    product, energy = (z * levels).sum(axis=1), (z * z).sum(axis=1)
    encoded &= product > 0
    unit = 1.0 / (float(reference.RMS_UNIT) * float(F32(family.step / math.sqrt(n))) * n)
    d = energy / np.where(encoded, product, 1) * rms[:, 0].astype(np.float64) * unit * np.exp2(k)
    return family.with_scale(assigned, np.where(encoded, d, 0.0))


# Scales of every kind, as the families store them.
SCALES = {
    reference.LloydMax: {
        "zero": 0x0000, "minus-zero": 0x8000, "smallest": 0x0001, "subnormal": 0x0155, "largest-subnormal": 0x03FF,
        "smallest-normal": 0x0400, "one": 0x3C00, "minus-one": 0xBC00, "third": 0x3555, "largest": 0x7BFF,
        "infinity": 0x7C00, "minus-infinity": 0xFC00, "signalling-nan": 0x7C01, "nan": 0x7E00,
    },
    reference.Trellis: {
        "zero": 0x000, "smallest": 0x001, "subnormal": 0x00A, "largest-subnormal": 0x01F, "smallest-normal": 0x020,
        "one": 0x1E0, "third": 0x1AB, "largest": 0x3DF, "infinity": 0x3E0, "signalling-nan": 0x3E1, "nan": 0x3F0,
    },
}  # fmt: skip


def blocks_to_decode(family, body: int, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Named blocks with `body` bytes after the first two, many of which the encoder never writes."""

    def block(word: int, rest: np.ndarray) -> np.ndarray:
        return np.concatenate([np.array([word], "<u2").view(np.uint8), rest])

    scales, is_trellis = SCALES[type(family)], isinstance(family, reference.Trellis)
    for name, scale in scales.items():
        start_state = int(rng.integers(64)) << reference.SCALE_BITS if is_trellis else 0
        yield f"d-{name}", block(scale | start_state, rng.integers(0, 256, body, np.uint8))
    one = scales["one"]
    yield "lowest-index", block(one, np.zeros(body, np.uint8))
    yield "highest-index", block(one, np.full(body, 0xFF, np.uint8))
    yield "counting-bytes", block(one, np.arange(body, dtype=np.uint8) * 37)
    yield "one-bit", block(one, np.eye(1, body, body // 3, dtype=np.uint8)[0] * 16)
    if is_trellis:
        for ago in range(1, reference.MEMORY + 1):
            yield f"path-bit-{ago}-before-the-first", block(one | 1 << (16 - ago), np.zeros(body, np.uint8))


def blocks_to_encode(n: int, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Named inputs of n values."""
    mixed = rng.standard_normal(n).astype(F32)
    mixed[n // 2] = np.nan
    yield "gaussian", rng.standard_normal(n).astype(F32)
    yield "heavy-tailed", rng.standard_cauchy(n).astype(F32)
    yield "small-integers", rng.integers(-4, 5, n).astype(F32)
    yield "zeros", np.zeros(n, F32)
    yield "constant", np.full(n, 0.7, F32)
    yield "one-hot", np.eye(1, n, 5, dtype=F32)[0]
    yield "fp16-subnormal-scale", (rng.standard_normal(n) * 2.0**-18).astype(F32)
    yield "scale-below-fp16", (rng.standard_normal(n) * 1e-30).astype(F32)
    yield "denormals", (rng.integers(-(2**23), 2**23, n) * 2.0**-149).astype(F32)
    yield "saturating", (rng.standard_normal(n) * 1e30).astype(F32)
    yield "nan", mixed


def render(name: str) -> str:
    """The contents of the file of one type."""
    form = reference.FORMATS[name]
    rng = np.random.default_rng([form.bits, form.block])

    def line(what: str, case: str, block: np.ndarray, floats: np.ndarray) -> str:
        floats = np.where(np.isnan(floats), F32(np.nan), floats).astype("<f4")
        return f"{what} {case} {block.tobytes().hex()} {floats.tobytes().hex()}\n"

    lines = [f"# {name}: what, case, block ({form.block_bytes} bytes), {form.block} floats. See README.md.\n"]
    for case, block in blocks_to_decode(form.family, form.block_bytes - 2, rng):
        lines.append(line("decode", case, block, reference.dequantize(block, name)))
    for case, x in blocks_to_encode(form.block, rng):
        lines.append(line("encode", case, encode(name, x[None])[0], x))
    return "".join(lines)


def main() -> int:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is missing or differs")
    check = parser.parse_args().check
    differ = False
    for name in reference.FORMATS:
        path, text = VECTORS / f"{name}.txt", render(name)
        if check:
            if not path.exists() or path.read_text(encoding="ascii") != text:
                print(f"{path} differs from what {Path(__file__).name} computes", file=sys.stderr)
                differ = True
            continue
        VECTORS.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="ascii")
        os.replace(temporary, path)
        print(path.relative_to(ROOT))
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
