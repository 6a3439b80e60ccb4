"""Run the programs of a llama.cpp build: streamed output, a log file each, errors that show the log's last lines."""

from __future__ import annotations

import codecs
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ProgramError", "Programs", "Result"]

# Environment variables that change what the programs compute belong to a result's identity.
_RELEVANT = ("LLAMA_", "GGML_", "TURBOQUANT_")
_IRRELEVANT = ("TURBOQUANT_CACHE",)


class ProgramError(RuntimeError):
    """A llama.cpp program is missing, failed, or printed something else than expected."""


@dataclass(frozen=True)
class Result:
    """What a program printed: ``out`` to stdout, ``log`` to stderr."""

    out: str
    log: str
    log_path: Path


class Programs:
    """The programs in one ``bin`` folder."""

    def __init__(self, folder: str | Path, logs: str | Path, threads: int | None = None) -> None:
        """Use the programs in `folder`; write their logs to `logs` (created when needed).

        Args:
            folder: holds llama-perplexity, llama-completion and their libraries.
            logs: one file per kind of run, overwritten by the next run of that kind.
            threads: of every program; default: the CPUs this process may use.

        Raises:
            ProgramError: the folder does not exist.
        """
        self.folder = Path(folder).expanduser().resolve()
        self.logs = Path(logs)
        self.threads = threads or _cpus()
        if not self.folder.is_dir():
            raise ProgramError(f"{self.folder}: no such folder; `turboquant build` makes one and prints its path")

    def path(self, name: str) -> Path:
        """The path of a program.

        Raises:
            ProgramError: it is not there.
        """
        for candidate in (self.folder / name, self.folder / f"{name}.exe"):
            if candidate.is_file():
                return candidate
        raise ProgramError(f"{self.folder} has no {name}; build it with `turboquant build`")

    def fingerprint(self) -> str:
        """A hash of every program and library in the folder and of the environment that changes what they do."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            if path.is_file() and not path.is_symlink():
                digest.update(path.name.encode() + b"\0")
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
        for name in sorted(os.environ):
            if name.startswith(_RELEVANT) and name not in _IRRELEVANT:
                digest.update(f"\0{name}={os.environ[name]}".encode())
        return digest.hexdigest()

    def run(
        self, name: str, arguments: Sequence[str], *, log: str, on_text: Callable[[str], None] | None = None
    ) -> Result:
        """Run a program to its end.

        Args:
            name: e.g. ``"llama-perplexity"``.
            arguments: its options; threads and log options are added.
            log: the log file's name without suffix.
            on_text: called with each piece of stdout as it arrives.

        Raises:
            ProgramError: it could not be started or did not exit with 0. An interrupt ends the program, too.
        """
        # Trace level: only there does llama.cpp print the cache's size.
        command = [str(self.path(name)), *arguments, "-t", str(self.threads), "-lv", "4", "--log-colors", "off"]
        self.logs.mkdir(parents=True, exist_ok=True)
        log_path = self.logs / f"{log.replace('/', '-')}.log"
        pieces: list[str] = []
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # The log is written under a temporary name, so that two runs at once do not mix theirs.
        handle, partial = tempfile.mkstemp(prefix=log_path.name, dir=self.logs)
        try:
            with os.fdopen(handle, "w+b") as log_file:
                try:
                    process = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log_file
                    )
                except OSError as error:
                    raise ProgramError(f"cannot start {command[0]}: {error}") from error
                try:
                    assert process.stdout is not None
                    while data := os.read(process.stdout.fileno(), 1 << 16):
                        text = decoder.decode(data)
                        pieces.append(text)
                        if on_text and text:
                            on_text(text)
                    code = process.wait()
                finally:
                    if process.poll() is None:
                        process.kill()
                        process.wait()
                    if process.stdout is not None:
                        process.stdout.close()
                log_file.seek(0)
                text = log_file.read().decode("utf-8", errors="replace")
        finally:
            os.replace(partial, log_path)
        result = Result("".join(pieces), text, log_path)
        if code != 0:
            raise ProgramError(_failure(command, code, result))
        return result


def _failure(command: Sequence[str], code: int, result: Result) -> str:
    how = f"was ended by signal {-code}" if code < 0 else f"exited with {code}"
    tail = [line for line in result.log.splitlines() if line.strip()][-8:]
    lines = [f"{Path(command[0]).name} {how}", f"  command: {' '.join(command)}", f"  log: {result.log_path}"]
    return "\n".join(lines + [f"  | {line}" for line in tail])


def _cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
