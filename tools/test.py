#!/usr/bin/env python3
"""Run all tests, also on a fresh machine: `python3 tools/test.py`.

The script needs Python 3.10 or newer, pip and a C++ compiler. It makes a virtual environment, installs CMake and Ninja
from PyPI if they are missing, and, as root on Debian and Ubuntu, installs the packages of the suites that need a cross
compiler or clang. A suite whose tools cannot be installed is skipped, and the output gives the reason. Builds are kept
in the cache folder (~/.cache/turboquant), so a second run takes minutes.

Suites that use one core run beside the others. Their output is printed when they have ended.

The last line has the counts over all suites: "N passed, N failed, N skipped". The exit status is 0 if nothing failed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
FUZZ_SECONDS = 60
#: Greatest time of a suite in seconds, far above the needed one.
TIME_LIMIT = 45 * 60


class Skip(Exception):
    """A suite cannot run on this machine. The text gives the reason."""


class Broken(Exception):
    """A suite failed to run. The text gives the reason."""


@dataclass
class Count:
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


@dataclass
class Context:
    """The state that the suites share."""

    cache: Path
    install_packages: bool
    pytest_args: list[str]
    whole: bool = False  # see --whole
    python: Path | None = None  # of the virtual environment, once it is there
    apt_updated: bool = False
    path: str = field(default_factory=lambda: os.environ.get("PATH", ""))
    out: TextIO | None = None  # the output of a suite; None is the terminal

    def say(self, *lines: object) -> None:
        print(*lines, sep="\n", file=self.out, flush=True)

    def environment(self) -> dict[str, str]:
        """The caller's environment without variables that would change the results."""
        dropped = ("TURBOQUANT_KERNELS", "TURBOQUANT_GENERIC", "LLAMA_ARG_", "PYTEST_ADDOPTS", "PYTHONPATH", "PYTHONHOME")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
        return {**kept, "PATH": self.path, "TURBOQUANT_CACHE": str(self.cache)}


# ---- processes -------------------------------------------------------------------------------------------------------


class Processes:
    """The running processes of all threads, so that one signal ends them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal may arrive while this thread has it
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, words: list[str], environment: dict[str, str], out: TextIO | None) -> int:
        """Run a command to its end; returns its status. Raises Broken if it takes too long."""
        with self._lock:
            if self._stopped:
                raise Broken("stopped")
            errors = None if out is None else subprocess.STDOUT
            process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=errors
            )
            self._running.add(process)
        try:
            return process.wait(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise Broken(f"`{' '.join(words)}` took more than {TIME_LIMIT // 60} minutes and was stopped") from None
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            with self._lock:
                self._running.discard(process)

    def stop(self) -> None:
        """End all processes, and start no other one."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


PROCESSES = Processes()


def run(context: Context, command: Sequence[object], *, log: Path | None = None, show: bool = False) -> None:
    """Run a command, with its output in that of the suite (`show`) or in `log`. Raises Broken if it fails."""
    words = [str(word) for word in command]
    if show:
        status = PROCESSES.run(words, context.environment(), context.out)
        if status != 0:
            raise Broken(f"`{' '.join(words)}` ended with status {status}")
        return
    with tempfile.TemporaryFile("w+", errors="replace") if log is None else log.open("w+", errors="replace") as out:
        status = PROCESSES.run(words, context.environment(), out)
        if status != 0:
            out.seek(0)
            tail = "\n".join(out.read().splitlines()[-60:])
            raise Broken(f"`{' '.join(words)}` ended with status {status}\n{tail}")


def works(context: Context, *command: object) -> bool:
    """Whether a command can be run and succeeds."""
    words = [str(word) for word in command]
    try:
        return subprocess.run(words, capture_output=True, env=context.environment(), timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def junit(path: Path) -> Count:
    """Counts of a JUnit XML report."""
    if not path.is_file():
        raise Broken(f"no test report at {path}")
    root = ElementTree.parse(path).getroot()
    count = Count()
    for case in root.iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"} or case.get("status") == "fail":
            count.failed += 1
        elif "skipped" in kinds or case.get("status") in ("notrun", "disabled"):
            count.skipped += 1
        else:
            count.passed += 1
    return count


# ---- requirements ----------------------------------------------------------------------------------------------------

APT = threading.Lock()


def require_packages(context: Context, ready: Callable[[], bool], *packages: str) -> None:
    """Install Debian packages until `ready()` is true, if this is permitted; otherwise raise Skip with the reason."""
    if ready():
        return
    names = " ".join(packages)
    if not shutil.which("apt-get"):
        raise Skip(f"needs {names}, and there is no apt-get here to install them")
    if not context.install_packages:
        raise Skip(f"needs {names} (not installed because of --no-packages)")
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise Skip(f"needs {names}; as root: apt-get install {names}")
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    with APT:
        context.say(f"installing {names} ...")
        try:
            if not context.apt_updated:
                run(context, ["apt-get", "update", "-q"])
                context.apt_updated = True
            known = [name for name in packages if works(context, "apt-cache", "show", name)]
            run(context, ["apt-get", "install", "-q", "-y", "--no-install-recommends", *known])
        except Broken as problem:
            raise Skip(f"needs {names}, which apt-get could not install: {problem}") from None
    if not ready():
        raise Skip(f"needs {names}; they are installed, but do not work together")


def sources() -> Iterator[Path]:
    """The files that `pip install .` reads."""
    for top in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "cpp", "ggml_types", "models", "python"):
        path = ROOT / top
        if path.is_dir():
            yield from (file for file in sorted(path.rglob("*")) if file.is_file() and "__pycache__" not in file.parts)
        elif path.is_file():
            yield path


def digest(paths: Iterator[Path], *more: str) -> str:
    total = hashlib.sha256("\n".join(more).encode())
    for path in paths:
        total.update(f"{path.relative_to(ROOT)}\n".encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def cmake_is_new_enough(context: Context) -> bool:
    """Whether ctest writes JUnit reports, which it does since version 3.21."""
    program = shutil.which("cmake", path=context.path)
    if not program or not shutil.which("ctest", path=context.path):
        return False
    text = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    numbers = text.split("version", 1)[-1].split()[0].split("-")[0].split(".")[:2] if "version" in text else []
    return len(numbers) == 2 and all(n.isdigit() for n in numbers) and (int(numbers[0]), int(numbers[1])) >= (3, 21)


def python(context: Context) -> Path:
    if context.python is None:
        raise Broken("the virtual environment could not be made (see the suite `install`)")
    return context.python


# ---- suites ----------------------------------------------------------------------------------------------------------


def install(context: Context) -> Count:
    """A virtual environment with the package and the test dependencies."""
    key = hashlib.sha256(f"{sys.version} {sys.executable} {ROOT}".encode()).hexdigest()[:10]
    folder = context.cache / "tests" / f"venv-{key}"
    executable = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "installed"
    if not works(context, executable, "-m", "pip", "--version"):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            import ensurepip  # noqa: F401  (Debian packs it separately)
        except ImportError:
            version = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
            require_packages(context, lambda: works(context, sys.executable, "-c", "import ensurepip"), version)
        venv.EnvBuilder(with_pip=True, symlinks=os.name != "nt").create(folder)
    pip = [executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
    needed = [] if cmake_is_new_enough(context) else ["cmake>=3.21,<5"]
    needed += [] if shutil.which("ninja", path=context.path) else ["ninja>=1.11,<2"]
    state = digest(sources(), *needed)
    if not stamp.is_file() or stamp.read_text() != state:
        stamp.unlink(missing_ok=True)
        run(context, [*pip, f"{ROOT}[test]", *needed])
        stamp.write_text(state)
    else:
        context.say("nothing has changed since the last run")
    context.path = f"{executable.parent}{os.pathsep}{context.path}"
    run(context, [executable, "-c", "import turboquant"])
    context.python = executable
    return Count(passed=1)


def build_cpp(context: Context, name: str, targets: Sequence[str] = (), *options: str) -> Path:
    """Configure and build the C++ tests with some options; returns the build folder."""
    ninja = shutil.which("ninja", path=context.path)
    cmake = shutil.which("cmake", path=context.path)
    if not cmake or not ninja:
        raise Broken("CMake or Ninja is missing (see the suite `install`)")
    key = hashlib.sha256(f"{ROOT} {os.environ.get('CXX', '')}".encode()).hexdigest()[:10]
    folder = context.cache / "tests" / f"cpp-{name}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    command += ["-DTURBOQUANT_BUILD_TESTS=ON", "-DTURBOQUANT_BUILD_PYTHON=OFF", *options]
    run(context, command, log=folder / "configure.log")
    run(context, [ninja, "-C", folder, *targets], log=folder / "build.log")
    return folder


def core(context: Context) -> str:
    """Compile the core, unless `cpp` has; returns the CMake option with which emulators link its objects."""
    return f"-DTURBOQUANT_OBJECTS={build_cpp(context, 'plain', ['turboquant_objects']) / 'objects.txt'}"


def run_ctest(context: Context, folder: Path) -> Count:
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    ctest = shutil.which("ctest", path=context.path)
    command = [ctest, "--test-dir", folder, "--output-on-failure", "--output-junit", report]
    try:
        run(context, [*command, "--parallel", os.cpu_count() or 1], show=True)
    except Broken:
        if not report.is_file():
            raise
    count = junit(report)
    if count.passed + count.failed == 0:
        raise Broken(f"{folder}: no test ran")
    return count


def cpp(context: Context) -> Count:
    """C++ tests."""
    extent = "whole" if context.whole else "usual"
    return run_ctest(context, build_cpp(context, "plain", (), f"-DTURBOQUANT_TEST_EXTENT={extent}"))


def sanitized(context: Context) -> Count:
    """C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer."""
    return run_ctest(context, build_cpp(context, "sanitized", (), "-DTURBOQUANT_SANITIZE=ON"))


def neon(context: Context) -> Count:
    """C++ tests for Arm, cross-compiled and run under qemu."""
    if platform.machine() in ("aarch64", "arm64"):
        raise Skip("this is an Arm machine: the C++ tests have run natively")
    require_packages(
        context,
        lambda: all(shutil.which(tool) for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64")),
        "qemu-user",
        "g++-aarch64-linux-gnu",
        "libc6-dev-arm64-cross",
    )
    return run_ctest(context, build_cpp(context, "neon", (), "-DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux.cmake"))


def fuzz(context: Context) -> Count:
    """One minute of random bytes through the decoders (libFuzzer)."""

    def has_fuzzer() -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text('#include <cstdint>\n#include <cstddef>\nextern "C" int LLVMFuzzerTestOneInput('
                              "const uint8_t *, size_t) { return 0; }\n")
            flags = ["-fsanitize=fuzzer,address,undefined", source, "-o", Path(folder) / "probe"]
            return works(context, "clang++", *flags)

    require_packages(context, has_fuzzer, "clang", "libclang-rt-dev")
    options = ("-DCMAKE_CXX_COMPILER=clang++", "-DTURBOQUANT_FUZZ=ON", "-DTURBOQUANT_SANITIZE=ON")
    folder = build_cpp(context, "fuzz", ["fuzz_decode"], *options)
    programs = [path for path in folder.rglob("fuzz_decode") if path.is_file() and os.access(path, os.X_OK)]
    if not programs:
        raise Broken(f"{folder}: fuzz_decode was not built")
    corpus = context.cache / "tests" / "fuzz-corpus"  # inputs with which earlier runs reached new code
    corpus.mkdir(parents=True, exist_ok=True)
    command = [programs[0], f"-max_total_time={FUZZ_SECONDS}", "-print_final_stats=1", f"-artifact_prefix={folder}/"]
    run(context, [*command, corpus], log=folder / "fuzz.log")
    printed = (folder / "fuzz.log").read_text(errors="replace").splitlines()
    context.say(*(line for line in printed if "executed_units" in line))
    return Count(passed=1)


def cuda(context: Context) -> Count:
    """CUDA kernels: on a GPU; without one, in an emulator, and nvcc compiles them if it is there."""
    nvcc = shutil.which("nvcc", path=f"{context.path}{os.pathsep}/usr/local/cuda/bin")
    on_gpu = bool(nvcc) and works(context, "nvidia-smi")
    if not on_gpu and not sys.platform.startswith("linux"):
        raise Skip("needs NVIDIA's nvcc and a GPU; the emulator needs Linux")
    tests = ROOT / "tests" / "cuda"
    kind = "cuda" if on_gpu else "cuda-emulated"
    folder = context.cache / "tests" / f"{kind}-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:10]}"
    folder.mkdir(parents=True, exist_ok=True)
    command = ["cmake", "-S", tests if on_gpu else tests / "emulator", "-B", folder, "-G", "Ninja"]
    gpu_options = [f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DCMAKE_CUDA_ARCHITECTURES=native"]
    command += gpu_options if on_gpu else [core(context)]
    run(context, command, log=folder / "configure.log")
    run(context, ["ninja", "-C", folder], log=folder / "build.log")
    count = run_ctest(context, folder)
    if on_gpu:
        return count
    context.say("There is no NVIDIA GPU, so the tests ran in the emulator.")
    if not nvcc:
        context.say("nvcc did not compile the kernels, because it is not installed.")
        return count + Count(skipped=1)
    compile_kernels(context, nvcc, folder)
    return count + Count(passed=1)


def compile_kernels(context: Context, nvcc: str, folder: Path) -> None:
    """Compile the kernels of the emulator's selection with nvcc, without assembling them."""
    emulator, kernels = ROOT / "tests" / "cuda" / "emulator", ROOT / "cpp" / "cuda"
    flags = ["-std=c++17", "-Werror", "all-warnings", f"-I{ROOT / 'cpp' / 'include'}", f"-I{kernels}"]
    flags += ["-include", emulator / "selection.h"]

    def compile_one(source: Path) -> None:
        architecture = "compute_90a" if source.stem.startswith("hopper") else "compute_90"
        run(context, [nvcc, *flags, f"-arch={architecture}", "-ptx", source, "-o", folder / f"{source.stem}.ptx"])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sorted(kernels.glob("*.cu"))))


def metal(context: Context) -> Count:
    """Metal kernels, compiled for an emulator. (Models on an emulated device are in the suite `llama`.)"""
    if not sys.platform.startswith("linux"):
        raise Skip("the emulator needs Linux")
    folder = context.cache / "tests" / f"metal-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:10]}"
    folder.mkdir(parents=True, exist_ok=True)
    command = ["cmake", "-S", ROOT / "tests" / "metal", "-B", folder, "-G", "Ninja", core(context)]
    run(context, command, log=folder / "configure.log")
    run(context, ["ninja", "-C", folder], log=folder / "build.log")
    return run_ctest(context, folder)


def run_pytest(context: Context, folder: str) -> Count:
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        command = [python(context), "-m", "pytest", "-q", folder, f"--junitxml={report}", "-p", "no:cacheprovider"]
        try:
            run(context, [*command, *context.pytest_args], show=True)
        except Broken as problem:
            if not report.is_file():
                raise
            count = junit(report)
            if count.failed == 0:
                raise problem
            return count
        return junit(report)


def browser(context: Context) -> None:
    """Chromium and its driver, for the tests of pages."""
    has_browser = lambda: bool(shutil.which("chromium") and shutil.which("chromedriver"))  # noqa: E731
    require_packages(context, has_browser, "chromium", "chromium-driver")


def wasm_compiler(context: Context) -> None:
    """Clang and its linker for WebAssembly, for the test that rebuilds codec.wasm."""
    require_packages(context, lambda: bool(shutil.which("clang++") and shutil.which("wasm-ld")), "clang", "lld")


def python_tests(context: Context) -> Count:
    """The Python package."""
    for wanted in (browser, wasm_compiler):  # without one, the tests that need it are skipped
        try:
            wanted(context)
        except Skip as reason:
            context.say(f"some tests will be skipped: {reason}")
    return run_pytest(context, "tests/python")


def builds(context: Context) -> Count:
    """Builds of llama.cpp: with the hooks, without hooks, and the oldest supported release with the hooks."""
    names = ("stock", "oldest", "patched")
    for name in names:
        run(context, [python(context), ROOT / "tests" / "llama" / "builds.py", name], show=True)
    return Count(passed=len(names))


def llama(context: Context) -> Count:
    """llama.cpp with the cache types, end to end."""
    return run_pytest(context, "tests/llama")


@dataclass(frozen=True)
class Suite:
    name: str
    run: Callable[[Context], Count]
    needs: tuple[str, ...] = ()
    beside: bool = False  # uses one core for most of its time

    @property
    def title(self) -> str:
        return f"==== {self.name}: {(self.run.__doc__ or '').strip()}"


SUITES = (
    Suite("install", install),
    Suite("cpp", cpp, ("install",)),
    Suite("builds", builds, ("install",)),  # early, because `llama` waits for it
    Suite("sanitized", sanitized, ("install",)),
    Suite("neon", neon, ("install",)),
    Suite("cuda", cuda, ("install",)),
    Suite("metal", metal, ("install",)),
    Suite("python", python_tests, ("install",), beside=True),
    Suite("fuzz", fuzz, ("install",), beside=True),
    Suite("llama", llama, ("install", "builds"), beside=True),
)


# ---- the command -----------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02} s"


def cache_folder() -> Path:
    """As turboquant.llama.paths.cache_dir, which is not installed yet."""
    chosen = os.environ.get("TURBOQUANT_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache").resolve() / "turboquant"


def _stop(*_: object) -> None:
    """End with temporary files removed."""
    PROCESSES.stop()
    raise KeyboardInterrupt


def perform(suite: Suite, context: Context) -> tuple[Count, str]:
    """Run one suite; returns its count and, if it was skipped as a whole, the reason."""
    try:
        return suite.run(context), ""
    except Skip as reason:
        return Count(skipped=1), str(reason)
    except (Broken, OSError, subprocess.SubprocessError) as problem:
        context.say(problem)
        return Count(failed=1), ""


class Session:
    """A run of suites by two threads: the main one, whose suites print to the terminal, and one for suites that run
    beside these. The main thread also takes the latter when it has no other ones left.
    """

    def __init__(self, context: Context, suites: Sequence[Suite], keep_going: bool) -> None:
        self.context, self.keep_going = context, keep_going
        self.counts: dict[str, Count] = {}  # of the suites that have ended
        self.lines: dict[str, str] = {}
        self._pending = list(suites)
        self._main: Suite | None = None  # at work in the main thread
        self._logs: list[Path] = []  # output of suites that ran beside others, not printed yet
        self._changed = threading.Condition()

    def run(self) -> None:
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(self._work, True) if (os.cpu_count() or 1) > 1 else None
            try:
                self._work(False)
                if beside and not beside.done():
                    print("\nwaiting for the suite that ran beside the others", flush=True)
                if beside:
                    beside.result()
            finally:
                with self._changed:
                    self._pending.clear()
                    self._changed.notify_all()
        self._print_logs()

    def _work(self, beside: bool) -> None:
        while suite := self._take(beside):
            if not beside:
                self._print_logs()
                print(f"\n{suite.title}", flush=True)
                self._perform(suite, self.context)
                continue
            log = self.context.cache / "tests" / f"{suite.name}.log"
            with log.open("w", errors="replace") as out:
                print(f"\n{suite.title}", file=out, flush=True)
                self._perform(suite, replace(self.context, out=out))
            self._logs.append(log)

    def _take(self, beside: bool) -> Suite | None:
        """The next suite of a thread, once those that it needs have ended."""
        with self._changed:
            while True:
                own = [suite for suite in self._pending if suite.beside == beside]
                if beside and not self._main and own == self._pending:
                    return None
                candidates = own if beside or own else self._pending
                if not candidates:
                    return None
                for suite in candidates:
                    if all(name in self.counts for name in suite.needs):
                        self._pending.remove(suite)
                        self._main = self._main if beside else suite
                        return suite
                self._changed.wait()

    def _perform(self, suite: Suite, context: Context) -> None:
        began = time.monotonic()
        bad = [name for name, count in self.counts.items() if count.failed]
        missing = [name for name in suite.needs if name in bad]
        if missing:
            count, reason = Count(skipped=1), f"needs {', '.join(missing)}, which failed"
        elif bad and not self.keep_going:
            count, reason = Count(skipped=1), "an earlier suite failed (--keep-going runs this one all the same)"
        else:
            count, reason = perform(suite, context)
        text = f"{suite.name:10} {count} in {duration(time.monotonic() - began)}"
        with self._changed:
            self.counts[suite.name] = count
            self.lines[suite.name] = f"{text}{f'  (skipped: {reason})' if reason else ''}"
            self._main = None if suite is self._main else self._main
            self._changed.notify_all()
        context.say(f"==== {self.lines[suite.name]}")

    def _print_logs(self) -> None:
        while self._logs:
            print(self._logs.pop(0).read_text(errors="replace"), end="", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    names = [suite.name for suite in SUITES]
    described = "\n".join(f"  {suite.name:10} {(suite.run.__doc__ or '').strip()}" for suite in SUITES)
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"suites:\n{described}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=names, metavar="SUITE",
                        help="run this suite and those it needs (may be given more than once)")
    parser.add_argument("--keep-going", action="store_true", help="go on with the next suite after one that failed")
    parser.add_argument("--whole", action="store_true",
                        help="in `cpp`, the whole conformance lists with all kernels, not only with the best ones")
    parser.add_argument("--no-packages", action="store_true", help="install no system packages, even as root")
    parser.add_argument("pytest", nargs="*", help="after `--`: arguments for pytest, such as -k NAME")
    given = parser.parse_args(arguments)
    if sys.version_info < (3, 10):  # noqa: UP036  (people run this with whatever python3 is)
        parser.error(f"Python 3.10 or newer is needed; this is {platform.python_version()}")

    wanted = set(given.only or names)
    for suite in reversed(SUITES):
        wanted |= set(suite.needs) if suite.name in wanted else set()
    context = Context(cache_folder(), not given.no_packages, given.pytest, given.whole)
    context.cache.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _stop)  # CI ends jobs with SIGTERM
    # A shell starts background jobs with SIGINT ignored, and children inherit this, so tests of Ctrl-C would never end.
    signal.signal(signal.SIGINT, _stop)

    start = time.monotonic()
    chosen = [suite for suite in SUITES if suite.name in wanted]
    session = Session(context, chosen, given.keep_going)
    session.run()
    total = sum(session.counts.values(), Count())
    lines = [session.lines[suite.name] for suite in chosen]
    print(f"\nall suites, {duration(time.monotonic() - start)}:", *lines, sep="\n")
    print(total, flush=True)
    return 1 if total.failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; what is built is kept, and a rerun goes on from there", file=sys.stderr)
        sys.exit(130)
