"""``python -m turboquant.evaluate``: the quality table of a model for a list of cache types."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ..errors import TurboQuantError
from ..fetch import resolve_model
from ..llama.paths import bundled_model, bundled_text, cache_dir
from ..llama.progress import Reporter, Track, plain_console
from ..measure.measurer import Measurer
from ..measure.needle import template_for
from ..measure.pairs import CachePair, parse_pairs
from ..measure.programs import ProgramError, Programs
from ..measure.results import Results, write_text
from .demo import show_demo
from .report import show, to_json, to_markdown
from .rows import Options, measure

TYPES = "q8_0,q4_0,turbo4,turbo4_tcq,turbo3,turbo3_tcq,turbo2,turbo2_tcq,q8_0/turbo3"

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def evaluate(
    bin_dir: Annotated[Path, typer.Option("--bin", help="The bin folder of a llama.cpp build (`turboquant where`).")],
    model: Annotated[
        Path | None,
        typer.Option(
            help="A GGUF model, or the name of a known model (see `turboquant fetch`). Default: the bundled "
            "prose-8m-q8_0.gguf."
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text. Default: the bundled heldout.txt.")] = None,
    types: Annotated[str, typer.Option(help="Cache types: TYPE or TYPE_K/TYPE_V, comma-separated.")] = TYPES,
    ctx: Annotated[int, typer.Option(min=128, help="Tokens in a chunk, whose second half is scored.")] = 2048,
    chunks: Annotated[int, typer.Option(min=1, help="Number of chunks; more chunks give smaller errors.")] = 6,
    needles: Annotated[int, typer.Option(min=0, max=30, help="Number of retrieval questions per cache type.")] = 4,
    distance: Annotated[int, typer.Option(min=1, help="Characters between a hidden number and the question.")] = 6000,
    threads: Annotated[int | None, typer.Option(min=1, help="Number of threads. Default: all CPUs.")] = None,
    demo: Annotated[str, typer.Option(help="First generate text and ask one question with this cache.")] = "",
    headline: Annotated[str, typer.Option(hidden=True, help="Text before the table, after the output of --demo.")] = "",
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this file as Markdown.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write all numbers to this file.")] = None,
) -> None:
    """Measure the loss (perplexity, KL divergence from the f16 cache, retrieval) and the size (MiB) of cache types.

    Results are stored in the cache folder. A measurement with the same build, model, text and options is not repeated.
    """
    console = plain_console()
    # SIGTERM is treated as Ctrl-C, so that the running program is ended and the scratch folder removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        pairs = parse_pairs(types)
        text_path = _file(text or bundled_text())
        model_path = resolve_model(model or bundled_model())
        options = Options(
            model=model_path,
            text=text_path,
            pairs=pairs,
            ctx=ctx,
            chunks=chunks,
            needles=needles,
            distance=distance,
            template=template_for(model_path),
        )
        folder = cache_dir() / "evaluate"
        programs, results = Programs(bin_dir, folder / "logs", threads), Results(folder / "results")
        if demo:
            try:
                measurer = Measurer(model_path, text_path, programs, results, folder)
                show_demo(console, CachePair.parse(demo), options, measurer)
            except ProgramError as error:  # the table is measured nevertheless
                console.print(f"\nThis could not be shown: {error.reason}.\n", markup=False, highlight=False)
        if headline:
            console.print(headline, markup=False, highlight=False)
        started = time.monotonic()
        with _Display(Reporter(plain_console(stderr=True))) as display:
            rows = measure(options, programs, results, folder, display.update)
        took = f"{time.monotonic() - started:.0f} s" if display.runs else "all remembered"
        show(console, rows, options, programs.threads, took)
        if markdown:
            write_text(markdown, to_markdown(rows))
        if json_path:
            about = {"model": str(options.model), "text": str(options.text), "ctx": ctx, "chunks": chunks}
            write_text(json_path, to_json(rows, **about, threads=programs.threads, distance=distance))
    except (TurboQuantError, OSError, ValueError) as error:
        plain_console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


class _Display:
    """A progress bar for each measurement, one after the other."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._stack = ExitStack()
        self._track: Track | None = None
        self._what = ""
        self.runs = 0

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *unused: object) -> None:
        self._stack.close()

    def update(self, what: str, done: int, total: int) -> None:
        if self._track is None or what != self._what:
            self._stack.close()
            self._what = what
            self.runs += 1
            self._track = self._stack.enter_context(self._reporter.track(f"measuring {what}", total))
        self._track.update(done)


def _file(path: Path) -> Path:
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def main() -> None:
    """Run the command line. Ctrl-C ends it with a message and exit status 130."""
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        sys.stderr.write("\nInterrupted. What was measured is kept: run it again to go on.\n")
        code = 130
    except Exception as error:
        if not hasattr(error, "show"):  # a usage error of click
            raise
        error.show()
        code = getattr(error, "exit_code", 2)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
