"""Run the programs of a patched llama.cpp."""

from __future__ import annotations

import difflib
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .build import where
from .files import LlamaError, last_lines

__all__ = ["ProgramError", "Result", "program", "run"]

_SUFFIX = ".exe" if os.name == "nt" else ""


class ProgramError(LlamaError):
    """A program of llama.cpp is missing, failed, or took too long."""


@dataclass(frozen=True)
class Result:
    """What a program printed, and how long it took in seconds."""

    command: tuple[str, ...]
    stdout: str
    stderr: str
    returncode: int
    seconds: float


def program(name: str, bin: str | os.PathLike[str] | None = None) -> Path:
    """The path of the built program `name`, e.g. "llama-completion".

    Args:
        name: its name, without a folder.
        bin: the folder to look in (default: that of the last build, see `build.where`).

    Raises:
        BuildError: `bin` is None and nothing has been built.
        ProgramError: no such program in the folder.
    """
    folder = Path(bin) if bin is not None else where()
    path = folder / f"{name}{_SUFFIX}"
    if path.is_file() and os.access(path, os.X_OK):
        return path.resolve()
    if not folder.is_dir():
        raise ProgramError(f"{folder}: no such folder; `turboquant build` makes one, `turboquant where` prints it")
    there = sorted(file.name for file in folder.iterdir() if file.name.startswith(("llama-", "test-")))
    close = difflib.get_close_matches(name, there, 3, 0.6)
    hint = f" (it has {', '.join(close)})" if close else ""
    how = f"`turboquant build --target default --target {name}`"
    raise ProgramError(f"no {name} in {folder}{hint}; build it with {how}")


def run(
    name: str,
    args: Sequence[str | os.PathLike[str]] = (),
    *,
    bin: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    input: str | None = None,
    timeout: float | None = None,
    check: bool = True,
) -> Result:
    """Run the built program `name` with `args` to its end, with its output captured.

    Args:
        env: variables to set on top of the present environment.
        input: text for its standard input (default: empty, so that nothing waits for a key).
        timeout: seconds after which it is killed.
        check: whether an exit status other than 0 is an error.

    Raises:
        BuildError, ProgramError: as `program`; also if it cannot be started, fails, or takes too long. The text has
            the last lines that it printed.
    """
    command = (str(program(name, bin)), *(os.fspath(arg) for arg in args))
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, env={**os.environ, **(env or {})}, cwd=cwd, input=input or "", capture_output=True,
            encoding="utf-8", errors="replace", timeout=timeout,
        )  # fmt: skip
    except OSError as error:
        raise ProgramError(f"{command[0]} could not be started: {error}") from error
    except subprocess.TimeoutExpired as error:
        tail = last_lines(_text(error.stderr) or _text(error.stdout), 12)
        raise ProgramError(f"{name} was stopped after {timeout:g} s; the last it printed:\n{tail}") from None
    result = Result(command, done.stdout, done.stderr, done.returncode, time.monotonic() - start)
    if check and done.returncode != 0:
        how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else f"failed (status {done.returncode})"
        tail = last_lines(done.stderr, 12) or last_lines(done.stdout, 12)
        raise ProgramError(f"{name} {how}; the last it printed:\n{tail}\nCommand: {subprocess.list2cmdline(command)}")
    return result


def _text(output: str | bytes | None) -> str:
    return output.decode("utf-8", "replace") if isinstance(output, bytes) else output or ""
