"""A llama.cpp of twenty lines, matching sources of this project, and a source package with them, for fast tests.

The programs print ``<512, from the inserted hook> <ANSWER, from our "codec"> <WORD, from a file of the tree>``.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

HOOK = """
[[hook]]
id = "type-enum"
why = "the type's id."
file = "ggml/include/ggml.h"
anchor = 'GGML_TYPE_COUNT'
where = "before"
text = "GGML_TYPE_TURBO4 = 512,"
"""
INJECT = 'include_directories("${CMAKE_CURRENT_LIST_DIR}/../cpp/include")\n'

CMAKE = """
cmake_minimum_required(VERSION 3.14)
project(llama.cpp C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(LLAMA_BUILD_COMMIT unknown CACHE STRING "")
add_subdirectory(ggml)
foreach(name llama-completion llama-bench llama-extra)
    add_executable(${name} src/llama-context.cpp common/arg.cpp)
    target_link_libraries(${name} ggml)
    target_compile_definitions(${name} PRIVATE COMMIT="${LLAMA_BUILD_COMMIT}")
endforeach()
if (LLAMA_BUILD_TESTS)
    add_executable(test-things src/llama-context.cpp common/arg.cpp)
    target_link_libraries(test-things ggml)
endif()
option(BREAK_CONFIGURE "" OFF)
if (BREAK_CONFIGURE)
    message(FATAL_ERROR "this tree was told to fail")
endif()
"""
GGML_CMAKE = """
project(ggml C)
add_library(ggml STATIC src/ggml-cpu/ggml-cpu.c)
target_include_directories(ggml PUBLIC include ${TURBOQUANT_INCLUDE})
"""
FILES = {
    "CMakeLists.txt": CMAKE,
    "ggml/CMakeLists.txt": GGML_CMAKE,
    "ggml/include/ggml.h": "enum ggml_type { GGML_TYPE_COUNT = 600 };\n",
    "ggml/src/ggml-cpu/ggml-cpu.c": '#include "ggml.h"\n#include "answer.h"\n'
    "int type_id(void) { return GGML_TYPE_TURBO4; }\nint answer(void) { return ANSWER; }\n",
    "include/llama.h": "",
    "src/llama-context.cpp": '#include <cstdio>\nextern "C" int type_id(void); extern "C" int answer(void);\n'
    'const char * word(); int main() { std::printf("%d %d %s\\n", type_id(), answer(), word()); }\n',
    "common/arg.cpp": 'const char * word() { return "one"; }\n',
    "tools/CMakeLists.txt": "",
    "scripts/tool.sh": "#!/bin/sh\n",
}
EXTRA = {  # files that no build needs
    "models/big.gguf": "weights",
    "docs/manual.md": "text",
    "media/logo.svg": "<svg/>",
    ".github/workflow.yml": "on: push",
}


def write(root: Path, files: dict[str, str]) -> Path:
    """Write `files` below `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def make_tree(root: Path) -> Path:
    """A llama.cpp checkout."""
    return write(root, {**FILES, **EXTRA})


def make_native(root: Path, answer: int = 41) -> Path:
    """The sources of this project."""
    files = {"ggml_types/ggml/hooks.toml": HOOK, "ggml_types/inject.cmake": INJECT}
    return write(root, {**files, "cpp/include/answer.h": f"#define ANSWER {answer}\n"})


BACKEND = '''
import pathlib
def build_wheel(*args):
    raise RuntimeError("nobody should build this")
def build_sdist(*args):
    raise RuntimeError("nobody should build this")
def prepare_metadata_for_build_wheel(folder, settings=None):
    name = "llama_cpp_python-{version}.dist-info"
    path = pathlib.Path(folder, name)
    path.mkdir()
    (path / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: {version}\\n")
    (path / "WHEEL").write_text("Wheel-Version: 1.0\\n")
    return name
'''
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_sdist(folder: Path, version: str, members: dict[str, str] | None = None) -> Path:
    """A source package of llama-cpp-python that pip can "download" from `folder` without a network.

    `members` are added unchanged, after the usual members.
    """
    top = f"llama_cpp_python-{version}"
    files = {
        f"{top}/.git/modules/vendor/llama.cpp/HEAD": COMMIT + "\n",
        f"{top}/PKG-INFO": f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n",
        f"{top}/pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        f"{top}/backend.py": BACKEND.replace("{version}", version),
        **{f"{top}/vendor/llama.cpp/{name}": text for name, text in {**FILES, **EXTRA}.items()},
        **(members or {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{top}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            data = text.encode()
            member.size = len(data)
            member.mode = 0o755 if name.endswith(".sh") else 0o644
            tar.addfile(member, io.BytesIO(data))
    return path
