"""The mask of a decode step, which a hook fills without examining each cell if the contents are certain."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from harness import HERE, Build


def test_decode_mask_is_the_rule_asked_cell_by_cell(build: Build, tmp_path: Path) -> None:
    program = tmp_path / "decode_mask"
    glue = build.source.parent / "native"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", str(HERE / "decode_mask.cpp")]
    command += [f"-I{build.source / folder}" for folder in ("src", "include", "ggml/include", "ggml/src")]
    command += [f"-I{glue / folder}" for folder in ("ggml_types", "cpp/include")]
    command += [f"-L{build.bin}", "-lllama", "-lggml", "-lggml-base", "-lggml-cpu"]
    command += [f"-Wl,-rpath,{build.bin}", f"-Wl,-rpath-link,{build.bin}", "-o", str(program)]
    compiled = subprocess.run(command, check=False, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
