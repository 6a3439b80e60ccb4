"""The order of a graph's nodes, which the CUDA glue changes so that one launch computes RoPE of queries and keys."""

from __future__ import annotations

from pathlib import Path

from harness import Build, run_beside_glue


def test_ropes_are_arranged(build: Build, tmp_path: Path) -> None:
    run_beside_glue(build, "arrange.cpp", tmp_path)
