"""The descriptions that the glue of every backend uses: which ops use the types, and attention over them."""

from __future__ import annotations

from pathlib import Path

from harness import Build, run_beside_glue


def test_ops_and_attention_are_described(build: Build, tmp_path: Path) -> None:
    run_beside_glue(build, "ops.cpp", tmp_path)
