#!/usr/bin/env python3
"""Write the golden vectors of tests/vectors: one file per format, with blocks and their decoded floats.

This program does not use the C++ code. The NumPy codec (python/turboquant/reference.py) decodes. Encode lines follow
the encoder of cpp/FORMAT.md in float32, operation by operation, with the constants of cpp/src/codebooks.h. Decode lines
never change, because that would change the format. Encode lines may change when the encoder improves.

  python3 tools/make_vectors.py            write tests/vectors/*.txt
  python3 tools/make_vectors.py --check    compare with the present files; exit with status 1 if one differs
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
VECTORS = ROOT / "tests" / "vectors"
CODEBOOKS = ROOT / "cpp" / "src" / "codebooks.h"
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


def encoder_constant(pattern: str) -> str:
    """The text in codebooks.h that the group of a pattern matches."""
    match = re.search(pattern, CODEBOOKS.read_text(encoding="utf-8"), re.S)
    if not match:
        sys.exit(f"{CODEBOOKS}: nothing matches {pattern!r}; adapt encode() in {__file__} to the encoder")
    return match.group(1)


RMS_UNIT = int(encoder_constant(r"rms_unit = (\d+);"))
COARSE_UNIT = int(encoder_constant(r"coarse_unit = (\d+);"))


def coarse_thresholds(bits: int) -> np.ndarray:
    """int64 [steps, 2**(bits - 1) - 1]: the thresholds of the scale search."""
    table = encoder_constant(rf"coarse_thresholds{bits}\[\w+\]\[\d+\] = (.*?);")
    return np.array([[int(t) for t in row.split(",")] for row in re.findall(r"\{([\d, ]+)\}", table)])


def butterfly(y: np.ndarray) -> np.ndarray:
    """H y in float32, with the stages in the order 1, 2, 4, ..., which determines the rounding."""
    n, h = len(y), 1
    while h < n:
        pairs = y.reshape(-1, 2, h)
        a, b = pairs[:, 0], pairs[:, 1]
        y = np.stack([a + b, a - b], axis=1).reshape(n)
        h *= 2
    return y


def encode(name: str, x: np.ndarray) -> np.ndarray:
    """One block encoded as FORMAT.md describes, uint8 [block_bytes]."""
    bits, n = reference.FORMATS[name]
    half = 1 << (bits - 1)
    magnitudes = reference.levels(bits)[half:]
    empty = np.zeros(reference.FORMATS[name].block_bytes, np.uint8)
    largest = np.abs(x).max()
    if not np.isfinite(largest) or largest == 0:
        return empty
    # Scale to [1, 4), rotate, round to integers.
    k = min(max(int(np.frexp(largest)[1]) - 1, -126), 126)
    y = butterfly(F32(x * F32(2.0**-k)) * reference.signs(1, n).astype(F32)) * reference.signs(2, n).astype(F32)
    lanes = np.zeros(16, F32)
    for part in (y * y).reshape(-1, 16):
        lanes = lanes + part
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    rms = np.sqrt(F32(lanes[0] * F32(1.0 / n)))
    z = np.rint(y * F32(F32(RMS_UNIT) / rms)).astype(np.int64)
    # Search the scale in coarse units.
    coarse = np.minimum((np.abs(z) + COARSE_UNIT // 2) // COARSE_UNIT, 127)
    best_a, best_b, best_explained = 0, 1, -1.0
    for thresholds in coarse_thresholds(bits):
        levels = magnitudes[(coarse[:, None] > thresholds).sum(axis=1)]
        a, b = int(coarse @ levels), int(levels @ levels)
        explained = float(a) * float(a) / float(b)
        if explained > best_explained:
            best_a, best_b, best_explained = a, b, explained
    # Assign the nearest centroids under it; compute the scale that preserves inner products.
    midpoints = ((magnitudes[1:] + magnitudes[:-1]) / 2).astype(F32)
    scale = F32(float(COARSE_UNIT) * float(best_a) / float(best_b))
    m = (np.abs(z)[:, None] > np.rint(midpoints * scale)).sum(axis=1)
    gain = float(z @ z) / float(np.abs(z) @ magnitudes[m])
    unit = 1.0 / (float(RMS_UNIT) * float(F32(reference.step(bits) / math.sqrt(n))) * n)
    d = gain * float(rms) * unit * 2.0**k
    stored = np.float16(65504) if d >= 65520.0 else np.float16(F32(d))
    if stored == 0:
        return empty
    index = np.where(z < 0, half - 1 - m, half + m).astype(np.uint8)
    return np.concatenate([np.array([stored], "<f2").view(np.uint8), reference.pack(index, bits)])


def blocks_to_decode(body: int, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Named blocks with `body` index bytes, many of which the encoder never writes."""
    scales = {
        "zero": 0x0000, "minus-zero": 0x8000, "smallest": 0x0001, "subnormal": 0x0155, "largest-subnormal": 0x03FF,
        "smallest-normal": 0x0400, "one": 0x3C00, "minus-one": 0xBC00, "third": 0x3555, "largest": 0x7BFF,
        "infinity": 0x7C00, "minus-infinity": 0xFC00, "signalling-nan": 0x7C01, "nan": 0x7E00,
    }  # fmt: skip
    for name, d in scales.items():
        yield f"d-{name}", np.concatenate([np.array([d], "<u2").view(np.uint8), rng.integers(0, 256, body, np.uint8)])
    one = np.array([0x00, 0x3C], np.uint8)
    yield "lowest-index", np.concatenate([one, np.zeros(body, np.uint8)])
    yield "highest-index", np.concatenate([one, np.full(body, 0xFF, np.uint8)])
    yield "counting-bytes", np.concatenate([one, np.arange(body, dtype=np.uint8) * 37])
    yield "one-bit", np.concatenate([one, np.eye(1, body, body // 3, dtype=np.uint8)[0] * 16])


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
    for case, block in blocks_to_decode(form.block_bytes - 2, rng):
        lines.append(line("decode", case, block, reference.dequantize(block, name)))
    for case, x in blocks_to_encode(form.block, rng):
        lines.append(line("encode", case, encode(name, x), x))
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
