"""The header of a GGUF file: its metadata, and the positions of its tensors.

Model files are untrusted. Every size in the file is compared with the remaining bytes of the file before it is used, so
the work is bounded by the size of the file and not by sizes that it claims.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

__all__ = ["MAGIC_BYTES", "Header", "HeaderError", "Info", "UnsupportedError", "read_header", "shown"]

MAGIC_BYTES = 24  #: magic, version, count of tensors, count of metadata
_VERSIONS = (2, 3)
_DIMENSIONS = 4  # greatest number of dimensions of a tensor in ggml
_NAME = 65535  # greatest length of a key in bytes, by the specification
_TEXT = 1 << 24  # greatest size of a value that is read, in bytes: several times that of any tokenizer
_LIST = 4096  # greatest length of a list of numbers that is read: enough for layers, too short for a vocabulary
_STRINGS = 1 << 22  # greatest length of a list: several times that of any vocabulary

_Kind = gguf.GGUFValueType
_FORMATS = {
    _Kind.UINT8: "B", _Kind.INT8: "b", _Kind.UINT16: "H", _Kind.INT16: "h", _Kind.UINT32: "I", _Kind.INT32: "i",
    _Kind.FLOAT32: "f", _Kind.BOOL: "?", _Kind.UINT64: "Q", _Kind.INT64: "q", _Kind.FLOAT64: "d",
}  # fmt: skip


class HeaderError(Exception):
    """The file is damaged. The text describes the damage, without the file's name."""


class UnsupportedError(HeaderError):
    """The file may be intact, but this program cannot read it."""


@dataclass(frozen=True)
class Info:
    """A tensor and its position."""

    name: str
    type: str  #: "F16", "Q4_K", ...
    shape: tuple[int, ...]  #: dimensions in ggml's order, fastest first
    offset: int  #: offset in the file
    bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.bytes


@dataclass
class Header:
    """The contents of a file before the data of its tensors."""

    #: the metadata without lists of strings, long lists and very long strings
    metadata: dict[str, Any] = field(default_factory=dict)
    fields: int = 0  #: the keys of all metadata
    #: begin and end of each key with its value, as offsets in the file
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    tensors: list[Info] = field(default_factory=list)
    alignment: int = 32
    infos: int = 0  #: offset of the descriptions of the tensors
    infos_end: int = 0
    data: int = 0  #: offset of the data of the tensors


def read_header(path: Path) -> Header:
    """Read and check the header of a file.

    Raises:
        HeaderError: the file is damaged or cannot be read. Overlapping or misplaced tensors count as damage.
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        if len(file.read(MAGIC_BYTES)) < MAGIC_BYTES:
            raise HeaderError("it is shorter than the head of any GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).read()


class _Reader:
    """Reads from the start of a file to its end. Reading beyond the end is an error."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._size = data, 0, len(data)

    def read(self) -> Header:
        head = Header()
        if self._bytes(4) != b"GGUF":
            raise HeaderError("it does not start with GGUF")
        version = self._number("I")
        if version & 0xFFFF == 0:
            raise UnsupportedError("it has the byte order of another kind of machine; gguf-convert-endian changes it")
        if version not in _VERSIONS:
            raise UnsupportedError(f"it has version {version} of the format, and {_VERSIONS} are known")
        tensors, head.fields = self._number("Q"), self._number("Q")
        names: set[str] = set()
        for _ in range(head.fields):
            start = self._at
            name = self._name("a key of its metadata")
            if name in names:
                raise HeaderError(f"it has {shown(name)} twice in its metadata")
            names.add(name)
            kept, value = self._value(name)
            if kept:
                head.metadata[name] = value
            head.spans[name] = (start, self._at)
        head.alignment = self._alignment(head.metadata)
        head.infos = self._at
        raw = [self._info() for _ in range(tensors)]
        head.infos_end = self._at
        head.data = -(-self._at // head.alignment) * head.alignment
        head.tensors = [self._placed(head, *one) for one in raw]
        _check_places(head.tensors)
        return head

    def _bytes(self, count: int) -> bytes:
        start = self._skip(count)
        return self._data[start : self._at]

    def _skip(self, count: int) -> int:
        """Skip `count` bytes, and return the offset of the first of them."""
        if count > self._size - self._at:
            raise HeaderError(f"{count} bytes are claimed at {self._at}, and {self._size - self._at} are left")
        self._at += count
        return self._at - count

    def _number(self, format: str) -> Any:
        size = struct.calcsize(f"<{format}")
        return struct.unpack_from(f"<{format}", self._data, self._skip(size))[0]

    def _name(self, what: str) -> str:
        length = self._number("Q")
        if length > _NAME:
            raise HeaderError(f"{what} claims {length} bytes")
        raw = self._bytes(length)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise HeaderError(f"{what} is not UTF-8: {raw[:40]!r}") from None

    def _value(self, name: str) -> tuple[bool, Any]:
        """The next value of the metadata, and whether it is kept."""
        kind = self._kind(name)
        if kind == _Kind.STRING:
            start, length = self._at + 8, self._number("Q")
            self._skip(length)
            # llama.cpp does not require UTF-8.
            return length <= _TEXT, self._data[start : start + min(length, _TEXT)].decode(errors="replace")
        if kind != _Kind.ARRAY:
            return True, self._number(_FORMATS[kind])
        kind, count = self._kind(name), self._number("Q")
        if kind == _Kind.ARRAY:
            raise HeaderError(f"{shown(name)} is a list of lists")
        if kind == _Kind.STRING:
            if count > min(_STRINGS, (self._size - self._at) // 8):
                raise HeaderError(f"{shown(name)} claims {count} strings, and {self._size - self._at} bytes are left")
            for _ in range(count):
                self._skip(self._number("Q"))
            return count == 0, []
        start = self._skip(count * struct.calcsize(f"<{_FORMATS[kind]}"))
        if count > _LIST:
            return False, None
        return True, list(struct.unpack_from(f"<{count}{_FORMATS[kind]}", self._data, start))

    def _kind(self, name: str) -> gguf.GGUFValueType:
        number = self._number("I")
        try:
            return _Kind(number)
        except ValueError:
            raise HeaderError(f"{shown(name)} has the unknown type {number}") from None

    def _alignment(self, metadata: dict[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        # This exceeds the alignment of file systems and GPUs, and also limits the padding.
        if type(value) is not int or not 0 < value <= 1 << 20 or value & (value - 1):
            raise HeaderError(f"general.alignment is {shown(repr(value))}, which is no power of two")
        return value

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._name("a tensor's name")
        dimensions = self._number("I")
        if not 0 < dimensions <= _DIMENSIONS:
            raise HeaderError(f"tensor {shown(name)} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return name, shape, self._number("I"), self._number("Q")

    def _placed(self, head: Header, name: str, shape: tuple[int, ...], number: int, offset: int) -> Info:
        try:
            kind = gguf.GGMLQuantizationType(number)
            values, size = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise UnsupportedError(
                f"tensor {shown(name)} has the type {number}, which the package gguf does not know: pip install -U gguf"
            ) from None
        if min(shape) < 1 or shape[0] % values:
            raise HeaderError(f"tensor {shown(name)} has the shape {shape}, which {kind.name} cannot have")
        info = Info(name, kind.name, shape, head.data + offset, math.prod(shape) // values * size)
        if info.end > self._size:
            raise HeaderError(f"tensor {shown(name)} ends at {info.end}, and the file at {self._size}")
        if offset % head.alignment:
            raise HeaderError(f"tensor {shown(name)} begins at {offset}, which is no multiple of {head.alignment}")
        return info


def _check_places(tensors: list[Info]) -> None:
    """Raise HeaderError if a name occurs twice, or a byte belongs to two tensors."""
    names: set[str] = set()
    last: Info | None = None
    for info in sorted(tensors, key=lambda info: info.offset):
        if info.name in names:
            raise HeaderError(f"it has two tensors {shown(info.name)}")
        names.add(info.name)
        if last and info.offset < last.end:
            raise HeaderError(f"tensors {shown(last.name)} and {shown(info.name)} overlap")
        last = info


def shown(name: str) -> str:
    """A name or value for messages; it may contain any characters."""
    return name if name.isprintable() and len(name) <= 60 else f"{name[:60]!r}"
