"""`turboquant tune` with a real llama.cpp: its measurements agree with llama-perplexity for the plan that it writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import QUIET, Build, perplexity_report, random_tokens
from test_guard import types
from turboquant import cli
from turboquant.plan import read_plan, read_shape
from typer.testing import CliRunner

#: Few tokens, so that the test is fast: 13 runs of 512 for tuning, and 6 of 2048 for the check.
QUICK = ("--chunks", 1, "--check-chunks", 1)
BITS = 4.6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, build: Build, prose_model: Path, heldout: str) -> Path:
    """A folder in which the bundled model was tuned: text.txt, plan.json, out.gguf, said.txt."""
    folder = tmp_path_factory.mktemp("tune")
    (folder / "text.txt").write_text(heldout[:60000], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TURBOQUANT_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        for name, value in QUIET.items():
            patch.setenv(name, value)
        done = CliRunner().invoke(cli.app, command(build, prose_model, "--write-into", "out.gguf"))
    assert done.exit_code == 0, done.output
    (folder / "said.txt").write_text(done.output, encoding="utf-8")
    return folder


def command(build: Build, model: Path, *more: object) -> list[str]:
    words = ("tune", "-m", model, "-f", "text.txt", "--bits", BITS, "-o", "plan.json", *QUICK, "--bin", build.bin, *more)
    return [str(word) for word in words]


def kld(build: Build, model: Path, folder: Path, *arguments: object) -> float:
    """The KLD of a cache on the first chunk of the text by llama-perplexity, without an exact window as in tune."""
    common = ("-m", model, "-c", 2048, "--chunks", 1, "-fa", "on", "--kl-divergence-base", folder / "base")
    if not (folder / "base").exists():
        build.run("llama-perplexity", *common, "-f", folder / "text.txt")
    return perplexity_report(build.run("llama-perplexity", *common, "--kl-divergence", "--cache-window", 0, *arguments).text)[1]


def test_the_budget_is_kept_and_spent(place: Path, prose_model: Path) -> None:
    plan, shape = read_plan(place / "plan.json"), read_shape(prose_model)
    assert BITS - 0.35 < shape.mean_bits(plan, 4096) <= BITS
    assert len(set(plan.k) | set(plan.v)) > 1
    assert plan.about["bits"]["mean"] == pytest.approx(shape.mean_bits(plan, 4096), abs=1e-3)


def test_the_measured_kld_is_that_of_llama_perplexity(build: Build, prose_model: Path, place: Path) -> None:
    plan = read_plan(place / "plan.json")
    found = kld(build, prose_model, place, "--cache-plan", place / "plan.json")
    assert found == pytest.approx(plan.about["kld"]["measured"], rel=0.01, abs=2e-5)
    assert found < kld(build, prose_model, place, "-ctk", "turbo4", "-ctv", "turbo4")
    assert found < kld(build, prose_model, place, "-ctk", "turbo4", "-ctv", "q4_0")  # 4.3 bits
    assert "turbo4" in (place / "said.txt").read_text() and "q8_0/turbo3" in (place / "said.txt").read_text()


def test_the_copy_takes_its_plan(probe, place: Path) -> None:
    plan = read_plan(place / "plan.json")
    p = probe(place / "out.gguf")
    p.context("auto", "auto")
    p.logits(random_tokens(20))
    assert types(p.log) == (list(plan.k), list(plan.v))
    assert "the plan in the model's metadata sets the types of K and V" in p.log


def test_the_estimate_orders_layers_as_a_direct_measurement_does(build: Build, prose_model: Path, place: Path) -> None:
    """The order of the layers by the cost of K is the same in turbo4 as in turbo3."""
    from turboquant.measure.programs import Programs
    from turboquant.measure.results import Results
    from turboquant.tune.meter import Meter, Span

    programs = Programs(build.bin, place / "logs", 2)
    found: dict[str, list[float]] = {"turbo3": [], "turbo4": []}
    from turboquant.models.modelfile import ModelFile

    with ModelFile(prose_model) as model:
        metadata = model.metadata
    span, results = Span("50%", 4, 512), Results(place / "results")
    with Meter(prose_model, place / "text.txt", span, programs, results, place, metadata) as meter:
        for type, klds in found.items():
            for layer in range(6):
                k = ["f16"] * 6
                k[layer] = type
                klds.append(meter.measure(k, ["f16"] * 6).kld)
    order = [sorted(range(6), key=klds.__getitem__) for klds in found.values()]
    assert order[0][-1] == order[1][-1] and order[0][0] == order[1][0]
    distance = sum(abs(order[0].index(layer) - order[1].index(layer)) for layer in range(6))
    assert distance <= 4  # it is 18 for the reverse order


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupted_and_again(build: Build, prose_model: Path, place: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text((place / "text.txt").read_text())
    environment = {**os.environ, **QUIET, "TURBOQUANT_CACHE": str(tmp_path / "cache")}
    words = [sys.executable, "-m", "turboquant.cli", *command(build, prose_model)]
    process = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    stored = tmp_path / "cache" / "evaluate" / "results"
    deadline = time.monotonic() + 240
    while len(list(stored.glob("*.json"))) < 6:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from here" in said and "Traceback" not in said
    assert not (tmp_path / "plan.json").exists() and not list(stored.parent.glob("kld-base-*"))
    before = {path.name: path.stat().st_mtime_ns for path in stored.glob("*.json")}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The description of the model may be stored again, but no measurement was repeated.
    anew = [stored / name for name, time_ns in before.items() if (stored / name).stat().st_mtime_ns != time_ns]
    assert not [path for path in anew if "kld" in json.loads(path.read_text())["value"]]
    again, first = json.loads((tmp_path / "plan.json").read_text()), json.loads((place / "plan.json").read_text())
    assert (again["k"], again["v"]) == (first["k"], first["v"])
