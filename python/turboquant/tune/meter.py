"""Runs the program turboquant-measure, and stores its results.

``ggml_types/programs/turboquant-measure.cpp`` describes its input and output.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..errors import TurboQuantError
from ..llama.files import last_lines
from ..measure.pairs import Window
from ..measure.programs import Programs
from ..measure.results import Results, file_hash
from ..measure.scratch import scratch_folder
from ..plan import CacheShape, Layer, Plan, compact, fitting, shape_of

__all__ = ["Info", "MeasureError", "Measured", "Meter", "Span"]

_PROGRAM = "turboquant-measure"
_FORMAT = 2  # increase it when the meaning of stored results changes
Step = Callable[[int, int], None]


class MeasureError(TurboQuantError):
    """The model cannot be measured. The text says what to do."""


@dataclass(frozen=True)
class Span:
    """A part of a text: `count` chunks of `context` tokens, starting at a chunk's number or at "N%" of the text."""

    first: str
    count: int
    context: int

    @property
    def tokens(self) -> int:
        """Number of tokens that one run evaluates."""
        return self.count * self.context


@dataclass(frozen=True)
class Info:
    """The program's description of the model and the text."""

    model: dict[str, Any]  #: the description of the model in a plan
    available: int  #: number of chunks of the text
    first: int  #: number of the first evaluated chunk
    window: int
    layers: list[dict[str, Any]] = field(default_factory=list)
    vocabulary: int = 0

    def shape(self, metadata: dict[str, Any], where: str) -> CacheShape:
        """The caches that llama.cpp creates: those of the metadata, with the layers and windows of its log."""
        shape = shape_of(metadata, where)
        if not self.layers:
            return shape
        windows = {layer["layer"]: layer["window"] for layer in self.layers}
        layers = [
            Layer(layer.heads, layer.head_k, layer.head_v, windows[number]) if layer and number in windows else None
            for number, layer in enumerate(shape.layers)
        ]
        return CacheShape(tuple(layers), self.window, shape.context)


@dataclass(frozen=True)
class Measured:
    """One run compared with the f16 cache: mean KLD in nats with its standard error, and shares in 0 ... 1."""

    kld: float
    error: float
    same_top: float
    nll: float
    chunks: list[float]


class Meter:
    """A context manager that measures plans on one part of a text. The program starts when a result is not stored."""

    def __init__(
        self, model: Path, text: Path, span: Span, programs: Programs, results: Results, scratch: Path, metadata: Any
    ) -> None:
        """Hash the inputs of the results. Raises OSError if the model, the text or the build cannot be read."""
        self.model, self.text, self.span, self.programs, self.results = model, text, span, programs, results
        self._scratch, self._metadata = scratch, metadata
        self._stack = ExitStack()
        self._process: subprocess.Popen[str] | None = None
        self._based = False
        self._log: IO[str] | None = None
        self._folder = Path()
        self._common = {
            "what": "tune", "format": _FORMAT, "build": programs.fingerprint(), "model": file_hash(model, results),
            "text": file_hash(text, results), "span": asdict(span), "threads": programs.threads,
            "gpu_layers": programs.gpu_layers, "window": 0,
        }  # fmt: skip
        self._info: Info | None = None

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe:
                    pipe.close()
        self._process, self._based = None, False
        self._stack.close()

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return self.span.count * (self.span.context - 1 - self.span.context // 2)

    def info(self) -> Info:
        """The program's description of the model. Raises MeasureError if the program cannot run it."""
        if self._info is None:
            stored = self.results.get(self._key("info"))
            if stored is None:
                self._start()
            else:
                self._info = Info(**stored)
        assert self._info is not None
        return self._info

    def shape(self) -> CacheShape:
        """The caches of the model. Raises PlanError if the model cannot have a plan."""
        return self.info().shape(self._metadata, str(self.model))

    def stored(self, k: Sequence[str | None], v: Sequence[str | None]) -> Measured | None:
        """The stored result for these types, or None."""
        stored = self.results.get(self._key(self._names(k, v)))
        return None if stored is None else Measured(**stored)

    def measure(self, k: Sequence[str | None], v: Sequence[str | None], step: Step = lambda done, of: None) -> Measured:
        """The result for these types of all layers.

        Raises:
            MeasureError: libllama refused the types, or used other types.
        """
        if known := self.stored(k, v):
            return known
        runs = 1 if self.ready else 2
        self._start()
        if not self._based:
            self._until("base", lambda done, of: step(done, runs * of))
            self._based = True
        assert self._process is not None and self._process.stdin is not None
        path = self._folder / "plan.json"
        path.write_text(Plan(tuple(k), tuple(v)).to_json(), encoding="utf-8")
        try:
            self._process.stdin.write(f"plan {path}\n")
            self._process.stdin.flush()
        except OSError:  # the program has ended, and its output gives the reason
            pass
        record = self._until("result", lambda done, of: step((runs - 1) * of + done, runs * of))
        names = self._names(k, v)
        if not record["types"]:
            raise MeasureError(
                f"the build in {self.programs.folder} did not say which types it took, as it knows no plans: run "
                "`turboquant build` again"
            )
        if record["types"] != names:
            raise MeasureError(f"libllama took other types than the plan's: {record['types']}, wanted {names}")
        found = {key: record[key] for key in ("kld", "error", "same_top", "nll", "chunks")}
        if any(value is None for value in found.values()):
            raise MeasureError(f"with {names} the model's predictions are not finite")
        self.results.put(self._key(names), found)
        return Measured(**found)

    def _names(self, k: Sequence[str | None], v: Sequence[str | None]) -> str:
        """The types as libllama logs them, with the block that fits the heads in their names."""
        layers = self.shape().layers
        sides = []
        for side, types in (("k", k), ("v", v)):
            fit = [fitting(type, layer.head(side)) if layer and type else None
                   for type, layer in zip(types, layers, strict=True)]  # fmt: skip
            sides.append(f"{side.upper()} {compact(fit)}")
        return "; ".join(sides)

    def _key(self, what: str) -> dict[str, Any]:
        return {**self._common, "types": what}

    @property
    def ready(self) -> bool:
        """Whether the f16 run exists that others are compared with. The first measurement includes it."""
        return self._based

    def _start(self) -> None:
        """Start the program, unless it runs, and read its description of the model."""
        if self._process:
            return
        if any(character in str(self._scratch) for character in "\n\r"):
            raise MeasureError(f"{self._scratch} has a line break in it: set TURBOQUANT_CACHE to another folder")
        self._folder = Path(self._stack.enter_context(scratch_folder(self._scratch)))
        self.programs.logs.mkdir(parents=True, exist_ok=True)
        self._log = self._stack.enter_context((self.programs.logs / "tune.log").open("w+", encoding="utf-8"))
        command = [
            str(self.programs.path(_PROGRAM)), str(self.model), str(self.text), self.span.first, str(self.span.count),
            str(self.span.context), str(self.programs.threads), str(self.programs.gpu_layers or 0),
            str(self._folder / "f16.kld"),
        ]  # fmt: skip
        try:
            # With an exact window a batch would see its own tokens exactly, which hides the cost of a type.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, encoding="utf-8",
                errors="replace", env={**os.environ, Window.VARIABLE: "0"},
            )  # fmt: skip
        except OSError as error:
            raise MeasureError(f"{command[0]} could not be started: {error}") from error
        record = self._until("model")
        wanted = ("model", "available", "first", "window", "layers", "vocabulary")
        self._info = Info(**{key: record[key] for key in wanted})
        self.results.put(self._key("info"), asdict(self._info))

    def _until(self, kind: str, step: Step = lambda done, of: None) -> dict[str, Any]:
        """The next record of the given kind."""
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if record["record"] == kind:
                return dict(record)
            if record["record"] in ("failure", "error"):
                raise MeasureError(f"{self.model}: {record['why']}")
            if record["record"] == "step":
                step(record["done"], record["of"])
        status = self._process.wait() if self._process.stdout.read() == "" else None
        assert self._log is not None
        self._log.flush()
        self._log.seek(0)
        how = f"was ended by signal {-status}" if status and status < 0 else f"ended too early (status {status})"
        raise MeasureError(f"{_PROGRAM} {how}; the end of its log:\n{last_lines(self._log.read(), 6)}")

