"""A GGUF model file, read piece by piece, and written again with some tensors scaled and some metadata added.

All other contents are copied as bytes, so that nothing is lost that this program does not know. Only a few MiB of a
tensor are in memory at a time.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from ..errors import TurboQuantError
from .header import MAGIC_BYTES, Header, HeaderError, Info, UnsupportedError, read_header, shown
from .weights import scale_columns, scale_rows

__all__ = ["ModelError", "ModelFile", "Scaling", "Tensor", "replace_metadata"]

_PIECE = 4 << 20  # bytes of a tensor in memory at a time


class ModelError(TurboQuantError):
    """The file is no usable GGUF model. The text gives the reason."""


@dataclass(frozen=True)
class Tensor:
    """The position of a tensor, as a matrix of rows of bytes."""

    name: str
    type: str  #: "F16", "Q4_K", ...
    shape: tuple[int, ...]  #: dimensions in ggml's order, fastest first
    offset: int  #: offset in the file
    rows: int
    row_bytes: int

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Scaling:
    """Factors of a tensor along `axis`, which is "rows", "columns" or "elements" (of a vector)."""

    axis: str
    factors: NDArray[np.float64]


class ModelFile:
    """An open model file: a context manager."""

    def __init__(self, path: Path) -> None:
        """Raise ModelError if the file is no complete GGUF file in native byte order, or its metadata are invalid."""
        self.path = path
        self.size = path.stat().st_size
        head = _read(path)
        if not head.tensors:
            raise ModelError(f"{path} has no tensors in it: is it a vocabulary, or the first part of a split model?")
        self.metadata = head.metadata
        _check_metadata(path, head.metadata)
        self.tensors = {info.name: _describe(info) for info in head.tensors}
        self._head = head
        self._file = path.open("rb")

    def __enter__(self) -> ModelFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def pieces(self, tensor: Tensor) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """The rows of a tensor, several at a time: (index of the first row, bytes (rows, row_bytes))."""
        step = max(1, _PIECE // tensor.row_bytes)
        for first in range(0, tensor.rows, step):
            count = min(step, tensor.rows - first)
            self._file.seek(tensor.offset + first * tensor.row_bytes)
            data = self._file.read(count * tensor.row_bytes)
            yield first, np.frombuffer(data, np.uint8).reshape(count, tensor.row_bytes)

    def floats(self, tensor: Tensor) -> Iterator[NDArray[np.float32]]:
        """The values of a tensor, several rows at a time: float32 (rows, columns)."""
        kind = gguf.GGMLQuantizationType[tensor.type]
        for _, rows in self.pieces(tensor):
            yield gguf.quants.dequantize(rows, kind).reshape(len(rows), -1)

    def write(
        self,
        target: Path,
        scalings: Mapping[str, Sequence[Scaling]],
        metadata: Mapping[str, Any],
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Write the scaled model to `target`; an existing file is replaced.

        Args:
            scalings: the factors by tensor; tensors keep their types and sizes.
            metadata: added at the end; they replace metadata with the same keys. Values are str, int, float, or lists
                of one of these.
            progress: called with the number of bytes written so far.

        Raises:
            OSError: the file cannot be written, for instance because the disk is full.
            ModelError: a scaled weight leaves the range of its type, or the source file changes meanwhile.
        """
        with target.open("wb") as out:
            self._write_head(out, metadata)
            shift = out.tell() - self._head.data
            at = self._head.data
            for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.offset):
                self._copy(out, at, tensor.offset)
                for first, rows in self.pieces(tensor):
                    for scaling in scalings.get(tensor.name, ()):
                        try:
                            rows = _apply(rows, first, tensor, scaling)
                        except ValueError as error:
                            raise ModelError(f"{self.path}: {tensor.name} cannot be scaled ({error})") from error
                    out.write(rows.data)
                    progress(out.tell())
                at = tensor.offset + tensor.bytes
                assert out.tell() == at + shift
            self._copy(out, at, self.size)
            out.flush()
            os.fsync(out.fileno())

    def _write_head(self, out: Any, metadata: Mapping[str, Any]) -> None:
        head = self._head
        self._file.seek(0)
        out.write(self._file.read(8))
        replaced = sorted(head.spans[key] for key in metadata if key in head.spans)
        out.write(struct.pack("<QQ", len(head.tensors), head.fields + len(metadata) - len(replaced)))
        at = MAGIC_BYTES
        for start, end in replaced:
            self._copy(out, at, start)
            at = end
        self._copy(out, at, head.infos)
        out.write(_packed(metadata))
        self._copy(out, head.infos, head.infos_end)
        out.write(b"\0" * (-out.tell() % head.alignment))

    def _copy(self, out: Any, start: int, end: int) -> None:
        self._file.seek(start)
        while start < end:
            data = self._file.read(min(_PIECE, end - start))
            if not data:
                raise ModelError(f"{self.path} became shorter while it was read")
            out.write(data)
            start += len(data)


def replace_metadata(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Replace the metadata `old` that `ModelFile.write` added by `new`, which must not take more bytes.

    Remaining bytes become spaces at the end of the last value of `new`, which must be a string.

    Raises:
        ValueError: the file does not end its metadata with `old`, or `new` takes more bytes or has another number of
            keys.
    """
    before, after = _packed(old), _packed(new)
    if len(after) > len(before) or len(new) != len(old):
        raise ValueError(f"{len(new)} keys of {len(after)} bytes cannot take the place of {len(old)} of {len(before)}")
    *_, last = new
    after = _packed({**new, last: new[last] + " " * (len(before) - len(after))})
    with path.open("r+b") as file:
        head = file.read(_read(path).data)
        file.seek(head.index(before))
        file.write(after)


def _packed(metadata: Mapping[str, Any]) -> bytes:
    return b"".join(_text(key) + _value(value) for key, value in metadata.items())


def _apply(rows: NDArray[np.uint8], first: int, tensor: Tensor, scaling: Scaling) -> NDArray[np.uint8]:
    if scaling.axis == "rows":
        return scale_rows(rows, tensor.type, scaling.factors[first : first + len(rows)])
    if scaling.axis == "elements" and tensor.rows > 1:
        width = tensor.shape[0]
        values = scaling.factors.reshape(tensor.rows, width)[first : first + len(rows)]
        flat = scale_columns(rows.reshape(1, -1), tensor.type, values.ravel())
        return flat.reshape(rows.shape)
    return scale_columns(rows, tensor.type, scaling.factors)


def _read(path: Path) -> Header:
    try:
        return read_header(path)
    except UnsupportedError as error:
        raise ModelError(f"{path} cannot be used: {error}") from None
    except HeaderError as error:
        raise ModelError(f"{path} is truncated or damaged ({error}): get the file again") from None


def _check_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raise ModelError if metadata that other modules rely on have another type."""
    architecture = metadata.get("general.architecture", "")
    if not isinstance(architecture, str):
        raise ModelError(f"{path}: general.architecture is {shown(repr(architecture))}, wanted a name")
    for key in ("split.count", f"{architecture}.block_count", f"{architecture}.context_length"):
        value = metadata.get(key, 0)
        if type(value) is not int or value < 0:
            raise ModelError(f"{path}: {shown(key)} is {shown(repr(value))}, wanted a number: get the file again")


def _describe(info: Info) -> Tensor:
    rows = math.prod(info.shape[1:])
    return Tensor(info.name, info.type, info.shape, info.offset, rows, info.bytes // rows)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


_KINDS: dict[type, tuple[gguf.GGUFValueType, Callable[[Any], bytes]]] = {
    str: (gguf.GGUFValueType.STRING, _text),
    int: (gguf.GGUFValueType.UINT32, lambda value: struct.pack("<I", value)),
    float: (gguf.GGUFValueType.FLOAT32, lambda value: struct.pack("<f", value)),
}


def _value(value: Any) -> bytes:
    """The bytes of a metadata value in GGUF: its type, then the value."""
    if isinstance(value, list):
        kind, pack = _KINDS[type(value[0])]
        body = b"".join(pack(item) for item in value)
        return struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, kind, len(value)) + body
    kind, pack = _KINDS[type(value)]
    return struct.pack("<I", kind) + pack(value)
