"""Plots that matplotlib draws into files."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ._output import OutputError, check_new, partial_file, publish

__all__ = ["check_plot", "figure"]

_SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raise OutputError if no picture can be written to `path`. Callers check before they start long work."""
    if path.suffix.lower() not in _SUFFIXES:
        raise OutputError(f"{path} is no picture's name: it must end in {', '.join(_SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise OutputError("a picture needs the package matplotlib: pip install 'turboquant[convert]'")
    check_new(path)


@contextmanager
def figure(
    path: Path, columns: int, title: str, rows: int = 1, size: tuple[float, float] = (5, 4)
) -> Iterator[Sequence[Any]]:
    """The axes of a new figure, row by row. At the end of the ``with`` block the figure is written to `path`.

    Raises:
        OutputError: as `check_plot`, or the file cannot be written.
    """
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), layout="constrained", squeeze=False
    )
    try:
        yield list(axes.ravel())
        drawn.suptitle(title)
        with partial_file(path) as partial:
            drawn.savefig(partial, dpi=120, format=path.suffix[1:].lower())
            publish(partial, path)
    finally:
        pyplot.close(drawn)
