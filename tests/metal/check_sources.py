#!/usr/bin/env python3
"""Checks what the emulator does not see in the kernels' sources: `check_sources.py FOLDER [CLANG]`.

- The emulator passes parameters by their order. So they must be the arguments, the buffers from 1 on, threadgroup
  memory, the position of the threadgroup, the lane, the SIMD group, with these attributes.
- Metal demands an address space for every pointer and reference, and has no lambdas, `if constexpr`, `auto`, double
  precision or functions of the C++ library.
- With CLANG, the sources are also compiled as C++ for OpenCL (opencl.h), which has the same address spaces and does not
  convert between them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

SYSTEM = ("threadgroup_position_in_grid", "thread_index_in_simdgroup", "simdgroup_index_in_threadgroup")
SPACES = ("device", "threadgroup", "thread", "constant")
TYPES = (
    r"(?:u?char|u?short|u?int|u?long|u?int\d+_t|half|float|bool|simdgroup_\w+8x8|Units?(?:<N>)?|GridEntry|Place"
    r"|\w+Arguments)"
)
FORBIDDEN = (r"\[[&=]?\]\s*\(", r"\bif constexpr\b", r"\bauto\b", r"\bdouble\b", r"\bstd::", r"\bstatic_assert\b")


def code_of(text: str) -> str:
    return re.sub(r"//.*", "", text)


def check_kernels(code: str) -> list[str]:
    wrong = []
    for name, parameters in re.findall(r"\bkernel void (\w+)\((.*?)\)\s*\{", code, re.DOTALL):
        attributes = re.findall(r"\[\[(\w+(?:\(\d+\))?)\]\]|TURBOQUANT_THREADGROUP\((\d+)\)", parameters)
        found = [attribute or f"threadgroup({index})" for attribute, index in attributes]
        buffers = sum(item.startswith("buffer") for item in found)
        memory = ["threadgroup(0)"] if "threadgroup(0)" in found else []
        if found != [f"buffer({i})" for i in range(buffers)] + memory + list(SYSTEM):
            wrong.append(f"{name}: the parameters have the attributes {', '.join(found)}")
    return wrong


def check_pointers(code: str) -> list[str]:
    wrong = []
    for match in re.finditer(rf"((?:\w+\s+)?)(?:const\s+)?{TYPES}(?:\s+const)?\s*[*&]+\s*(?:\w+\s*[,)=;]|>)", code):
        before = code[max(0, match.start() - 30) : match.start()] + match.group(1)
        words = re.findall(r"\w+", before)
        if not words or not any(word in SPACES for word in words[-2:]):
            wrong.append(f"no address space: {match.group(0).strip()}")
    return wrong


def check_address_spaces(clang: str, folder: Path) -> list[str]:
    here = Path(__file__).resolve().parent
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "metal_stdlib").write_text('#include "opencl.h"\n')
        for source in sorted(folder.glob("*.metal")):
            command = [clang, "-x", "clcpp", "-cl-std=clc++2021", "-fsyntax-only", "-w", "-D__METAL_VERSION__=300"]
            command += [f"-I{name}", f"-I{here}", f"-I{folder}", str(source)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode != 0:
                wrong.append(done.stderr)
    return wrong


def main() -> int:
    folder = Path(sys.argv[1])
    wrong = []
    for path in sorted([*folder.glob("*.metal"), *folder.glob("*.h")]):
        if path.name == "turboquant_metal.h":
            continue
        code = code_of(path.read_text())
        found = check_kernels(code) + check_pointers(code)
        found += [
            f"{match.group(0)!r} is not part of the language" for f in FORBIDDEN for match in re.finditer(f, code)
        ]
        wrong += [f"{path.name}: {item}" for item in found]
    if len(sys.argv) > 2:
        wrong += check_address_spaces(sys.argv[2], folder)
    print("\n".join(wrong) or "nothing found")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
