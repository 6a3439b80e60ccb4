"""The mask of a decode step, which a hook fills without examining each cell if the contents are certain."""

from __future__ import annotations

from pathlib import Path

from harness import Build, run_beside_glue


def test_decode_mask_is_the_rule_asked_cell_by_cell(build: Build, tmp_path: Path) -> None:
    run_beside_glue(build, "decode_mask.cpp", tmp_path)
