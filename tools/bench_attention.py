#!/usr/bin/env python3
"""Speed of attention over a quantized KV cache, compared with llama.cpp's own f16 in the same run.

The program prints two tables: the attention of one layer (microseconds, GB/s of cache, and the limits of the machine),
and decode and prefill of a whole model (llama-bench). It needs `turboquant build`, a C++ compiler, and `pip install
.[bench]`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import turboquant
from bench_common import Problem, numbers, pairs, shown
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from turboquant.llama.build import where
from turboquant.llama.paths import cache_dir

ROOT = Path(__file__).resolve().parent.parent
PAIRS = "f16,q8_0,q4_0,turbo4,turbo3,turbo2,q8_0:turbo4,q8_0:turbo3"
#: A model with the attention of an 8B model (32 query heads, 8 KV heads of 128) in two layers, and little else.
HEADS, KV_HEADS, HEAD, LAYERS, WIDTH, FF, CONTEXT = 32, 8, 128, 2, 1024, 2048, 131072

EPILOG = """\
The machine must be otherwise idle: llama.cpp's threads wait for each other at every step, and one busy core can halve
all speeds. Ratios are relative to f16 of the same run; compare ratios between machines.

limits   bytes: bytes of the cache divided by the memory bandwidth of the same number of threads; MACs: multiply-adds of
         Q K^T and P V divided by the machine's peak for 8-bit integers. Both are measured in the same run. A KV cache
         that fits into the CPU's caches can be read faster than memory, so its share of the bytes limit may exceed
         100%.
V left   the share of V's rows that sparse V left out in a decode with the default threshold, counted by the same
out      kernels on the same values. LLAMA_ARG_CACHE_SPARSE_V=0 in the environment turns sparse V off.

examples
  python3 tools/bench_attention.py
  python3 tools/bench_attention.py --types f16,turbo4 --depths 8192 --threads 2
  python3 tools/bench_attention.py --plot attention.svg --json attention.json
  python3 tools/bench_attention.py --skip-model --spread 8        scores as peaked as in late layers, for sparse V
  TURBOQUANT_KERNELS=avx2 python3 tools/bench_attention.py        other kernels
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", type=pairs, default=pairs(PAIRS), metavar="K[:V],...", help=f"default {PAIRS}")
    parser.add_argument("--depths", type=numbers, default="512,2048,8192,32768,65536", metavar="N,...",
                        help="tokens in the cache (default %(default)s)")
    parser.add_argument("--threads", type=numbers, default="1,2", metavar="N,...", help="default %(default)s")
    parser.add_argument("--prefill", type=int, default=256, metavar="N", help="tokens of a prefill (default 256)")
    parser.add_argument("--spread", type=float, default=1.0, metavar="S",
                        help="standard deviation of the scores in the first table (default 1: sparse V has nothing to "
                             "leave out)")
    parser.add_argument("--seconds", type=float, default=0.3, help="at least, for each figure (default 0.3)")
    parser.add_argument("--skip-model", action="store_true", help="the first table only")
    parser.add_argument("--skip-layer", action="store_true", help="the second table only")
    parser.add_argument("--bin", type=Path, help="folder of the programs that `turboquant build` made")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the first table; .png, .svg or .pdf")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures")
    given = parser.parse_args()
    for file in (given.plot, given.json):
        if file and not file.resolve().parent.is_dir():
            parser.error(f"{file}: no folder {file.resolve().parent}")
    return given


def native_flags(command: list[str]) -> list[str]:
    """-march=native if the compiler supports it, because the limits need the machine's best instructions."""
    probe = [*command, "-march=native", "-E", "-x", "c++", os.devnull, "-o", os.devnull]
    return ["-march=native"] if subprocess.run(probe, capture_output=True).returncode == 0 else []


def compile_helper(folder: Path) -> Path:
    """tools/bench_attention.cpp, compiled against the build, again if the source or build is newer."""
    source = Path(__file__).with_suffix(".cpp")
    target = cache_dir() / "tools" / "bench_attention"
    library = next(iter(sorted(folder.glob("libggml-base.*"))), None)
    if library is None:
        raise Problem(f"{folder}: no libggml-base; run `turboquant build`, or give --bin")
    stamp = target.with_suffix(".stamp")
    state = f"{folder} {library.stat().st_mtime_ns} {source.stat().st_mtime_ns}"
    if target.is_file() and stamp.is_file() and stamp.read_text() == state:
        return target
    include = folder.parent.parent / "llama.cpp" / "ggml" / "include"
    if not include.is_dir():
        raise Problem(f"{include}: not there; --bin must name the bin folder of a `turboquant build`")
    target.parent.mkdir(parents=True, exist_ok=True)
    cxx = shlex.split(os.environ.get("CXX", "c++"))
    temporary = target.with_name(f"bench_attention.{os.getpid()}.tmp")
    command = [*cxx, "-std=c++17", "-O3", *native_flags(cxx), str(source), "-I", str(include), "-L", str(folder),
               "-lggml", "-lggml-cpu", "-lggml-base", "-lpthread", f"-Wl,-rpath,{folder}", "-o", str(temporary)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Problem(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    os.replace(temporary, target)
    stamp.write_text(state)
    return target


def run_layer(helper: Path, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The output of the helper, line by line."""
    lists = [",".join(map(str, values)) for values in (given.threads, given.depths, (1, given.prefill))]
    command = [helper, HEADS, KV_HEADS, HEAD, given.spread, given.seconds, *lists, *given.types]
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        try:
            assert process.stdout and process.stderr
            for line in process.stdout:
                yield json.loads(line)
            problem = process.stderr.read()
        finally:
            process.kill()
    if process.returncode:
        raise Problem(f"{helper.name} ended with {process.returncode}: {problem.strip()[-2000:]}")


def left_out(pair: str, depth: int, spread: float) -> float | None:
    """Share of V's rows that sparse V leaves out for one token; None if llama.cpp's own attention runs."""
    type_k, type_v = pair.split(":")
    if not any(name.startswith("turbo") for name in (type_k, type_v)):
        return None
    threshold = float(os.environ.get("LLAMA_ARG_CACHE_SPARSE_V") or 1e-6)
    rng = np.random.default_rng(1)

    def rows(name: str) -> np.ndarray:
        """The contents of a cache as in the helper: 256 different rows, repeated."""
        x = rng.standard_normal((KV_HEADS, 256, HEAD), np.float32)
        if name in ("f16", "bf16"):
            coded = x.astype(np.float16).view(np.uint8) if name == "f16" else (x.view(np.uint32) >> 16).astype("<u2")
            coded = coded.view(np.uint8)
        elif name.startswith("turbo"):
            coded = turboquant.quantize(x, name)
        else:
            coded = gguf.quantize(x, gguf.GGMLQuantizationType[name.upper()])
        return np.tile(coded, (1, -(-depth // 256), 1))[:, :depth]

    q = spread * rng.standard_normal((HEADS, 1, HEAD), np.float32)
    _, rate = turboquant.attention(q, rows(type_k), rows(type_v), type_k=type_k, type_v=type_v, sparse_v=threshold,
                                   return_skip_rate=True)
    return rate


def make_model(folder: Path) -> Path:
    """The two-layer model with Q8_0 weights, which is created once."""
    target = cache_dir() / "tools" / f"attention-{HEADS}x{KV_HEADS}x{HEAD}-{LAYERS}-{WIDTH}-{FF}-q8_0.gguf"
    if target.is_file():
        return target
    sys.path.insert(0, str(ROOT / "tests" / "llama"))
    from make_model import Shape, write_model  # noqa: PLC0415

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        plain = write_model(Path(scratch) / "f32.gguf", Shape(head=HEAD, heads=HEADS, kv_heads=KV_HEADS, layers=LAYERS,
                                                              width=WIDTH, ff=FF, context=CONTEXT))
        small = Path(scratch) / "q8_0.gguf"
        done = subprocess.run([folder / "llama-quantize", plain, small, "Q8_0"], capture_output=True, text=True)
        if done.returncode:
            raise Problem(f"llama-quantize failed: {done.stderr[-2000:]}")
        os.replace(small, target)
    return target


def run_model(folder: Path, model: Path, pair: str, depth: int, threads: int, prefill: int) -> dict[str, float]:
    """Tokens per second of decode and prefill, measured by llama-bench."""
    type_k, type_v = pair.split(":")
    command = [folder / "llama-bench", "-m", model, "-fa", 1, "-ctk", type_k, "-ctv", type_v, "-d", depth,
               "-t", threads, "-p", prefill, "-n", 32, "-r", 2, "-o", "json"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise Problem(f"llama-bench failed for {pair} at depth {depth}: {done.stderr[-2000:]}")
    return {"decode" if row["n_gen"] else "prefill": row["avg_ts"] for row in json.loads(done.stdout)}


def progress_bar(console: Console) -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                    console=console, transient=True)


def layer_table(rows: list[dict[str, Any]], limits: dict[int, dict[str, float]]) -> Table:
    table = Table(title=f"attention of one layer, {HEADS} query heads, {KV_HEADS} KV heads of {HEAD}")
    for name in ("tokens", "depth", "threads", "cache K/V"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("µs", "GB/s", "of f16", "bytes limit", "MACs limit", "V left out"):
        table.add_column(name, justify="right", no_wrap=True)
    baseline = {(r["queries"], r["depth"], r["threads"]): r["seconds"] for r in rows if r["pair"] == "f16:f16"}
    order = sorted(rows, key=lambda r: (r["queries"], r["threads"], r["depth"]))
    for at, row in enumerate(order):
        limit = limits[row["threads"]]
        macs = 2 * HEADS * HEAD * row["queries"] * (row["depth"] + (row["queries"] + 1) / 2)
        ratio = baseline[row["queries"], row["depth"], row["threads"]] / row["seconds"]
        last = at + 1 == len(order) or order[at + 1]["depth"] != row["depth"]
        table.add_row(str(row["queries"]), str(row["depth"]), str(row["threads"]), shown(row["pair"]),
                      f"{row['seconds'] * 1e6:.0f}", f"{row['cache_bytes'] / row['seconds'] / 1e9:.2f}",
                      f"{ratio:.2f}x",
                      f"{row['cache_bytes'] / limit['read'] / row['seconds']:.0%}",
                      f"{macs / limit['byte_macs'] / row['seconds']:.0%}",
                      "–" if row["left_out"] is None else f"{row['left_out']:.1%}", end_section=last)
    return table


def model_table(rows: list[dict[str, Any]], prefill: int) -> Table:
    table = Table(title=f"llama-bench, {LAYERS} layers, {HEADS} query and {KV_HEADS} KV heads of {HEAD}, Q8_0 weights")
    for name in ("depth", "threads", "cache K/V", "decode t/s", "of f16", f"prefill {prefill} t/s", "of f16"):
        table.add_column(name, justify="right", no_wrap=True)
    baseline = {(r["depth"], r["threads"]): r for r in rows if r["pair"] == "f16:f16"}
    for at, row in enumerate(rows):
        f16 = baseline[row["depth"], row["threads"]]
        last = at + 1 == len(rows) or rows[at + 1]["depth"] != row["depth"]
        table.add_row(str(row["depth"]), str(row["threads"]), shown(row["pair"]), f"{row['decode']:.1f}",
                      f"{row['decode'] / f16['decode']:.2f}x", f"{row['prefill']:.1f}",
                      f"{row['prefill'] / f16['prefill']:.2f}x", end_section=last)
    return table


def draw(rows: list[dict[str, Any]], limits: dict[int, dict[str, float]], file: Path) -> None:
    """Plot of microseconds over depth for decode and prefill, with the most threads; dashed lines are the limits."""
    try:
        import matplotlib  # noqa: PLC0415

        matplotlib.use("Agg")
        from matplotlib import pyplot  # noqa: PLC0415
    except ImportError:
        raise Problem("--plot needs matplotlib: pip install 'turboquant[bench]'") from None
    threads = max(limits)
    queries = sorted({r["queries"] for r in rows})
    figure, axes = pyplot.subplots(1, len(queries), figsize=(6 * len(queries), 4.5), layout="constrained")
    for axis, count in zip(axes, queries):
        for pair in dict.fromkeys(r["pair"] for r in rows):
            mine = sorted((r["depth"], r["seconds"], r["cache_bytes"]) for r in rows
                          if (r["pair"], r["queries"], r["threads"]) == (pair, count, threads))
            depths = [one[0] for one in mine]
            line, = axis.plot(depths, [one[1] * 1e6 for one in mine], marker="o", label=shown(pair))
            macs = [2 * HEADS * HEAD * count * (d + (count + 1) / 2) / limits[threads]["byte_macs"] for d in depths]
            floor = [max(m, one[2] / limits[threads]["read"]) * 1e6 for m, one in zip(macs, mine)]
            axis.plot(depths, floor, linestyle="--", linewidth=0.8, color=line.get_color())
        axis.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="µs per layer",
                 title=f"{'decode' if count == 1 else f'prefill of {count}'}, {threads} threads (dashed: limit)")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    temporary = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    figure.savefig(temporary, dpi=150)
    os.replace(temporary, file)


def main() -> int:
    given = parse_arguments()
    console, log = Console(width=None if sys.stdout.isatty() else 120), Console(stderr=True)
    folder = (given.bin or where()).resolve()
    layer: list[dict[str, Any]] = []
    limits: dict[int, dict[str, float]] = {}
    model: list[dict[str, Any]] = []
    try:
        if not given.skip_layer:
            helper = compile_helper(folder)
            with progress_bar(log) as progress:
                total = len(given.threads) * (1 + 2 * len(given.depths) * len(given.types))
                task = progress.add_task("attention of one layer", total=total)
                for row in run_layer(helper, given):
                    if row.pop("limit", False):
                        limits[row["threads"]] = row
                    else:
                        one = row["queries"] == 1
                        row["left_out"] = left_out(row["pair"], row["depth"], given.spread) if one else None
                        layer.append(row)
                    progress.advance(task)
            for threads, limit in limits.items():
                console.print(f"{threads} thread{'s' * (threads > 1)}: reads memory at {limit['read'] / 1e9:.1f} GB/s; "
                              f"peak {limit['float_macs'] / 1e9:.0f} GMAC/s in float32, "
                              f"{limit['byte_macs'] / 1e9:.0f} in 8-bit integers")
            console.print(layer_table(layer, limits))
        if not given.skip_model:
            gguf = make_model(folder)
            with progress_bar(log) as progress:
                task = progress.add_task("whole model",
                                         total=len(given.threads) * len(given.depths) * len(given.types))
                for threads in given.threads:
                    for depth in given.depths:
                        for pair in given.types:
                            speed = run_model(folder, gguf, pair, depth, threads, given.prefill)
                            model.append({"pair": pair, "depth": depth, "threads": threads, **speed})
                            progress.advance(task)
            console.print(model_table(model, given.prefill))
        if given.plot and layer:
            draw(layer, limits, given.plot)
            log.print(f"wrote {given.plot}")
        if given.json:
            temporary = given.json.with_name(f".{given.json.name}.{os.getpid()}")
            figures = {"limits": list(limits.values()), "layer": layer, "model": model}
            temporary.write_text(json.dumps(figures, indent=1))
            os.replace(temporary, given.json)
            log.print(f"wrote {given.json}")
    except Problem as problem:
        log.print(f"bench_attention: {problem}", style="red", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        log.print("stopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
