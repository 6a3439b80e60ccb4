"""tools/bench_attention.py and bench_cuda.py run against the build and print their tables. No speed is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def bench(
    build, tmp_path: Path, *args: object, tool: str = "bench_attention.py"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOOLS / tool, "--bin", build.bin, *args]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=tmp_path)


def test_layer_table(build, tmp_path) -> None:
    done = bench(build, tmp_path, "--types", "turbo4,q8_0:turbo3", "--depths", 64, "--threads", 1, "--prefill", 3,
                 "--seconds", 0.001, "--skip-model", "--json", "figures.json", "--plot", "figure.svg")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [limit["threads"] for limit in figures["limits"]] == [1]
    assert all(limit[name] > 0 for limit in figures["limits"] for name in ("read", "float_macs", "byte_macs"))
    measured = {(row["pair"], row["queries"]): row for row in figures["layer"]}
    assert set(measured) == {(pair, n) for pair in ("f16:f16", "turbo4:turbo4", "q8_0:turbo3") for n in (1, 3)}
    # 8 KV heads of 128: 66 bytes of turbo4 for each K and V of 64 tokens in the cache and the new one
    assert measured["turbo4:turbo4", 1]["cache_bytes"] == 65 * 8 * 2 * 66
    assert measured["f16:f16", 1]["left_out"] is None and measured["turbo4:turbo4", 3]["left_out"] is None
    assert 0 <= measured["q8_0:turbo3", 1]["left_out"] < 0.01  # scores of deviation 1
    assert "q8_0/turbo3" in done.stdout and "1.00x" in done.stdout
    assert (tmp_path / "figure.svg").read_text().startswith("<?xml")


def test_refused(build, tmp_path) -> None:
    done = bench(build, tmp_path, "--types", "turbo9", "--depths", 64, "--threads", 1, "--seconds", 0.001,
                 "--skip-model")
    assert done.returncode == 1 and "no cache type turbo9" in done.stderr
    done = bench(build, tmp_path, "--depths", "0")
    assert done.returncode == 2 and "wanted numbers above 0" in done.stderr
    done = bench(build, tmp_path, "--plot", "nowhere/a.png")
    assert done.returncode == 2 and "no folder" in done.stderr


def test_model_in_parts(build, tmp_path) -> None:
    """The CPU stands in for a GPU."""
    given = ("--skip-kernels", "--types", "turbo4", "--model-shape", "2,256,4,2,64,256,300", "--models", tmp_path,
             "--depths", 64, "--prefill", 16, "--batches", "2,8", "--batch-depths", 32, "--slots", 2,
             "--slot-depth", 32, "--heads", "64,128", "--head-depths", 32, "--decode", 4, "--repeat", 1, "--count", "--json", "cuda.json")
    if not (build.bin / "llama-batched-bench").is_file():
        given = (*given, "--parts", "prefill,batches")
    done = bench(build, tmp_path, *given, tool="bench_cuda.py")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "cuda.json").read_text())["rows"]
    assert all(figure["tokens_s"] > 0 for row in rows for figure in row["figures"])
    paths = {(row["part"], row["head"], row["unified"]): row["paths"] for row in rows if row["window"] == "0"}
    # 2 layers; the numbers of tokens and streams; 8 steps of a run that counts
    expected = {
        ("decode", 64, False): (1, 1, 2 * 8),
        ("prefill", 64, False): (16, 1, 2),
        ("batches", 64, False): (8, 1, 2),
        ("slots", 64, False): (1, 2, 2 * 8),
        ("slots", 64, True): (2, 1, 2 * 8),
        ("heads", 64, False): (1, 1, 2 * 8),
        ("heads", 128, False): (1, 1, 2 * 8),
    }
    assert len(rows) == len(paths) * 4  # f16, q8_0, turbo4 with two windows
    for place, found in paths.items():
        tokens, streams, calls = expected[place]
        assert found[f"attention by the tile engine, tokens {tokens}, streams {streams}"] == calls, place
    assert "| turbo4, window 0 |" in done.stdout
