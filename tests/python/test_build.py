"""Builds: a tiny llama.cpp is patched, configured with CMake and compiled with ninja."""

from __future__ import annotations

import hashlib
import io
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_llama import EXTRA, FILES, make_native, make_sdist, make_tree, write
from rich.console import Console
from turboquant.errors import TurboQuantError
from turboquant.llama import build as builds
from turboquant.llama import patch as hooks
from turboquant.llama import source, toolchain
from turboquant.llama.files import list_files, lock, read_json
from turboquant.llama.progress import Reporter, duration
from turboquant.measure.programs import ProgramError, program

TARGETS = ("llama-completion", "llama-bench")  # what the tiny tree has of the default ones

if not all(shutil.which(tool) for tool in ("cmake", "ninja", "c++", "cc")):
    pytest.skip("needs cmake, ninja and a C++ compiler on the PATH", allow_module_level=True)


@pytest.fixture
def native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny sources of this project, and a separate cache."""
    root = make_native(tmp_path / "native")
    monkeypatch.setenv("TURBOQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CCACHE_DISABLE", "1")
    monkeypatch.setattr(hooks, "native_dir", lambda: root)
    monkeypatch.setattr(builds, "native_dir", lambda: root)
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "llama")


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def build(said: io.StringIO) -> Callable[..., Path]:
    reporter = Reporter(Console(file=said, width=200))
    return lambda *args, **kwargs: builds.build(*args, **kwargs, reporter=reporter)


def answer(bin: Path, name: str = "llama-completion") -> str:
    return subprocess.run([program(name, bin)], check=True, capture_output=True, text=True).stdout.strip()


def log(bin: Path) -> str:
    return (bin.parent.parent / "build.log").read_text()


def contents(root: Path) -> dict[str, str]:
    return {name: (root / name).read_text() for name in list_files(root)}


def test_everything_once_then_only_what_changed(native, tree, build, said):
    bin = build(tree)
    assert answer(bin) == answer(bin, "llama-bench") == "512 41 one"
    assert not (bin / "llama-extra").exists()
    assert contents(tree) == {**FILES, **EXTRA}  # the user's tree is unchanged
    assert builds.where() == bin
    assert "no llama-cli, llama-server" in said.getvalue()  # default programs that this tree lacks
    assert not builds.is_outdated(bin)

    # Without changes neither CMake nor ninja runs.
    (bin.parent.parent / "build.log").unlink()
    said.truncate(0)
    assert build(tree) == bin
    assert not (bin.parent.parent / "build.log").exists()
    assert said.getvalue() == ""

    # The codec changes: the folder is the same, and only what depends on the codec is compiled.
    write(native, {"cpp/include/answer.h": "#define ANSWER 42\n"})
    assert builds.is_outdated(bin)
    assert build(tree) == bin
    assert answer(bin) == "512 42 one"
    assert "ggml-cpu.c.o" in log(bin) and "arg.cpp.o" not in log(bin)

    # The user's tree changes.
    write(tree, {"common/arg.cpp": 'const char * word() { return "two"; }\n'})
    assert build(tree) == bin
    assert answer(bin) == "512 42 two"
    assert "arg.cpp.o" in log(bin) and "ggml-cpu.c.o" not in log(bin)

    # A deleted program is built again.
    (bin / "llama-bench").unlink()
    assert build(tree) == bin
    assert answer(bin, "llama-bench") == "512 42 two"


def test_targets(native, tree, build):
    bin = build(tree, targets=["llama-extra"])
    assert answer(bin, "llama-extra") == "512 41 one"
    assert not (bin / "llama-bench").exists()
    build(tree, targets=["default", "test-things"])  # tests are configured only now
    there = ["llama-bench", "llama-completion", "llama-extra", "test-things"]
    assert sorted(path.name for path in bin.iterdir()) == there
    # With other sources and fewer targets, no program of the old sources remains.
    write(native, {"cpp/include/answer.h": "#define ANSWER 42\n"})
    build(tree, targets=["llama-bench"])
    assert [path.name for path in bin.iterdir()] == ["llama-bench"]
    assert answer(bin, "llama-bench") == "512 42 one"
    with pytest.raises(builds.BuildError, match="no target 'llama-benhc'; it has llama-bench"):
        build(tree, targets=["llama-benhc"])


def test_options_and_compilers_have_folders_of_their_own(native, tree, build, monkeypatch):
    first = build(tree, targets=["llama-bench"])
    other = build(tree, targets=["llama-bench"], cmake_args=["COMMON_THING=1", "-DCMAKE_BUILD_TYPE=Debug"])
    assert other != first and answer(other, "llama-bench") == "512 41 one"
    assert "CMAKE_BUILD_TYPE:STRING=Debug" in (other.parent / "CMakeCache.txt").read_text()
    assert builds.where() == other
    assert build(tree, targets=["llama-bench"]) == first == builds.where()
    monkeypatch.setenv("CXXFLAGS", "-O1")
    assert builds._make_plan(source.local(tree), (), (), ["cc", "c++"]).folder not in (
        builds._make_plan(source.local(tree), (), (), ["cc", "other c++"]).folder,
        first.parent.parent,
    )


def test_cpu_counts_only_for_native_code(native, tree, monkeypatch):
    def folder(*options: str) -> Path:
        return builds._make_plan(source.local(tree), (), options, ["cc", "c++"]).folder

    here, portable = folder(), folder("-DGGML_NATIVE=OFF")
    monkeypatch.setattr(builds, "cpu", lambda: "another one")
    assert folder() != here
    assert folder("-DGGML_NATIVE=OFF") == portable


def test_release_of_llama_cpp_python(native, tmp_path, build, monkeypatch):
    archive = make_sdist(tmp_path / "index", "9.9.9")

    def copy(version: str, to: Path, *args: object, **kwargs: object) -> Path:
        to.mkdir()
        return Path(shutil.copy(archive, to))

    monkeypatch.setattr(source, "_pip_download", copy)
    with pytest.raises(source.UnprovenError):
        build(version="9.9.9", targets=["llama-bench"])
    bin = build(version="9.9.9", targets=["llama-bench"], unproven=True)
    assert answer(bin, "llama-bench") == "512 41 one"
    assert bin.parent.parent.name.startswith("llama.cpp-9.9.9-")
    archive.unlink()
    assert build(version="9.9.9", targets=["llama-bench"]) == bin


def test_compile_error_is_shown_and_does_not_stay(native, tree, build):
    good = FILES["common/arg.cpp"]
    write(tree, {"common/arg.cpp": good + "int broken( { return 1; }\n"})
    with pytest.raises(builds.BuildError) as error:
        build(tree)
    text = str(error.value)
    assert "compiling CMakeFiles/llama-" in text and "arg.cpp.o failed" in text
    assert "arg.cpp:2:" in text and "error:" in text and "-DCOMMIT=" not in text  # the message, not the command
    log_file = Path(text.rpartition("Full log: ")[2])
    assert "error:" in log_file.read_text()
    with pytest.raises(builds.BuildError, match="turboquant build"):
        builds.where()
    write(tree, {"common/arg.cpp": good})
    assert answer(build(tree)) == "512 41 one"


def test_configure_error_is_shown(native, tree, build):
    with pytest.raises(builds.BuildError, match="(?s)could not configure.*this tree was told to fail.*Full log: "):
        build(tree, cmake_args=["BREAK_CONFIGURE=ON"])


def test_hook_that_does_not_fit_is_told(native, tree, build):
    write(tree, {"ggml/include/ggml.h": "enum ggml_type { NOTHING };\n"})
    with pytest.raises(hooks.PatchError, match="ggml/include/ggml.h.*GGML_TYPE_COUNT"):
        build(tree)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cmake_args": ["-G"]}, "'-G' is no CMake option"),
        ({"cmake_args": ["--fresh"]}, "is no CMake option"),
        ({"targets": ["-t"]}, "'-t' is no CMake target"),
        ({"jobs": 0}, "at least 1, got 0"),
        ({"version": "1.0"}, "not both"),
    ],
)
def test_bad_arguments(native, tree, build, arguments, message):
    with pytest.raises(builds.BuildError, match=message):
        build(tree, **arguments)


# A build that stops in the middle: `slow` is a target whose command writes its process id, and then waits.
SLOW = """
if (NOT EXISTS "${CMAKE_SOURCE_DIR}/../go-on")
    add_custom_command(OUTPUT slow.txt VERBATIM
        COMMAND sh -c "echo $$ > '${CMAKE_SOURCE_DIR}/../started' && exec sleep 600")
else()
    add_custom_command(OUTPUT slow.txt COMMAND sh -c "echo done > slow.txt" VERBATIM)
endif()
add_custom_target(slow DEPENDS slow.txt)
"""
START = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits an ignored SIGINT
from turboquant.llama import build, patch
from turboquant import cli
root = Path(sys.argv[1])
build.native_dir = patch.native_dir = lambda: root
sys.argv = ["turboquant", "build", "--source", sys.argv[2], "--target", "slow", "--target", "llama-bench"]
cli.main()
"""


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    for _ in range(1200):  # a limit for a test that hangs, not a bound on speed
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate())


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # a zombie process is not alive
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True


def start_slow(native: Path, tree: Path) -> tuple[subprocess.Popen[str], Path, int]:
    """A running `turboquant build`, its folder, and the id of the "compiler" that ninja waits for."""
    command = [sys.executable, "-c", START, str(native), str(tree)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def mark() -> list[Path]:
        return [path for path in native.parent.glob("cache/builds/*/started") if path.read_text().endswith("\n")]

    wait_for(mark, process)
    return process, mark()[0].parent, int(mark()[0].read_text())


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_build_goes_on(native, tree, build, number):
    write(tree, {"CMakeLists.txt": FILES["CMakeLists.txt"] + SLOW})
    process, folder, compiler = start_slow(native, tree)
    assert alive(compiler)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)  # a limit for a test that hangs, not a bound on speed
    assert process.returncode == 130
    assert out == "" and "goes on from here" in err
    assert not alive(compiler)
    assert not (folder / "done.json").exists()
    (folder / "go-on").write_text("")
    bin = build(tree, targets=["slow", "llama-bench"])
    assert bin == folder / "build" / "bin"
    assert answer(bin, "llama-bench") == "512 41 one"


@pytest.mark.skipif(os.name == "nt", reason="ninja does not inherit the lock there")
def test_compilers_that_outlive_their_parent_keep_the_folder_locked(native, tree):
    write(tree, {"CMakeLists.txt": FILES["CMakeLists.txt"] + SLOW})
    process, folder, compiler = start_slow(native, tree)
    try:
        process.kill()
        process.communicate()
        assert alive(compiler)
        with lock(builds._lock_file(folder), block=False) as held:
            assert held is None
    finally:
        os.kill(compiler, signal.SIGKILL)
    with lock(builds._lock_file(folder)) as held:  # free as soon as ninja has noticed
        assert held is not None


@pytest.mark.skipif(os.name == "nt", reason="ninja does not inherit the lock there")
def test_second_build_waits_for_the_first(native, tree, said, build):
    folder = builds._make_plan(source.local(tree), (), (), toolchain.compiler()).folder
    command = [sys.executable, "-c", START.replace('"slow", "--target", ', ""), str(native), str(tree)]
    with lock(builds._lock_file(folder)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        first = process.stderr.readline()
        assert f"another process is building in {folder}" in first
        assert not folder.exists()
    out, _ = process.communicate()
    assert process.returncode == 0
    assert out == f"{folder / 'build' / 'bin'}\n"


def test_old_folders_go_but_only_ours(native, tree, build, tmp_path):
    cache = tmp_path / "cache" / "builds"
    theirs = write(cache / "mine", {"notes.txt": "not a build"})
    link = cache / "link"
    elsewhere = write(tmp_path / "elsewhere", {"build.json": '{"made_by": "turboquant"}'})
    link.symlink_to(elsewhere, target_is_directory=True)
    for number in range(5):
        folder = write(cache / f"old-{number}", {"build.json": '{"made_by": "turboquant"}', "x/y": "z"})
        os.utime(folder / "build.json", (1000 + number, 1000 + number))
    with lock(builds._lock_file(cache / "old-1")):  # somebody builds in it
        bin = build(tree, targets=["llama-bench"])
    left = {path.name for path in cache.iterdir() if path.is_dir()}
    assert left == {"mine", "link", "old-1", "old-3", "old-4", bin.parent.parent.name}
    assert (theirs / "notes.txt").exists() and (elsewhere / "build.json").exists()


def test_where_falls_back_to_another_finished_build(native, tree, build):
    first = build(tree, targets=["llama-bench"])
    second = build(tree, targets=["llama-bench"], cmake_args=["X=1"])
    assert builds.where() == second
    shutil.rmtree(second.parent.parent)
    assert builds.where() == first
    (first / "llama-bench").unlink()
    with pytest.raises(builds.BuildError, match="run `turboquant build` first"):
        builds.where()


def test_moved_cache_is_built_again(native, tree, build, monkeypatch):
    bin = build(tree, targets=["llama-bench"])
    moved = native.parent / "moved"
    bin.parents[3].rename(moved)
    monkeypatch.setenv("TURBOQUANT_CACHE", str(moved))
    write(native, {"cpp/include/answer.h": "#define ANSWER 42\n"})
    bin = build(tree, targets=["llama-bench"])
    assert moved in bin.parents
    assert answer(bin, "llama-bench") == "512 42 one"


# ---- tools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpu", "version", "broken"),
    [
        ("avx2 amx_tile amx_int8", "c++ (Debian 12.2.0-14+deb12u1) 12.2.0", True),
        ("avx2 amx_tile amx_int8", "g++ (GCC) 11.4.1 20231218 (Red Hat 11.4.1-3)", True),
        ("avx2 amx_tile amx_int8", "g++ (Ubuntu 13.2.0-23ubuntu4) 13.2.0", True),
        ("avx2 amx_tile amx_int8", "c++ (Debian 12.4.0-1) 12.4.0", False),
        ("avx2 amx_tile amx_int8", "g++ (GCC) 14.1.0", False),
        ("avx2 amx_tile amx_int8", "Debian clang version 14.0.6", False),
        ("avx2 avx512f", "c++ (Debian 12.2.0-14+deb12u1) 12.2.0", False),
    ],
)  # fmt: skip
def test_compilers_that_break_amx_build_without_it(monkeypatch, cpu, version, broken):
    """llama.cpp, built by such a GCC for a CPU with AMX, crashes at its first product."""
    monkeypatch.setattr(toolchain, "_cpu_flags", lambda: set(cpu.split()))
    monkeypatch.setenv("CXXFLAGS", "-O2")
    options = builds.base_options(["/usr/bin/cc: " + version, "/usr/bin/c++: " + version])
    flags = [option for option in options if "CXX_FLAGS" in option]
    assert flags == (["-DCMAKE_CXX_FLAGS=-O2 -mno-amx-tile -mno-amx-int8 -mno-amx-bf16"] if broken else [])


def test_missing_compiler_names_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(toolchain.ToolError, match="no C compiler found; install "):
        toolchain.compiler()
    monkeypatch.setenv("CC", "no-such-cc --fast")
    with pytest.raises(toolchain.ToolError, match="CC names, 'no-such-cc --fast', does not run"):
        toolchain.compiler()


def test_missing_cuda_compiler_names_the_way_out(native, tree, build, monkeypatch):
    find = shutil.which
    monkeypatch.setattr(toolchain.shutil, "which", lambda name, **how: None if "nvcc" in name else find(name, **how))
    monkeypatch.delenv("CUDACXX", raising=False)
    with pytest.raises(toolchain.ToolError, match="nvcc is neither in PATH nor in .*CUDACXX"):
        build(tree, backend="cuda")
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    with pytest.raises(toolchain.ToolError, match="CUDACXX names, 'no-such-nvcc', does not run"):
        build(tree, backend="cuda")


@pytest.mark.skipif(os.name == "nt", reason="the fake program is a shell script")
def test_cuda_backend_asks_cmake_for_it(native, tree, build, monkeypatch, tmp_path):
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    fake_program(nvcc, "Cuda compilation tools, release 13.0, V13.0.88")
    monkeypatch.setenv("CUDACXX", str(nvcc))
    bin = build(tree, targets=["llama-bench"], backend="cuda", arch="80,90")
    cache = (bin.parent / "CMakeCache.txt").read_text()
    assert "GGML_CUDA:UNINITIALIZED=ON" in cache and "CMAKE_CUDA_ARCHITECTURES:UNINITIALIZED=80;90" in cache
    assert build(tree, targets=["llama-bench"]) != bin
    with pytest.raises(builds.BuildError, match="'sm_90' names no GPUs"):
        build(tree, backend="cuda", arch="sm_90")
    with pytest.raises(builds.BuildError, match="needs the backend cuda"):
        build(tree, arch="native")
    with pytest.raises(builds.BuildError, match="no backend 'vulkan'; it is one of cpu, cuda, metal"):
        build(tree, backend="vulkan")


def test_metal_backend_is_for_macos_and_asks_cmake_for_it(native, tree, build, monkeypatch):
    if platform.system() != "Darwin":
        with pytest.raises(builds.BuildError, match="needs macOS, and this is"):
            build(tree, backend="metal")
    monkeypatch.setattr(builds.platform, "system", lambda: "Darwin")
    for backend, expected in (("metal", "ON"), ("cpu", "OFF")):
        bin = build(tree, targets=["llama-bench"], backend=backend)
        assert f"GGML_METAL:UNINITIALIZED={expected}" in (bin.parent / "CMakeCache.txt").read_text()
    bin = build(tree, targets=["llama-bench"], backend="metal", cmake_args=["GGML_METAL_EMBED_LIBRARY=OFF"])
    assert "GGML_METAL_EMBED_LIBRARY:UNINITIALIZED=OFF" in (bin.parent / "CMakeCache.txt").read_text()


def fake_program(path: Path, output: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {output}\n")
    path.chmod(0o755)


def fake_wheel(folder: Path, name: str, version: str) -> str:
    """Write a wheel, and return its line with the pinned hash."""
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        program = zipfile.ZipInfo(f"{name}/data/bin/{name}")
        program.external_attr = 0o100755 << 16
        wheel.writestr(program, f"#!/bin/sh\necho {name} version {version}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.mark.skipif(os.name == "nt", reason="the fake programs are shell scripts")
@pytest.mark.parametrize("machine", ["has nothing", "has an old cmake", "has ninja"])
def test_cmake_and_ninja_come_from_pypi_if_the_machine_has_none(machine, monkeypatch, tmp_path, said):
    pytest.importorskip("pip")
    path, wheels = tmp_path / "bin", tmp_path / "wheels"
    path.mkdir()
    wheels.mkdir()
    if machine == "has an old cmake":
        fake_program(path / "cmake", "cmake version 3.18.4")
        fake_program(path / "ninja", "1.11.1")
    elif machine == "has ninja":
        fake_program(path / "ninja", "1.11.1")
    (path / "sh").symlink_to(shutil.which("sh") or "/bin/sh")
    pinned = tmp_path / "pinned.txt"
    pinned.write_text("".join(fake_wheel(wheels, *one) for one in (("cmake", "3.31.0"), ("ninja", "1.12.0"))))
    monkeypatch.setattr(toolchain, "_PINNED", pinned)
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(path))
    monkeypatch.setenv("TURBOQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    reporter = Reporter(Console(file=said, width=200))
    tools = toolchain.find_tools(reporter)
    own = tmp_path / "cache" / "tools" / "cmake-ninja"
    assert tools.cmake == own / "cmake/data/bin/cmake"
    assert tools.ninja == (own / "ninja/data/bin/ninja" if machine == "has nothing" else path / "ninja")
    assert tools.path().split(os.pathsep)[0] == str(tools.cmake.parent)
    assert ("Ninja" in said.getvalue()) == (machine == "has nothing")
    shutil.rmtree(wheels)  # the second call fetches nothing
    assert toolchain.find_tools(reporter) == tools


@pytest.mark.skipif(os.name == "nt", reason="the fake programs are shell scripts")
def test_replaced_wheels_are_not_installed(monkeypatch, tmp_path, said):
    """Wheels with the same names and versions and other bytes are refused, because hashes are pinned."""
    pytest.importorskip("pip")
    pinned = dict(re.findall(r"^(\w+)==(\S+)", toolchain._PINNED.read_text(), re.MULTILINE))
    assert pinned.keys() == {"cmake", "ninja"}
    for name, version in pinned.items():
        fake_wheel(tmp_path, name, version)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("TURBOQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(toolchain.ToolError, match=r"what pip fetched is not what .*build-tools\.txt pins"):
        toolchain.find_tools(Reporter(Console(file=said)))
    assert not (tmp_path / "cache" / "tools" / "cmake-ninja").exists()


def test_no_cmake_and_no_network(monkeypatch, tmp_path, said):
    pytest.importorskip("pip")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("TURBOQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(toolchain.ToolError, match="(?s)CMake 3.19 or newer and Ninja not found.*No matching dist"):
        toolchain.find_tools(Reporter(Console(file=said)))


def test_jobs_and_cpu():
    assert 1 <= toolchain.jobs() <= (os.cpu_count() or 1)
    assert toolchain.cpu() == toolchain.cpu() != ""


# ---- programs --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="the fake program is a shell script")
def test_a_program_that_is_not_there(tmp_path):
    (tmp_path / "llama-say").write_text("#!/bin/sh\n")
    (tmp_path / "llama-say").chmod(0o755)
    assert program("llama-say", tmp_path) == (tmp_path / "llama-say").resolve()
    with pytest.raises(ProgramError, match=r"no llama-sya in .*it has llama-say.*--target llama-sya"):
        program("llama-sya", tmp_path)
    with pytest.raises(ProgramError, match="no such folder"):
        program("llama-say", tmp_path / "nowhere")


def test_program_of_the_last_build(native, tree, build):
    with pytest.raises(TurboQuantError, match="turboquant build"):
        program("llama-bench")
    bin = build(tree, targets=["llama-bench"])
    assert program("llama-bench") == (bin / "llama-bench").resolve()


# ---- progress --------------------------------------------------------------------------------------------------------


def test_plain_progress_is_sparse(said, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("turboquant.llama.progress.time.monotonic", lambda: now[0])
    with Reporter(Console(file=said, width=40)).track("compiling") as track:
        for done in range(1, 1001):
            now[0] += 0.5
            track.update(done, 1000)
    lines = said.getvalue().splitlines()
    assert lines[0] == "compiling ..."
    assert lines[1] == "compiling 100/1000 (10%), 50 s, about 7 min 30 s left"
    assert lines[-1] == "compiling 1000/1000 (100%), 8 min 20 s"
    assert len(lines) == 11


def test_terminal_progress_is_a_bar():
    out = io.StringIO()
    with Reporter(Console(file=out, force_terminal=True, width=100)).track("compiling") as track:
        track.update(3, 12)
    assert "3/12" in out.getvalue()


def test_duration():
    texts = [duration(seconds) for seconds in (0.4, 59.6, 200, 3720)]
    assert texts == ["0 s", "1 min 00 s", "3 min 20 s", "1 h 02 min"]


def test_json_that_is_none(tmp_path):
    write(tmp_path, {"half.json": '{"a": ', "list.json": "[1]"})
    assert read_json(tmp_path / "half.json") is read_json(tmp_path / "list.json") is read_json(tmp_path / "no") is None
