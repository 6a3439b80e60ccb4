"""A GGUF model file, read piece by piece, and written again with some tensors scaled and some metadata added.

Everything else is copied as bytes, so that nothing that this program does not know can get lost. Only a few MiB of a
tensor are in memory at a time, however large the file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from ..llama.files import LlamaError
from .weights import scale_columns, scale_rows

__all__ = ["ModelError", "ModelFile", "Scaling", "Tensor", "replace_metadata"]

_PIECE = 4 << 20  # bytes of a tensor in memory at a time
_LIST = 4096  # numbers in a list that is still read: the layers of a model; those of its vocabulary are more
_HEADER = 24  # magic, version, count of tensors, count of metadata


class ModelError(LlamaError):
    """The file is no GGUF model that can be converted. The text says why."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is, as a matrix of rows of bytes."""

    name: str
    type: str  #: "F16", "Q4_K", ...
    shape: tuple[int, ...]  #: ggml's order, fastest first
    offset: int  #: in the file
    rows: int
    row_bytes: int

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Scaling:
    """What to multiply a tensor by; `axis` is "rows", "columns" or "elements" (of a vector)."""

    axis: str
    factors: NDArray[np.float64]


class ModelFile:
    """An open model file: a context manager."""

    def __init__(self, path: Path) -> None:
        """ModelError if it is no whole GGUF file of this machine's byte order."""
        self.path = path
        size = path.stat().st_size
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:  # whatever the package stumbles over in a damaged file
            raise ModelError(f"{path} is truncated or damaged ({error}): get the file again") from error
        if reader.byte_order != "I":
            raise ModelError(f"{path} has the byte order of another kind of machine; gguf-convert-endian changes it")
        if not reader.tensors:
            raise ModelError(f"{path} has no tensors in it: is it a vocabulary, or the first part of a split model?")
        self.metadata: dict[str, Any] = {}
        for name, field in reader.fields.items():
            if len(field.types) == 1 or _is_short_list(field):
                self.metadata[name] = field.contents()
        self.tensors = {tensor.name: _describe(tensor) for tensor in reader.tensors}
        self._infos = reader.tensors[0].field.offset
        last = reader.tensors[-1].field
        self._infos_end = last.offset + sum(part.nbytes for part in last.parts)
        self._counts = (len(reader.tensors), len([name for name in reader.fields if not name.startswith("GGUF.")]))
        self.alignment = reader.alignment
        self.data = reader.data_offset
        del reader  # and with it the mapping of the file
        end = max(tensor.offset + tensor.bytes for tensor in self.tensors.values())
        if end > size:
            raise ModelError(f"{path} is truncated ({size} bytes, and its tensors end at {end}): get the file again")
        self.size = size
        self._file = path.open("rb")

    def __enter__(self) -> ModelFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def pieces(self, tensor: Tensor) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """The tensor's rows, some at a time: (number of the first, bytes (rows, row_bytes))."""
        step = max(1, _PIECE // tensor.row_bytes)
        for first in range(0, tensor.rows, step):
            count = min(step, tensor.rows - first)
            self._file.seek(tensor.offset + first * tensor.row_bytes)
            data = self._file.read(count * tensor.row_bytes)
            yield first, np.frombuffer(data, np.uint8).reshape(count, tensor.row_bytes)

    def floats(self, tensor: Tensor) -> Iterator[NDArray[np.float32]]:
        """The tensor's values, some rows at a time: float32 (rows, columns)."""
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
        """Write the scaled model to `target`, in place of what is there.

        Args:
            scalings: what to do to which tensors; they keep their types and sizes.
            metadata: added at the end; str, int, float, or lists of one of them.
            progress: called with the bytes written so far.

        Raises:
            OSError: as a full disk.
            ValueError: a scaled weight leaves the range of its type.
        """
        with target.open("wb") as out:
            self._write_head(out, metadata)
            shift = out.tell() - self.data
            at = self.data
            for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.offset):
                self._copy(out, at, tensor.offset)
                for first, rows in self.pieces(tensor):
                    for scaling in scalings.get(tensor.name, ()):
                        rows = _apply(rows, first, tensor, scaling)
                    out.write(rows.data)
                    progress(out.tell())
                at = tensor.offset + tensor.bytes
                assert out.tell() == at + shift
            self._copy(out, at, self.size)
            out.flush()
            os.fsync(out.fileno())

    def _write_head(self, out: Any, metadata: Mapping[str, Any]) -> None:
        tensors, fields = self._counts
        self._file.seek(0)
        out.write(self._file.read(8))
        out.write(struct.pack("<QQ", tensors, fields + len(metadata)))
        self._copy(out, _HEADER, self._infos)
        out.write(_packed(metadata))
        self._copy(out, self._infos, self._infos_end)
        out.write(b"\0" * (-out.tell() % self.alignment))

    def _copy(self, out: Any, start: int, end: int) -> None:
        self._file.seek(start)
        while start < end:
            data = self._file.read(min(_PIECE, end - start))
            if not data:
                raise ModelError(f"{self.path} became shorter while it was read")
            out.write(data)
            start += len(data)


def replace_metadata(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Replace metadata `old` that `ModelFile.write` has added by `new`, which may not take more bytes.

    What remains of the old one's bytes becomes spaces at the end of the last value of `new`, a string.

    Raises:
        ValueError: `old` is not there as it was written, or `new` takes more bytes or has another number of keys.
    """
    before, after = _packed(old), _packed(new)
    if len(after) > len(before) or len(new) != len(old):
        raise ValueError(f"{len(new)} keys of {len(after)} bytes cannot take the place of {len(old)} of {len(before)}")
    *_, last = new
    after = _packed({**new, last: new[last] + " " * (len(before) - len(after))})
    with path.open("r+b") as file:
        head = file.read(gguf.GGUFReader(path).data_offset)
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


def _describe(tensor: Any) -> Tensor:
    shape = tuple(int(n) for n in tensor.shape)
    rows = int(np.prod(shape[1:], dtype=np.int64))
    return Tensor(tensor.name, tensor.tensor_type.name, shape, int(tensor.data_offset), rows, tensor.n_bytes // rows)


def _is_short_list(field: Any) -> bool:
    return field.types[1] != gguf.GGUFValueType.STRING and len(field.data) <= _LIST


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


_KINDS: dict[type, tuple[gguf.GGUFValueType, Callable[[Any], bytes]]] = {
    str: (gguf.GGUFValueType.STRING, _text),
    int: (gguf.GGUFValueType.UINT32, lambda value: struct.pack("<I", value)),
    float: (gguf.GGUFValueType.FLOAT32, lambda value: struct.pack("<f", value)),
}


def _value(value: Any) -> bytes:
    """A value of GGUF's metadata: its type, then itself."""
    if isinstance(value, list):
        kind, pack = _KINDS[type(value[0])]
        body = b"".join(pack(item) for item in value)
        return struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, kind, len(value)) + body
    kind, pack = _KINDS[type(value)]
    return struct.pack("<I", kind) + pack(value)
