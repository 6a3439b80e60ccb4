"""What the glue of every backend starts from: which ops touch the types, and what attention over them is."""

from __future__ import annotations

from pathlib import Path

from harness import Build, run_beside_glue


def test_ops_and_attention_are_described(build: Build, tmp_path: Path) -> None:
    run_beside_glue(build, "ops.cpp", tmp_path)
