"""The llama.cpp builds that the tests need, which are made once and cached. `python3 tests/llama/builds.py [NAME ...]`
makes them before the tests, with progress on the terminal.

- patched: the default llama.cpp, built by `turboquant build`, with the test programs that the package does not build
- stock: the library of the same llama.cpp without the hooks, with the same options
- oldest: the library of the oldest llama.cpp that the hooks are tested with, patched; it only has to compile and link,
  so it is not optimized
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import Build, compile_probe  # noqa: E402
from turboquant.llama import build as builder  # noqa: E402
from turboquant.llama import patch as engine  # noqa: E402
from turboquant.llama import source as sources  # noqa: E402
from turboquant.llama.files import hash_files, list_files, lock, remove_tree, sync  # noqa: E402
from turboquant.llama.paths import cache_dir, native_dir  # noqa: E402
from turboquant.llama.progress import Reporter  # noqa: E402
from turboquant.llama.toolchain import compiler, cpu, find_tools, jobs  # noqa: E402

#: The releases of llama-cpp-python with whose llama.cpp the hooks are tested, oldest first.
VERSIONS = tuple(sources.PROVEN)
TARGETS = ("default", "llama-batched-bench", "test-quantize-fns", "test-backend-ops")


def source(version: str) -> Path:
    """The unpatched llama.cpp of a release, read-only."""
    tools = find_tools(Reporter())
    return sources.fetch(version, Reporter(), tools.path()).root


@functools.cache
def patched() -> Build:
    """The build under test, or the one that TURBOQUANT_TEST_BIN and TURBOQUANT_TEST_SOURCE name."""
    given = os.environ.get("TURBOQUANT_TEST_BIN")
    if given:
        tree = os.environ.get("TURBOQUANT_TEST_SOURCE")
        assert tree, "TURBOQUANT_TEST_BIN is set, so TURBOQUANT_TEST_SOURCE must name its llama.cpp tree"
        return _with_probe(Path(given), Path(tree))
    folder = builder.build(targets=TARGETS)
    return _with_probe(folder, folder.parent.parent / "llama.cpp")


@functools.cache
def stock() -> Build:
    """The libraries of the default release without the hooks."""
    return _with_probe(_library(sources.DEFAULT_VERSION, hooks=False), source(sources.DEFAULT_VERSION))


@functools.cache
def oldest() -> Path:
    """The folder with the libraries of the oldest release, patched."""
    return _library(VERSIONS[0], hooks=True, optimized=False)


def _with_probe(folder: Path, tree: Path) -> Build:
    name = hashlib.sha256(str(folder).encode()).hexdigest()[:10]
    return Build(folder, tree, compile_probe(folder, tree, _folder() / f"probe-{name}"))


def _folder() -> Path:
    folder = cache_dir() / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _library(version: str, hooks: bool, optimized: bool = True) -> Path:
    """Build only ggml and libllama; an existing build with the same inputs is reused."""
    native = native_dir()
    reporter = Reporter()
    tools = find_tools(reporter)
    tree = source(version)
    options = builder.base_options(compiler())
    if not optimized:
        options += ["-DCMAKE_C_FLAGS_RELEASE=-O0", "-DCMAKE_CXX_FLAGS_RELEASE=-O0"]
    parts = [version, sources.PROVEN[version].sha256, *options, *map(str, compiler()), cpu()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]
    state = key
    if hooks:
        files = [f"{top}/{name}" for top in ("cpp", "ggml_types") for name in list_files(native / top)]
        state += hash_files(native, files)
    kind = "patched" if hooks else "stock"
    work = _folder() / f"{kind}-{version}-{key}"
    done, result = work / "done", work / "build" / "bin"
    with lock(_folder() / f"{work.name}.lock"):
        if done.is_file() and done.read_text() == state and (result / "libllama.so").exists():
            return result
        done.unlink(missing_ok=True)
        for old in _folder().glob(f"{kind}-{version}-*"):
            if old.is_dir() and old != work:
                remove_tree(old)
        stage = work / "stage"
        remove_tree(stage)
        shutil.copytree(tree, stage)
        if hooks:
            engine.patch(stage)
        sync(stage, list(list_files(stage)), work / "llama.cpp")  # writes only changed files
        remove_tree(stage)
        arguments = ["-G", "Ninja", "-S", work / "llama.cpp", "-B", work / "build", *options]
        arguments += [f"-DCMAKE_MAKE_PROGRAM={tools.ninja}", "-DLLAMA_BUILD_COMMON=OFF", "-DLLAMA_BUILD_TESTS=OFF"]
        arguments += ["-DLLAMA_BUILD_TOOLS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF"]
        arguments += engine.cmake_args() if hooks else []
        environment = {**os.environ, "PATH": tools.path()}
        with (work / "build.log").open("w") as log, reporter.busy(f"building the {kind} library of {version}"):
            for command in ([tools.cmake, *arguments], [tools.ninja, "-C", work / "build", "-j", jobs(), "llama"]):
                words = [str(word) for word in command]
                ended = subprocess.run(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
                if ended.returncode != 0:
                    text = Path(log.name).read_text(errors="replace")
                    at = max(text.find("error:"), 0)
                    raise RuntimeError(f"{' '.join(words)} failed:\n{text[at : at + 3000]}\nFull log: {log.name}")
        done.write_text(state)
    return result


if __name__ == "__main__":
    builds = {"stock": lambda: stock().bin, "oldest": oldest, "patched": lambda: patched().bin}
    for name in sys.argv[1:] or builds:
        print(f"{name}: {builds[name]()}")
