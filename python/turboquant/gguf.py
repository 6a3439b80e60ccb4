"""Add the TurboQuant types to the package `gguf`: ``import turboquant.gguf``.

The import registers, once per process:

- the members TURBO4 = 512, TURBO4_64, TURBO4_32, TURBO3, ... TURBO2_32 = 520, and TURBO4_TCQ = 525, ...
  TURBO2_TCQ_32 = 533 of ``gguf.GGMLQuantizationType``,
- their (block, bytes) in ``gguf.GGML_QUANT_SIZES``,
- their conversions in ``gguf.quants``, through the C++ core.

Afterwards GGUFReader reads files with such tensors, ``gguf.quants.quantize`` and ``dequantize`` convert them, and
GGUFWriter writes them:

    writer.add_tensor("name", turboquant.quantize(x, "turbo4"), raw_dtype=gguf.GGMLQuantizationType.TURBO4)

The ids are those of a llama.cpp that `turboquant build` made. They are far above the ids of llama.cpp's own types. A
llama.cpp without the types refuses such a file.
"""
from __future__ import annotations

import types as python_types
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._codec import dequantize as _dequantize
from ._codec import quantize as _quantize
from ._types import TypeInfo, resolve, types

try:
    import gguf as _gguf
    import gguf.quants as _quants
except ModuleNotFoundError as error:
    if error.name != "gguf":
        raise  # gguf is installed, but one of its dependencies is not: the error names it
    raise ModuleNotFoundError("turboquant.gguf needs the package gguf: pip install 'turboquant[gguf]'",
                              name="gguf") from error

__all__ = ["ggml_type", "register"]


def ggml_type(type: str) -> Any:
    """The member of ``gguf.GGMLQuantizationType`` of that type: ``ggml_type("turbo4_64")`` is ``...TURBO4_64``."""
    return _gguf.GGMLQuantizationType(resolve(type).file_id)


def register() -> None:
    """Register the types. The import of this module calls it; further calls change nothing.

    Raises:
        RuntimeError: gguf already has another type with one of the names or ids.
    """
    for info in types():
        member = _add_member(info)
        sizes = (info.block, info.block_bytes)
        if _gguf.GGML_QUANT_SIZES.setdefault(member, sizes) != sizes:
            raise RuntimeError(f"gguf.GGML_QUANT_SIZES has {_gguf.GGML_QUANT_SIZES[member]} for {info.name}, "
                               f"not {sizes}")
        if member not in _quants._type_traits:
            _add_conversions(info, member)


def _add_member(info: TypeInfo) -> Any:
    """Add a member to an existing enum. Python has no public interface for it, as an IntEnum cannot be extended."""
    enum: Any = _gguf.GGMLQuantizationType
    name, value = info.name.upper(), info.file_id
    by_name, by_value = enum._member_map_.get(name), enum._value2member_map_.get(value)
    if by_name is not None and by_name is by_value:
        return by_name
    if by_name is not None or by_value is not None:
        raise RuntimeError(f"gguf.GGMLQuantizationType has {by_name or by_value!r} already, so {name} = {value} cannot "
                           "be registered; this gguf is not one that turboquant knows")
    member: Any = int.__new__(enum, value)
    member._name_, member._value_ = name, value
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member
    type.__setattr__(enum, name, member)
    return member


def _add_conversions(info: TypeInfo, member: Any) -> None:
    """Subclass gguf's base of all quantized types, whose __init_subclass__ registers the class."""

    def quantize_blocks(cls: Any, blocks: NDArray[Any]) -> NDArray[np.uint8]:
        return _quantize(blocks, info)

    def dequantize_blocks(cls: Any, blocks: NDArray[Any]) -> NDArray[np.float32]:
        return _dequantize(blocks, info)

    def body(namespace: dict[str, Any]) -> None:
        namespace["__module__"] = __name__
        namespace["quantize_blocks"] = classmethod(quantize_blocks)
        namespace["dequantize_blocks"] = classmethod(dequantize_blocks)

    base = getattr(_quants, "__Quant")
    python_types.new_class(info.name.capitalize(), (base,), {"qtype": member}, body)


register()
