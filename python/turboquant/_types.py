"""The type table: the layout of a block of each format."""
from __future__ import annotations

import difflib
import operator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from . import _core


@dataclass(frozen=True)
class TypeInfo:
    """One row of the type table.

    Rotated values are decoded as ``d * step * levels[i]``, where ``d`` is the block's scale. In turbo4, turbo3 and
    turbo2, i is a value's index. In turbo4_tcq, turbo3_tcq and turbo2_tcq, the trellis-coded types, i follows from a
    value's bits and from those of other values before it.
    """

    name: str  #: "turbo4", "turbo4_64", ...
    bits: int  #: bits of one value beside the scale: 4, 3 or 2
    block: int  #: values in a block: 128, 64 or 32
    block_bytes: int  #: bytes of an encoded block: 2 with the scale, then the bits of the values
    step: float  #: value of one unit of `levels`, relative to the block's RMS
    #: the int8 levels, ascending, read-only: 2**bits centroids, or 2 * 2**bits in a trellis-coded type
    levels: NDArray[np.int8] = field(repr=False, compare=False)
    id: int = field(repr=False)  #: tq_type of the C ABI
    family: str = field(repr=False)  #: name of the type of the same family with the longest block
    file_id: int = field(repr=False)  #: the type's number in files: GGUF, llama.cpp's saved states

    @property
    def bits_per_value(self) -> float:
        """Bits of storage per value, the scale included: 8 * block_bytes / block."""
        return 8 * self.block_bytes / self.block

    def row_bytes(self, n: int) -> int:
        """Bytes of an encoded row of n values. Raises ValueError if n is not a positive multiple of the block."""
        n = operator.index(n)
        if n <= 0 or n % self.block:
            raise ValueError(f"n: got {n}, but a row of {self.name} is a positive multiple of its block, {self.block}")
        return n // self.block * self.block_bytes

    def row_values(self, row_bytes: int) -> int:
        """Values in an encoded row of `row_bytes` bytes; the inverse of `row_bytes()`, with the same errors."""
        row_bytes = operator.index(row_bytes)
        if row_bytes <= 0 or row_bytes % self.block_bytes:
            raise ValueError(f"row_bytes: got {row_bytes}, but a row of {self.name} is a positive multiple of its "
                             f"block's {self.block_bytes} bytes")
        return row_bytes // self.block_bytes * self.block


def _read_table() -> dict[str, TypeInfo]:
    table = {}
    for id, (name, bits, block, block_bytes, step, levels, family, file_id) in enumerate(_core.type_table()):
        levels.flags.writeable = False
        table[name] = TypeInfo(name, bits, block, block_bytes, step, levels, id, family, file_id)
    return table


_TABLE = _read_table()


def types() -> tuple[TypeInfo, ...]:
    """All types, in the order of their ids: turbo4, turbo4_64, turbo4_32, turbo3, ... turbo2_32, turbo4_tcq, ..."""
    return tuple(_TABLE.values())


def resolve(type: str | TypeInfo, argument: str = "type") -> TypeInfo:
    """The type of that name. `argument` is the name of the caller's argument, for the error."""
    if isinstance(type, TypeInfo):
        return type
    if not isinstance(type, str):
        raise TypeError(f"{argument}: got {type!r} ({type.__class__.__name__}), wanted a type's name (str) or a "
                        "TypeInfo")
    if type in _TABLE:
        return _TABLE[type]
    close = difflib.get_close_matches(type.lower(), _TABLE, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{argument}: got {type!r}, wanted one of {', '.join(_TABLE)}{hint}")


@dataclass(frozen=True)
class CacheType:
    """One of ggml's own types that K or V may have in `attention`."""

    name: str  #: "f16", "bf16", "q8_0", "q4_0" or "f32"
    block: int  #: values in a block: 32; rows of `attention` are multiples of it, also for f16
    block_bytes: int  #: bytes of a block
    id: int = field(repr=False)  #: TQ_ROW_... of the C ABI

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of n values, a multiple of 32."""
        return n // self.block * self.block_bytes

    def row_values(self, row_bytes: int) -> int:
        """Values in a row of `row_bytes` bytes."""
        return row_bytes // self.block_bytes * self.block


#: By name.
PLAIN = {row[0]: CacheType(*row) for row in _core.row_table()}


def resolve_cache(type: str | TypeInfo, argument: str) -> TypeInfo | CacheType:
    """The turbo type or plain cache type of that name."""
    if isinstance(type, str) and type in PLAIN:
        return PLAIN[type]
    try:
        return resolve(type, argument)
    except ValueError as error:
        raise ValueError(f"{error}; or one of {', '.join(PLAIN)}") from None


def type_for_head(type: str | TypeInfo, head: int) -> TypeInfo:
    """The type of the same family as `type` with the largest block that divides a head of `head` values.

    Heads of 128, 256 and 512 values take blocks of 128; heads of 64, 192 and 576 take blocks of 64; heads of 96 take
    blocks of 32.

    Raises:
        ValueError: no block divides the head (80, 112).
    """
    info = resolve(type)
    head = operator.index(head)
    name = _core.type_for_head(info.id, head)
    if not name:
        raise ValueError(f"head: got {head}, wanted a positive multiple of 32, the smallest block")
    return _TABLE[name]


def codebook(type: str | TypeInfo) -> NDArray[np.float32]:
    """The type's levels in units of the block's RMS, float32, ascending: ``float32(step) * levels`` of `TypeInfo`.

    Those of turbo4, turbo3 and turbo2 are the 2**bits Lloyd-Max levels of N(0,1), rounded to multiples of the step. The
    trellis-coded types have twice as many levels, of which a value can have every fourth, as its path bits determine.
    Source: Max, "Quantizing for minimum distortion", 1960, table I; TurboQuant (arXiv 2504.19874), section 3.1;
    Marcellin and Fischer, "Trellis coded quantization of memoryless and Gauss-Markov sources", 1990.
    """
    info = resolve(type)
    return np.float32(info.step) * info.levels.astype(np.float32)
