#!/usr/bin/env python3
"""Compile the codec for the page of `turboquant explore`: cpp/src/scalar.cpp to WebAssembly.

The program writes codec.wasm, and codec.json with the hashes of its sources, to python/turboquant/explore. It needs
Clang with the WebAssembly target and its linker: on Debian and Ubuntu `apt install clang lld`. CXX selects another
Clang.

  python3 tools/make_wasm.py            write both files
  python3 tools/make_wasm.py --check    check whether the present sources give codec.wasm. Exit status 0: yes; 1: no,
                                        run this program; 3: unknown, because the sources have changed, and the compiler
                                        of codec.wasm is missing
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tools" / "wasm" / "codec.cpp"
WASM = ROOT / "python" / "turboquant" / "explore" / "codec.wasm"
RECORD = WASM.with_suffix(".json")
FLAGS = [
    "--target=wasm32", "-std=c++17", "-O2", "-mbulk-memory", "-ffp-contract=off", "-Wall", "-Wextra", "-ferror-limit=3",
    "-ffreestanding", "-nostdlib", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden",
    "-Itools/wasm/include", "-Icpp/include", "-Icpp/src",
    "-Wl,--no-entry,--strip-all,-z,stack-size=65536",
]  # fmt: skip


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compiler() -> list[str] | None:
    """The command of a Clang that can make WebAssembly, or None."""
    command = shlex.split(os.environ.get("CXX", ""))
    if not command or "clang" not in Path(command[0]).name:
        command = ["clang++"]
    if not shutil.which(command[0]):
        return None
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cpp"
        probe.write_text("int main() { return 0; }\n")
        flags = [*FLAGS[:1], "-nostdlib", "-Wl,--no-entry", str(probe), "-o", str(probe.with_suffix(".wasm"))]
        done = subprocess.run([*command, *flags], capture_output=True, check=False)
    return command if done.returncode == 0 else None


def version(command: list[str]) -> str:
    """The version, such as `Debian clang version 14.0.6`. Other versions give other bytes."""
    printed = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    return printed.splitlines()[0]


def build(command: list[str]) -> tuple[bytes, dict[str, object]]:
    """The module, and the record for codec.json. Raises CalledProcessError if the source does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        output, depends = Path(folder) / "codec.wasm", Path(folder) / "codec.d"
        words = [*command, *FLAGS, "-MMD", "-MF", str(depends), str(SOURCE.relative_to(ROOT)), "-o", str(output)]
        subprocess.run(words, cwd=ROOT, check=True)
        files = depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        inputs = sorted({(ROOT / file).resolve().relative_to(ROOT).as_posix() for file in files})
        data = output.read_bytes()
    record: dict[str, object] = {
        "compiler": version(command),
        "flags": FLAGS,
        "inputs": {name: sha256(ROOT / name) for name in inputs},
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    return data, record


def check(command: list[str] | None) -> int:
    """See --check."""
    name = WASM.relative_to(ROOT)
    if not WASM.is_file() or not RECORD.is_file():
        print(f"{name} is missing: python3 tools/make_wasm.py", file=sys.stderr)
        return 1
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if record["sha256"] != sha256(WASM):
        print(f"{name} is not the file of {RECORD.name}: python3 tools/make_wasm.py", file=sys.stderr)
        return 1
    if command and version(command) == record["compiler"]:
        if build(command)[0] != WASM.read_bytes():
            print(f"{name} is older than its sources: python3 tools/make_wasm.py", file=sys.stderr)
            return 1
        print(f"{name} is what {record['compiler']} makes of the sources")
        return 0
    inputs = record["inputs"].items()
    changed = [file for file, digest in inputs if not (ROOT / file).is_file() or sha256(ROOT / file) != digest]
    changed += [] if record["flags"] == FLAGS else ["the flags"]
    if changed:
        print(f"{', '.join(changed)} changed since {name} was made, with {record['compiler']}, which is not here to "
              "tell whether that matters", file=sys.stderr)  # fmt: skip
        return 3
    print(f"the sources of {name} have not changed")
    return 0


def write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
    print(f"{path.relative_to(ROOT)}, {len(data):,} bytes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; tell whether codec.wasm is up to date")
    only_check = parser.parse_args().check
    command = compiler()
    if command is None and not only_check:
        print("no Clang that makes WebAssembly: apt install clang lld, or name one in CXX", file=sys.stderr)
        return 1
    try:
        if only_check:
            return check(command)
        assert command
        data, record = build(command)
    except subprocess.CalledProcessError as error:
        print(f"{SOURCE.relative_to(ROOT)} does not compile ({error.cmd[0]}: status {error.returncode}, see above). If a "
              "header is missing, what the codec uses of it goes into tools/wasm/include", file=sys.stderr)  # fmt: skip
        return 1
    write(WASM, data)
    write(RECORD, f"{json.dumps(record, indent=1)}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
