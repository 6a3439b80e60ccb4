#!/usr/bin/env python3
"""Make notebooks/*.ipynb from notebooks/*.py: run every cell, and store text and pictures in the notebook.

    make_notebooks.py            run and write all notebooks
    make_notebooks.py 02 05      run and write only these
    make_notebooks.py --check    exit with status 1 if the cells of a notebook differ from its source; run nothing

The sources are plain Python with cells marked by `# %%` (Jupytext's percent format). Edit the sources, not the .ipynb.
JupyterLab with jupytext opens them as notebooks. The program needs pip install '.[notebooks]'.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"  # widgets need a running kernel
TIMEOUT = 300  # greatest time of a cell in seconds, far above the needed one


def sources() -> list[Path]:
    """The notebooks' sources, in their order."""
    return sorted(FOLDER.glob("[0-9]*.py"))


def from_source(source: Path) -> nbformat.NotebookNode:
    """The notebook of a source, without outputs. The same source gives the same notebook."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02}"
        cell.metadata = {}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run all cells in a new kernel, in the notebooks' folder, and store the outputs in the cells.

    Raises:
        CellExecutionError: a cell failed.
    """
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        settings = {"connection_file": str(Path(folder) / "kernel.json")}
        if os.name == "posix":  # sockets in that folder, no open ports
            settings |= {"transport": "ipc", "ip": str(Path(folder) / "socket")}
        NotebookClient(notebook, config=Config(KernelManager=settings), timeout=TIMEOUT, record_timing=False,
                       resources={"metadata": {"path": str(FOLDER)}}).execute()


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Remove outputs that need a running kernel, and metadata that differ between machines."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if WIDGET not in one.get("data", {})]
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec",)} | {"language_info": {"name": "python"}}


def same_cells(one: nbformat.NotebookNode, other: nbformat.NotebookNode) -> bool:
    """Whether two notebooks have the same cells, apart from their outputs."""
    cells = [[(cell.id, cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (one, other)]
    return cells[0] == cells[1]


def check(source: Path) -> str:
    """What is wrong with the notebook of a source, or an empty text."""
    target = source.with_suffix(".ipynb")
    if not target.is_file():
        return f"{target.name} is missing"
    if not same_cells(from_source(source), nbformat.read(target, as_version=4)):
        return f"{target.name} is not what {source.name} says"
    return ""


def make(source: Path) -> Path:
    """Run a source and write its notebook."""
    target = source.with_suffix(".ipynb")
    notebook = from_source(source)
    execute(notebook)
    tidy(notebook)
    partial = target.with_name(f".{target.name}.partial")
    try:
        nbformat.write(notebook, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument("numbers", nargs="*", metavar="NN", help="how a notebook's name begins (default: all)")
    given = parser.parse_args()
    wanted = [one for one in sources() if not given.numbers or one.name.startswith(tuple(given.numbers))]
    if not wanted:
        parser.error(f"no notebook in {FOLDER} begins with {' or '.join(given.numbers)}")
    if given.check:
        problems = [problem for problem in map(check, wanted) if problem]
        print(*problems or ["all notebooks are those of their sources"], sep="\n")
        if problems:
            print("run tools/make_notebooks.py")
        return 1 if problems else 0
    for source in wanted:
        print(f"{source.name} ...", end=" ", flush=True)
        started = time.monotonic()
        try:
            target = make(source)
        except CellExecutionError as error:
            print(f"failed; {source.with_suffix('.ipynb').name} is as it was\n{error}")
            return 1
        print(f"{time.monotonic() - started:.0f} s, {target.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; notebooks that are not finished are as they were", file=sys.stderr)
        sys.exit(130)
