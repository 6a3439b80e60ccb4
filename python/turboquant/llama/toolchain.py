"""The programs that a build needs: the machine's C++ compiler, and CMake and Ninja from the machine or from PyPI.

CMake and Ninja are no dependencies of the package, because most machines with a compiler have them, and the codec needs
neither at run time. If one is missing or too old, both are installed once, as PyPI wheels, into the cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import TurboQuantError
from .files import last_lines, lock, remove_tree
from .paths import cache_dir
from .progress import Reporter

__all__ = ["Tools", "ToolError", "breaks_amx", "compiler", "cpu", "cuda_compiler", "find_tools", "jobs"]

MINIMUM_CMAKE = (3, 19)  # ggml_types/inject.cmake defers calls
_PINNED = Path(__file__).with_name("build-tools.txt")


class ToolError(TurboQuantError):
    """A program that the build needs is missing and could not be installed."""


@dataclass(frozen=True)
class Tools:
    """CMake and Ninja, ready to run."""

    cmake: Path
    ninja: Path

    def path(self) -> str:
        """PATH with the folders of both programs at the front."""
        own = dict.fromkeys([str(self.cmake.parent), str(self.ninja.parent)])
        return os.pathsep.join([*own, os.environ.get("PATH", os.defpath)])


# ---- compiler --------------------------------------------------------------------------------------------------------


def compiler() -> list[str]:
    """The C and C++ compilers that CMake will find: program and version, one string each.

    Raises:
        ToolError: there is none, or it does not run.
    """
    found = [
        _compiler("CC", ("cc", "gcc", "clang", "cl") if os.name == "nt" else ("cc", "gcc", "clang")),
        _compiler("CXX", ("c++", "g++", "clang++", "cl") if os.name == "nt" else ("c++", "g++", "clang++")),
    ]
    for variable, identity in zip(("CC", "CXX"), found, strict=True):
        if identity is None:
            what = "C" if variable == "CC" else "C++"
            asked = os.environ.get(variable)
            if asked:
                raise ToolError(f"the {what} compiler that {variable} names, {asked!r}, does not run")
            raise ToolError(f"no {what} compiler found; {_how_to_get_a_compiler()}")
    return [identity for identity in found if identity]


def _compiler(variable: str, names: tuple[str, ...]) -> str | None:
    asked = os.environ.get(variable)
    for command in [shlex.split(asked, posix=os.name != "nt")] if asked else [[name] for name in names]:
        program = shutil.which(command[0])
        if not program:
            continue
        version = [] if Path(command[0]).stem.lower() == "cl" else ["--version"]
        # On a Mac without the command line tools `c++` exists and fails.
        output = _run([program, *command[1:], *version])
        if output:
            return f"{shlex.join([os.path.realpath(program), *command[1:]])}: {output.splitlines()[0].strip()}"
    return None


def breaks_amx(compilers: Sequence[str]) -> bool:
    """Whether this CPU has AMX and the C++ compiler miscompiles llama.cpp's use of it.

    GCC before 11.5, 12.4, 13.3 and 14 takes ldtilecfg to read 8 bytes and drops most of the tile configuration that
    llama.cpp stores for it (GCC bug 114098). The programs then crash at the first product with quantized weights.

    Args:
        compilers: as :func:`compiler` returns them.
    """
    identity = "".join(compilers[1:2]).rpartition(": ")[2]
    match = re.search(r"(\d+)\.(\d+)\.\d+\b(?!.*\d\.\d)", identity)
    if "amx_tile" not in _cpu_flags() or "clang" in identity.lower() or match is None:
        return False
    major, minor = int(match[1]), int(match[2])
    return major < 14 and minor < {11: 5, 12: 4, 13: 3}.get(major, 99)


def cuda_compiler() -> tuple[Path, str]:
    """nvcc and its version: from CUDACXX, PATH, or the usual folders of the CUDA toolkit.

    Raises:
        ToolError: there is none, or it does not run.
    """
    asked = os.environ.get("CUDACXX")
    folders = [Path(root) / "bin" for root in (os.environ.get(name) for name in ("CUDA_PATH", "CUDA_HOME")) if root]
    folders.append(Path("/usr/local/cuda/bin"))
    candidates = [asked] if asked else ["nvcc", *(str(folder / "nvcc") for folder in folders)]
    for candidate in candidates:
        program = shutil.which(candidate)
        release = re.search(r"release [\d.]+, V[\d.]+", _run([program, "--version"])) if program else None
        if program and release:
            return Path(program), f"{os.path.realpath(program)}: {release[0]}"
    if asked:
        raise ToolError(f"the CUDA compiler that CUDACXX names, {asked!r}, does not run")
    raise ToolError(
        f"no CUDA compiler: nvcc is neither in PATH nor in {', '.join(map(str, folders))}; install NVIDIA's CUDA "
        f"toolkit, or point CUDACXX at its nvcc"
    )


def _how_to_get_a_compiler() -> str:
    if sys.platform == "darwin":
        return "install Apple's with `xcode-select --install`"
    if os.name == "nt":
        return "install Visual Studio's C++ build tools and start from their developer prompt"
    for manager, command in (
        ("apt-get", "apt-get install g++"),
        ("dnf", "dnf install gcc-c++"),
        ("pacman", "pacman -S gcc"),
        ("zypper", "zypper install gcc-c++"),
        ("apk", "apk add g++"),
    ):
        if shutil.which(manager):
            return f"install one with `{command}` (as root), or point CC and CXX at one"
    return "install g++ or clang with the system's package manager, or point CC and CXX at one"


def _cpuinfo() -> dict[str, str]:
    """The keys of /proc/cpuinfo, each with the value of the first core that has it; empty if not on Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        lines.setdefault(key.strip(), value.strip())
    return lines


def _cpu_flags() -> set[str]:
    """The features that Linux lists for an x86 CPU."""
    return set(_cpuinfo().get("flags", "").split())


def cpu() -> str:
    """The CPU's model and features in one line: code compiled for this very CPU may not run on another."""
    system = platform.system()
    if system == "Linux":
        lines = _cpuinfo()
        keys = {"model name", "flags", "Features", "CPU implementer", "CPU part", "isa"}
        found = {key: lines[key] for key in sorted(keys & set(lines))}
        features = " ".join(found.pop(key, "") for key in ("flags", "Features", "isa"))
        digest = hashlib.sha256(" ".join(sorted(features.split())).encode()).hexdigest()[:12]
        return " ".join([platform.machine(), *found.values(), digest])
    if system == "Darwin":
        return f"{platform.machine()} {_run(['sysctl', '-n', 'machdep.cpu.brand_string']).strip()}"
    return f"{platform.machine()} {platform.processor()}"


def jobs() -> int:
    """How many compilers to run in parallel: one per usable CPU and per 1.5 GiB of memory."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return cpus
    return max(1, min(cpus, int(memory / (1.5 * 2**30))))


# ---- CMake and Ninja -------------------------------------------------------------------------------------------------


def find_tools(reporter: Reporter) -> Tools:
    """CMake (3.19 or newer) and Ninja from the machine, the Python environment, or the cache, filled by pip if needed.

    Raises:
        ToolError: they are missing, and pip could not download them.
    """
    scripts = sysconfig.get_path("scripts")
    cmake = _first([shutil.which("cmake"), shutil.which("cmake", path=scripts)], MINIMUM_CMAKE)
    ninja = _first([shutil.which("ninja"), shutil.which("ninja-build"), shutil.which("ninja", path=scripts)], (1,))
    if cmake and ninja:
        return Tools(cmake, ninja)
    folder = cache_dir() / "tools"

    def own() -> Tools | None:
        mine = _in_folder(folder / "cmake-ninja")
        return Tools(cmake or mine.cmake, ninja or mine.ninja) if mine else None

    found = own()
    if found:
        return found

    def waiting() -> None:
        reporter.say("another process is fetching cmake and ninja; waiting for it")

    names = {f"CMake {'.'.join(map(str, MINIMUM_CMAKE))} or newer": cmake, "Ninja": ninja}
    missing = " and ".join(name for name, tool in names.items() if not tool)
    with lock(cache_dir() / "locks" / "tools.lock", waiting):
        found = own()
        if found:
            return found
        with reporter.busy(f"no {missing} on this machine: fetching cmake and ninja from PyPI"):
            _install(folder, missing)
    found = own()
    if not found:
        raise ToolError(
            f"the cmake and ninja that pip put into {folder / 'cmake-ninja'} do not run on this machine; "
            f"install {missing} with the system's package manager"
        )
    return found


def _install(folder: Path, missing: str) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ToolError(
            f"{missing} not found, and pip, which would fetch it, is not installed for {sys.executable}; run "
            f"`{sys.executable} -m ensurepip`, or install {missing} with the system's package manager"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".partial.*"):  # left by a run that was killed
        remove_tree(leftover)
    with tempfile.TemporaryDirectory(prefix=".partial.", dir=folder) as temporary:
        target = Path(temporary) / "tools"
        # Only wheels: compiling CMake from source would take longer than compiling llama.cpp.
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
        command += ["--only-binary", ":all:", "--no-deps", "--target", str(target), "--require-hashes", "-r", str(_PINNED)]
        env = dict(os.environ, PIP_USER="0")  # pip.conf may set --user, which contradicts --target
        done = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise ToolError(
                f"{missing} not found, and what pip fetched is not what {_PINNED} pins; does a proxy or a mirror change "
                f"it? Install {missing} with the system's package manager"
            )
        if done.returncode != 0:
            raise ToolError(
                f"{missing} not found, and pip could not fetch it:\n{last_lines(done.stderr, 8)}\n"
                f"Install {missing} with the system's package manager, or `pip install cmake ninja` when online."
            )
        remove_tree(folder / "cmake-ninja")
        os.replace(target, folder / "cmake-ninja")


def _in_folder(folder: Path) -> Tools | None:
    """The programs that pip installed into `folder`, not the Python scripts that start them."""
    suffix = ".exe" if os.name == "nt" else ""
    cmake = _first([folder / "cmake/data/bin" / f"cmake{suffix}", folder / "bin" / f"cmake{suffix}"], MINIMUM_CMAKE)
    ninja = _first([folder / "ninja/data/bin" / f"ninja{suffix}", folder / "bin" / f"ninja{suffix}"], (1,))
    return Tools(cmake, ninja) if cmake and ninja else None


def _first(candidates: Sequence[str | Path | None], minimum: tuple[int, ...]) -> Path | None:
    """The first candidate that runs and is new enough."""
    for candidate in candidates:
        if candidate and Path(candidate).is_file():
            version = re.search(r"\d+(\.\d+)+", _run([str(candidate), "--version"]))
            if version and tuple(int(part) for part in version[0].split(".")) >= minimum:
                return Path(candidate)
    return None


def _run(command: list[str]) -> str:
    """The output of `command`; "" if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout or done.stderr) if done.returncode == 0 else ""
