"""tools/bench_attention.py runs against the build and prints its tables. No speed is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_attention.py"


def bench(build, tmp_path: Path, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOOL, "--bin", build.bin, *args]
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
