"""A graph's nodes: their order, which the CUDA glue changes so that one launch computes RoPE of queries and keys, and
what later ones take from earlier ones."""

from __future__ import annotations

from pathlib import Path

from harness import Build, run_beside_glue


def test_what_the_cuda_glue_makes_of_a_graph(build: Build, tmp_path: Path) -> None:
    run_beside_glue(build, "arrange.cpp", tmp_path)
