#!/usr/bin/env python3
"""Speed of a quantized KV cache on an NVIDIA GPU, with ratios to llama.cpp's own f16 and q8_0 of the same call.

The program measures a model with the shape of an 8B model, whose weights are random, in parts:

  kernels  the attention of one layer by TurboQuant's kernels alone (needs nvcc)
  decode   one token at a time after a prompt of each depth, and the prompt itself
  prefill  --prefill tokens at once at each depth
  batches  2 to 64 tokens at once, one batch for each figure, as speculative decoding computes them
  slots    8 and 32 sequences that decode together, with a cache for each or with a unified one
  heads    decode with heads of 64, 128 and 256, at the same bytes of K and V

The tables are Markdown. Every figure is stored in the file of --json as soon as it is measured, and a call with the
same file measures only what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_common import Problem, numbers, pairs, shown
from bench_model import write_model

ROOT = Path(__file__).resolve().parent.parent
BASES = ("f16:f16", "q8_0:q8_0")
PAIRS = "turbo4,turbo3,turbo2,q8_0:turbo4,q8_0:turbo3"
PARTS = ("kernels", "decode", "prefill", "batches", "slots", "heads")
SHORT = 16384  # tokens of a prompt that is computed again for each run of a figure
WARM = 4096  # tokens of prompts before a longer one: the first run loads kernels, so it is slower
MODEL = "32,4096,32,8,128,14336,128256"  # see write_model
HOPPER_FLAGS = ["-gencode=arch=compute_90a,code=sm_90a"]  # of nvcc of CUDA 12 or newer, as cpp/turboquant-cuda.cmake
CODEC_FLAGS = ["--ftz=false", "--prec-div=true", "--prec-sqrt=true", "--fmad=false"]  # as cpp/turboquant-cuda.cmake

EPILOG = """\
ratios   The brackets have the ratio to f16, then that to q8_0, of the same round and call. If a call completes the
         figures of an earlier one, it measures f16 and q8_0 again.
programs decode, slots and heads run llama-batched-bench; prefill and batches run llama-bench. llama-bench computes the
         cache of a depth once and restores it for each further figure, and a restored cache has no exact window. So
         these two parts see a window of the batch alone; the other parts see the complete window.
window   --windows sets LLAMA_ARG_CACHE_WINDOW; "default" is the window that the types have without it. The guard is
         off, so that each layer has the named type.
--count  Each figure of a turbo type is computed once more, shorter and without CUDA graphs, and the attention calls are
         counted (TURBOQUANT_COUNT=1). The last table shows which kernels they used.

The model takes 4.5 GB in the folder of --models; the part `heads` writes two more. Without --json nothing is stored.

examples
  python3 tools/bench_cuda.py --json cuda.json
  python3 tools/bench_cuda.py --parts decode --types turbo4 --depths 0,32768 --json cuda.json      a short run
  python3 tools/bench_cuda.py --json cuda.json --stop-after 540       again and again, where a call has ten minutes
  python3 tools/bench_cuda.py --json cuda.json --tables               the tables of what is stored
  python3 tools/bench_cuda.py --rounds 5 --json cuda.json --plot cuda.svg    the speed differs between processes
  python3 tools/bench_cuda.py --parts decode --depths 4096 --count
  python3 tools/bench_cuda.py --skip-model --shape 64,8,128,1       8 query heads per KV head
  python3 tools/bench_cuda.py --skip-model --shape 32,8,128,1,256   with an exact window
  python3 tools/bench_cuda.py --skip-model --shape 32,8,128,32,-1,32    32 requests in one cache
"""


def parts(text: str) -> list[str]:
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: the parts are {', '.join(PARTS)}")
    return [name for name in PARTS if name in chosen]


def depths(text: str) -> list[int]:
    return numbers(text, least=0)


def model_shape(text: str) -> list[int]:
    shape = numbers(text)
    if len(shape) != 7:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted seven numbers, as in {MODEL}")
    return shape


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to measure")
    what.add_argument("--parts", type=parts, default=",".join(PARTS), metavar="NAME,...", help="default %(default)s")
    what.add_argument("--skip-kernels", action="store_true", help="all parts but kernels")
    what.add_argument("--skip-model", action="store_true", help="the part kernels only")
    what.add_argument("--types", type=lambda text: pairs(text, *BASES), default=PAIRS, metavar="K[:V],...",
                      help="besides f16 and q8_0 (default %(default)s)")
    what.add_argument("--windows", type=lambda text: text.split(","), default="default,0", metavar="N[:TYPE],...",
                      help="exact windows of the turbo types (default %(default)s)")
    what.add_argument("--depths", type=depths, default="0,8192,32768,131072", metavar="N,...",
                      help="of decode and prefill: tokens in the cache (default %(default)s)")
    what.add_argument("--decode", type=int, default=128, metavar="N", help="tokens to generate (default %(default)s)")
    what.add_argument("--prefill", type=int, default=512, metavar="N",
                      help="tokens of a prefill (default %(default)s)")
    what.add_argument("--batches", type=numbers, default="2,4,8,16,32,64", metavar="N,...",
                      help="tokens at once (default %(default)s)")
    what.add_argument("--batch-depths", type=depths, default="32768", metavar="N,...", help="default %(default)s")
    what.add_argument("--slots", type=numbers, default="8,32", metavar="N,...", help="sequences (default %(default)s)")
    what.add_argument("--slot-depth", type=int, default=4096, metavar="N",
                      help="tokens of each sequence (default %(default)s)")
    what.add_argument("--heads", type=numbers, default="64,128,256", metavar="N,...",
                      help="values of a head (default %(default)s)")
    what.add_argument("--head-depths", type=depths, default="32768", metavar="N,...", help="default %(default)s")
    what.add_argument("--shape", default="32,8,128,1", metavar="H,KV,D,T[,W[,R]]",
                      help="of the part kernels: query heads, KV heads, head size, tokens, slots of an exact window "
                           "(-1: none), requests that share the cache (default %(default)s, no window, one request)")
    what.add_argument("--count", action="store_true", help="also count which kernels compute attention")

    how = parser.add_argument_group("how to measure")
    how.add_argument("--repeat", type=int, default=3, metavar="N",
                     help=f"runs of a figure, of which the median counts (default %(default)s); prompts of more than "
                          f"{SHORT} tokens for decode are computed once, after shorter ones")
    how.add_argument("--rounds", type=int, default=1, metavar="N",
                     help="times to measure everything; the mean counts (default 1)")
    how.add_argument("--stop-after", type=float, metavar="SECONDS",
                     help="start nothing new after this time; the next call with the same --json goes on")
    how.add_argument("--timeout", type=float, default=900, metavar="SECONDS",
                     help="for one run of a program (default %(default)s)")
    how.add_argument("--model-shape", type=model_shape, default=MODEL, metavar="L,W,H,KV,D,FF,V",
                     help="layers, width, query heads, KV heads, values of a head, width of the feed-forward layers, "
                          "vocabulary (default %(default)s)")
    how.add_argument("--model", type=Path, metavar="FILE", help="a GGUF file instead; without the part heads")
    how.add_argument("--models", type=Path, metavar="DIR",
                     help="where the random models are kept (default: tools in TurboQuant's cache folder)")
    how.add_argument("--split", choices=("none", "layer", "row", "tensor"), default="none",
                     help="how to split the model over several GPUs, llama.cpp's -sm (default: one GPU)")
    how.add_argument("--arch", default="native", help="GPUs to compile the program of the part kernels for")
    how.add_argument("--bin", type=Path, metavar="DIR",
                     help="folder of the programs (default: those of the last `turboquant build`)")

    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, metavar="FILE", help="store all figures, and go on from those it has")
    out.add_argument("--tables", action="store_true", help="measure nothing, print the tables of --json")
    out.add_argument("--plot", type=Path, metavar="FILE", help="also draw decode's ratios; .png, .svg or .pdf")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds takes a number from 1 on")
    if given.tables and not given.json:
        parser.error("--tables needs --json")
    if given.model and not given.model.is_file():
        parser.error(f"{given.model} is not a file")
    if given.skip_kernels:
        given.parts = [part for part in given.parts if part != "kernels"]
    if given.skip_model:
        given.parts = ["kernels"]
    return given


# ---- jobs: one run of a program each --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """The figures of one pair in one run of a program. Jobs that differ in pair and window alone are compared."""

    part: str
    head: int
    depth: int
    slots: int
    unified: bool
    pair: str
    window: str  # empty for pairs without a turbo type, which have none

    @staticmethod
    def of(row: dict[str, Any]) -> Job:
        """The job of a stored row."""
        return Job(**{name: row[name] for name in Job.__dataclass_fields__})

    @property
    def group(self) -> tuple[Any, ...]:
        return self.part, self.head, self.depth, self.slots, self.unified

    @property
    def name(self) -> str:
        window = {"": "", "default": ""}.get(self.window, f", window {self.window}")
        return shown(self.pair) + window

    @property
    def place(self) -> str:
        if self.part == "slots":
            return f"{self.slots} slots of {self.depth}, {'unified' if self.unified else 'split'}"
        return f"heads of {self.head}, depth {self.depth}" if self.part == "heads" else f"depth {self.depth}"


def all_jobs(given: argparse.Namespace) -> list[Job]:
    own = given.model_shape[4]
    heads = [] if given.model else given.heads
    places = {
        "decode": [(own, depth, 1, False) for depth in given.depths],
        "prefill": [(own, depth, 1, False) for depth in given.depths],
        "batches": [(own, depth, 1, False) for depth in given.batch_depths],
        "slots": [(own, given.slot_depth, slots, unified) for slots in given.slots for unified in (False, True)],
        "heads": [(head, depth, 1, False) for depth in given.head_depths for head in heads],
    }
    return [
        Job(part, *place, pair, window)
        for part in given.parts if part != "kernels"
        for place in places[part]
        for pair in given.types
        for window in (given.windows if "turbo" in pair else [""])
    ]


def program_of(part: str) -> str:
    return "llama-bench" if part in ("prefill", "batches") else "llama-batched-bench"


def command_of(job: Job, folder: Path, model: Path, given: argparse.Namespace, *, count: bool) -> list[object]:
    type_k, type_v = job.pair.split(":")
    common: list[object] = ["-m", model, "-ngl", 99, "-ctk", type_k, "-ctv", type_v, "-sm", given.split]
    program = program_of(job.part)
    if program == "llama-bench":
        tokens = given.batches if job.part == "batches" else [given.prefill]
        once = ["-r", 1, "--no-warmup"] if count else ["-r", given.repeat]
        return [folder / program, *common, "-fa", 1, "-d", job.depth, "-p", ",".join(map(str, tokens)), "-n", 0,
                *once, "-o", "jsonl"]
    prompt, decode = max(job.depth, 1), 8 if count else given.decode
    long = job.slots * prompt > SHORT
    repeat = 1 if count or long else given.repeat
    cells = job.slots * ((prompt + decode + 255) // 256 * 256)
    prompts = f"{WARM // job.slots},{prompt}" if long and not count else prompt
    return [folder / program, *common, "-fa", "on", "-c", cells, "-npp", prompts, "-ntg",
            ",".join([str(decode)] * repeat), "-npl", job.slots, "-kvu" if job.unified else "-no-kvu",
            "--output-format", "jsonl"]


def environment_of(job: Job, *, count: bool) -> dict[str, str]:
    chosen = {"LLAMA_ARG_CACHE_GUARD": "off"}
    if job.window not in ("", "default"):
        chosen["LLAMA_ARG_CACHE_WINDOW"] = job.window
    if count:
        chosen |= {"TURBOQUANT_COUNT": "1", "GGML_CUDA_DISABLE_GRAPHS": "1"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_CACHE_")}
    inherited.pop("TURBOQUANT_COUNT", None)
    return inherited | chosen


def run(command: list[object], timeout: float | None = None, env: dict[str, str] | None = None) -> tuple[str, str]:
    name = Path(str(command[0])).name
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace",
                              timeout=timeout, env=env, stdin=subprocess.DEVNULL)
    except (FileNotFoundError, PermissionError):
        raise Problem(f"{command[0]} is not a program on this machine") from None
    except subprocess.TimeoutExpired:
        raise Problem(f"{name} was ended after {timeout:.0f} s (--timeout)") from None
    if done.returncode:
        raise Problem(f"{name} ended with {done.returncode}:\n{(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout, done.stderr


def figures_of(job: Job, output: str) -> list[dict[str, Any]]:
    """The figures in the JSON lines of a program, which are medians, because the first run may warm the card up."""
    runs: dict[tuple[str, int], list[float]] = {}
    for line in output.splitlines():
        if not line.startswith("{"):
            continue
        row = json.loads(line)
        if program_of(job.part) == "llama-bench":
            runs["batch", row["n_prompt"]] = row["samples_ts"]
        elif row["pp"] == max(job.depth, 1):
            runs.setdefault(("decode", row["pl"]), []).append(row["speed_tg"])
            runs.setdefault(("prompt", row["pl"] * row["pp"]), []).append(row["speed_pp"])
    if not runs:
        raise Problem(f"there is no figure in the output of the program:\n{output.strip()[-500:]}")
    return [{"what": what, "tokens": tokens, "tokens_s": statistics.median(speeds), "runs": speeds}
            for (what, tokens), speeds in runs.items()]


def paths_of(log: str) -> dict[str, int]:
    """The calls of kernels that TURBOQUANT_COUNT reports at the end of a program, by kernel and shape."""
    start = "turboquant: count "
    counts = [line[len(start):].split(" ", 1) for line in log.splitlines() if line.startswith(start)]
    if not counts:
        raise Problem("the programs count no calls; build them again with this version of TurboQuant")
    return {name: int(number) for number, name in counts}


# ---- what is stored -------------------------------------------------------------------------------------------------


class Store:
    """The figures, in the file of --json if there is one. A row has the fields of its job, round and call."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.data: dict[str, Any] = {"settings": {}, "kernels": {}, "rows": []}
        self.call = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime())}-{os.getpid()}"
        if file and file.is_file():
            try:
                data = json.loads(file.read_text(encoding="utf-8"))
                if not isinstance(data["rows"], list) or not isinstance(data["settings"], dict):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                raise Problem(f"{file} is not a file of this program; name another one with --json") from None
            self.data = data
        elif file and not file.resolve().parent.is_dir():
            raise Problem(f"{file}: no folder {file.resolve().parent}")

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.data["rows"]

    def agree(self, settings: dict[str, Any]) -> None:
        """Refuse to mix figures of different machines, builds or models."""
        stored = self.data["settings"]
        for name, value in settings.items():
            if self.rows and stored.get(name) != value:
                raise Problem(f"{self.file} has figures with {name} {stored.get(name)!r}, and this call has {value!r}; "
                              "name another file with --json")
        self.data["settings"] = settings

    def save(self) -> None:
        if self.file:
            temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}")
            temporary.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, self.file)

    def find(self, job: Job, number: int, call: str | None = None) -> dict[str, Any] | None:
        """The latest row of a job in a round."""
        fields = asdict(job) | {"round": number} | ({"call": call} if call else {})
        for row in reversed(self.rows):
            if all(row.get(name) == value for name, value in fields.items()):
                return row
        return None

    def add(self, job: Job, number: int, **results: Any) -> None:
        self.rows.append(asdict(job) | {"round": number, "call": self.call} | results)
        self.save()


def settings_of(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """What must be the same in all figures of a file."""
    try:
        machine = run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])[0].strip()
    except Problem:
        machine = f"no NVIDIA GPU, {platform.machine()}"
        print("bench_cuda: nvidia-smi does not work here, so this measures the CPU", file=sys.stderr)
    programs = sorted({folder / program_of(part) for part in given.parts if part != "kernels"})
    for file in programs:
        if not file.is_file():
            raise Problem(f"{file} is missing; `turboquant build --backend cuda --target default --target {file.name}` "
                          "makes it, and --bin names the folder")
    digest = hashlib.sha256()
    for file in [*sorted(folder.glob("libggml*.so")), *sorted(folder.glob("libllama.so"))] or programs:
        digest.update(file.read_bytes())
    return {
        "machine": machine,
        "programs": digest.hexdigest()[:16],
        "model": str(given.model) if given.model else given.model_shape,
        "decode": given.decode,
        "prefill": given.prefill,
        "repeat": given.repeat,
        "split": given.split,
    }


def model_of(job: Job, given: argparse.Namespace) -> Path:
    if given.model:
        return given.model
    if given.models:
        return write_model(given.models, given.model_shape, job.head)
    try:
        from turboquant.llama.paths import cache_dir  # noqa: PLC0415
    except ImportError:
        raise Problem("the package turboquant is not installed here; say with --models where to keep models") from None
    return write_model(cache_dir() / "tools", given.model_shape, job.head)


# ---- measuring ------------------------------------------------------------------------------------------------------


def missing(jobs: list[Job], number: int, store: Store, *, count: bool) -> Iterator[tuple[Job, bool, bool]]:
    """The jobs of a round to run, each with whether to time it and whether to count its kernels.

    If a group lacks figures that an earlier call did not measure, f16 and q8_0 are measured in this call as well.
    """
    groups: dict[tuple[Any, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.group, []).append(job)
    for group in groups.values():
        lacking = [job for job in group if not store.find(job, number)]
        for job in group:
            row = store.find(job, number)
            again = bool(lacking) and job.pair in BASES and not store.find(job, number, store.call)
            timed = job in lacking or again
            counted = count and bool(job.window) and not (row and "paths" in row)
            if timed or counted:
                yield job, timed, counted


def measure_jobs(folder: Path, given: argparse.Namespace, store: Store) -> list[str]:
    """Run what is missing. Returns what failed."""
    jobs, begin = all_jobs(given), time.monotonic()
    failed = []
    todo = [(job, number, timed, counted) for number in range(1, given.rounds + 1)
            for job, timed, counted in missing(jobs, number, store, count=given.count)]
    for at, (job, number, timed, counted) in enumerate(todo):
        if given.stop_after and time.monotonic() - begin > given.stop_after:
            print(f"bench_cuda: stopped with {len(todo) - at} of {len(todo)} runs left; call again", file=sys.stderr)
            break
        start = time.monotonic()
        results: dict[str, Any] = {}
        try:
            model = model_of(job, given)
            if timed:
                command = command_of(job, folder, model, given, count=False)
                output, _ = run(command, given.timeout, environment_of(job, count=False))
                results["figures"] = figures_of(job, output)
                store.add(job, number, seconds=round(time.monotonic() - start, 1), **results)
            if counted:
                command = command_of(job, folder, model, given, count=True)
                _, log = run(command, given.timeout, environment_of(job, count=True))
                row = store.find(job, number)
                assert row is not None
                row["paths"] = paths_of(log)
                store.save()
            said = " ".join(f"{one['tokens_s']:.0f}" for one in results.get("figures", [])) or "counted"
        except Problem as problem:
            said = f"failed: {problem}"
            failed.append(f"{job.part}, {job.place}, {job.name}: {problem}")
        elapsed = time.monotonic() - begin
        left = elapsed / (at + 1) * (len(todo) - at - 1)
        print(f"[{at + 1}/{len(todo)}] round {number}, {job.part}, {job.place}, {job.name}: {said} "
              f"({time.monotonic() - start:.0f} s, about {left / 60:.0f} min left)", file=sys.stderr, flush=True)
    return failed


def compile_kernels(folder: Path, arch: str) -> Path:
    """bench_cuda.cu, compiled with the kernels that it measures."""
    try:
        from turboquant.llama.toolchain import ToolError, cuda_compiler  # noqa: PLC0415
    except ImportError:
        raise Problem("the part kernels needs the package turboquant: pip install .") from None
    try:
        nvcc, version = cuda_compiler()
    except ToolError as problem:
        raise Problem(str(problem)) from None
    kernels = ROOT / "cpp" / "cuda"
    common: list[object] = [nvcc, "-std=c++17", "-O3", f"-arch={arch}", f"-I{kernels}", f"-I{ROOT / 'cpp' / 'include'}"]
    hopper = HOPPER_FLAGS if not re.search(r"release ([1-9]|1[01])\.", version) else []
    flags = dict.fromkeys(("attention", "codec", "window"), CODEC_FLAGS)
    flags |= dict.fromkeys(("hopper128", "hopper_direct128"), ["-use_fast_math", *hopper])
    objects = [folder / f"{name}.o" for name in flags]
    for compiled in objects:
        run([*common, *flags[compiled.stem], "-c", kernels / f"{compiled.stem}.cu", "-o", compiled])
    program = folder / "bench_cuda"
    attention = sorted(file for file in kernels.glob("*.cu") if file.stem not in flags)
    source = ROOT / "tools" / "bench_cuda.cu"
    run([*common, "-use_fast_math", "--threads", 0, source, *attention, *objects, "-o", program])
    return program


def covered(pair: str) -> bool:
    """Whether the kernels support the pair: a turbo type with one of the same family, q8_0 or f16."""
    sides = pair.split(":")
    families = {side.endswith("_tcq") for side in sides if side.startswith("turbo")}
    return len(families) == 1 and all(side.startswith("turbo") or side in ("q8_0", "f16") for side in sides)


def measure_kernels(given: argparse.Namespace, store: Store) -> None:
    names = ",".join(pair for pair in given.types if covered(pair))
    depths = ",".join(map(str, sorted({max(depth, 256) for depth in given.depths})))
    asked = {"types": names, "depths": depths, "shape": given.shape}
    if store.data["kernels"].get("asked") == asked:
        return
    print("compiling the kernels", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        lines = run([compile_kernels(Path(scratch), given.arch), names, depths, given.shape])[0].splitlines()
    device, *rows = [json.loads(line) for line in lines]
    store.data["kernels"] = {"asked": asked, "device": device, "rows": rows}
    store.save()


# ---- tables ---------------------------------------------------------------------------------------------------------


def markdown(title: str, head: list[str], lines: list[list[str]]) -> str:
    body = [head, ["---", *["--:"] * (len(head) - 1)], *lines]
    return f"{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in body) + "\n"


def kernel_table(kernels: dict[str, Any]) -> str:
    device = kernels["device"]
    lines = [[shown(row["pair"] if ":" in row["pair"] else f"{row['pair']}:{row['pair']}"), str(row["depth"]),
              f"{row['layer_us']:.1f}", f"{row['tb_s']:.2f}", f"{row['share']:.0%}"]
             for row in kernels["rows"] if "pair" in row]
    return markdown(f"One layer's attention, {device['device']}, cudaMemcpy {device['copy_tb_s']:.2f} TB/s",
                    ["K/V", "depth", "µs", "TB/s of cache", "of cudaMemcpy"], lines)


class Figures:
    """Tokens per second and ratios over the rows of a store: by group, name of pair and window, and figure."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.speeds: dict[tuple[Any, ...], list[float]] = {}
        self.ratios: dict[tuple[Any, ...], dict[str, list[float]]] = {}
        good = [(Job.of(row), row) for row in rows]
        base = {(job.group, job.pair, row["round"], row["call"], one["what"], one["tokens"]): one["tokens_s"]
                for job, row in good if job.pair in BASES for one in row["figures"]}
        for job, row in good:
            for one in row["figures"]:
                key = (job.group, job.name, one["what"], one["tokens"])
                self.speeds.setdefault(key, []).append(one["tokens_s"])
                for pair in BASES:
                    other = base.get((job.group, pair, row["round"], row["call"], one["what"], one["tokens"]))
                    if other:
                        self.ratios.setdefault(key, {}).setdefault(pair, []).append(one["tokens_s"] / other)

    def ratio(self, *key: Any) -> float | None:
        """The mean ratio to f16."""
        ratios = self.ratios.get(key, {}).get(BASES[0])
        return statistics.fmean(ratios) if ratios else None

    def cell(self, *key: Any) -> str:
        speeds = self.speeds.get(key)
        if not speeds:
            return "–"
        mean = statistics.fmean(speeds)
        spread = f" ± {statistics.stdev(speeds) / len(speeds) ** 0.5:.0f}" if len(speeds) > 1 else ""
        if key[1] == shown(BASES[0]):
            return f"{mean:.0f}{spread}"
        ratios = [f"{statistics.fmean(found):.2f}" if found else "–"
                  for found in (self.ratios.get(key, {}).get(pair) for pair in BASES)]
        return f"{mean:.0f}{spread} ({'; '.join(ratios[:1] if key[1] == shown(BASES[1]) else ratios)})"


def model_tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    figures = Figures(rows)
    jobs = list(dict.fromkeys(Job.of(row) for row in rows))

    def table(title: str, part: str, columns: list[tuple[str, tuple[Any, ...], str, int]]) -> str:
        names = list(dict.fromkeys(job.name for job in jobs if job.part == part))
        order = [shown(pair) for pair in BASES if shown(pair) in names]
        names = order + [name for name in names if name not in order]
        lines = [[name, *(figures.cell(group, name, what, tokens) for _, group, what, tokens in columns)]
                 for name in names]
        return markdown(f"{title}, tokens/s (ratio to f16; to q8_0)", ["K/V", *(head for head, *_ in columns)], lines)

    def groups(part: str) -> list[Job]:
        return list({job.group: job for job in jobs if job.part == part}.values())

    def tokens_of(part: str) -> list[int]:
        return sorted({figure["tokens"] for row in rows if row["part"] == part for figure in row["figures"]})

    if one := sorted(groups("decode"), key=lambda job: job.depth):
        yield table("Decode", "decode", [(f"at {job.depth}", job.group, "decode", 1) for job in one])
        long = [job for job in one if job.depth]
        if long:
            yield table("The whole prompt", "decode",
                        [(f"of {job.depth}", job.group, "prompt", job.depth) for job in long])
    if one := sorted(groups("prefill"), key=lambda job: job.depth):
        for count in tokens_of("prefill"):
            yield table(f"Prefill of {count}", "prefill",
                        [(f"at {job.depth}", job.group, "batch", count) for job in one])
    for job in sorted(groups("batches"), key=lambda job: job.depth):
        yield table(f"Tokens at once at depth {job.depth}", "batches",
                    [(str(count), job.group, "batch", count) for count in tokens_of("batches")])
    if one := sorted(groups("slots"), key=lambda job: (job.slots, job.unified)):
        head = {job: f"{job.slots} {'unified' if job.unified else 'split'}" for job in one}
        depth = ", ".join(map(str, sorted({job.depth for job in one})))
        yield table(f"Decode of slots of {depth}", "slots",
                    [(head[job], job.group, "decode", job.slots) for job in one])
        yield table(f"Prompts of slots of {depth}", "slots",
                    [(head[job], job.group, "prompt", job.slots * job.depth) for job in one])
    if one := sorted(groups("heads"), key=lambda job: (job.depth, job.head)):
        yield table("Decode by the size of heads", "heads",
                    [(f"{job.head} at {job.depth}", job.group, "decode", 1) for job in one])
    lines = []
    for row in rows:
        if "paths" in row:
            job = Job.of(row)
            calls = sorted(row["paths"].items())
            lines.append([f"{job.part}, {job.place}, {job.name}", "; ".join(f"{n} {path}" for path, n in calls)])
    if lines:
        yield markdown("Which code computed attention and RoPE", ["run", "calls, by tokens of a stream"], lines)


def draw(rows: list[dict[str, Any]], file: Path, title: str) -> None:
    try:
        import matplotlib  # noqa: PLC0415

        matplotlib.use("Agg")
        from matplotlib import pyplot  # noqa: PLC0415
    except ImportError:
        raise Problem("--plot needs matplotlib: pip install 'turboquant[bench]'") from None
    figures = Figures(rows)
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name in dict.fromkeys(key[1] for key in figures.speeds if key[0][0] == "decode"):
        ratios = {key[0][2]: figures.ratio(*key) for key in figures.speeds
                  if key[0][0] == "decode" and key[1] == name and key[2] == "decode"}
        points = sorted((depth, ratio) for depth, ratio in ratios.items() if ratio)
        axes.plot([str(depth) for depth, _ in points], [ratio for _, ratio in points], marker="o", label=name)
    axes.set(xlabel="tokens in the cache", ylabel="decode speed, f16 = 1", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, bbox_inches="tight")


def programs_of(given: argparse.Namespace) -> Path:
    if given.bin:
        return given.bin.resolve()
    try:
        from turboquant.llama.build import where  # noqa: PLC0415
    except ImportError:
        raise Problem("the package turboquant is not installed here; name the programs' folder with --bin") from None
    try:
        return where()
    except FileNotFoundError as problem:
        raise Problem(str(problem)) from None


def main() -> int:
    given = parse_arguments()
    failed = []
    try:
        store = Store(given.json)
        if not given.tables:
            if given.parts != ["kernels"]:
                folder = programs_of(given)
                store.agree(settings_of(folder, given))
            if "kernels" in given.parts:
                try:
                    measure_kernels(given, store)
                except Problem as problem:
                    failed.append(f"kernels: {problem}")
            if given.parts != ["kernels"]:
                failed += measure_jobs(folder, given, store)
        machine = store.data["settings"].get("machine", "")
        print(f"{machine}\n" if machine else "", end="\n" if machine else "")
        if store.data["kernels"]:
            print(kernel_table(store.data["kernels"]))
        for table in model_tables(store.rows):
            print(table)
        if given.plot:
            draw(store.rows, given.plot, machine)
    except Problem as problem:
        print(f"bench_cuda: {problem}", file=sys.stderr)
        return 1
    for line in failed:
        print(f"bench_cuda: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("bench_cuda: stopped", file=sys.stderr)
        sys.exit(130)
