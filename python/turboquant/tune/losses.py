"""Loss of each cache type in a layer, estimated from few measurements: noise power follows the relative error."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from .._codec import dequantize, quantize
from .._types import types
from ..errors import TurboQuantError

__all__ = ["LINEAR", "PROBES", "estimate", "finer", "relative_error"]

#: KLD of a layer, in nats per token, up to which it is assumed to be proportional to the noise power. Above this the
#: KLD saturates, and finer types are measured.
LINEAR = 0.03
#: The first measured type: the loss of K is measurable at 3 bits; that of V, an eighth of it, at 2 bits.
PROBES = {"k": "turbo3", "v": "turbo2"}

_FINER = {"turbo2": "turbo3", "turbo3": "turbo4"}
_TURBO = {info.name for info in types()}
# The error is at most half a unit in the last place; over a binade its relative square is 2^-2m / 18, with m bits of
# mantissa.
_FLOATS = {"f32": 0.0, "f16": 2.0**-20 / 18, "bf16": 2.0**-14 / 18}


@functools.cache
def relative_error(type: str) -> float:
    """The relative squared error of a type on normal values; rotated blocks are nearly normal.

    Raises:
        TurboQuantError: there is no such type, or `tune` does not support it.
    """
    if type in _FLOATS:
        return _FLOATS[type]
    x = np.random.default_rng(0).standard_normal((512, 128), dtype=np.float32)
    import gguf

    try:
        if type in _TURBO:
            y = dequantize(quantize(x, type), type)
        else:
            kind = gguf.GGMLQuantizationType[type.upper()]
            y = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    except (KeyError, NotImplementedError, ValueError, gguf.quants.QuantError):
        raise TurboQuantError(f"{type} cannot be tuned; give types such as turbo2, turbo3, turbo4, q4_0, q8_0, f16") from None
    return float(np.square(y - x).mean() / np.square(x).mean())


def finer(measured: Mapping[str, float]) -> str | None:
    """The next type to measure in a layer, given the KLDs measured there; None if no further type is needed."""
    type, kld = min(measured.items(), key=lambda item: relative_error(item[0]))
    return _FINER.get(type) if kld > LINEAR else None


def estimate(measured: Mapping[str, float], types: Sequence[str]) -> dict[str, float]:
    """The KLD that each of `types` causes in a layer, in nats per token.

    Measured KLDs are returned unchanged; the others are scaled from the measured type with the nearest error.
    """
    costs = {}
    for type in types:
        error = relative_error(type)
        if type in measured:
            costs[type] = measured[type]
            continue
        nearest = min(measured, key=lambda one: abs(np.log(max(error, 1e-12) / relative_error(one))))
        costs[type] = measured[nearest] * error / relative_error(nearest)
    return costs
