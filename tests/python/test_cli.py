"""The commands, run with a tiny llama.cpp."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import turboquant
from fake_llama import EXTRA, FILES, make_native, make_tree, write
from turboquant import cli
from turboquant.llama import build as builds
from turboquant.llama import patch as hooks
from turboquant.llama.files import list_files
from typer.testing import CliRunner, Result


@pytest.fixture
def native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = make_native(tmp_path / "native files")
    monkeypatch.setenv("TURBOQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CCACHE_DISABLE", "1")
    monkeypatch.setattr(hooks, "native_dir", lambda: root)
    monkeypatch.setattr(builds, "native_dir", lambda: root)
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = make_tree(tmp_path / "llama")
    return root


def turbo(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def contents(root: Path) -> dict[str, str]:
    return {name: (root / name).read_text() for name in list_files(root)}


@pytest.mark.parametrize(
    ("arguments", "place", "then"),
    [
        (["build", "--source", "tree"], "turboquant.llama.build.build", "goes on from here"),
        (["patch", "tree"], "turboquant.llama.patch.patch", "starts anew"),
        (["fetch", "smollm2"], "turboquant.fetch.fetch", "starts anew"),
    ],
)
def test_interruptions_say_what_is_kept(monkeypatch, arguments, place, then):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    done = turbo(*arguments)
    assert done.exit_code == 130
    assert done.stderr == f"turboquant: interrupted; nothing is broken, and the same command {then}\n"


def test_patch_check_unpatch(native, tree):
    before = contents(tree)
    told = turbo("patch", tree, "--check")
    assert told.exit_code == 0
    assert "missing   type-enum  ggml/include/ggml.h" in told.stdout
    assert "1 hook to insert: run `turboquant patch" in told.stdout
    assert contents(tree) == before

    done = turbo("patch", tree)
    assert done.exit_code == 0
    assert "applied   type-enum  ggml/include/ggml.h" in done.stdout
    assert "GGML_TYPE_TURBO4 = 512," in (tree / "ggml/include/ggml.h").read_text()
    patched = contents(tree)
    assert turbo("patch", tree).exit_code == 0 and contents(tree) == patched
    assert "applied " in turbo("patch", tree, "--check").stdout

    undone = turbo("unpatch", tree)
    assert undone.exit_code == 0
    assert undone.stdout == "restored  ggml/include/ggml.h\n"
    assert contents(tree) == before == {**FILES, **EXTRA}
    assert "has no hooks in it" in turbo("unpatch", tree).stdout


@pytest.mark.skipif(not all(map(shutil.which, ("cmake", "c++"))), reason="needs cmake and a C++ compiler")
def test_the_cmake_lines_that_patch_prints_work(native, tree):
    lines = [line.strip() for line in turbo("patch", tree).stdout.splitlines() if line.startswith("  cmake ")]
    assert len(lines) == 2
    for line in lines:  # run unchanged by a shell; the path contains a space
        subprocess.run(line, shell=True, check=True, capture_output=True)
    done = subprocess.run([tree / "build/bin/llama-bench"], check=True, capture_output=True, text=True)
    assert done.stdout == "512 41 one\n"


def test_patch_that_does_not_fit(native, tree):
    write(tree, {"ggml/include/ggml.h": "enum ggml_type { NOTHING };\n"})
    for arguments in (["patch", tree], ["patch", tree, "--check"]):
        result = turbo(*arguments)
        assert result.exit_code == 1
        assert "GGML_TYPE_COUNT" in result.output and "Traceback" not in result.output
    assert "does not fit" in turbo("patch", tree).stderr
    assert "1 hook of 1 would not fit" in turbo("patch", tree, "--check").stderr


def test_patch_of_something_else(native, tmp_path):
    result = turbo("patch", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"turboquant: {tmp_path}: not a llama.cpp source tree")
    assert result.stdout == ""


@pytest.mark.skipif(
    not all(map(shutil.which, ("cmake", "ninja", "c++"))), reason="needs cmake, ninja and a C++ compiler"
)
def test_build_and_where(native, tree):
    nothing = turbo("where")
    assert nothing.exit_code == 1
    assert nothing.stdout == "" and "run `turboquant build` first" in nothing.stderr

    result = turbo("build", "--source", tree, "--target", "llama-bench", "-j", 1, "--cmake-arg", "-DGGML_NATIVE=OFF")
    assert result.exit_code == 0, result.output
    bin = Path(result.stdout.strip())
    assert result.stdout == f"{bin}\n"  # the folder, and nothing else
    done = subprocess.run([bin / "llama-bench"], check=True, capture_output=True, text=True)
    assert done.stdout == "512 41 one\n"

    found = turbo("where")
    assert (found.exit_code, found.stdout, found.stderr) == (0, f"{bin}\n", "")
    write(native, {"cpp/include/answer.h": "#define ANSWER 42\n"})
    old = turbo("where")
    assert (old.exit_code, old.stdout) == (0, f"{bin}\n")
    assert "`turboquant build` renews it" in old.stderr


def test_build_tells_what_is_wrong(native, tree):
    (tree / "common/arg.cpp").unlink()
    result = turbo("build", "--source", tree)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"turboquant: {tree} is no llama.cpp source tree: it lacks common/arg.cpp\n"
    assert turbo("build", "--version", "new").stderr.startswith("turboquant: 'new' is no version")
    both = turbo("build", "--version", "0.3.36", "--source", tree)
    assert both.exit_code == 1 and "not both" in both.stderr


def test_cache_folder_that_cannot_be_written(native, tree, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TURBOQUANT_CACHE", str(tmp_path / "file" / "cache"))
    result = turbo("build", "--source", tree)
    assert result.exit_code == 1
    assert str(tmp_path / "file") in result.stderr and "Traceback" not in result.output


def test_types_prints_the_type_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    rows = [line.split() for line in turbo("types").stdout.splitlines()]
    assert [row[0] for row in rows] == ["type", *(info.name for info in turboquant.types())]
    assert ["turbo3_64", "3", "64", "26", "3.25", "4.92"] in rows


def test_every_command_has_help():
    listed = turbo("--help").stdout
    for name in ("patch", "unpatch", "build", "where", "fetch", "explore", "types"):
        assert name in listed
        assert turbo(name, "--help").exit_code == 0


def test_as_a_program(tmp_path):
    code = "from turboquant.cli import main; main()"
    command = [sys.executable, "-c", code, "where"]
    env = dict(os.environ, TURBOQUANT_CACHE=str(tmp_path))
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("turboquant: no llama.cpp with the turbo types")


def test_the_types_of_defaults_exist():
    import inspect

    from turboquant.analyze import measure
    from turboquant.convert.run import CANDIDATES
    from turboquant.evaluate.__main__ import TYPES
    from turboquant.measure.pairs import bits_per_value, parse_pairs
    from turboquant.tune.run import DEFAULT_TYPES, GPU_TYPES, UNIFORM

    compared = inspect.signature(cli.compare).parameters["types"].default
    pairs = [parse_pairs(text) for text in (TYPES, compared, ",".join(UNIFORM))]
    names = {name for pair in sum(pairs, []) for name in (pair.k, pair.v)}
    names |= {*measure.TYPES, *DEFAULT_TYPES, *GPU_TYPES, *(name for pair in CANDIDATES for name in pair)}
    assert "turbo4_tcq" in names and all(bits_per_value(name) for name in names)
    assert not any("tcq" in name for name in GPU_TYPES)
