#!/usr/bin/env python3
"""Mutation tests: change one line at a time in a copy of the code, and check that the tests fail.

Every mutation is a realistic mistake: a line of a file, its replacement, and the tests that must fail. The program
prints docs/mutations.md. The exit status is 1 if the tests pass with a mutation.

Requirements: cmake, ninja, a C++ compiler and the test dependencies (pip install '.[test]'). Only files in a temporary
folder are changed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from turboquant.llama.progress import Reporter

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cmake", "cpp", "ggml_types", "models", "python", "tests", "tools")
FILES = ("CMakeLists.txt", "pyproject.toml", "README.md")


INTRODUCTION = """\
# Mutations

This table shows that the tests detect mistakes. For each row, `tools/mutate.py` changes one line in a copy of the code.
The row describes the change, its effect, and the first test that fails: the suite of `tools/test.py`, the test, and its
case where it has one. The table is the output of

```sh
python3 tools/mutate.py > docs/mutations.md
```

on a CPU whose best kernels are `{kernels}`. A mutation that no test detects is shown as **survives**, and the command
fails.

| mutation | what it breaks | suite | test that catches it |
|---|---|---|---|"""


@dataclass(frozen=True)
class Mutation:
    """A mutation. `old` occurs once in `file`; `tests` is a regular expression for ctest, or files for pytest."""

    what: str
    breaks: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def suite(self) -> str:
        """The suite of tools/test.py with the tests."""
        kind = self.tests.split(".")[0]
        return "python" if self.tests.endswith(".py") else "cpp" if kind == "core" else kind


ATTENTION = "cpp/src/attention.cpp"
TILE = "cpp/src/attention_tile.h"
METAL = "cpp/metal/attention.metal"
MUTATIONS = (
    Mutation("the mask of later tiles is read from row 0", "masks of caches of more than 64 rows",
             ATTENTION, "kernel.bias(mask.from(tile),", "kernel.bias(mask.from(0),", "core.attention"),
    Mutation("rows of a tile that the first query does not see are skipped", "batches whose tokens see different rows",
             ATTENTION, "        count = r;\n    }", "        count = r;\n        break;\n    }", "core.attention"),
    Mutation("later runs of tokens get the masks of the first", "batches of more than 128 query rows",
             ATTENTION, "mask[size_t(rows)] = a.mask ? a.mask + t * a.n_kv",
             "mask[size_t(rows)] = a.mask ? a.mask + (t - token) * a.n_kv", "core.attention"),
    Mutation("a merge ignores the second part's maximum", "ranges of rows that several threads compute",
             ATTENTION, "const float largest = a > b ? a : b;", "const float largest = a;", "core.attention"),
    Mutation("a merge hides NaN", "the sight of a broken cache: the output looks right",
             ATTENTION, "if (b == -INFINITY && from[head_v + 1] == 0) return;", "if (b == -INFINITY) return;",
             "core.attention"),
    Mutation("a sink is left out of the sum", "models with attention sinks",
             ATTENTION, "sum = sum * scale + std::exp(*sink - top);", "sum = sum * scale;", "core.attention"),
    Mutation("negative scales of V are not turned", "V in q4_0, whose scales are negative as often as not",
             ATTENTION, "            scale[r] = -scale[r];\n", "            scale[r] = -scale[r];\n            continue;\n",
             "core.attention"),
    Mutation("-128 is turned into an int8", "V in q8_0 that another program wrote",
             ATTENTION, "if (level[c] == -128) return false;", "", "core.attention"),
    Mutation("rows of V that are not finite reach queries that do not see them",
             "requests that share a cache with a broken one",
             ATTENTION, "apart = std::isfinite(s.state[m].sum) &&", "apart = false &&", "core.attention"),
    Mutation("sparse V leaves out rows of weight 1", "the output, as soon as sparse V is on",
             ATTENTION, "if (!(s.most[r] <= sparse_v)) index", "if (!(s.most[r] <= 0.5f)) index", "core.attention"),
    Mutation("ALiBi's slope is that of the query before", "models with ALiBi, whose heads share masks",
             ATTENTION, "(!queries.slope || slope == queries.slope[m - 1]);", "true;", "core.attention"),
    Mutation("the running sum is not corrected", "caches of more than 64 rows, when a later one scores higher",
             TILE, "state->sum = state->sum * state->correction + lane[0];", "state->sum = state->sum + lane[0];",
             "core.attention.scalar"),
    Mutation("masked rows count as a score of 0", "caches whose length is no multiple of 64",
             TILE, "for (int r = rows; r < tile_rows; ++r) bias[r] = -INFINITY;",
             "for (int r = rows; r < tile_rows; ++r) bias[r] = 0;", "core.attention"),
    Mutation("the soft cap has the wrong sign for negative scores", "models with a soft cap",
             TILE, "s[r] = soft_cap * (x > 0 ? tanh : -tanh);", "s[r] = soft_cap * tanh;", "core.attention.scalar"),
    Mutation("another kernel may be selected during a call", "results that depend on what other threads do",
             ATTENTION, "left_out += partial_of(kernel, kv,", "left_out += partial_of(kernels(), kv,", "core.api"),
    Mutation("of two equal branches the trellis takes the other one", "bytes that every kernel writes alike",
             "cpp/src/generic/trellis.h", "from_upper[t][s] = b < a;", "from_upper[t][s] = b <= a;", "core.vectors"),
    Mutation("of equal paths the vector search takes the one with the greatest state", "bytes that every kernel writes alike",
             "cpp/src/generic/trellis_vector.h", "return __builtin_ctzll(~others);",
             "return 63 - __builtin_clzll(~others);", "core.kernels"),
    Mutation("the start of a path is stored in reverse", "the subsets of a block's first six steps",
             "cpp/src/generic/trellis.h", "word |= (state >> k & 1) << (15 - k);", "word |= (state >> k & 1) << (10 + k);",
             "core.vectors"),
    Mutation("a trellis-coded block's scale is rounded down", "the inner product of keys with queries",
             "cpp/src/generic/trellis.h", "(float_to_half(float(d)) + 16) >> 5", "float_to_half(float(d)) >> 5", "core.vectors"),
    Mutation("a path's bits that reach into the byte before are taken from the wrong byte", "levels on CPUs with GFNI",
             "cpp/src/x86_trellis.h", "(k > b) == before", "(k >= b) == before", "core.kernels"),
    Mutation("a Metal encoder takes the scale of the own lane's step", "bytes in a cache on an Apple GPU",
             "cpp/metal/codec.metal", "double_of_uint(ulong(b)))), ushort(step));",
             "double_of_uint(ulong(b)))), lane);", "metal.codec"),
    Mutation("Metal threads do not wait for each other's products", "attention on an Apple GPU, now and then",
             METAL, "        threadgroup_barrier(mem_flags::mem_threadgroup);\n\n        // Weights,", "\n        // Weights,",
             "metal.attention"),
    Mutation("a run of rows on Metal includes the first row of the next one", "caches that are divided into runs",
             METAL, "row + r < last)", "row + r <= last)", "metal.attention"),
    Mutation("matrices of keys on Metal have the rows of a tile without its padding", "attention on an Apple GPU",
             METAL, "tile + r * pitch + e, pitch, 0, true", "tile + r * pitch + e, D, 0, true", "metal.attention"),
    Mutation("the two nibbles of a byte are swapped on Metal", "attention over turbo4 on an Apple GPU",
             "cpp/metal/levels.h", "out.numbers[0] = word & 0x0f0f0f0fu;\n        out.numbers[1] = word >> 4 & 0x0f0f0f0fu;",
             "out.numbers[1] = word & 0x0f0f0f0fu;\n        out.numbers[0] = word >> 4 & 0x0f0f0f0fu;", "metal.attention"),
    Mutation("a sink is left out of the sum on Metal", "models with attention sinks on an Apple GPU",
             METAL, "float sum = a.has_sinks ? exp2(sink - top) : 0.0f;", "float sum = 0.0f;", "metal.attention"),
    Mutation("the merge on Metal does not wait for the parts", "attention on an Apple GPU, now and then",
             "cpp/metal/attention.cpp", "    encoder.barrier();\n", "", "metal.attention"),
    Mutation("a CUDA encoder takes the last of equally good scales", "bytes that equal the CPU's",
             "cpp/cuda/encode.cuh", "(other == best && other_step < step)", "(other == best && other_step > step)",
             "cuda.emulated.codec"),
    Mutation("slots of a window on CUDA are numbered like the batch", "windows that have been filled once",
             "cpp/cuda/window.cu", "row_at(side.slots, index[row], 0, 0)", "row_at(side.slots, row, 0, 0)",
             "cuda.emulated.window"),
    Mutation("pairs of values that turn on CUDA are always adjacent", "models with RoPE of the kind neox",
             "cpp/cuda/rope.cu", "const int apart = a.adjacent ? 1 : pairs;", "const int apart = 1;", "cuda.emulated.rope"),
    Mutation("on CUDA a tile has the mask of the tile before", "caches of more than one tile for each warp",
             "cpp/cuda/attention.cuh", "        mask.advance();\n", "", "cuda.emulated.attention"),
    Mutation("a tile on CUDA is seen if eight of its rows are", "the end of what a token sees",
             "cpp/cuda/mask.cuh", "return (shown & next) == next;", "return shown & next;", "cuda.emulated.attention"),
    Mutation("sums of products on CUDA are taken in units that were chosen after them", "scores that rise by much",
             "cpp/cuda/mma.cuh", "            flush(o);\n            limit = headroom", "            limit = headroom",
             "cuda.emulated.attention"),
    Mutation("CUDA does not correct the output if kept products get another reference", "scores that rise by much",
             "cpp/cuda/mma.cuh", "            correct_output<D, 1>(o, correction);\n            exponentials();",
             "            exponentials();", "cuda.emulated.attention"),
    Mutation("CUDA corrects the output but not the products that are not yet in it", "scores that rise by much",
             "cpp/cuda/mma.cuh", "            flush(o);\n            float largest[1]", "            float largest[1]",
             "cuda.emulated.attention"),
    Mutation("scales of hidden rows count on CUDA", "rows of a cache that were never written",
             "cpp/cuda/mma.cuh", "w[j][0] = weight[j][0] == 0 ? 0.0f : w[j][0];", "w[j][0] = w[j][0];",
             "cuda.emulated.attention"),
    Mutation("a short run on CUDA begins where a long one would", "caches that cannot be divided evenly",
             "cpp/cuda/call.cuh", "begin = chunk * p.chunk_rows - short_before * step;", "begin = chunk * p.chunk_rows;",
             "cuda.emulated.attention"),
    Mutation("short runs on CUDA are those of the first streams in all streams", "several caches at once",
             "cpp/cuda/call.cuh", "short_first ? chunk < p.short_chunks : chunk", "chunk", "cuda.emulated.attention"),
    Mutation("a CUDA thread block that finishes prompts leaves out the sink", "prompts of models with attention sinks",
             "cpp/cuda/hopper.cuh", "            all.add(sink);\n            factor", "            factor",
             "cuda.emulated.small_gpu"),
    Mutation("a CUDA thread block that finishes prompts takes the signs of the next lane", "prompts on Hopper GPUs",
             "cpp/cuda/hopper.cuh", "s1_word(n / 4) >> first, n % 4 * 4 + i);",
             "s1_word(n / 4) >> first, n % 4 * 4 + (i ^ 1));", "cuda.emulated.small_gpu"),
    Mutation("each CUDA thread block stores rows of a prompt that another one stores, too", "what follows a prompt",
             "cpp/cuda/merge.cuh", "uint32_t(group) * encode_warps + threadIdx.x / 32;",
             "uint32_t(group) + threadIdx.x / 32;", "cuda.emulated.small_gpu"),
    Mutation("rows of a stage on CUDA are replaced before all warps have read them", "long caches, now and then",
             "cpp/cuda/load.cuh", "wait_for_warps(preceding + 1);", "tell_waiting_warp(preceding + 1);",
             "cuda.emulated.attention"),
    Mutation("all lanes of a column count an exact row on CUDA", "caches with a window",
             "cpp/cuda/exact.cuh", "(place.quad == 0 ? weight[h] : 0.0f); // of one lane", "weight[h];",
             "cuda.emulated.attention"),
    Mutation("CUDA thread blocks with rows of the cache take exact rows, too", "caches with a window",
             "cpp/cuda/exact.cuh", "place.row_tile - call.plan.first_exact;", "place.row_tile;", "cuda.emulated.attention"),
    Mutation("a window without slots has no thread block on CUDA", "callers whose windows have no slots",
             "cpp/cuda/attention.cu", "if (exact > 0 && p.chunks", "if (p.chunks", "cuda.emulated.attention"),
    Mutation("the halves of blocks of 32 values are the lower ones on CUDA", "heads of 96",
             "cpp/cuda/operands.cuh", "quad < 4 ? low_halves : high_halves", "low_halves", "cuda.emulated.attention"),
    Mutation("lanes on CUDA write their seen rows over those of other lanes", "requests that share a cache",
             "cpp/cuda/gather.cu", "list += sum_up_to(__popc(seen), lane) - __popc(seen);",
             "list += lane ? __popc(seen) : 0;", "cuda.emulated.attention"),
    Mutation("a merge of few parts on CUDA leaves out the sink", "models with attention sinks",
             "cpp/cuda/merge.cuh", "    own.MergedSum::add(sink);\n", "", "cuda.emulated.attention"),
    Mutation("a CUDA cluster that merges parts does not wait for the values of the others", "decoding on Hopper GPUs, now and then",
             "cpp/cuda/merge.cuh", "            wait_for_phase(arrived, 0);\n", "", "cuda.emulated.attention"),
    Mutation("CUDA thread blocks that merge columns store only some KV heads' rows", "tokens of the cache, if heads are rows of their own",
             "cpp/cuda/merge.cuh", "warp = threadIdx.x / 32;\n\n    let_next_start();\n    if (row < 0) {\n", "warp = threadIdx.x / 32;\n\n    let_next_start();\n    if (row < 0) {\n        if (blockIdx.y > 0) return;\n", "cuda.emulated.attention"),
    Mutation("the sums of rounded blocks on CUDA are those of other blocks", "products of attention's output with weights that have an offset",
             "cpp/cuda/softmax.cuh", "if (lane == j) {", "if (lane == 0) {", "cuda.emulated.attention"),
    Mutation("a CUDA warp rotates the columns of its KV head's first warp", "short caches",
             "cpp/cuda/query.cuh", "own[i][j] = place.row_tile == 0 ? q[i][j] : q[columns_at_once + i][j];", "own[i][j] = q[i][j];", "cuda.emulated.attention"),
    Mutation("a warp does not wait for the copy of its rows on CUDA", "a few tokens at once",
             "cpp/cuda/direct.cuh", "copy_wait<direct_stages - 2>();", "copy_wait<direct_stages - 1>();",
             "cuda.emulated.direct"),
    Mutation("CUDA warps do not meet before rows of a step are replaced", "a few tokens at once",
             "cpp/cuda/hopper_direct.cuh", "            sync_groups(columns.barrier(), 1);\n        }", "        }",
             "cuda.emulated.few"),
    Mutation("a tile on CUDA is hidden if its first 16 values are", "prompts of several requests",
             "cpp/cuda/wide.cu", "bits |= __shfl_xor_sync(all_lanes, bits, 2);", "", "cuda.emulated.wide"),
    Mutation("CUDA does not correct the output of the steps before", "prompts on Hopper GPUs, if scores rise",
             "cpp/cuda/hopper.cuh", "                keep_registers(output);\n                if (raised) correct_output(correction);\n",
             "                keep_registers(output);\n", "cuda.emulated.small_gpu"),
    Mutation("a warp of a CUDA warpgroup does not wait with the others", "prompts on Hopper GPUs, as PTX defines them",
             "cpp/cuda/hopper.cuh", "                products_wait<1>();", "                if (place.warp) products_wait<1>();",
             "cuda.emulated.attention"),
    Mutation("a CUDA buffer of rows is empty when the own thread block has used it", "prompts on Hopper GPUs, now and then",
             "cpp/cuda/hopper.cuh", "arrive_mapped(map_to(memory.empty(buffer), place.lane));",
             "arrive_mapped(map_to(memory.empty(buffer), place.rank));", "cuda.emulated.small_gpu"),
    Mutation("the thread blocks of a CUDA cluster expand the same step", "prompts on Hopper GPUs",
             "cpp/cuda/hopper.cuh", "load_next = next(at, place.rank);", "load_next = at;", "cuda.emulated.small_gpu"),
    Mutation("a CUDA thread block shares rows before all warps have expanded them", "prompts on Hopper GPUs, now and then",
             "cpp/cuda/hopper.cuh", "        sync_groups(1 + number, 1); // all rows are there\n", "",
             "cuda.emulated.small_gpu"),
    Mutation("a CUDA thread block ends while another one may reach its memory", "prompts on Hopper GPUs, now and then",
             "cpp/cuda/hopper.cuh", "    if (call.plan.cluster > 1) sync_cluster();\n#endif", "#endif",
             "cuda.emulated.small_gpu"),
    Mutation("convert accepts predictions that are not finite", "the check that a conversion did no harm",
             "python/turboquant/convert/check.py", "(found.kld if math.isfinite(found.kld) else math.inf)", "found.kld",
             "tests/python/test_convert.py"),
    Mutation("tune takes a saturated layer's cost as proportional", "plans for models that 4 bits destroy",
             "python/turboquant/tune/losses.py", "_FINER.get(type) if kld > LINEAR else None", "None",
             "tests/python/test_tune.py"),
    Mutation("the budget of tune is exceeded by a step", "the size that was asked for",
             "python/turboquant/tune/allocate.py", "if index in climbing and step <= left + slack:",
             "if index in climbing and left > 0:", "tests/python/test_tune.py"),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", help="mutations whose description matches")
    parser.add_argument("--list", action="store_true", help="print the mutations, and do nothing")
    options = parser.parse_args()
    # A shell starts background jobs with SIGINT ignored, and children inherit this, so tests of Ctrl-C would never end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chosen = [one for one in MUTATIONS if not options.only or re.search(options.only, one.what)]
    if options.list or not chosen:
        print("\n".join(f"{one.what} ({one.file})" for one in chosen) or f"no mutation matches {options.only!r}")
        return 0 if chosen else 2
    with tempfile.TemporaryDirectory(prefix="mutate-") as name, Reporter().track("mutations", len(chosen)) as track:
        copy = Copy(Path(name))
        for one in sorted({one.tests for one in chosen}):
            if not copy.passes(one):
                raise SystemExit(f"{one} fails without a mutation, too; its output: {copy.said[-3000:]}")
        survivors = 0
        print(INTRODUCTION.format(kernels=best_kernels()), flush=True)
        for done, one in enumerate(chosen):
            track.update(done, label=one.what)
            caught = copy.caught(one)
            survivors += not caught
            print(f"| {one.what} | {one.breaks} | {one.suite} | {caught or '**survives**'} |", flush=True)
    return 1 if survivors else 0


def best_kernels() -> str:
    """The name of the best kernels of this CPU; the tests of the core run these first."""
    from turboquant import kernels

    return next(one.name for one in kernels() if one.supported)


class Copy:
    """A copy of the tree, in which mutations are applied, built and tested."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.build, self.said = folder / "tree", folder / "build", ""
        skip = shutil.ignore_patterns("__pycache__", "build", ".*_cache")
        for name in FOLDERS:
            shutil.copytree(ROOT / name, self.tree / name, ignore=skip)
        for name in FILES:
            shutil.copy(ROOT / name, self.tree)
        extension = importlib.util.find_spec("turboquant._core")
        if extension and extension.origin:  # already compiled; no mutation changes it
            shutil.copy(extension.origin, self.tree / "python" / "turboquant")

    def caught(self, one: Mutation) -> str:
        """The failures of the tests; empty if they passed."""
        path = self.tree / one.file
        text = path.read_text(encoding="utf-8")
        if text.count(one.old) != 1:
            times = text.count(one.old)
            raise SystemExit(f"{one.file} has {one.old!r} {times} times, wanted once: mend tools/mutate.py")
        path.write_text(text.replace(one.old, one.new), encoding="utf-8")
        try:
            return "" if self.passes(one.tests) else self._how()
        finally:
            path.write_text(text, encoding="utf-8")

    def passes(self, tests: str) -> bool:
        if tests.endswith(".py"):
            return self._run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()])
        suite = tests.split(".")[0]
        build = self.build / suite
        if not (build / "build.ninja").exists():
            options = (
                "-DTURBOQUANT_BUILD_TESTS=ON",
                "-DTURBOQUANT_BUILD_PYTHON=OFF",
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DTURBOQUANT_TEST_EXTENT={'brief' if suite == 'metal' else 'usual'}",
            )
            top = self.tree / {"metal": "tests/metal", "cuda": "tests/cuda/emulator"}.get(suite, ".")
            if not self._run(["cmake", "-S", top, "-B", build, "-G", "Ninja", *options]):
                raise SystemExit(self.said)
        # Several of the CUDA emulator's tests share a program.
        target = [] if suite == "cuda" else ["--target", f"test_{tests.split('.')[1]}"]
        if not self._run(["cmake", "--build", build, *target]):
            return False
        ctest = ["ctest", "--test-dir", build, "-R", tests, "-E", "[.]best$", "--no-tests=error"]
        return self._run([*ctest, "--output-on-failure", "--stop-on-failure"])

    def _run(self, command: list[object]) -> bool:
        environment = {**os.environ, "PYTHONPATH": str(self.tree / "python")}
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=self.tree, env=environment, capture_output=True, text=True, errors="replace")
        self.said = done.stdout + done.stderr
        return done.returncode == 0

    def _how(self) -> str:
        """The first failure that the output names."""
        if "error:" in self.said and "FAILED:" in self.said:
            return "does not compile"
        ends = "Failed|SEGFAULT|Subprocess aborted|Timeout"
        ctest = re.findall(rf"^\s*\d+ - ((?:core|metal|cuda)\.\S+) \((?:{ends})", self.said, re.MULTILINE)
        case = re.findall(r"^\S+\.cpp:\d+: .* \[(.+)\]$", self.said, re.MULTILINE)
        pytest = re.findall(r"^FAILED (\S+::\w+)", self.said, re.MULTILINE)
        emulator = re.findall(r"^emulator: .*?lane \d+: (.+)$", self.said, re.MULTILINE)
        test = re.sub(r"\.\d+$", "", (ctest + pytest or ["a crash or a timeout"])[0])  # without the part
        if ctest and emulator:
            return f"`{test}`: the emulator stops at a {emulator[0]}"
        return f"`{test}`" + (f": {case[0].split('; ')[0]}" if ctest and case else "")


if __name__ == "__main__":
    sys.exit(main())
