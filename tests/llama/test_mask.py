"""The mask of attention, which a hook fills without examining each cell if the contents are certain."""

from __future__ import annotations

from pathlib import Path

from harness import Build, run_beside_glue


def test_masks_equal_those_of_llama_cpp(build: Build, tiny, tmp_path: Path) -> None:
    run_beside_glue(build, "mask.cpp", tmp_path, tiny("head128"))
