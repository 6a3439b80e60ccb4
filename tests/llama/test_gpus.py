"""Two GPUs write the text that one writes. Needs two NVIDIA GPUs and a build by `turboquant build --backend cuda`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from harness import Build

from turboquant.llama.build import BuildError, where

PROMPT = "She looked out of the window and saw that the road was empty. The rain had"


@pytest.fixture(scope="module")
def cuda_build() -> Build:
    program = shutil.which("nvidia-smi")
    listed = subprocess.run([program, "-L"], capture_output=True, text=True).stdout if program else ""
    if listed.count("GPU ") < 2:
        pytest.skip("needs two NVIDIA GPUs")
    try:
        folder = where()
    except BuildError as error:
        pytest.skip(f"needs `turboquant build --backend cuda`: {error}")
    if not list(folder.glob("*ggml-cuda*")):
        pytest.skip(f"needs `turboquant build --backend cuda`: {folder} is a build for the CPU")
    return Build(folder, folder, folder / "probe")


def write(build: Build, model: Path, pair: tuple[str, str], gpus: str, split: str) -> str:
    """64 greedy tokens; `gpus` as in CUDA_VISIBLE_DEVICES."""
    result = build.run(
        "llama-completion", "-m", model, "-p", PROMPT, "-n", 64, "--temp", 0, "-c", 512, "-no-cnv", "--no-warmup",
        "--no-display-prompt", "-ngl", 99, "-fa", "on", "-ctk", pair[0], "-ctv", pair[1], "-sm", split,
        env={"CUDA_VISIBLE_DEVICES": gpus},
    )
    return result.out.rstrip()[:100]  # it sometimes ends before it has printed its last token


@pytest.mark.parametrize("pair", [("turbo4", "turbo4"), ("q8_0", "turbo3"), ("turbo3", "turbo2")], ids="/".join)
@pytest.mark.parametrize("split", ["layer", "row"])
def test_two_gpus_write_the_text_of_one(cuda_build, prose_model, pair: tuple[str, str], split: str) -> None:
    one = write(cuda_build, prose_model, pair, "0", "none")
    assert len(one) == 100
    assert write(cuda_build, prose_model, pair, "0,1", split) == one
