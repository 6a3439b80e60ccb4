#!/usr/bin/env python3
"""Check the Metal backend on a Mac: `python3 tools/check_metal.py`. After the build it should take five minutes.

The kernels were written without Apple hardware, and run in an emulator in the tests. This program builds llama.cpp
with them, compares every op on the turbo types with the CPU (test-backend-ops), measures the KL divergence of the
bundled model from its f16 cache in batches and token by token, on the GPU and on the CPU, and the speed of decode and
prefill. It prints a report in Markdown; paste it into an issue, also if something failed.

It needs `pip install .` (or the quickstart's environment) and the Xcode command line tools.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_attention import Problem, make_model
from turboquant.errors import TurboQuantError
from turboquant.llama.build import build
from turboquant.llama.paths import bundled_model, bundled_text
from turboquant.measure.perplexity import parse_divergence

OPS = ("SET_ROWS", "CPY", "GET_ROWS", "FLASH_ATTN_EXT")
PAIRS = ("turbo4/turbo4", "turbo3/turbo3", "turbo4_tcq/turbo3_tcq", "q8_0/turbo3")
SPEED_PAIRS = ("f16/f16", "q8_0/q8_0", "turbo4/turbo4", "turbo3/turbo3", "turbo4_tcq/turbo4_tcq")


def run(command: list[object], **environment: str) -> tuple[int, str]:
    words = [str(word) for word in command]
    print(f"# {Path(words[0]).name} {' '.join(words[1:])}", file=sys.stderr, flush=True)
    done = subprocess.run(
        words, capture_output=True, text=True, errors="replace", env={**os.environ, **environment}, check=False
    )
    return done.returncode, done.stdout + done.stderr


def machine() -> list[str]:
    lines = [f"- {platform.platform()}, {platform.machine()}"]
    for command in (["sysctl", "-n", "machdep.cpu.brand_string"], ["xcrun", "--show-sdk-version"]):
        try:
            status, text = run(command)
        except FileNotFoundError:
            continue
        if status == 0:
            lines.append(f"- {command[-1]}: {text.strip()}")
    return lines


def check_ops(folder: Path) -> tuple[list[str], bool]:
    """test-backend-ops on the turbo types: the GPU's results compared with the CPU's."""
    lines, good = ["| op | result |", "|---|---|"], True
    for op in OPS:
        status, text = run([folder / "test-backend-ops", "test", "-o", op, "-p", "turbo"])
        found = re.findall(r"(\d+)/(\d+) tests passed", text)
        failed = [line.strip() for line in text.splitlines() if "FAIL" in line and "turbo" in line]
        good = good and status == 0 and bool(found)
        lines.append(f"| {op} | {', '.join('/'.join(one) for one in found) or 'nothing ran'}, status {status} |")
        lines += [f"| | `{line[:160]}` |" for line in failed[:5]]
        if status < 0 or not found:
            lines.append(f"| | `{' '.join(text.split())[-300:]}` |")
    return lines, good


def check_quality(folder: Path) -> tuple[list[str], bool]:
    """KL divergence from the device's own f16 cache, in nats per token."""
    lines, good = ["| K/V | GPU, batched | GPU, one token at a time | CPU, batched |", "|---|--:|--:|--:|"], True
    values: dict[tuple[str, str], str] = {}
    runs = (("gpu", 99, 512, 4), ("token", 99, 1, 1), ("cpu", 0, 512, 4))
    with tempfile.TemporaryDirectory() as scratch:
        for name, layers, batch, chunks in runs:
            base = Path(scratch) / f"{name}.kld"
            command = [folder / "llama-perplexity", "-m", bundled_model(), "-c", 512, "--chunks", chunks, "-fa", "on"]
            command += ["-ngl", layers, "-ub", batch, "-b", max(batch, 512), "--kl-divergence-base", base]
            status, text = run([*command, "-f", bundled_text()])
            if status:
                return [f"`llama-perplexity` failed with f16: `{' '.join(text.split())[-600:]}`"], False
            for pair in PAIRS:
                k, v = pair.split("/")
                status, text = run([*command, "--kl-divergence", "-ctk", k, "-ctv", v], LLAMA_ARG_CACHE_WINDOW="0")
                try:
                    kld = parse_divergence(text).kld
                    values[pair, name] = f"{kld:.5f}"
                    good = good and kld < 1
                except ValueError:
                    values[pair, name] = f"failed ({status})"
                    good = False
    for pair in PAIRS:
        lines.append(f"| {pair} | {' | '.join(values[pair, name] for name, *_ in runs)} |")
    return lines, good


def check_speed(folder: Path) -> tuple[list[str], bool]:
    """Tokens per second of a model with the attention of an 8B model in two layers, and little else."""
    depths, model = (0, 8192, 32768), make_model(folder)
    lines = [f"| K/V | {' | '.join(f'decode at {d} | prefill at {d}' for d in depths)} |"]
    lines += [f"|---|{'--:|' * 2 * len(depths)}"]
    for pair in SPEED_PAIRS:
        k, v = pair.split("/")
        command = [folder / "llama-bench", "-m", model, "-ngl", 99, "-fa", 1, "-ctk", k, "-ctv", v, "-p", 512, "-n", 64]
        status, text = run(
            [*command, "-r", 3, "-d", ",".join(map(str, depths)), "-o", "json"], LLAMA_ARG_CACHE_WINDOW="0"
        )
        try:
            rows = json.loads(text[text.index("[") : text.rindex("]") + 1])
            found = {(row["n_depth"], bool(row["n_gen"])): f"{row['avg_ts']:.0f}" for row in rows}
            cells = [found[depth, decode] for depth in depths for decode in (True, False)]
        except (ValueError, KeyError):
            return [*lines, "", f"{pair} failed ({status}): `{' '.join(text.split())[-300:]}`"], False
        lines.append(f"| {pair} | {' | '.join(cells)} |")
    return lines, True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-embed", action="store_true", help="build ggml's own library as a file")
    parser.add_argument("--bin", type=Path, help="check the programs in this folder instead of building them")
    parser.add_argument("--skip-speed", action="store_true")
    given = parser.parse_args()
    options = ["GGML_METAL_EMBED_LIBRARY=OFF"] if given.no_embed else []
    try:
        folder = given.bin or build(targets=("default", "test-backend-ops"), backend="metal", cmake_args=options)
        parts = [("Ops", check_ops), ("KL divergence", check_quality), ("Speed", check_speed)]
        parts = parts[:-1] if given.skip_speed else parts
        report, good = ["# Metal check", *machine(), f"- library: {'a file' if given.no_embed else 'embedded'}"], True
        for title, check in parts:
            lines, fine = check(folder)
            report += ["", f"## {title}: {'passed' if fine else 'FAILED'}", "", *lines]
            good = good and fine
    except (Problem, TurboQuantError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(report))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
