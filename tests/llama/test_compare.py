"""turboquant compare with the real programs, on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from make_model import Shape, write_model
from turboquant import cli
from typer.testing import CliRunner, Result

#: With these small values of ctx and chunks the standard error of turbo3's KLD is about 0.004.
OPTIONS = ("-c", 256, "--chunks", 2, "--depths", "0,256", "--needle-depths", "1024", "--positions", 1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def place(build, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURBOQUANT_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return build.bin


def compare(bin: Path, *more: object) -> Result:
    return CliRunner().invoke(cli.app, ["compare", "--bin", str(bin), "--out", "out", *map(str, [*OPTIONS, *more])])


def test_bundled_model(place, cache, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("LLAMA_ARG_CACHE_WINDOW")
    done = compare(place, "--types", "q8_0,turbo3")
    assert done.exit_code == 0, done.output
    data = json.loads(Path("out/report.json").read_text(encoding="utf-8"))
    f16, q8_0, turbo3 = data["pairs"]
    assert [row["failure"] for row in data["pairs"]] == [None] * 3
    assert f16["quality"]["kld"] == pytest.approx(0, abs=1e-5) and f16["quality"]["same_top"] == 100
    assert 0 < q8_0["quality"]["kld"] < 0.003
    # 256 tokens are all in the window, or in the batch itself
    assert (turbo3["window_tokens"], turbo3["window_type"], q8_0["window_tokens"]) == (256, "q8_0", 0)
    assert 0 < turbo3["quality"]["kld"] < 0.003 and 0 < turbo3["decode"]["kld"] < 0.003
    assert all(0.02 < turbo3["paths"][path] < 0.12 for path in ("batched", "decode"))
    # 257 rows of 2 heads of 128 values, K and V of 6 layers
    assert turbo3["window_mib"] == pytest.approx(6 * 257 * 2 * 256 * 34 / 32 / 2**20, abs=0.01)
    assert turbo3["mib"] == pytest.approx(f16["mib"] * 3.125 / 16 + turbo3["window_mib"], abs=0.02)
    assert all(row["paths"]["agree"] for row in data["pairs"])
    assert q8_0["mib"] == pytest.approx(f16["mib"] * 8.5 / 16, abs=0.01) and turbo3["bits"] == 3.125
    assert all(cell["found"] is not None for row in data["pairs"] for cell in row["needles"])
    assert f16["needles"][0]["found"]
    assert all(speed["prefill"] > 0 and speed["decode"] > 0 for row in data["pairs"] for speed in row["speed"])
    assert data["machine"]["cpu"] and data["machine"]["backends"]

    # Token by token means batches of one token. The log is that of the last run.
    log = (cache / "evaluate" / "logs" / "perplexity-turbo3.log").read_text(encoding="utf-8")
    assert "computing over 2 chunks, n_ctx=256, batch_size=1, n_seq=1" in log

    few = ("--depths", "", "--needle-depths", "", "--window", 0)
    assert compare(place, "--types", "turbo3", *few).exit_code == 0
    turbo3 = json.loads(Path("out/report.json").read_text(encoding="utf-8"))["pairs"][1]
    assert turbo3["window_tokens"] == 0 and 0.02 < turbo3["quality"]["kld"] < 0.12

    logs = {file.name: file.stat().st_mtime_ns for file in (cache / "evaluate" / "logs").iterdir()}
    assert compare(place, "--types", "q8_0,turbo3").exit_code == 0
    assert logs == {file.name: file.stat().st_mtime_ns for file in (cache / "evaluate" / "logs").iterdir()}


def test_head_size_that_no_block_divides(place, tmp_path):
    model = write_model(tmp_path / "head80.gguf", Shape(head=80))
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    done = compare(
        place, "-m", model, "-f", "text.txt", "--types", "bf16,turbo4", "--depths", "", "--needle-depths", ""
    )
    assert done.exit_code == 0, done.output
    _, bf16, turbo4 = json.loads(Path("out/report.json").read_text(encoding="utf-8"))["pairs"]
    assert bf16["failure"] is None and bf16["bits"] == 16
    assert "does not work with the head size 80" in turbo4["failure"] and "use -ctk f16" in turbo4["failure"]
