"""tools/bench_cuda.py with stand-ins for llama.cpp's programs: what it runs, its ratios, and how it goes on."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_cuda.py"

#: Decode speeds by pair; a window of the turbo types costs a fifth. "factor" multiplies all of them.
PROGRAM = '''#!{python}
import json, os, sys
from pathlib import Path

here, name, args = Path(__file__).parent, Path(__file__).name, sys.argv[1:]
value = lambda option: args[args.index(option) + 1]
pair = value("-ctk") + ":" + value("-ctv")
window = os.environ.get("LLAMA_ARG_CACHE_WINDOW", "unset")
counted = os.environ.get("TURBOQUANT_COUNT") == "1"
with open(here / "runs.jsonl", "a") as file:
    settings = {{name: text for name, text in os.environ.items() if name.startswith(("LLAMA_ARG_", "GGML_"))}}
    file.write(json.dumps([name, pair, window, counted, args, settings]) + "\\n")
if (here / "broken").exists() and (here / "broken").read_text() == pair:
    print("E main: out of memory", file=sys.stderr)
    sys.exit(1)
factor = float((here / "factor").read_text()) if (here / "factor").exists() else 1
speed = factor * {{"f16:f16": 100, "q8_0:q8_0": 80, "turbo4:turbo4": 200, "q8_0:turbo3": 120}}[pair]
if "turbo" in pair and window != "0":
    speed *= 0.8
if name == "llama-bench":
    for tokens in map(int, value("-p").split(",")):
        samples = [1.0, speed * tokens, speed * tokens]
        print(json.dumps(dict(n_prompt=tokens, n_gen=0, n_depth=int(value("-d")), samples_ts=samples)))
else:
    print("main: n_kv_max = 512")
    slots = int(value("-npl"))
    decode = list(map(int, value("-ntg").split(",")))
    for run, (prompt, tokens) in enumerate((p, t) for p in map(int, value("-npp").split(",")) for t in decode):
        slow = 0.1 if run == 0 else 1
        speeds = dict(speed_pp=10 * speed * slow, speed_tg=speed * slots * slow)
        print(json.dumps(dict(pp=prompt, tg=tokens, pl=slots, **speeds)))
if counted:
    print("llama_perf_context_print: whatever", file=sys.stderr)
    print("turboquant: count 64 attention by the decode kernel, tokens 1, streams 1", file=sys.stderr)
'''
SMALL = ("--skip-kernels", "--depths", "0,4096", "--batch-depths", 1024, "--batches", "2,64", "--slots", 8,
         "--slot-depth", 512, "--heads", "64,128", "--head-depths", 256, "--types", "turbo4,q8_0:turbo3")


#: An nvcc whose programs print the lines of tools/bench_cuda.cu.
NVCC = """#!/bin/sh
test "$1" = --version && { echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; }
while test "$1" != -o; do shift; done
cat > "$2" <<'END'
#!/bin/sh
echo "kernels $*" >> HERE/kernels
echo '{"device": "H200", "copy_tb_s": 2.78}'
echo '{"pair": "turbo4", "depth": 8192, "layer_us": 15.24, "cache_bytes": 1, "tb_s": 1.694, "share": 0.61}'
echo '{"encode": "turbo4", "tokens": 512, "us": 1, "gb_s": 1, "million_blocks_s": 1}'
END
chmod +x "$2"
"""


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.json = folder / "cuda.json"
        for name in ("llama-bench", "llama-batched-bench", "libllama.so"):
            self.program(name, PROGRAM.format(python=sys.executable))
        self.machine("NVIDIA H200, 580.1")

    def program(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(stat.S_IRWXU)

    def machine(self, name: str) -> None:
        self.program("nvidia-smi", f"#!/bin/sh\necho {name}\n")

    def __call__(self, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
        model = self.folder / "model.gguf"
        model.touch()
        known = () if "--model" in args or "--models" in args else ("--models", self.folder)
        for head in (64, 128):  # they exist, so none is written
            (self.folder / f"random-32-4096-{4096 // head}-{1024 // head}-{head}-14336-128256-q4_0.gguf").touch()
        command = [sys.executable, TOOL, "--bin", self.folder, *known, *args]
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False,
                              env={**os.environ, "PATH": path, **env})

    def runs(self) -> list[list]:
        """The runs since the last call: program, pair, window, whether it counted, arguments, settings."""
        file = self.folder / "runs.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def rows_of(text: str, title: str) -> dict[str, list[str]]:
    """The cells of a Markdown table by its first column; the head is the row "K/V"."""
    lines = text.split(title)[1].split("\n\n")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells if row[0] != "---"}


def test_tables(bench: Bench) -> None:
    done = bench(*SMALL)
    assert done.returncode == 0, done.stderr
    assert "NVIDIA H200, 580.1" in done.stdout
    assert rows_of(done.stdout, "\nDecode, tokens/s") == {
        "K/V": ["at 0", "at 4096"],
        "f16": ["100", "100"],
        "q8_0": ["80 (0.80)"] * 2,
        "turbo4": ["160 (1.60; 2.00)"] * 2,
        "turbo4, window 0": ["200 (2.00; 2.50)"] * 2,
        "q8_0/turbo3": ["96 (0.96; 1.20)"] * 2,
        "q8_0/turbo3, window 0": ["120 (1.20; 1.50)"] * 2,
    }
    assert rows_of(done.stdout, "\nThe whole prompt, ")["turbo4"] == ["1600 (1.60; 2.00)"]
    assert rows_of(done.stdout, "\nPrefill of 512, ")["turbo4"] == ["81920 (1.60; 2.00)"] * 2
    assert rows_of(done.stdout, "\nTokens at once at depth 1024, ")["K/V"] == ["2", "64"]
    assert rows_of(done.stdout, "\nDecode of slots of 512, ")["K/V"] == ["8 split", "8 unified"]
    assert rows_of(done.stdout, "\nDecode of slots of 512, ")["turbo4"] == ["1280 (1.60; 2.00)"] * 2
    assert rows_of(done.stdout, "\nDecode by the size of heads, ")["K/V"] == ["64 at 256", "128 at 256"]
    assert "[54/54] round 1, heads, heads of 128, depth 256, q8_0/turbo3, window 0: 120 1200" in done.stderr


def test_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    from bench_model import write_model  # noqa: PLC0415

    file = write_model(tmp_path, [2, 256, 4, 2, 128, 512, 1000], 64)
    assert file.name == "random-2-256-8-4-64-512-1000-q4_0.gguf"
    reader = gguf.GGUFReader(file)
    known = {key: reader.get_field(f"llama.{key}").contents() for key in (
        "block_count", "attention.head_count", "attention.head_count_kv", "attention.key_length", "vocab_size")}
    assert list(known.values()) == [2, 8, 4, 64, 1000]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 + 1 + 2 * 9
    assert np.all(tensors["output_norm.weight"].data == 1)
    for name, rows, columns, gain in (("token_embd", 1000, 256, 16.0), ("blk.1.attn_q", 512, 256, 1.25),
                                      ("blk.1.attn_output", 256, 512, 2.0), ("blk.0.ffn_down", 256, 512, 0.5)):
        tensor = tensors[f"{name}.weight"]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert values.shape == (rows, columns)
        # the deviation over 131072 values, with the scale in float16: 0.5%
        assert values.std() * columns**0.5 == pytest.approx(gain, rel=0.01)
        # rows do not add the sum of their inputs: a mean of the weights, -0.5 of their integers, would give 1.7 here
        assert abs(values.sum(axis=1).mean()) < 0.2 * gain
    written = file.stat().st_mtime_ns
    assert write_model(tmp_path, [2, 256, 4, 2, 128, 512, 1000], 64) == file
    assert file.stat().st_mtime_ns == written


def test_what_the_programs_get(bench: Bench) -> None:
    inherited = {"LLAMA_ARG_CACHE_WINDOW": "64", "LLAMA_ARG_CACHE_SPARSE_V": "0", "TURBOQUANT_COUNT": "1"}
    done = bench(*SMALL, "--decode", 100, "--depths", "0,20000", **inherited)
    assert rows_of(done.stdout, "\nDecode, tokens/s")["f16"] == ["100", "100"]  # not the first, slow run
    runs = bench.runs()
    assert {(pair, window) for _, pair, window, *_ in runs} == {
        ("f16:f16", "unset"), ("q8_0:q8_0", "unset"), ("turbo4:turbo4", "unset"), ("turbo4:turbo4", "0"),
        ("q8_0:turbo3", "unset"), ("q8_0:turbo3", "0"),
    }
    assert not any(counted for _, _, _, counted, *_ in runs)
    assert all(settings == {"LLAMA_ARG_CACHE_GUARD": "off"} | ({"LLAMA_ARG_CACHE_WINDOW": "0"} if window == "0" else {})
               for _, _, window, _, _, settings in runs)
    words = [" ".join(args) for _, _, _, _, args, _ in runs]
    assert sum("-c 256 -npp 1 -ntg 100,100,100 -npl 1 -no-kvu" in line for line in words) == 6  # depth 0
    assert sum("-c 20224 -npp 4096,20000 -ntg 100 -npl 1 -no-kvu" in line for line in words) == 6
    assert sum("-c 6144 -npp 512 -ntg 100,100,100 -npl 8 -kvu" in line for line in words) == 6  # 8 times 768
    assert sum("-d 1024 -p 2,64 -n 0 -r 3" in line for line in words) == 6
    assert sum("random-32-4096-64-16-64-14336-128256-q4_0.gguf" in line for line in words) == 6
    # pairs that are compared follow each other
    assert [pair for _, pair, *_ in runs[:6]] == ["f16:f16", "q8_0:q8_0", *["turbo4:turbo4"] * 2, *["q8_0:turbo3"] * 2]


def test_a_failure_loses_nothing_and_a_rerun_completes(bench: Bench) -> None:
    (bench.folder / "broken").write_text("turbo4:turbo4")
    few = (*SMALL, "--parts", "decode,prefill", "--json", bench.json)
    done = bench(*few)
    assert done.returncode == 1
    assert "bench_cuda: prefill, depth 4096, turbo4, window 0: llama-bench ended with 1" in done.stderr
    assert "out of memory" in done.stderr
    assert rows_of(done.stdout, "\nDecode, tokens/s")["q8_0/turbo3"] == ["96 (0.96; 1.20)"] * 2
    assert "turbo4" not in rows_of(done.stdout, "\nDecode, tokens/s")
    bench.runs()

    # In the next call all speeds are half as high; the ratios are those of each call.
    (bench.folder / "broken").unlink()
    (bench.folder / "factor").write_text("0.5")
    done = bench(*few)
    assert done.returncode == 0, done.stderr
    assert {pair for _, pair, *_ in bench.runs()} == {"f16:f16", "q8_0:q8_0", "turbo4:turbo4"}
    table = rows_of(done.stdout, "\nDecode, tokens/s")
    assert table["turbo4, window 0"] == ["100 (2.00; 2.50)"] * 2
    assert table["q8_0/turbo3"] == ["96 (0.96; 1.20)"] * 2
    assert table["f16"][0].startswith("75 ± ")  # of both calls

    done = bench(*few)
    assert bench.runs() == [] and done.returncode == 0
    assert rows_of(done.stdout, "\nDecode, tokens/s") == table
    done = bench(*few, "--types", "turbo4", "--depths", "0,64")
    prompts = [args[args.index("-npp") + 1] for *_, args, _ in bench.runs() if "-npp" in args]
    assert set(prompts) == {"64"}


def test_kernels(bench: Bench) -> None:
    bench.program("nvcc", NVCC.replace("HERE", str(bench.folder)))
    chosen = ("--types", "turbo4,q4_0:turbo3,turbo2_tcq", "--depths", "0,8192", "--json", bench.json)
    done = bench("--skip-model", *chosen, CUDACXX=str(bench.folder / "nvcc"))
    assert done.returncode == 0, done.stderr
    table = rows_of(done.stdout, "One layer's attention, H200, cudaMemcpy 2.78 TB/s")
    assert table.pop("K/V") == ["depth", "µs", "TB/s of cache", "of cudaMemcpy"]
    assert table == {"turbo4": ["8192", "15.2", "1.69", "61%"]}
    asked = "kernels turbo4:turbo4,turbo2_tcq:turbo2_tcq 256,8192 32,8,128,1\n"
    assert (bench.folder / "kernels").read_text() == asked
    assert bench("--skip-model", *chosen, CUDACXX="nothing").stdout == done.stdout  # they are stored
    done = bench("--parts", "kernels,decode", *chosen, "--shape", "64,8,128,1", "--types", "turbo4", CUDACXX="nothing")
    assert done.returncode == 1 and "bench_cuda: kernels: the CUDA compiler that CUDACXX names" in done.stderr
    assert "160 (1.60; 2.00)" in done.stdout


def test_rounds(bench: Bench) -> None:
    few = (*SMALL, "--parts", "decode", "--depths", 0, "--json", bench.json)
    bench(*few)
    bench.runs()
    (bench.folder / "factor").write_text("2")
    done = bench(*few, "--rounds", 2)
    assert len(bench.runs()) == 6  # the second round
    assert rows_of(done.stdout, "\nDecode, tokens/s")["turbo4, window 0"] == ["300 ± 100 (2.00; 2.50)"]


def test_stopped_before_the_end(bench: Bench) -> None:
    few = (*SMALL, "--parts", "decode", "--json", bench.json)
    done = bench(*few, "--stop-after", "1e-9")
    assert done.returncode == 0 and "stopped with 12 of 12 runs left" in done.stderr
    assert bench.runs() == []
    assert bench(*few, "--stop-after", 100).returncode == 0 and len(bench.runs()) == 12


def test_a_run_that_takes_too_long_fails(bench: Bench) -> None:
    bench.program("llama-batched-bench", f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    done = bench(*SMALL, "--parts", "decode,prefill", "--depths", 0, "--types", "turbo4", "--timeout", 0.5)
    assert done.returncode == 1 and "llama-batched-bench was ended after 0 s" in done.stderr
    assert len(bench.runs()) == 4  # llama-bench


def test_kernels_are_counted(bench: Bench) -> None:
    few = (*SMALL, "--parts", "decode", "--depths", 4096, "--json", bench.json)
    bench(*few)
    bench.runs()
    done = bench(*few, "--count")
    runs = bench.runs()
    assert [(pair, window, counted) for _, pair, window, counted, *_ in runs] == [
        ("turbo4:turbo4", "unset", True), ("turbo4:turbo4", "0", True),
        ("q8_0:turbo3", "unset", True), ("q8_0:turbo3", "0", True),
    ]
    assert all(settings["GGML_CUDA_DISABLE_GRAPHS"] == "1" for *_, settings in runs)
    table = rows_of(done.stdout, "\nWhich code computed attention")
    assert table["decode, depth 4096, turbo4"] == ["64 attention by the decode kernel, tokens 1, streams 1"]
    bench(*few, "--count")
    assert bench.runs() == []


def test_programs_that_do_not_count(bench: Bench) -> None:
    bench.program("llama-batched-bench", PROGRAM.format(python=sys.executable).replace("turboquant: count", "nothing"))
    done = bench(*SMALL, "--parts", "decode", "--depths", 0, "--count", "--json", bench.json)
    assert done.returncode == 1 and "the programs count no calls" in done.stderr
    assert rows_of(done.stdout, "\nDecode, tokens/s")["turbo4"] == ["160 (1.60; 2.00)"]


@pytest.mark.parametrize("change", ["machine", "programs", "decode"])
def test_other_figures_are_not_mixed(bench: Bench, change: str) -> None:
    few = [*SMALL, "--parts", "decode", "--depths", 0, "--json", bench.json]
    assert bench(*few).returncode == 0
    bench.runs()
    if change == "machine":
        bench.machine("NVIDIA H100, 580.1")
    elif change == "programs":
        (bench.folder / "libllama.so").write_text("another build")
    else:
        few += ["--decode", 7]
    done = bench(*few)
    assert done.returncode == 1 and f"cuda.json has figures with {change} " in done.stderr
    assert bench.runs() == []
    assert "160 (1.60; 2.00)" in bench(*few, "--tables").stdout


def test_tables_need_no_programs(bench: Bench) -> None:
    first = bench(*SMALL, "--json", bench.json)
    for name in ("llama-bench", "llama-batched-bench", "nvidia-smi"):
        (bench.folder / name).unlink()
    done = bench("--tables", "--json", bench.json)
    assert done.returncode == 0 and done.stdout == first.stdout


def test_a_model_of_the_user(bench: Bench) -> None:
    model = bench.folder / "model.gguf"
    done = bench(*SMALL, "--model", model, "--parts", "decode,heads")
    assert done.returncode == 0 and "heads" not in done.stdout
    assert {args[args.index("-m") + 1] for *_, args, _ in bench.runs()} == {str(model)}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--parts", "decode,tails"], "'tails': the parts are kernels, decode"),
        (["--depths", "-1"], "wanted numbers above -1"),
        (["--model-shape", "1,2,3"], "wanted seven numbers"),
        (["--tables"], "--tables needs --json"),
        (["--skip-kernels", "--parts", "heads", "--heads", "96", "--models", "."], "heads of 96 do not divide"),
        (["--rounds", "0"], "--rounds takes a number from 1 on"),
        (["--skip-kernels", "--json", "nowhere/a.json"], "no folder"),
        (["--skip-kernels", "--model", "nowhere.gguf"], "nowhere.gguf is not a file"),
    ],
)
def test_refused(bench: Bench, args: list[str], message: str) -> None:
    done = bench(*args)
    assert done.returncode != 0 and message in done.stderr
    assert bench.runs() == []


def test_a_damaged_file_is_refused(bench: Bench) -> None:
    for text in ("{", "[]", '{"model": []}'):
        bench.json.write_text(text)
        done = bench("--json", bench.json)
        assert done.returncode == 1 and "is not a file of this program" in done.stderr
        assert bench.json.read_text() == text


def test_missing_programs_are_named(bench: Bench) -> None:
    (bench.folder / "llama-batched-bench").unlink()
    done = bench(*SMALL)
    assert done.returncode == 1 and "--target llama-batched-bench` makes it" in done.stderr
    assert bench(*SMALL, "--parts", "prefill,batches").returncode == 0
