"""``python -m turboquant.evaluate``: the quality table of a model for a list of cache types."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from turboquant.fetch import resolve_model
from turboquant.llama.files import LlamaError
from turboquant.llama.paths import cache_dir, native_dir

from . import demo as demos
from .measure import Measurer, Options, Row, measure
from .needle import ask, bundled_model, fit_needles, template_for
from .pairs import CachePair, parse_pairs
from .programs import ProgramError, Programs
from .report import notes, table, to_json, to_markdown
from .results import Results, write_text

TYPES = "q8_0,q4_0,turbo4,turbo3,turbo2,q8_0/turbo3"

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def evaluate(
    bin_dir: Annotated[Path, typer.Option("--bin", help="The bin folder of a llama.cpp build (`turboquant where`).")],
    model: Annotated[
        Path | None,
        typer.Option(
            help="A GGUF model, or the name of a known one (`turboquant fetch`). Default: the bundled "
            "prose-8m-q8_0.gguf."
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text. Default: the bundled heldout.txt.")] = None,
    types: Annotated[str, typer.Option(help="Cache types: TYPE or TYPE_K/TYPE_V, comma-separated.")] = TYPES,
    ctx: Annotated[int, typer.Option(min=128, help="Tokens in a chunk; the second half is scored.")] = 2048,
    chunks: Annotated[int, typer.Option(min=1, help="Chunks; more of them, smaller error bars.")] = 6,
    needles: Annotated[int, typer.Option(min=0, max=30, help="Retrieval questions per cache type.")] = 4,
    distance: Annotated[int, typer.Option(min=1, help="Characters between a hidden number and the question.")] = 6000,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads. Default: all CPUs.")] = None,
    demo: Annotated[str, typer.Option(help="First write something and ask one question with this cache.")] = "",
    headline: Annotated[str, typer.Option(hidden=True, help="Printed between the two.")] = "",
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this file as Markdown.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write all numbers to this file.")] = None,
) -> None:
    """Measure what each cache type costs (perplexity, KL divergence from the f16 cache, retrieval) and saves (MiB).

    Results are remembered in the cache folder; what was measured once with the same build, model, text and options is
    shown at once.
    """
    console = _console(sys.stdout.isatty())
    # As Ctrl-C does, so that the running program is ended and the scratch folder removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        pairs = parse_pairs(types)
        text_path = _file(text or native_dir() / "models" / "heldout.txt")
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
                _demo(console, CachePair.parse(demo), options, measurer)
            except ProgramError as error:  # the table is measured all the same
                console.print(f"\nThis could not be shown: {error.reason}.\n", markup=False, highlight=False)
        if headline:
            console.print(headline, markup=False, highlight=False)
        started = time.monotonic()
        with _Display(console) as display:
            rows = measure(options, programs, results, folder, display.update)
        _show(console, rows, options, programs, started, display.runs)
        if markdown:
            write_text(markdown, to_markdown(rows))
        if json_path:
            about = {"model": str(options.model), "text": str(options.text), "ctx": ctx, "chunks": chunks}
            write_text(json_path, to_json(rows, **about, threads=programs.threads, distance=distance))
    except (LlamaError, OSError, ValueError) as error:
        _console(sys.stderr.isatty(), stderr=True).print(
            f"error: {error}", markup=False, highlight=False, soft_wrap=True
        )
        raise typer.Exit(1) from None


def _demo(console: Console, pair: CachePair, options: Options, measurer: Measurer) -> None:
    programs, results = measurer.programs, measurer.results
    common = {"demo": 2, "build": measurer.build, "model": measurer.model_hash}
    common |= {"pair": str(pair), "threads": programs.threads}

    key = {**common, "what": "text", "request": demos.REQUEST, "opening": demos.OPENING}
    known = results.get(key)
    chats = known["chat"] if known else demos.has_chat_template(programs, options.model)
    what = f"{'An answer' if chats else 'A story'}, written with K in {pair.k} and V in {pair.v}"
    console.print(f"{what}{' (remembered)' if known else ''}:\n", markup=False, highlight=False)
    stream = _Stream()
    stream.write(f"> {demos.REQUEST}\n\n" if chats else demos.OPENING)
    if known is None:
        write = demos.chat if chats else demos.write_story
        written = write(programs, options.model, pair, on_text=stream.write)
        results.put(key, {"chat": chats, **asdict(written)})
    else:
        written = demos.Written(known["text"], known["ended"])
        stream.write(written.text)
    stream.end(cut=not written.ended)

    if not options.needles:
        return
    text = options.text.read_text(encoding="utf-8", errors="replace")
    try:
        (needle,) = fit_needles(
            text, 1, options.distance, options.needle_ctx, measurer.count_tokens, template=options.template
        )
    except ValueError as error:
        console.print(f"No question is asked: {error}.\n", markup=False, highlight=False)
        return
    key = {**common, "prompt": needle.prompt}
    answers = results.get(key)
    note = " (remembered)" if answers else ""
    console.print(f"Hidden {needle.distance:,} characters before the question: {needle.note}", highlight=False)
    console.print(f"Question: {needle.question}", highlight=False)
    if answers is None:
        answers = ask(programs, options.model, [needle], pair)
        results.put(key, answers)
    verdict = "right" if answers == [needle.number] else f"wrong, it is {needle.number}"
    console.print(f"Answer: {answers[0]} ({verdict}){note}\n", highlight=False, markup=False)


def _show(
    console: Console, rows: list[Row], options: Options, programs: Programs, started: float, runs: int
) -> None:
    took = "all remembered" if runs == 0 else f"{time.monotonic() - started:.0f} s"
    title = (
        f"{options.model.name}, {options.text.name}: {options.chunks} x {options.ctx} tokens, "
        f"{programs.threads} threads ({took})"
    )
    caption = f"± standard error. Perplexity's own, ± {rows[0].ppl_error:.1f}, is that of the text and common to all."
    caption += "\nKLD (nats per token) and same top token: against the model's own f16 cache."
    if distances := [row.distance for row in rows if row.distance]:
        nearest = min(options.distance, *distances)
        caption += f"\nNeedle: a number {nearest:,} characters before the question, greedy decoding."
        if nearest < options.distance:
            caption += f" More do not fit into {options.needle_ctx} tokens."
    console.print(f"\n{title}\n", highlight=False, markup=False, soft_wrap=True)
    console.print(table(rows), highlight=False)
    console.print(f"\n{caption}", highlight=False, markup=False, soft_wrap=True)
    for line in notes(rows):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


class _Display:
    """Progress: a bar on a terminal, one line per measurement elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""
        self.runs = 0

    def __enter__(self) -> _Display:
        if self._console.is_terminal:
            columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
        return self

    def __exit__(self, *unused: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._what = what
            self.runs += 1
            if self._bar:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(what, total=total)
            else:
                self._console.print(f"measuring {what}", highlight=False)
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done)


class _Stream:
    """Write model output as it comes; off a terminal, control characters are dropped."""

    def __init__(self) -> None:
        self._trailing = ""

    def write(self, text: str) -> None:
        # Models may emit anything: escape sequences must not reach the terminal either.
        text = self._trailing + "".join(one for one in text if one.isprintable() or one == "\n")
        body = text.rstrip("\n")  # llama-completion ends with blank lines
        self._trailing = text[len(body) :]
        sys.stdout.write(body.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding))
        sys.stdout.flush()

    def end(self, cut: bool) -> None:
        dots = (" …" if "utf" in sys.stdout.encoding.lower() else " ...") if cut else ""
        sys.stdout.write(f"{dots}\n\n")
        sys.stdout.flush()


def _console(terminal: bool, stderr: bool = False) -> Console:
    # Decided by the stream alone: FORCE_COLOR must not put control characters into a file.
    width = None if terminal else 110
    return Console(force_terminal=terminal, no_color=not terminal or None, width=width, stderr=stderr)


def _file(path: Path) -> Path:
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def main() -> None:
    """Run the command line; Ctrl-C ends it with one sentence and exit code 130."""
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
