"""``turboquant compare``: read the options, compare, write the report, print the short table."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..llama.build import where
from ..llama.files import LlamaError, read_json
from ..llama.paths import cache_dir, native_dir
from ..llama.progress import Reporter
from . import needle, page
from .compare import FORMAT, CompareError, CompareOptions, above, check, compare, read_model, to_json
from .pairs import CachePair, parse_pairs
from .programs import Programs
from .results import Results, write_text

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
    bin: Path | None,
    threads: int | None,
    gpu_layers: int | None,
) -> list[str]:
    """Compare as the options of the command say; return why the KLD is above `fail_above`, if it is.

    Raises:
        LlamaError: the text says what to do.
        OSError: a file cannot be read or written.
    """
    bundled = native_dir() / "models"
    model_path = (model or bundled / "prose-8m-q8_0.gguf").expanduser()
    described = read_model(model_path)
    try:
        options = CompareOptions(
            model=model_path,
            text=(text or bundled / "heldout.txt").expanduser(),
            pairs=_with_plans(parse_pairs(types), described.plan, plan),
            ctx=ctx,
            chunks=chunks,
            decode_ctx=min(512, ctx),
            decode_chunks=decode_chunks,
            depths=_numbers(depths, "--depths"),
            needle_depths=None if needle_depths is None else _numbers(needle_depths, "--needle-depths"),
            positions=positions,
            template=_template(template or ("plain" if model else "notes")),
            time_again=time_again,
            command=["turboquant", *sys.argv[1:]],
        )
    except ValueError as error:
        raise CompareError(str(error)) from error
    scratch = cache_dir() / "evaluate"
    check(options, described, scratch)
    folder = _folder(out or _free(f"compare-{model_path.stem}", options.command))
    programs = Programs(bin or where(), scratch / "logs", threads, gpu_layers)
    with Reporter().track("starting", 1, "work") as track:
        report = compare(
            options, described, programs, Results(scratch / "results"), scratch,
            lambda label, done, total: track.update(int(done), max(1, int(total)), label),
        )  # fmt: skip
    for name, content in zip(_FILES, (to_json(report), page.to_markdown(report), page.to_html(report)), strict=True):
        _write(folder / name, content)
    _show(report, folder)
    return [] if fail_above is None else above(report, fail_above)


def _with_plans(pairs: list[CachePair], in_model: bool, plan: Path | None) -> list[CachePair]:
    """The pairs, and the plans that there are: that in the model's metadata, and that of a file."""
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


def _template(name: str) -> str:
    if name in needle.TEMPLATES:
        return needle.TEMPLATES[name]
    path = Path(name).expanduser()
    if not path.is_file():
        known = ", ".join(needle.TEMPLATES)
        raise CompareError(f"--needle-template {name}: neither one of {known}, nor a file")
    return needle.check_template(path.read_text(encoding="utf-8").removesuffix("\n"))


def _free(name: str, command: Sequence[str]) -> Path:
    """A folder that is free, or holds what the same command wrote: reports of other commands stay."""
    for number in itertools.count(1):
        folder = Path(name if number == 1 else f"{name}-{number}")
        if not folder.exists() or (read_json(folder / _FILES[0]) or {}).get("command") == list(command):
            return folder
    raise AssertionError


def _folder(folder: Path) -> Path:
    """Make the folder and see that the report can be written to it, without writing over what is not ours."""
    folder = folder.expanduser()
    taken = [name for name in _FILES if (folder / name).exists()]
    if taken and (read_json(folder / _FILES[0]) or {}).get("format") != FORMAT:
        raise CompareError(
            f"{folder / taken[0]} exists and is no report of this program; give another folder with --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        write_text(probe, "")
        probe.unlink()
    except OSError as error:
        raise CompareError(f"cannot write to {folder} ({error.strerror}); give another folder with --out") from error
    return folder


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise LlamaError(
            f"cannot write {path} ({error.strerror}); make room or give another --out: what was measured is remembered"
        ) from error


def _show(report: dict[str, object], folder: Path) -> None:
    terminal = sys.stdout.isatty()
    console = Console(force_terminal=terminal, no_color=not terminal or None, width=None if terminal else 110)
    console.print(page.table(report), highlight=False)
    console.print()
    for line in page.alarms(report):
        console.print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)
    for line in page.verdict(report) + page.failures(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nReport: {folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
