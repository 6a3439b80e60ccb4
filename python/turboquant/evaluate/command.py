"""``turboquant compare``: read the options, compare, write the report, print the short table."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import TurboQuantError
from ..fetch import resolve_model
from ..llama.build import where
from ..llama.files import read_json
from ..llama.paths import bundled_model, bundled_text, cache_dir
from ..llama.progress import Reporter, plain_console
from ..measure import needle
from ..measure.pairs import CachePair, Window, parse_pairs
from ..measure.programs import Programs
from ..measure.results import Results, write_text
from . import page
from .compare import CompareError, CompareOptions, above, check, compare, read_model
from .comparison import FORMAT, Comparison

__all__ = ["run"]

_FILES = ("report.json", "report.md", "report.html")


def run(
    model: Path | None,
    text: Path | None,
    *,
    types: str,
    ctx: int,
    chunks: int,
    decode_chunks: int,
    depths: str,
    needle_depths: str | None,
    positions: int,
    template: str | None,
    out: Path | None,
    fail_above: float | None,
    plan: Path | None,
    time_again: bool,
    window: str | None,
    bin: Path | None,
    threads: int | None,
    gpu_layers: int | None,
) -> list[str]:
    """Run the command with its options. Returns a line for each pair that exceeds a KLD of `fail_above`.

    Raises:
        TurboQuantError: the text says what to do.
        OSError: a file cannot be read or written.
    """
    model_path = resolve_model(model) if model else bundled_model()
    described = read_model(model_path)
    try:
        options = CompareOptions(
            model=model_path,
            text=(text or bundled_text()).expanduser(),
            pairs=_with_plans(parse_pairs(types), described.plan, plan),
            ctx=ctx,
            chunks=chunks,
            decode_ctx=min(512, ctx),
            decode_chunks=decode_chunks,
            depths=_numbers(depths, "--depths"),
            needle_depths=None if needle_depths is None else _numbers(needle_depths, "--needle-depths"),
            positions=positions,
            template=_template(template) if template else needle.template_for(model_path),
            time_again=time_again,
            window=None if window is None else _window(window),
            command=["turboquant", *sys.argv[1:]],
        )
    except ValueError as error:
        raise CompareError(str(error)) from error
    scratch = cache_dir() / "evaluate"
    check(options, described, scratch)
    name = f"compare-{model_path.stem}"
    out = out and out.expanduser()
    if out:
        _check(out)
    else:
        _probe(Path(name))
    programs = Programs(bin or where(), scratch / "logs", threads, gpu_layers)
    wanted = any(pair.window and pair.window.tokens for pair in options.all_pairs)
    if wanted and not programs.knows_window():
        raise CompareError(f"--window: the build in {programs.folder} has none: run `turboquant build` again")
    with Reporter().track("starting", 1, "work") as track:
        report = compare(
            options, described, programs, Results(scratch / "results"), scratch,
            lambda label, done, total: track.update(int(done), max(1, int(total)), label),
        )  # fmt: skip
    contents = (report.to_json(), page.to_markdown(report), page.to_html(report))
    folder = _write(out, name, options.command, dict(zip(_FILES, contents, strict=True)))
    _show(report, folder)
    return [] if fail_above is None else above(report, fail_above)


def _with_plans(pairs: list[CachePair], in_model: bool, plan: Path | None) -> list[CachePair]:
    """The pairs, preceded by the plan of the file `plan`, and the plan in the model's metadata, if they exist."""
    auto = CachePair("auto", "auto")
    if in_model and auto not in pairs:
        pairs = [auto, *pairs]
    if plan is not None:
        plan = plan.expanduser().resolve()
        if not plan.is_file():
            raise CompareError(f"{plan}: no such file; give a plan that `turboquant tune` has written with --plan")
        pairs = [CachePair("auto", "auto", plan), *pairs]
    return pairs


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [-1]
    if any(number < 0 for number in numbers):
        raise CompareError(f"{option}: expected whole numbers with commas between, such as 0,4096,16384, got {text!r}")
    return list(dict.fromkeys(numbers))


def _window(text: str) -> Window:
    try:
        return Window.parse(text)
    except ValueError as error:
        raise CompareError(f"--{error}") from error


def _template(name: str) -> str:
    if name in needle.TEMPLATES:
        return needle.TEMPLATES[name]
    path = Path(name).expanduser()
    if not path.is_file():
        known = ", ".join(needle.TEMPLATES)
        raise CompareError(f"--needle-template {name}: neither one of {known}, nor a file")
    return needle.check_template(path.read_text(encoding="utf-8").removesuffix("\n"))


def _check(folder: Path) -> None:
    """Check that the report can be written to the folder without replacing other files. The folder is not created."""
    taken = [name for name in _FILES if (folder / name).exists()]
    if taken and (read_json(folder / _FILES[0]) or {}).get("format") != FORMAT:
        raise CompareError(
            f"{folder / taken[0]} exists and is no report of this program; give another folder with --out"
        )
    _probe(folder)


def _probe(folder: Path) -> None:
    """Raise CompareError if the folder cannot be created or written to."""
    above = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryFile(prefix=".writable-", dir=above).close()
    except OSError as error:
        raise CompareError(f"cannot write to {folder} ({error.strerror}); give another folder with --out") from error


def _make(folder: Path | None, name: str, command: Sequence[str]) -> Path:
    """Create the folder `folder`, or else one that is new, empty, or has the report of the same command."""
    for number in itertools.count(1):
        one = folder or Path(name if number == 1 else f"{name}-{number}")
        try:
            one.mkdir(parents=True, exist_ok=folder is not None)
            return one
        except FileExistsError:
            if folder:
                raise
            written = (read_json(one / _FILES[0]) or {}).get("command") == list(command)
            if one.is_dir() and (written or not any(one.iterdir())):
                return one
    raise AssertionError


def _write(out: Path | None, name: str, command: Sequence[str], files: dict[str, str]) -> Path:
    path = out or Path(name)
    try:
        folder = _make(out, name, command)
        for file, content in files.items():
            path = folder / file
            write_text(path, content)
    except OSError as error:
        raise TurboQuantError(
            f"cannot write {path} ({error.strerror}); make room or give another --out: what was measured is remembered"
        ) from error
    return folder


def _show(report: Comparison, folder: Path) -> None:
    console = plain_console()
    console.print(page.table(report), highlight=False)
    console.print()
    for line in page.alarms(report):
        console.print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)
    for line in page.verdict(report) + page.failures(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nReport: {folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
