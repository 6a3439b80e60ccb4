#!/usr/bin/env python3
"""Speed of a quantized KV cache on an NVIDIA GPU, compared with llama.cpp's own f16 in the same run.

The program prints two tables: the attention of one layer by TurboQuant's kernel (microseconds, cache bytes per second,
and their share of the bytes that cudaMemcpy reads and writes on the card), and decode and prefill of a whole model by
llama-bench, with ratios to f16. It needs `turboquant build --backend cuda` and nvcc; --plot also needs `pip install
.[plot]`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_attention import Problem, make_model, numbers, pairs, progress_bar, shown
from rich.console import Console
from rich.table import Table
from turboquant.llama.build import where
from turboquant.llama.toolchain import ToolError, cuda_compiler

ROOT = Path(__file__).resolve().parent.parent
PAIRS = "f16,q8_0,turbo4,turbo3,turbo2,q8_0:turbo4,q8_0:turbo3"
CODEC_FLAGS = ["--ftz=false", "--prec-div=true", "--prec-sqrt=true", "--fmad=false"]  # as cpp/turboquant-cuda.cmake

EPILOG = """\
The model has two layers with the attention of an 8B model (32 query heads, 8 KV heads of 128) and little else, so that
the time of attention dominates. The rest of a token takes about 170 microseconds of small kernels on an H200.

examples
  python3 tools/bench_cuda.py
  python3 tools/bench_cuda.py --types f16,turbo4 --depths 0,131072 --repeat 10
  python3 tools/bench_cuda.py --depths 0 --rounds 10    the time of launches differs between processes
  python3 tools/bench_cuda.py --json cuda.json --plot cuda.svg
  python3 tools/bench_cuda.py --skip-model --shape 64,8,128,1       8 query heads per KV head
  python3 tools/bench_cuda.py --skip-model --shape 32,8,128,1,256   with an exact window
"""


def depths(text: str) -> list[int]:
    """Numbers of tokens in the cache; unlike `numbers` this accepts 0."""
    return [0 if part.strip() == "0" else numbers(part)[0] for part in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", type=pairs, default=pairs(PAIRS), metavar="K[:V],...", help=f"default {PAIRS}")
    parser.add_argument("--depths", type=depths, default="0,8192,32768,131072", metavar="N,...",
                        help="tokens in the cache (default %(default)s)")
    parser.add_argument("--prefill", type=int, default=512, metavar="N", help="tokens of a prefill (default 512)")
    parser.add_argument("--decode", type=int, default=128, metavar="N", help="tokens to generate (default 128)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="runs of each figure (default 5)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N",
                        help="times to start all over; the mean counts (default 1)")
    parser.add_argument("--shape", default="32,8,128,1", metavar="H,KV,D,T[,W]",
                        help="of the first table: query heads, KV heads, head size, tokens, slots of an exact window "
                             "(default %(default)s, no window)")
    parser.add_argument("--split", choices=("none", "layer", "row", "tensor"), default="none",
                        help="how llama-bench splits the model over several GPUs, its -sm (default: one GPU)")
    parser.add_argument("--arch", default="native", help="GPUs to compile the first table's program for")
    parser.add_argument("--skip-kernels", action="store_true", help="the second table only")
    parser.add_argument("--skip-model", action="store_true", help="the first table only")
    parser.add_argument("--bin", type=Path, help="folder of the programs that `turboquant build` made")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw decode's ratios; .png, .svg or .pdf")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds takes a number from 1 on")
    return given


def run(command: list[object]) -> str:
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    except FileNotFoundError:
        hint = " (is NVIDIA's driver installed?)" if command[0] == "nvidia-smi" else ""
        raise Problem(f"{command[0]} is not on this machine{hint}") from None
    if done.returncode:
        raise Problem(f"{Path(str(command[0])).name} failed:\n{done.stderr[-2000:] or done.stdout[-2000:]}")
    return done.stdout


def compile_kernels(folder: Path, arch: str) -> Path:
    """bench_cuda.cu, compiled with the kernels that it measures."""
    nvcc, _ = cuda_compiler()
    kernels = ROOT / "cpp" / "cuda"
    common: list[object] = [nvcc, "-std=c++17", "-O3", f"-arch={arch}", f"-I{kernels}", f"-I{ROOT / 'cpp' / 'include'}"]
    exact = [folder / f"{name}.o" for name in ("codec", "window")]
    for compiled in exact:
        run([*common, *CODEC_FLAGS, "-c", kernels / f"{compiled.stem}.cu", "-o", compiled])
    program = folder / "bench_cuda"
    attention = sorted(kernels.glob("attention*.cu"))
    run([*common, "-use_fast_math", "--threads", 0, ROOT / "tools" / "bench_cuda.cu", *attention, *exact, "-o", program])
    return program


def covered(pair: str) -> bool:
    """Whether the decode kernel supports the pair: a turbo type with one of the same family, q8_0 or f16."""
    sides = pair.split(":")
    families = {side.endswith("_tcq") for side in sides if side.startswith("turbo")}
    return len(families) == 1 and all(side.startswith("turbo") or side in ("q8_0", "f16") for side in sides)


def kernel_rows(program: Path, given: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    names = ",".join(pair for pair in given.types if covered(pair))
    lines = run([program, names, ",".join(str(max(depth, 256)) for depth in given.depths), given.shape]).splitlines()
    rows = [json.loads(line) for line in lines]
    return rows[0], rows[1:]


def kernel_table(device: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"one layer's attention, {device['device']}, cudaMemcpy {device['copy_tb_s']:.2f} TB/s")
    for name in ("K/V", "depth", "µs", "TB/s of cache", "of cudaMemcpy"):
        table.add_column(name, justify="left" if name == "K/V" else "right")
    for row in rows:
        if "pair" in row:
            pair = row["pair"] if ":" in row["pair"] else f"{row['pair']}:{row['pair']}"
            table.add_row(shown(pair), str(row["depth"]), f"{row['layer_us']:.1f}", f"{row['tb_s']:.2f}",
                          f"{row['share']:.0%}")
    return table


def model_rows(folder: Path, given: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    model = make_model(folder)
    found: dict[tuple[str, int, str], list[float]] = {}
    with progress_bar(console) as progress:
        task = progress.add_task("llama-bench", total=len(given.types) * given.rounds)
        for pair in given.types * given.rounds:
            type_k, type_v = pair.split(":")
            command = [folder / "llama-bench", "-m", model, "-ngl", 99, "-fa", 1, "-ctk", type_k, "-ctv", type_v,
                       "-sm", given.split, "-d", ",".join(map(str, given.depths)), "-p", given.prefill,
                       "-n", given.decode, "-r", given.repeat, "-o", "json"]
            for row in json.loads(run(command)):
                key = (pair, row["n_depth"], "decode" if row["n_gen"] else "prefill")
                found.setdefault(key, []).append(row["avg_ts"])
            progress.advance(task)
    rows: list[dict[str, Any]] = [
        {"pair": pair, "depth": depth, "what": what, "tokens_s": statistics.fmean(speeds), "rounds": speeds}
        for (pair, depth, what), speeds in found.items()
    ]
    base = {(row["depth"], row["what"]): row["tokens_s"] for row in rows if row["pair"] == "f16:f16"}
    for row in rows:
        row["ratio"] = row["tokens_s"] / base[row["depth"], row["what"]]
    return rows


def model_table(rows: list[dict[str, Any]], what: str, given: argparse.Namespace) -> Table:
    table = Table(title=f"{what}, tokens/s (and the ratio to f16)")
    table.add_column("K/V")
    for depth in given.depths:
        table.add_column(f"at {depth}", justify="right")
    for pair in given.types:
        cells = [row for row in rows if row["pair"] == pair and row["what"] == what]
        table.add_row(shown(pair), *(f"{row['tokens_s']:.0f} ({row['ratio']:.2f})" for row in cells))
    return table


def draw(rows: list[dict[str, Any]], given: argparse.Namespace, title: str) -> None:
    import matplotlib.pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for pair in given.types:
        points = [row for row in rows if row["pair"] == pair and row["what"] == "decode"]
        ratios = [row["ratio"] for row in points]
        axes.plot([str(row["depth"]) for row in points], ratios, marker="o", label=shown(pair))
    axes.set(xlabel="tokens in the cache", ylabel="decode speed, f16 = 1", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(given.plot, bbox_inches="tight")


def main() -> int:
    given = parse_arguments()
    console = Console(file=sys.stdout)
    record: dict[str, Any] = {"command": sys.argv[1:]}
    try:
        record["driver"] = run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]).strip()
        console.print(record["driver"])
        if not given.skip_kernels:
            with tempfile.TemporaryDirectory() as scratch:
                with console.status("compiling the kernels"):
                    program = compile_kernels(Path(scratch), given.arch)
                record["device"], record["kernels"] = kernel_rows(program, given)
            console.print(kernel_table(record["device"], record["kernels"]))
        if not given.skip_model:
            record["model"] = model_rows(given.bin or where(), given, Console(stderr=True))
            for what in ("decode", "prefill"):
                console.print(model_table(record["model"], what, given))
            if given.plot:
                draw(record["model"], given, record["driver"])
    except (Problem, ToolError, FileNotFoundError) as problem:
        print(f"bench_cuda: {problem}", file=sys.stderr)
        return 1
    if given.json:
        given.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
