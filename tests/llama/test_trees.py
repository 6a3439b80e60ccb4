"""The hooks on every tested llama.cpp. The oldest one compiles; all other tests run the newest one."""

from __future__ import annotations

import filecmp
import re
import shutil
from pathlib import Path

import builds
import pytest

FOLDERS = ("ggml", "src", "common", "include", "tools", "tests", "examples")


def copy_tree(source: Path, target: Path) -> Path:
    for folder in FOLDERS:
        if (source / folder).is_dir():
            shutil.copytree(source / folder, target / folder)
    shutil.copy(source / "CMakeLists.txt", target)
    return target


def differences(a: Path, b: Path) -> set[str]:
    """Relative paths of files that differ in content or exist on one side only."""
    names = {str(p.relative_to(root)) for root in (a, b) for p in root.rglob("*") if p.is_file()}
    return {name for name in names if not filecmp.cmp(a / name, b / name, shallow=False)}


@pytest.mark.parametrize("version", builds.VERSIONS)
def test_hooks_apply_and_come_out(version: str, tmp_path: Path) -> None:
    from turboquant.llama import patch as engine

    original = copy_tree(builds.source(version), tmp_path / "original")
    tree = copy_tree(original, tmp_path / "tree")
    engine.patch(tree)
    changed = differences(original, tree)
    assert {"ggml/include/ggml.h", "ggml/src/ggml.c", "common/arg.cpp", "src/llama-kv-cache.cpp"} <= changed
    once = {name: (tree / name).read_bytes() for name in changed}
    engine.patch(tree)
    assert {name: (tree / name).read_bytes() for name in changed} == once, "a second patch changed something"
    for name, content in once.items():  # only insertions: all lines of the original are present in order
        rest = iter(content.decode(errors="surrogateescape"))
        kept = (original / name).read_text(errors="surrogateescape")
        assert all(c in rest for c in kept), name
    engine.unpatch(tree)
    assert differences(original, tree) == set()


@pytest.mark.parametrize("version", builds.VERSIONS)
def test_architectures_that_rotate_in_code_of_their_own_are_known(version: str) -> None:
    """In these architectures all layers are rotated or none, because they do not store keys through build_attn."""
    header = (builds.native_dir() / "ggml_types" / "llama" / "turbo-rotation.h").read_text()
    known = set(re.findall(r'"([\w-]+)"', header.split("turbo_has_own_attention", 1)[1].split("}", 1)[0]))
    names = dict(re.findall(r'(LLM_ARCH_\w+),\s*"([^"]+)"', (builds.source(version) / "src/llama-arch.cpp").read_text()))
    for path in sorted((builds.source(version) / "src" / "models").glob("*.cpp")):
        if re.search(r"self_[kv]_rot|[^_]k_rot\b", path.read_text()):
            assert path.stem in known and path.stem in names.values(), path.name


def test_oldest_tree_compiles() -> None:
    """ggml and libllama of the oldest tree compile with the hooks."""
    libraries = builds.oldest()
    names = {path.name for path in libraries.iterdir()}
    assert {"libllama.so", "libggml-base.so", "libggml-cpu.so"} <= names
    assert b"turbo4_64" in (libraries / "libggml-base.so").resolve().read_bytes()
