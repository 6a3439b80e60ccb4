"""A device that holds the cache but lacks an operation on the types is refused with a message, and does not abort."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from harness import HERE, QUIET, Build


@pytest.fixture(scope="module")
def fake_device(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fake_device.cpp, compiled against the build."""
    program = tmp_path_factory.mktemp("fake") / "fake_device"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", str(HERE / "fake_device.cpp")]
    command += [f"-I{build.source / folder}" for folder in ("include", "ggml/include", "ggml/src")]
    command += [f"-L{build.bin}", "-lllama", "-lggml", "-lggml-base", "-lggml-cpu"]
    command += [f"-Wl,-rpath,{build.bin}", f"-Wl,-rpath-link,{build.bin}", "-o", str(program)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, model: Path, *args: object, **env: str) -> tuple[int, str]:
    command = [str(program), str(model), *map(str, args)]
    done = subprocess.run(
        command, check=False, capture_output=True, timeout=300, env={**os.environ, **QUIET, **env}, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("op", "type_k", "type_v", "flash", "named"),
    [
        ("SET_ROWS", "turbo4", "turbo3", -1, "turbo4"),
        ("SET_ROWS", "f16", "turbo3", 1, "turbo3"),
        ("FLASH_ATTN_EXT", "turbo4", "turbo4", 1, "turbo4"),
        ("FLASH_ATTN_EXT", "q8_0", "turbo2", -1, "turbo2"),
        ("MUL_MAT", "turbo3", "f16", 0, "turbo3"),
    ],
)
def test_missing_op_is_refused(fake_device, prose_model, op, type_k, type_v, flash, named):
    status, text = run(fake_device, prose_model, op, type_k, type_v, flash, 1, "FAKE")
    assert (status, "refused" in text) == (2, True), text
    sentence = next(line for line in text.splitlines() if "turboquant:" in line)
    for part in ("FAKE0 (the CPU in disguise)", f"cannot run {op} on {named}", "-nkvo", "-ngl 0"):
        assert part in sentence


@pytest.mark.parametrize(
    ("op", "type_k", "type_v", "flash", "offload"),
    [
        pytest.param("none", "turbo4", "turbo3", -1, 1, id="supported"),
        pytest.param("SET_ROWS", "turbo4", "turbo3", -1, 0, id="the way out: -nkvo"),
        pytest.param("SET_ROWS", "q8_0", "q8_0", -1, 1, id="stock types"),
        pytest.param("MUL_MAT", "turbo4", "turbo3", 1, 1, id="an op that is not needed"),
    ],
)
def test_otherwise_it_runs(fake_device, prose_model, op, type_k, type_v, flash, offload):
    status, text = run(fake_device, prose_model, op, type_k, type_v, flash, offload, "FAKE")
    assert (status, "decoded" in text) == (0, True), text


@pytest.mark.parametrize(
    ("offload", "registry", "type"), [(1, "FAKE", "turbo4"), (0, "FAKE", "turbo4_tcq"), (1, "RPC", "turbo4")]
)
def test_auto_depends_on_where_the_cache_is(fake_device, prose_model, offload, registry, type):
    status, text = run(fake_device, prose_model, "none", "auto", "auto", -1, offload, registry, TURBOQUANT_RPC="1")
    assert (status, "decoded" in text) == (0, True), text
    assert f"turboquant: cache types: K {type}*6; V {type}*6" in text


def test_a_remote_device_is_refused_unless_told_that_its_server_is_patched(fake_device, prose_model):
    args = (fake_device, prose_model, "none", "turbo4", "turbo4", -1, 1, "RPC")
    status, text = run(*args)
    assert status == 2 and "TURBOQUANT_RPC=1" in text and "-nkvo" in text, text
    assert run(*args, TURBOQUANT_RPC="1")[0] == 0
    assert run(fake_device, prose_model, "none", "q8_0", "q8_0", -1, 1, "RPC")[0] == 0


def test_inputs_of_a_turbo_cache_are_copied_at_once(fake_device, prose_model):
    """With a device that calls itself CUDA, as the scheduler would copy them one by one; see turbo-inputs.h."""

    def decode(type: str, registry: str) -> tuple[str, list[tuple[int, int]]]:
        args = (fake_device, prose_model, "none", type, type, 1, 1, registry)
        status, text = run(*args, TURBOQUANT_COUNT="1")
        assert status == 0, text
        steps = re.findall(r"turboquant: count (\d+) inputs copied at once, tokens (\d+),", text)
        return re.search(r"decoded (\w+)", text)[1], [(int(count), int(inputs)) for count, inputs in steps]

    (at_once, steps), (one_by_one, none) = decode("turbo4", "CUDA"), decode("turbo4", "FAKE")
    assert at_once == one_by_one and not none
    # the batch and three tokens; with the mask, the indices, and the window's mask and slots
    assert len(steps) == 1 and steps[0][0] == 4 and steps[0][1] >= 6, steps
    assert not decode("q8_0", "CUDA")[1]
    assert decode("turbo4", "NONE") == (one_by_one, [])
