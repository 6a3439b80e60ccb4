"""Queries, keys and values of a model for a text, read from the program turboquant-capture of a build.

``ggml_types/programs/turboquant-capture.cpp`` describes the stream that is read here.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TurboQuantError
from ..llama.files import last_lines
from .programs import cpus, program

__all__ = ["Attention", "Capture", "CaptureError", "Data", "Route", "check_model"]

_PROGRAM = "turboquant-capture"


class CaptureError(TurboQuantError):
    """The model or the text cannot be used, or the program failed. The text says what to do."""


@dataclass(frozen=True)
class Attention:
    """One attention operation of a pass. `layer` is the layer whose cache it reads; several operations may share it."""

    use: int  #: number of the attention operation, from 0
    layer: int
    scale: float  #: factor of the scores q·k
    head_k: int
    head_v: int
    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Route:
    """How q, k or v ("q", "k", "v") depends on the weights, or how the output ("o") is used; see `convert.paths`."""

    role: str
    use: int  #: -1 for k and v
    layer: int
    steps: list[dict[str, Any]]


@dataclass(frozen=True)
class Data:
    """Values of consecutive tokens: float32 (tokens, heads, head) for q, and (tokens, 1, heads * head) for k and v."""

    role: str
    use: int
    layer: int
    first: int  #: index of the first token in the text
    values: NDArray[np.float32]


def check_model(model: Path) -> None:
    """Raise CaptureError if `model` does not exist or is no GGUF file."""
    if not model.is_file():
        raise CaptureError(f"{model}: no such file; give a GGUF model")
    with model.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CaptureError(f"{model} is not a GGUF file, as it does not start with GGUF: give a GGUF model")


class Capture:
    """A running capture: a context manager whose iterator yields `Attention`, `Route` and `Data`.

    Attributes, set on entry:
        tokens: number of evaluated tokens.
        available: number of tokens in the part of the text that was read, which is as long as `tokens` may require.
    """

    def __init__(
        self,
        model: Path,
        text: Path,
        *,
        tokens: int,
        context: int,
        bin: str | os.PathLike[str] | None = None,
        threads: int | None = None,
        gpu_layers: int = 0,
    ) -> None:
        """Evaluate the first `tokens` tokens of `text`, in independent pieces of `context` tokens."""
        check_model(model)
        if not text.is_file():
            raise CaptureError(f"{text}: no such file; give a text with -f")
        self._model, self._text = model, text
        numbers = (tokens, context, threads or cpus(), gpu_layers)
        self._command = [str(program(_PROGRAM, bin)), str(model), str(text), *map(str, numbers)]
        self.tokens = self.available = 0

    def __enter__(self) -> Capture:
        self._log: IO[bytes] = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log,
                # Threads wait after every operation; they must not spin while the values are read.
                env={"OMP_WAIT_POLICY": "passive", **os.environ},
            )  # fmt: skip
        except OSError as error:
            self._log.close()
            raise CaptureError(f"{self._command[0]} could not be started: {error}") from error
        try:
            record = self._record()
            self.tokens, self.available = record["tokens"], record["available"]
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def __iter__(self) -> Iterator[Attention | Route | Data]:
        while (record := self._record())["record"] != "end":
            kind = record.pop("record")
            if kind == "attention":
                yield Attention(**record)
            elif kind == "path":
                yield Route(**record)
            else:
                head, heads, tokens = record["ne"]
                values = np.frombuffer(self._read(record["bytes"]), "<f4").reshape(tokens, heads, head)
                if not np.isfinite(values).all():
                    raise CaptureError(
                        f"{self._model}: {record['role'].upper()} of layer {record['layer']} is not finite on this "
                        "text; is the file damaged?"
                    )
                yield Data(record["role"], record["use"], record["layer"], record["first"], values)

    def _record(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"}\n"):
            raise self._failure()
        record: dict[str, Any] = json.loads(line)
        return record

    def _read(self, count: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(count)
        if len(data) != count:
            raise self._failure()
        return data

    def _failure(self) -> CaptureError:
        status = self._process.wait()
        self._log.seek(0)
        log = self._log.read().decode("utf-8", "replace")
        own = [line.partition(": ")[2] for line in log.splitlines() if line.startswith(f"{_PROGRAM}: ")]
        if "not within the file bounds" in log or "failed to read" in log:
            return CaptureError(f"{self._model} is truncated (it ends before its last tensor): get the file again")
        if own and own[-1].endswith("has no text in it"):
            return CaptureError(f"{own[-1]}: give another text with -f")
        if own and not own[-1].startswith("cannot load"):
            return CaptureError(own[-1])
        how = f"was ended by signal {-status}" if status < 0 else f"failed (status {status})"
        errors = [line for line in log.splitlines() if "error" in line.lower()]
        return CaptureError(
            f"llama.cpp cannot run {self._model}; {_PROGRAM} {how}:\n{last_lines(chr(10).join(errors) or log, 6)}"
        )

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()
