"""Follow the channels of q, k, v and of attention's output to the elements of the weights that determine them.

A model file does not say how its weights are used, but llama.cpp's graph does. The graph is followed backwards from the
tensor that attention reads, one operation at a time, through all operations that keep channels separate: views and
copies, RoPE (which mixes the two channels of a pair), factors, biases. The path ends at the first weight that scales
each channel: the rows of a matrix, or the elements of a norm's weight. No list of architectures is needed; unknown
operations are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Leaf", "Refusal", "Trace", "trace", "trace_output"]

Ints = NDArray[np.int64]

#: RoPE's modes in ggml.h. Only in the first two the pairs of channels are the same at all positions.
_ROPE = {0: "normal", 2: "neox", 8: "M-RoPE", 24: "vision RoPE", 40: "interleaved M-RoPE"}
_LAYOUT = {"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"}
_COPY = {"CONT", "CPY", "DUP"}


class Refusal(Exception):
    """The channels cannot be scaled through the weights. The text gives the reason."""


@dataclass(frozen=True)
class Leaf:
    """A weight, and for each channel the index of its row, column or element."""

    tensor: str
    axis: str  #: "rows", "columns" or "elements"
    index: Ints  #: (channels,)


@dataclass
class Trace:
    """All weights that must be scaled with the channels, and the channels that must have the same scale."""

    leaves: list[Leaf] = field(default_factory=list)
    pairs: list[tuple[Ints, Ints]] = field(default_factory=list)  #: pairs of channels that must have the same scale


def trace(steps: Sequence[dict[str, Any]], coordinates: Ints) -> Trace:
    """Follow `steps` (of a `Route`) to the weights.

    Args:
        coordinates: (channels, 4), the position of each channel of one token in the first step's tensor, in ggml's
            order.

    Raises:
        Refusal: an operation does not commute with scaling channels.
    """
    at, found = coordinates, Trace()
    for step in steps:
        op = step["op"]
        if op in _LAYOUT or op in _COPY:
            at = _through_layout(step, at)
        elif op == "ROPE":
            found.pairs += _rope_pairs(step, at)
        elif op == "SCALE":
            pass
        elif op in ("ADD", "MUL") and "weight" in step:
            size = math.prod(step["wne"])
            if size == 1 and op == "MUL":
                continue  # one factor for all
            found.leaves.append(Leaf(step["weight"], "elements", _flat(at % np.array(step["wne"]), step["wne"])))
            if op == "MUL":
                return found
        elif op == "MUL_MAT":
            if math.prod(step["wne"][2:]) != 1:
                raise Refusal(f"{step['weight']} is a matrix per head")
            found.leaves.append(Leaf(step["weight"], "rows", at[:, 0]))
            return found
        elif op in ("NORM", "RMS_NORM", "L2_NORM"):
            raise Refusal("it is normalised without a weight")
        else:
            raise Refusal(f"it goes through {op}")
    raise Refusal("it does not come from a weight")


def trace_output(steps: Sequence[dict[str, Any]], heads: int, head: int) -> Leaf:
    """The columns of the output matrix that multiply each channel of attention's output.

    Returns:
        A leaf with index (heads * head,). The steps lead backwards, so the positions of the columns are followed and
        then inverted.

    Raises:
        Refusal: the matrix has further columns.
    """
    product, *rest = steps
    columns = int(product["wne"][0])
    at = _unflat(np.arange(columns, dtype=np.int64), [columns, 1, 1, 1])
    for step in rest:
        if step["op"] != "MUL":  # a gate, element by element
            at = _through_layout(step, at)
    # The last tensor is attention's output, {head, heads, tokens}.
    channel = at[:, 1] * head + at[:, 0]
    if columns != heads * head or not np.array_equal(np.sort(channel), np.arange(columns)):
        raise Refusal(f"{product['weight']} does not take attention's output as it is")
    if math.prod(product["wne"][2:]) != 1:
        raise Refusal(f"{product['weight']} is a matrix per head")
    return Leaf(product["weight"], "columns", np.argsort(channel))


def _rope_pairs(step: dict[str, Any], at: Ints) -> list[tuple[Ints, Ints]]:
    """The pairs of channels that RoPE mixes. Channels outside its dimensions are in no pair."""
    mode, dims = step["mode"], step["dims"]
    if mode not in (0, 2):
        raise Refusal(f"it is rotated by {_ROPE.get(mode, f'RoPE of mode {mode}')}, and only normal and neox are known")
    inside = np.flatnonzero(at[:, 0] < dims)
    partner = at[inside].copy()
    if mode == 0:
        partner[:, 0] ^= 1
    else:
        partner[:, 0] = (partner[:, 0] + dims // 2) % dims
    keys = _flat(at, step["ne"])
    order = np.argsort(keys)
    wanted = _flat(partner, step["ne"])
    place = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
    other = order[place]
    if not np.array_equal(keys[other], wanted):
        raise Refusal("RoPE mixes it with channels that are not attention's")
    return [(inside, other)]


def _through_layout(step: dict[str, Any], at: Ints) -> Ints:
    """Convert coordinates in a view or copy to coordinates in its source."""
    if step["op"] in _COPY:
        return _unflat(_flat(at, step["ne"]), step["sne"])
    address = step["offset"] + at @ np.array(step["nb"], np.int64)
    result = np.zeros_like(at)
    # The source may be a view itself, so its strides need not ascend.
    for axis in sorted((a for a in range(4) if step["sne"][a] > 1), key=lambda a: -step["snb"][a]):
        result[:, axis], address = np.divmod(address, step["snb"][axis])
    if address.any() or (result >= np.array(step["sne"])).any():
        raise Refusal(f"a view ({step['op']}) of it cannot be followed")
    return result


def _flat(at: Ints, shape: Sequence[int]) -> Ints:
    strides = np.cumprod([1, *shape[:3]])
    return np.asarray(at @ strides, np.int64)


def _unflat(flat: Ints, shape: Sequence[int]) -> Ints:
    result = np.empty((len(flat), 4), np.int64)
    for axis in range(4):
        flat, result[:, axis] = np.divmod(flat, shape[axis])
    return result
