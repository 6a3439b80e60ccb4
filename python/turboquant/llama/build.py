"""Build llama.cpp with the TurboQuant cache types: copy the sources, patch the copy, configure, compile.

A build lives in a folder of the cache::

    builds/llama.cpp-0.3.36-1a2b3c4d5e/
        build.json   what the folder is for; it identifies the folder as one of this program
        llama.cpp/   the patched copy of the sources
        native/      copy of the codec and of ggml_types that are compiled into llama.cpp
        build/       CMake's folder; the programs are in build/bin
        build.log    the output of the last run of CMake and the compiler
        done.json    written last: what was built, and from which sources

The folder's name contains a hash of what would make its object files useless if it changed: the source, compiler, CPU
and CMake options. The hash does not include the contents of files. When they change, only the changed files are copied,
and ninja compiles what depends on them. ``done.json`` has the hash of everything, so a rerun without changes returns at
once.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import TurboQuantError
from . import patch as hooks
from . import source as sources
from .files import hash_files, last_lines, list_files, lock, read_json, remove_tree, sync, write_json
from .paths import cache_dir, native_dir
from .progress import Reporter, duration
from .toolchain import Tools, breaks_amx, compiler, cpu, cuda_compiler, find_tools
from .toolchain import jobs as default_jobs

__all__ = ["BACKENDS", "DEFAULT_TARGETS", "BuildError", "build", "is_outdated", "where"]

DEFAULT_TARGETS = (
    "llama-cli",
    "llama-completion",
    "llama-server",
    "llama-perplexity",
    "llama-bench",
    "llama-quantize",
    "turboquant-capture",
    "turboquant-measure",
)
BACKENDS = ("cpu", "cuda", "metal")  # the others include the CPU
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    # CMake would download the server's web page, or build it with npm.
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
_LAYOUT = 1  # increased when a change of this module makes existing build folders unusable
_KEEP = 3  # build folders that are kept
_STEP = re.compile(r"\[(\d+)/(\d+)\] ")
_SUFFIX = ".exe" if os.name == "nt" else ""


class BuildError(TurboQuantError):
    """llama.cpp could not be built, or has not been built."""


@dataclass(frozen=True)
class _Plan:
    """What to build, where, and what it depends on."""

    source: sources.Source
    targets: tuple[str, ...]  # requested targets
    options: tuple[str, ...]  # options for CMake, part of the folder's name
    folder: Path
    inputs: dict[str, object]  # the input of the hash in the folder's name
    fingerprint: str  # hash that includes the contents
    native: Path
    native_files: tuple[str, ...]
    native_digest: str

    @property
    def bin(self) -> Path:
        return self.folder / "build" / "bin"


def build(
    source: str | os.PathLike[str] | None = None,
    version: str | None = None,
    targets: Sequence[str] = (),
    jobs: int | None = None,
    cmake_args: Sequence[str] = (),
    reporter: Reporter | None = None,
    backend: str = "cpu",
    arch: str | None = None,
    unproven: bool = False,
) -> Path:
    """Build llama.cpp with the turbo types; what is already built is not built again.

    Args:
        source: a llama.cpp checkout, which is copied and not changed (default: the one inside llama-cpp-python).
        version: the release of llama-cpp-python (default: `source.DEFAULT_VERSION`).
        targets: CMake targets to build instead of `DEFAULT_TARGETS`; "default" stands for all of those.
        jobs: number of parallel compilers (default: one per CPU, fewer if memory is short).
        cmake_args: further options, "-DNAME=VALUE" or "NAME=VALUE".
        reporter: receives messages and progress (default: one that writes to stderr).
        backend: one of `BACKENDS`.
        arch: for "cuda", the GPUs to compile for: "native" or compute capabilities, as in "80,90" (default: llama.cpp's
            choice, which is native where a GPU is found).
        unproven: also fetch releases that the hooks are not tested with; see `source.fetch`.

    Returns:
        The folder with the programs.

    Raises:
        BuildError, SourceError, ToolError, PatchError: the text says what to do.
        KeyboardInterrupt: ninja was stopped; a rerun continues.
    """
    reporter = reporter or Reporter()
    if source is not None and version is not None:
        raise BuildError("give a source folder or a version, not both")
    if jobs is not None and jobs < 1:
        raise BuildError(f"jobs must be at least 1, got {jobs}")
    for target in targets:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", target):
            raise BuildError(f"{target!r} is no CMake target's name")
    options = [_option(arg) for arg in cmake_args]
    compilers = compiler()  # before anything is downloaded
    if backend not in BACKENDS:
        raise BuildError(f"there is no backend {backend!r}; it is one of {', '.join(BACKENDS)}")
    if arch is not None and backend != "cuda":
        raise BuildError("arch names GPUs: it needs the backend cuda")
    if backend == "cuda":
        program, identity = cuda_compiler()
        compilers = [*compilers, identity]
        options = ["-DGGML_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={program.as_posix()}", *_arch_options(arch), *options]
    if backend == "metal" and platform.system() != "Darwin":
        raise BuildError(f"the backend metal needs macOS, and this is {platform.system()}")
    if platform.system() == "Darwin":  # where llama.cpp builds Metal unless it is told not to
        options = [f"-DGGML_METAL={'ON' if backend == 'metal' else 'OFF'}", *options]

    tools: Tools | None = None
    if source is not None:
        tree = sources.local(source)
    else:
        release = version or sources.DEFAULT_VERSION
        cached = sources.cached(release)
        if cached is None:
            tools = find_tools(reporter)
            cached = sources.fetch(release, reporter, tools.path(), unproven)
        tree = cached
    plan = _make_plan(tree, targets, options, compilers)
    if _is_done(plan):
        return _use(plan)

    def waiting() -> None:
        reporter.say(f"another process is building in {plan.folder}; waiting for it")

    with lock(_lock_file(plan.folder), waiting) as descriptor:
        if not _is_done(plan):  # another process built it while this one waited for the lock
            tools = tools or find_tools(reporter)
            _build(plan, tools, jobs or default_jobs(), reporter, descriptor)
    _use(plan)
    _prune(plan.folder)
    return plan.bin


def where() -> Path:
    """The folder with the programs of the build that was last finished or requested.

    Raises:
        BuildError: there is no build.
    """
    builds = cache_dir() / "builds"
    latest = read_json(builds / "latest.json")
    folders = [builds / str(latest.get("folder"))] if latest else []
    folders += [folder for folder in _ours(builds) if folder not in folders]
    for folder in folders:
        if _record(folder):
            return folder / "build" / "bin"
    raise BuildError(f"no llama.cpp with the turbo types in {builds}: run `turboquant build` first")


def is_outdated(bin: Path) -> bool:
    """Whether `bin`, as `where` returns it, was built from a codec or hooks that differ from those of this package."""
    record = _record(bin.parent.parent)
    native = native_dir()
    return record is not None and record.get("native") != hash_files(native, _native_files(native))


# ---- plan ------------------------------------------------------------------------------------------------------------


def base_options(compilers: Sequence[str]) -> list[str]:
    """The CMake options of every build with these compilers."""
    options = list(_OPTIONS)
    if breaks_amx(compilers):
        options.append(f"-DCMAKE_CXX_FLAGS={os.environ.get('CXXFLAGS', '')} {_NO_AMX}".replace("= ", "="))
    return options


def _option(arg: str) -> str:
    match = re.fullmatch(r"(?:-D)?([A-Za-z_][A-Za-z0-9_]*(?::[A-Z]+)?=.*)", arg, re.DOTALL)
    if not match:
        raise BuildError(f"{arg!r} is no CMake option; write it as -DNAME=VALUE")
    return f"-D{match[1]}"


def _arch_options(arch: str | None) -> list[str]:
    if arch is None:
        return []
    one = r"\d{2,3}[af]?(-real|-virtual)?"
    if not re.fullmatch(rf"native|all|all-major|{one}([,;]{one})*", arch):
        raise BuildError(f"{arch!r} names no GPUs; write native, or compute capabilities as in 80,90")
    return [f"-DCMAKE_CUDA_ARCHITECTURES={arch.replace(',', ';')}"]


def _make_plan(
    source: sources.Source, targets: Sequence[str], options: Sequence[str], compilers: Sequence[str]
) -> _Plan:
    wanted: dict[str, None] = {}  # an ordered set
    for target in targets or ("default",):
        wanted.update(dict.fromkeys(DEFAULT_TARGETS if target == "default" else (target,)))
    all_options = (*base_options(compilers), *options)
    native = not any(re.match(r"-DGGML_NATIVE(:\w+)?=(OFF|0|NO|FALSE|N)$", option, re.I) for option in options)
    inputs: dict[str, object] = {
        "layout": _LAYOUT,
        "source": source.identity,
        "options": all_options,
        "compilers": list(compilers),
        "environment": {name: os.environ.get(name, "") for name in ("CFLAGS", "CXXFLAGS", "LDFLAGS", "ASMFLAGS")},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu() if native else "any",
    }
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    root = native_dir()
    files = tuple(_native_files(root))
    digest = hash_files(root, files)
    fingerprint = hashlib.sha256(f"{key}\n{source.digest}\n{digest}".encode()).hexdigest()
    folder = cache_dir() / "builds" / f"{source.slug}-{key[:10]}"
    return _Plan(source, tuple(wanted), all_options, folder, inputs, fingerprint, root, files, digest)


def _native_files(native: Path) -> list[str]:
    """The files of this project that go into a build."""

    def skip(path: str, is_dir: bool) -> bool:
        name = path.rpartition("/")[2]
        if is_dir:
            return name.startswith((".", "build", "__pycache__"))
        return name.startswith(".") or name.endswith(".md")

    return [
        f"{folder}/{file}"
        for folder in ("cpp", "ggml_types")
        if (native / folder).is_dir()
        for file in list_files(native / folder, skip)
    ]


def _lock_file(folder: Path) -> Path:
    # The lock file is not in the folder, because it must outlive the folder.
    return cache_dir() / "locks" / f"build-{folder.name}.lock"


def _record(folder: Path) -> dict[str, object] | None:
    """The contents of done.json, or None if one of its programs is missing."""
    record = read_json(folder / "done.json")
    if not record:
        return None
    programs = record.get("programs")
    if not isinstance(programs, list):
        return None
    return record if all((folder / "build" / str(program)).is_file() for program in programs) else None


def _is_done(plan: _Plan) -> bool:
    record = _record(plan.folder)
    if not record or record.get("fingerprint") != plan.fingerprint:
        return False
    targets = record.get("targets")
    return isinstance(targets, list) and set(plan.targets) <= set(targets)


def _use(plan: _Plan) -> Path:
    """Make this build the one that `where` returns."""
    with contextlib.suppress(OSError):  # a cache that this user cannot write to can still be used
        write_json(plan.folder.parent / "latest.json", {"folder": plan.folder.name})
        os.utime(plan.folder / "build.json")  # the most recently used folders are kept
    return plan.bin


# ---- build -----------------------------------------------------------------------------------------------------------


def _build(plan: _Plan, tools: Tools, jobs: int, reporter: Reporter, lock_descriptor: int | None) -> None:
    folder = plan.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "build.json", {"made_by": "turboquant", **plan.inputs})
    before = read_json(folder / "done.json") or {}
    old_targets = [str(target) for target in before.get("targets", [])]
    (folder / "done.json").unlink(missing_ok=True)
    start = time.monotonic()
    reporter.say(f"building {plan.source.name} with the turbo types in {folder}")
    _copy(plan)
    environment = _environment(plan, tools)
    log_file = folder / "build.log"
    with log_file.open("w", buffering=1, encoding="utf-8", errors="replace") as log:  # so that `tail -f` shows it
        with reporter.busy("configuring"):
            _configure(plan, tools, environment, log)
        available = _targets(plan, tools)
        targets = _choose(plan, available, reporter)
        kept: list[str] = []
        if before.get("fingerprint") == plan.fingerprint:
            kept = [target for target in old_targets if target not in plan.targets]
        else:
            # The programs of an earlier build need libraries that are about to change.
            for target in available - set(targets):
                if (plan.bin / f"{target}{_SUFFIX}").is_file():
                    (plan.bin / f"{target}{_SUFFIX}").unlink()
        _compile(plan, tools, targets, jobs, environment, log, reporter, lock_descriptor)
    programs = [f"bin/{target}{_SUFFIX}" for target in [*targets, *kept]]
    record = {
        "fingerprint": plan.fingerprint,
        "native": plan.native_digest,
        "source": plan.source.name,
        "commit": plan.source.commit,
        "targets": [*plan.targets, *kept],  # with those that this tree lacks, so that the same request is up to date
        "programs": [program for program in programs if (folder / "build" / program).is_file()],
    }
    write_json(folder / "done.json", record)
    reporter.say(f"built {', '.join(targets)} in {duration(time.monotonic() - start)}")


def _copy(plan: _Plan) -> None:
    """Update the patched copy of llama.cpp and the copy of this project's sources, file by file."""
    stage = plan.folder / "stage"
    remove_tree(stage)  # left by a run that was killed
    try:
        sync(plan.source.root, plan.source.files(), stage)
        hooks.patch(stage)
        sync(stage, list(list_files(stage)), plan.folder / "llama.cpp")
    finally:
        remove_tree(stage)
    sync(plan.native, plan.native_files, plan.folder / "native")


def _environment(plan: _Plan, tools: Tools) -> dict[str, str]:
    environment = dict(os.environ, PATH=tools.path(), NINJA_STATUS="[%f/%t] ")
    # The copy is no git checkout. It must not get the version of a repository that contains the cache folder.
    environment["GIT_CEILING_DIRECTORIES"] = str(plan.folder)
    # ggml uses ccache by itself where there is one. Paths relative to the folder let two folders share results; the
    # CPU must be hashed, as -march=native means something else on the next machine.
    identity = plan.folder / "cpu.txt"
    text = f"{plan.inputs['cpu']}\n"
    if not identity.is_file() or identity.read_text(encoding="utf-8") != text:
        identity.write_text(text, encoding="utf-8")
    environment.setdefault("CCACHE_BASEDIR", str(plan.folder))
    environment.setdefault("CCACHE_NOHASHDIR", "1")
    environment.setdefault("CCACHE_EXTRAFILES", str(identity))
    return environment


def _configure(plan: _Plan, tools: Tools, environment: dict[str, str], log: IO[str]) -> None:
    folder = plan.folder
    cache = folder / "build" / "CMakeCache.txt"
    if cache.is_file() and f"={(folder / 'llama.cpp').as_posix()}\n" not in cache.read_text("utf-8", "replace"):
        remove_tree(folder / "build")  # the cache folder was moved, and CMake's folders contain absolute paths
    tests = any(target.startswith("test-") for target in plan.targets) or _has_tests(folder / "build")
    here, there = plan.native.as_posix(), (folder / "native").as_posix()
    command = [str(tools.cmake), "-G", "Ninja", "-S", str(folder / "llama.cpp"), "-B", str(folder / "build")]
    command += [f"-DCMAKE_MAKE_PROGRAM={tools.ninja.as_posix()}"]
    command += [arg.replace(here, there) for arg in hooks.cmake_args()]
    command += [f"-DLLAMA_BUILD_COMMIT={plan.source.commit}", f"-DLLAMA_BUILD_NUMBER={plan.source.number}"]
    command += [f"-DLLAMA_BUILD_TESTS={'ON' if tests else 'OFF'}", *plan.options]
    log.write(f"$ {subprocess.list2cmdline(command)}\n")
    log.flush()
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace",
    )  # fmt: skip
    log.write(done.stdout)
    log.flush()
    if done.returncode != 0:
        # CMake continues after the first error, which is the one that explains the failure.
        _, error, rest = done.stdout.partition("CMake Error")
        text = "\n".join((error + rest).splitlines()[:20]) if error else last_lines(done.stdout)
        raise BuildError(f"CMake could not configure {plan.source.name}:\n{text.rstrip()}\nFull log: {log.name}")


def _has_tests(build_folder: Path) -> bool:
    """Whether an earlier run configured llama.cpp's tests; they then stay configured."""
    try:
        cache = (build_folder / "CMakeCache.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return re.search(r"^LLAMA_BUILD_TESTS:\w+=ON$", cache, re.M) is not None


def _targets(plan: _Plan, tools: Tools) -> set[str]:
    """The names of the targets of the configured tree."""
    command = [str(tools.ninja), "-C", str(plan.folder / "build"), "-t", "targets", "all"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    available = set(re.findall(r"^([^\s:/]+): phony$", done.stdout, re.M))
    if done.returncode != 0 or not available:
        raise BuildError(f"ninja cannot read {plan.folder / 'build'}:\n{last_lines(done.stdout + done.stderr)}")
    return available


def _choose(plan: _Plan, available: set[str], reporter: Reporter) -> list[str]:
    """The targets to build: the requested ones without default targets that this tree does not have."""
    missing = [target for target in plan.targets if target not in available]
    for target in missing:
        if target not in DEFAULT_TARGETS:
            close = difflib.get_close_matches(target, sorted(available), 4, 0.5)
            hint = f"; it has {', '.join(close)}" if close else ""
            raise BuildError(f"{plan.source.name} has no target {target!r}{hint}")
    targets = [target for target in plan.targets if target in available]
    if not targets:
        raise BuildError(f"{plan.source.name} has none of the targets {', '.join(plan.targets)}")
    if missing:
        reporter.say(f"note: this llama.cpp has no {', '.join(missing)}")
    return targets


def _compile(
    plan: _Plan,
    tools: Tools,
    targets: list[str],
    jobs: int,
    environment: dict[str, str],
    log: IO[str],
    reporter: Reporter,
    lock_descriptor: int | None,
) -> None:
    command = [str(tools.ninja), "-j", str(jobs), *targets]
    log.write(f"$ {subprocess.list2cmdline(command)}\n")
    # If this process is killed, ninja and its compilers hold the lock until they end.
    inherit = () if os.name == "nt" or lock_descriptor is None else (lock_descriptor,)
    failed: list[str] = []  # output of the first step that failed
    inside = False
    with reporter.track(f"compiling with {jobs} job{'s' * (jobs > 1)}") as track:
        process = subprocess.Popen(
            command, cwd=plan.folder / "build", env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", pass_fds=inherit,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                step = _STEP.match(line)
                if step:
                    inside = False
                    track.update(int(step[1]), int(step[2]))
                elif line.startswith("FAILED: "):
                    inside = not failed
                if inside:
                    failed.append(line.rstrip())
            process.wait()
        except BaseException:
            _stop(process)
            raise
        finally:
            log.flush()
            process.stdout.close()
    if process.returncode != 0:
        raise BuildError(_failure(plan, failed, Path(log.name)))


def _stop(process: subprocess.Popen[str]) -> None:
    """End ninja, which stops its compilers and removes their half-written files."""
    with contextlib.suppress(OSError):
        # On a terminal Ctrl-C reached ninja as well; a second signal does no harm.
        process.send_signal(signal.SIGINT if os.name != "nt" else signal.SIGTERM)
    try:
        process.communicate(timeout=20)
    except BaseException:
        process.kill()
        process.wait()


def _failure(plan: _Plan, failed: list[str], log: Path) -> str:
    # The output of a failed step: "FAILED: <file>", the command (long, and in the log), then the compiler's messages.
    output = failed[2:]
    errors = [number for number, line in enumerate(output) if "error" in line.lower()]
    if errors and len(output) > 30:
        output = output[errors[0] :][:30]  # the first error, which often causes the following ones
    text = "\n".join(output[-30:]) if output else last_lines(log.read_text(encoding="utf-8", errors="replace"), 15)
    what = re.sub(r"^FAILED: (\[code=\d+\] )?", "", failed[0]).strip() if failed else plan.source.name
    hint = ""
    if re.search(r"\bKilled\b|out of memory|cannot allocate memory", text, re.I):
        hint = "\nThe compiler ran out of memory; try again with --jobs 1."
    return f"compiling {what} failed:\n{text}{hint}\nFull log: {log}"


# ---- old folders -----------------------------------------------------------------------------------------------------


def _ours(builds: Path) -> list[Path]:
    """The build folders that this program made, the most recently used first."""
    found: list[tuple[float, Path]] = []
    for marker in builds.glob("*/build.json"):
        record = read_json(marker)
        if record and record.get("made_by") == "turboquant" and not marker.parent.is_symlink():
            found.append((marker.stat().st_mtime, marker.parent))
    return [folder for _, folder in sorted(found, reverse=True)]


def _prune(current: Path, keep: int = _KEEP) -> None:
    """Remove build folders except the `keep` most recently used, `current`, and those with a running build."""
    builds = current.parent
    for leftover in builds.glob(".removed-*"):
        remove_tree(leftover)
    for folder in _ours(builds)[keep:]:
        if folder == current:
            continue
        with lock(_lock_file(folder), block=False) as held:
            if held is None:
                continue
            # The folder is renamed first, so that it never exists incompletely under its name.
            gone = builds / f".removed-{folder.name}"
            with contextlib.suppress(OSError):
                os.replace(folder, gone)
                remove_tree(gone)
