"""turboquant tune without llama.cpp: allocation of bits, measurements, errors, stored results and files.

A script replaces the program that measures; tests/llama/test_tune.py runs the real one.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from fake_measure import ERRORS, write_measure
from make_model import Shape, write_model
from turboquant import cli
from turboquant.measure.pairs import Window
from turboquant.plan import Plan, expand, read_plan, read_shape
from turboquant.tune.allocate import Choice, allocate, allocate_for_loss, hull, least, most
from turboquant.tune.losses import LINEAR, estimate, finer, relative_error
from typer.testing import CliRunner, Result

#: K costs more than V, layer 2 costs most, and layer 4 costs almost nothing.
LAYERS = [{"k": 0.4, "v": 0.04}, {"k": 0.3, "v": 0.05}, {"k": 2.5, "v": 0.1}, {"k": 0.2, "v": 0.02}, {"k": 0.01, "v": 0.01}]


# ---- allocation ------------------------------------------------------------------------------------------------------


def choices(rng: random.Random, count: int) -> list[Choice]:
    """Random choices with the costs of cache types, and losses that mostly decrease with the cost."""
    costs = rng.sample([2.125, 3.125, 4.125, 4.5, 8.5, 16.0], count)
    scale = rng.lognormvariate(0, 2)
    return [Choice(str(cost), cost, scale * 4**-cost * rng.uniform(0.5, 1.5)) for cost in costs]


def brute_force(items: list[list[Choice]], budget: float) -> float:
    """The least loss within the budget."""
    fitting = (pick for pick in itertools.product(*items) if sum(one.cost for one in pick) <= budget + 1e-9)
    return min(sum(one.loss for one in pick) for pick in fitting)


def total(pick: list[Choice]) -> tuple[float, float]:
    return sum(one.cost for one in pick), sum(one.loss for one in pick)


def test_hull():
    item = [Choice("a", 1, 8), Choice("b", 2, 4), Choice("above", 3, 3.9), Choice("c", 4, 1), Choice("worse", 5, 2)]
    assert [one.name for one in hull(item)] == ["a", "b", "c"]
    assert hull(item[:1]) == item[:1]
    assert [one.name for one in hull([Choice("dear", 2, 5), Choice("cheap", 1, 5)])] == ["cheap"]


def test_against_brute_force():
    """The result is within the budget, optimal in most small cases, and always close to the optimum."""
    rng, equal, cases = random.Random(1), 0, 300
    for _ in range(cases):
        items = [choices(rng, rng.randint(1, 4)) for _ in range(rng.randint(1, 5))]
        budget = least(items) + rng.uniform(0, 6 * len(items))
        cost, loss = total(allocate(items, budget))
        best = brute_force(items, budget)
        assert cost <= budget + 1e-9 and best - 1e-12 <= loss
        equal += loss <= best * (1 + 1e-9)
    assert equal >= 0.9 * cases  # 294 of 300 when this was written


def test_optimal_at_the_corners():
    """If a budget is spent exactly along the hulls, no other choice is better (Lagrange multipliers)."""
    rng = random.Random(2)
    for _ in range(50):
        items = [choices(rng, 4) for _ in range(4)]
        steps = sorted(
            ((a.loss - b.loss) / (b.cost - a.cost), b.cost - a.cost)
            for item in items for a, b in itertools.pairwise(hull(item))
        )  # fmt: skip
        budget = least(items)
        for _, cost in reversed(steps):
            budget += cost
            spent, loss = total(allocate(items, budget))
            assert spent == pytest.approx(budget) and loss == pytest.approx(brute_force(items, budget), rel=1e-9)


def test_allocation_for_a_loss():
    rng, ratios = random.Random(3), []
    for _ in range(100):
        items = [choices(rng, 3) for _ in range(4)]
        best = sum(min(one.loss for one in item) for item in items)
        limit = best * rng.uniform(1, 100)
        cost, loss = total(allocate_for_loss(items, limit))
        assert loss <= limit * (1 + 1e-9)
        cheapest = min(
            sum(one.cost for one in pick) for pick in itertools.product(*items)
            if sum(one.loss for one in pick) <= limit * (1 + 1e-9)
        )  # fmt: skip
        assert cheapest <= cost + 1e-9
        ratios.append(cost / cheapest)
        with pytest.raises(ValueError, match="the best choices lose"):
            allocate_for_loss(items, best * 0.99)
    assert sum(ratios) / len(ratios) < 1.1  # of four items, where the last step weighs most


def test_budgets_at_the_ends():
    items = [[Choice("a", 1, 2), Choice("b", 2, 1)], [Choice("a", 1, 2), Choice("b", 2, 3)]]
    assert (least(items), most(items)) == (2, 3)
    assert [one.name for one in allocate(items, 2)] == ["a", "a"]
    assert [one.name for one in allocate(items, 100)] == ["b", "a"]
    with pytest.raises(ValueError, match="the cheapest choices cost 2"):
        allocate(items, 1.9)


# ---- what a type costs -----------------------------------------------------------------------------------------------


def test_relative_errors():
    """turbo types: the distortion of Lloyd-Max levels for N(0,1), less the gain of the scale search, plus the cost of
    preserving inner products.
    """
    for type, error in (("turbo4", 0.0095), ("turbo3", 0.0345), ("turbo2", 0.1175)):
        assert 0.75 * error < relative_error(type) < 1.15 * error
    assert relative_error("f32") == 0 < relative_error("f16") < relative_error("bf16") < relative_error("q8_0")
    assert relative_error("q8_0") < min(relative_error("turbo4"), relative_error("q4_0"))
    with pytest.raises(Exception, match="q3_x cannot be tuned"):
        relative_error("q3_x")


def test_estimates_are_proportional_to_the_error():
    found = estimate({"turbo3": 0.03}, ["turbo3", "turbo4", "q8_0", "f32"])
    assert found["turbo3"] == 0.03 and found["f32"] == 0
    for type in ("turbo4", "q8_0"):
        assert found[type] == pytest.approx(0.03 * relative_error(type) / relative_error("turbo3"))
    # The nearest measurement counts: the coarse one is saturated.
    found = estimate({"turbo3": 1.5, "turbo4": 0.9}, ["turbo2", "turbo3", "q8_0"])
    assert found["q8_0"] == pytest.approx(0.9 * relative_error("q8_0") / relative_error("turbo4"))
    assert found["turbo3"] == 1.5 < found["turbo2"]


def test_saturated_layers_are_measured_finer():
    assert finer({"turbo2": LINEAR / 2}) is None
    assert finer({"turbo2": 0.5}) == "turbo3" and finer({"turbo2": 0.5, "turbo3": 0.3}) == "turbo4"
    assert finer({"turbo2": 0.5, "turbo3": LINEAR / 2}) is None and finer({"turbo3": 2, "turbo4": 1}) is None


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model of five layers, a text, and the program; the current one."""
    monkeypatch.setenv("TURBOQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model.gguf", Shape(layers=5))
    (tmp_path / "text.txt").write_text("some text " * 100, encoding="utf-8")
    write_measure(tmp_path / "bin", LAYERS)
    return tmp_path


def command(*more: object) -> list[str]:
    return ["tune", "-m", "model.gguf", "-f", "text.txt", "-o", "plan.json", "--bin", "bin", "-t", "1", *map(str, more)]


def tune(*more: object) -> Result:
    return CliRunner().invoke(cli.app, command(*more))


def refused(done: Result) -> str:
    assert done.exit_code == 1 and "Traceback" not in done.output, done.output
    assert not Path("plan.json").exists()
    return done.stderr.rstrip().splitlines()[-1]


def runs() -> list[str]:
    return Path("bin/runs.txt").read_text(encoding="utf-8").splitlines()


def test_a_plan_for_bits(place):
    done = tune("--bits", 5)
    assert done.exit_code == 0, done.output
    plan, shape = read_plan("plan.json"), read_shape(place / "model.gguf")
    assert 4.4 < shape.mean_bits(plan, 4096) <= 5
    assert plan.k[2] == "q8_0" and plan.k[4] in ("turbo2_tcq", "turbo3_tcq", "turbo4_tcq") and plan.model == {"architecture": "llama", "layers": 5}
    assert plan.about["goal"] == {"bits": 5} and plan.about["context"] == 4096
    assert plan.about["bits"]["mean"] == pytest.approx(shape.mean_bits(plan, 4096), abs=1e-4)
    # What the program would say of the plan, and of the best of all plans within the budget.
    cost = {"turbo2_tcq": 2.125, "turbo3_tcq": 3.125, "turbo4_tcq": 4.125, "q8_0": 8.5}
    kld = sum(one["k"] * ERRORS[k] + one["v"] * ERRORS[v] for one, k, v in zip(LAYERS, plan.k, plan.v, strict=True))
    assert plan.about["kld"]["measured"] == pytest.approx(1.5 * (kld + 0.004), rel=0.01)
    items = [[Choice(t, cost[t], one[side] * ERRORS[t]) for t in cost] for side in "kv" for one in LAYERS]
    best = sum(one.loss for one in allocate(items, 5 * 10))
    assert kld < 1.15 * best  # the script's errors are not quite those of the codec
    assert re.search(r"^plan +\d", done.stdout, re.MULTILINE) and "K turbo" in done.stdout.replace("K q8_0", "K turbo")
    # The base, each side of each layer once, K of layer 2 in turbo4, too, as turbo3 saturates it, the plan and the
    # uniform pairs; the check is on the first tokens.
    assert len(runs()) == 1 + 10 + 1 + 1 + 5 and [line.split()[0] for line in runs()].count("0") == 6
    assert {line.split()[0] for line in runs()} == {"0", "500"}


def test_it_says_how_long_it_takes_and_remembers(place):
    first = tune("--bits", 5)
    assert re.search(r"\d+ tokens are still to be evaluated: about \d+ s", first.stderr), first.stderr
    before = runs()
    again = tune("--bits", 5)
    assert again.exit_code == 0 and runs() == before and again.stdout == first.stdout
    assert "replaced plan.json" in again.stderr and "still to be" not in again.stderr
    # Another goal measures its plan alone.
    assert tune("--bits", 3.5).exit_code == 0 and len(runs()) == len(before) + 1
    # Another model is measured anew.
    write_model(place / "model.gguf", Shape(layers=5, seed=2))
    assert tune("--bits", 3.5).exit_code == 0 and len(runs()) == 2 * len(before) + 1


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupted_run_goes_on(place):
    (place / "bin" / "stop").write_text("8", encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "turboquant.cli", *command("--bits", 5)], stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (place / "bin" / "waiting").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from here" in said and "Traceback" not in said
    assert not Path("plan.json").exists()
    scratch = place / "cache" / "evaluate"
    assert not list(scratch.glob("kld-base-*"))
    (place / "bin" / "stop").unlink()
    before = runs()
    assert len(before) == 8
    assert tune("--bits", 5).exit_code == 0
    assert len(runs()) == 19 and sorted(set(runs())) == sorted(set(runs()[7:] + before[:7]))  # the eighth was repeated


def test_a_plan_for_a_size(place):
    done = tune("--mib", 2.0, "--ctx", 2048)
    assert done.exit_code == 0, done.output
    plan, shape = read_plan("plan.json"), read_shape(place / "model.gguf")
    window = shape.window_mib(plan, 2048, Window())
    # 5 layers, 257 rows of two heads of 128 values in q8_0, K and V
    assert window == 5 * 257 * 2 * 256 * 34 / 32 / (1 << 20)
    assert 1.6 < shape.mib(plan, 2048) + window <= 2.0
    assert "MiB at 2048" in done.stdout and plan.about["context"] == 2048
    assert plan.about["mib"] == pytest.approx(shape.mib(plan, 2048) + window, abs=0.001)
    assert plan.about["window"] == {"counted": "256:q8_0", "mib": pytest.approx(window, abs=0.001)}
    assert f"counts the exact window, the newest 256 tokens in q8_0: {window:.2f} MiB" in done.stdout


def test_a_size_without_a_window(place, monkeypatch):
    """Where it is off, or no layer has a turbo type, all of the budget is K's and V's."""
    shape = read_shape(place / "model.gguf")
    monkeypatch.setenv("LLAMA_ARG_CACHE_WINDOW", "0")
    assert tune("--mib", 2.0, "--ctx", 2048).exit_code == 0
    plan = read_plan("plan.json")
    assert plan.about["window"] == {"counted": "0", "mib": 0} and 1.9 < shape.mib(plan, 2048) <= 2.0
    monkeypatch.delenv("LLAMA_ARG_CACHE_WINDOW")
    whole = shape.mib(Plan(("q8_0",) * 5, ("q8_0",) * 5), 2048)
    done = tune("--mib", whole + 0.01, "--ctx", 2048, "--types", "turbo4,q8_0")
    assert done.exit_code == 0, done.output
    plan = read_plan("plan.json")
    assert set(plan.k) | set(plan.v) == {"q8_0"} and plan.about["window"]["mib"] == 0
    Path("plan.json").unlink()
    monkeypatch.setenv("LLAMA_ARG_CACHE_WINDOW", "x")
    assert "LLAMA_ARG_CACHE_WINDOW: window: got 'x'" in refused(tune("--mib", 2.0, "--ctx", 2048))


def test_measured_without_a_window(place):
    """Whatever the environment says: a batch with a window would see its own tokens exactly."""
    (place / "bin" / "windows").touch()
    assert tune("--bits", 5).exit_code == 0
    assert set((place / "bin" / "windows").read_text().split()) == {"0"}


def test_a_plan_for_a_loss(place):
    sizes = []
    for limit in (0.01, 0.03, 0.2):
        assert tune("--kld", limit).exit_code == 0
        plan = read_plan("plan.json")
        assert plan.about["kld"]["measured"] <= limit
        sizes.append(read_shape(place / "model.gguf").mean_bits(plan, 4096))
    assert sizes[0] > sizes[1] > sizes[2]
    # Measured on the check's text, where everything costs half as much again: one try is not enough.
    assert "checking plan" in tune("--kld", 0.02).stderr or plan.about["goal"] == {"kld": 0.2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give one of --bits"),
        (("--bits", 5, "--kld", 1), "give one of --bits"),
        (("--mib", 5), "--mib needs --ctx"),
        (("--bits", -1), "give a number above 0"),
        (("--bits", "nan"), "give a number above 0"),
        (("--bits", 2), "--bits 2 cannot be met: with turbo2_tcq, turbo3_tcq, turbo4_tcq, q8_0, f16 this model's cache takes from 2.125 to "),
        (("--mib", 0.1, "--ctx", 4096), "this model's cache takes from 2.656 to 15.31 MiB at a context of 4096 tokens, and up to "
             "0.6667 MiB for the exact window of 256:q8_0"),
        (("--kld", 0.001), "--kld 0.001 cannot be met: the best plan of"),
        (("--bits", 5, "--types", "turbo4,turbo9"), "turbo9"),
        (("--bits", 5, "--types", "turbo4_64,q6_K"), "q6_K"),
        (("--bits", 5, "--check-chunks", 200), "too short to check the plan on text that it was not tuned on"),
        (("--bits", 5, "--chunks", 600), "give a longer text"),
    ],
)
def test_what_is_refused(place, options, message):
    assert message in refused(tune(*options))


def test_the_build_must_know_plans(place):
    (place / "bin" / "other").write_text("K q8_0*5; V q8_0*4,f16", encoding="utf-8")
    assert "libllama took other types than the plan's" in refused(tune("--bits", 5))
    (place / "bin" / "turboquant-measure").unlink()
    assert "has no turboquant-measure; build it with `turboquant build`" in refused(tune("--bits", 5))


def test_failures_are_told(place):
    (place / "bin" / "refuse").write_text("turbo2", encoding="utf-8")
    assert "model.gguf: turboquant: no turbo2 today" in refused(tune("--bits", 5))
    (place / "bin" / "refuse").unlink()
    (place / "bin" / "nan").write_text("yes", encoding="utf-8")
    assert "predictions are not finite" in refused(tune("--bits", 5))
    (place / "bin" / "costs.json").write_text("no JSON", encoding="utf-8")
    Path("text.txt").write_text("another text", encoding="utf-8")
    done = tune("--bits", 5)
    assert done.exit_code == 1 and "turboquant-measure ended too early (status 1); the end of its log" in done.stderr


def test_files_that_are_in_the_way(place):
    Path("plan.json").write_text("my notes", encoding="utf-8")
    done = tune("--bits", 5)
    assert done.exit_code == 1 and "exists and is no plan" in done.stderr and not Path("bin/runs.txt").exists()
    Path("plan.json").unlink()
    Path("out.gguf").write_text("", encoding="utf-8")
    assert "out.gguf exists already" in refused(tune("--bits", 5, "--write-into", "out.gguf"))
    Path("plot.png").write_text("", encoding="utf-8")
    assert "plot.png exists already" in refused(tune("--bits", 5, "--plot", "plot.png"))
    assert "it must end in .png, .svg, .pdf" in refused(tune("--bits", 5, "--plot", "plot.txt"))
    assert "no such file" in refused(tune("--bits", 5, "-m", "none.gguf"))
    assert "no such file" in refused(tune("--bits", 5, "-f", "none.txt"))


def test_a_copy_with_the_plan_and_a_plot(place):
    done = tune("--bits", 5, "--write-into", "out.gguf", "--plot", "plot.svg")
    assert done.exit_code == 0, done.output
    fields = gguf.GGUFReader("out.gguf").fields
    found = Plan.from_metadata({name: field.contents() for name, field in fields.items() if "plan" in name}, "out.gguf")
    plan = read_plan("plan.json")
    assert found is not None and (found.k, found.v, found.model) == (plan.k, plan.v, plan.model)
    assert "this plan, measured" in Path("plot.svg").read_text(encoding="utf-8")
    Path("plan.json").unlink()
    done = tune("--bits", 3, "-m", "out.gguf", "--write-into", "again.gguf")  # its plan takes the place of the other
    assert done.exit_code == 0, done.output
    again = gguf.GGUFReader("again.gguf")
    types = str(again.fields["turboquant.plan.type_k"].contents())
    assert expand(types) == read_plan("plan.json").k != plan.k and len(again.fields) == len(fields)
    for one, other in zip(again.tensors, gguf.GGUFReader("model.gguf").tensors, strict=True):
        assert one.name == other.name and np.array_equal(one.data, other.data)


def test_a_gpu_gets_types_that_it_has_kernels_for(place):
    (place / "bin" / "refuse").write_text("_tcq", encoding="utf-8")
    done = tune("--bits", 5, "-ngl", 99)
    assert done.exit_code == 0, done.output
    plan = read_plan("plan.json")
    assert set(plan.k) | set(plan.v) <= {"turbo2", "turbo3", "turbo4", "q8_0", "f16"}
    assert "q8_0/turbo3" in done.stdout and "_tcq" not in done.stdout


def test_types_are_kept_to(place):
    assert tune("--bits", 9, "--types", "q4_0,f16").exit_code == 0
    plan = read_plan("plan.json")
    assert set(plan.k) | set(plan.v) == {"q4_0", "f16"} and plan.k[2] == "f16"


def test_saturated_and_destroyed_layers(place):
    """Layer 0's K is destroyed by everything below q8_0: it is measured at finer types, and in f16, and gets q8_0."""
    write_measure(place / "bin", [{"k": 500.0, "v": 0.05}, *LAYERS[1:]])
    assert tune("--bits", 4.5).exit_code == 0
    assert read_plan("plan.json").k[0] in ("q8_0", "f16")
    tried = [line.split()[1] for line in runs() if line.startswith("500 ")]
    assert {"turbo3,q8_0*4", "turbo4,q8_0*4", "f16,q8_0*4"} <= set(tried)


def test_layers_without_a_cache_and_with_a_window(place):
    """The program's description of windows and layers is used, because metadata are incomplete."""
    write_model(place / "model.gguf", Shape(arch="gemma2", layers=4, window=32))
    layers = [{**LAYERS[0], "window": True}, LAYERS[1], None, LAYERS[3]]
    write_measure(place / "bin", layers, swa=32)
    assert tune("--bits", 4, "--ctx", 65536).exit_code == 0
    plan = read_plan("plan.json")
    assert plan.k[2] is None and plan.v[2] is None
    # A window of 32 holds 768 cells: at 65536 tokens its bits cost next to nothing.
    assert plan.k[0] in ("q8_0", "f16") and plan.v[0] == "q8_0" and plan.k[1] != "q8_0"
    measured = {json.dumps(line.split()[1:]) for line in runs()}
    assert all("-" in line for line in measured)


def test_heads_of_64(place):
    write_model(place / "model.gguf", Shape(head=64, layers=5))
    write_measure(place / "bin", LAYERS, block="_64")
    done = tune("--bits", 5)
    assert done.exit_code == 0, done.output
    plan = read_plan("plan.json")
    assert "turbo3_tcq" in plan.v and plan.about["bits"]["mean"] <= 5
