"""Run the programs of a llama.cpp build, with streamed output, log files, and errors that show the end of the log."""

from __future__ import annotations

import codecs
import difflib
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import TurboQuantError
from ..llama.build import where

__all__ = ["ProgramError", "Programs", "Result", "cpus", "parse_cache_types", "program"]

_SUFFIX = ".exe" if os.name == "nt" else ""

# Environment variables that change the results of the programs are part of a result's key.
_RELEVANT = ("LLAMA_", "GGML_", "TURBOQUANT_")
_IRRELEVANT = ("TURBOQUANT_CACHE",)
_USED = ("llama-perplexity", "llama-completion", "llama-bench", "turboquant-measure")
_ATTEMPTS = 5
_ERROR = re.compile(r"^(?:[\d.]+ )?E (?:\w+: )?(.*\S)", re.MULTILINE)


class ProgramError(TurboQuantError):
    """A llama.cpp program is missing, failed, or printed unexpected output.

    ``reason`` gives the reason in one line; the text also has the command and the end of its log.
    """

    def __init__(self, text: str, reason: str | None = None) -> None:
        super().__init__(text)
        self.reason = reason or text.split("\n", 1)[0]


@dataclass(frozen=True)
class Result:
    """The output of a program: ``out`` from stdout, ``log`` from stderr."""

    out: str
    log: str
    log_path: Path


class Programs:
    """The programs in one ``bin`` folder."""

    def __init__(
        self, folder: str | Path, logs: str | Path, threads: int | None = None, gpu_layers: int | None = None
    ) -> None:
        """Use the programs in `folder`; write their logs to `logs` (created when needed).

        Args:
            folder: contains llama-perplexity, llama-completion, llama-bench and their libraries.
            logs: folder of the logs, one file per kind of run, overwritten by the next run of that kind.
            threads: threads of every program (default: the number of CPUs that this process may use).
            gpu_layers: number of layers that a GPU evaluates (default: llama.cpp's choice).

        Raises:
            ProgramError: the folder does not exist.
        """
        self.folder = Path(folder).expanduser().resolve()
        self.logs = Path(logs)
        self.threads = threads or cpus()
        self.gpu_layers = gpu_layers
        if not self.folder.is_dir():
            raise ProgramError(f"{self.folder}: no such folder; `turboquant build` makes one and prints its path")

    def path(self, name: str) -> Path:
        """The path of a program.

        Raises:
            ProgramError: the program does not exist.
        """
        for candidate in (self.folder / name, self.folder / f"{name}.exe"):
            if candidate.is_file():
                return candidate
        raise ProgramError(f"{self.folder} has no {name}; build it with `turboquant build`")

    def fingerprint(self) -> str:
        """A hash of the programs, of the libraries in their folder, and of the environment variables they read."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            used = path.stem in _USED or ".so" in path.suffixes or path.suffix in (".dylib", ".dll")
            if used and path.is_file() and not path.is_symlink():
                digest.update(path.name.encode() + b"\0")
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
        for name in sorted(os.environ):
            if name.startswith(_RELEVANT) and name not in _IRRELEVANT:
                digest.update(f"\0{name}={os.environ[name]}".encode())
        return digest.hexdigest()

    def cache_types(self) -> list[str]:
        """The cache types that the build's --help lists; empty if it has no such list.

        Raises:
            ProgramError: llama-perplexity is missing or does not run.
        """
        return parse_cache_types(self._help())

    def knows_window(self) -> bool:
        """Whether the build supports the exact window, according to its --help.

        Raises:
            ProgramError: llama-perplexity is missing or does not run.
        """
        return "--cache-window" in self._help()

    def _help(self) -> str:
        command = [str(self.path("llama-perplexity")), "--help"]
        try:
            done = subprocess.run(command, check=False, capture_output=True, encoding="utf-8", errors="replace")
        except OSError as error:
            raise ProgramError(f"cannot start {command[0]}: {error}") from error
        return done.stdout + done.stderr

    def run(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        log: str,
        on_text: Callable[[str], None] | None = None,
        complete: Callable[[Result], bool] | None = None,
        log_options: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> Result:
        """Run a program to its end.

        llama.cpp writes its output from a separate thread and does not wait for that thread at exit, so on a busy
        machine the end of the output can be lost. `complete` recognizes a complete output; otherwise the program runs
        again.

        Args:
            name: name of the program, such as ``"llama-perplexity"``.
            arguments: options of the program; options for threads and the log are added.
            log: name of the log file without suffix.
            on_text: called with each piece of stdout as it arrives.
            complete: whether a result is complete; None accepts every result.
            log_options: whether the program has llama.cpp's log options (llama-bench has none).
            env: environment variables in addition to those of this process.

        Raises:
            ProgramError: the program could not be started, did not exit with 0, or its output was never complete.
            KeyboardInterrupt: the program was ended as well.
        """
        command = [str(self.path(name)), *arguments, "-t", str(self.threads)]
        command += [] if self.gpu_layers is None else ["-ngl", str(self.gpu_layers)]
        # llama.cpp prints the size of the cache only at trace level.
        command += ["-lv", "4", "--log-colors", "off"] if log_options else []
        self.logs.mkdir(parents=True, exist_ok=True)
        log_path = self.logs / f"{log.replace('/', '-')}.log"
        for attempt in range(_ATTEMPTS):
            result, code = _run(command, log_path, on_text, {**os.environ, **(env or {})})
            if code != 0:
                # A failure without a printed reason is repeated to get the reason; a crash is not repeated.
                if code > 0 and log_options and not _ERROR.search(result.log) and attempt + 1 < _ATTEMPTS:
                    continue
                how = f"was ended by signal {-code}" if code < 0 else f"exited with {code}"
                raise _failure(command, how, result)
            if complete is None or complete(result):
                return result
        raise _failure(command, "ended without printing its result", result)


def program(name: str, bin: str | os.PathLike[str] | None = None) -> Path:
    """The path of the built program `name`, such as "llama-completion".

    Args:
        name: name of the program, without a folder.
        bin: folder of the program (default: that of the last build, see `build.where`).

    Raises:
        BuildError: `bin` is None and nothing has been built.
        ProgramError: the folder has no such program.
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


def parse_cache_types(usage: str) -> list[str]:
    """The values of -ctk in the --help of a program, which may be wrapped over several lines."""
    match = re.search(r"--cache-type-k TYPE\b.*?allowed values:([^()]*)\(", usage, re.DOTALL)
    return [name.strip() for name in match[1].replace("\n", " ").split(",")] if match else []


def _run(
    command: list[str], log_path: Path, on_text: Callable[[str], None] | None, env: Mapping[str, str]
) -> tuple[Result, int]:
    pieces: list[str] = []
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    # The log is written under a temporary name, so that simultaneous runs do not mix their logs.
    handle, partial = tempfile.mkstemp(prefix=log_path.name, dir=log_path.parent)
    try:
        with os.fdopen(handle, "w+b") as log_file:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log_file, env=env
                )
            except OSError as error:
                raise ProgramError(f"cannot start {command[0]}: {error}") from error
            assert process.stdout is not None
            try:
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
                process.stdout.close()
            log_file.seek(0)
            logged = log_file.read().decode("utf-8", errors="replace")
    finally:
        os.replace(partial, log_path)
    return Result("".join(pieces), logged, log_path), code


def _failure(command: Sequence[str], how: str, result: Result) -> ProgramError:
    tail = [line for line in result.log.splitlines() if line.strip()][-8:]
    program = Path(command[0]).name
    lines = [f"{program} {how}", f"  command: {' '.join(command)}", f"  log: {result.log_path}"]
    errors = _ERROR.findall(result.log)
    # The first error names the cause; the following ones are consequences.
    reason = f"{program} {how}: {errors[0]}" if errors else f"{program} {how}; its log: {result.log_path}"
    return ProgramError("\n".join(lines + [f"  | {line}" for line in tail]), reason)


def cpus() -> int:
    """The CPUs that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
