"""What a cache type costs in one layer, from few measurements: noise power is proportional to a type's relative error."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from .._codec import dequantize, quantize
from ..llama.files import LlamaError

__all__ = ["LINEAR", "PROBES", "estimate", "finer", "relative_error"]

#: Nats up to which a layer's KLD is taken to be proportional to the noise that causes it. Above it saturates, and finer
#: types are measured.
LINEAR = 0.03
#: The type to measure first: K shows at 3 bits; V, which costs an eighth of it, at 2.
PROBES = {"k": "turbo3", "v": "turbo2"}

_FINER = {"turbo2": "turbo3", "turbo3": "turbo4"}
# Half a unit of the last place, uniformly spread over a binade: 2^-2m / 18 with m stored bits of the mantissa.
_FLOATS = {"f32": 0.0, "f16": 2.0**-20 / 18, "bf16": 2.0**-14 / 18}


@functools.cache
def relative_error(type: str) -> float:
    """The relative squared error of a type on normally distributed values, which a rotation makes of any.

    Raises:
        LlamaError: no such type, or none that can be tried here.
    """
    if type in _FLOATS:
        return _FLOATS[type]
    x = np.random.default_rng(0).standard_normal((512, 128), dtype=np.float32)
    import gguf

    try:
        if type.startswith("turbo"):
            y = dequantize(quantize(x, type), type)
        else:
            kind = gguf.GGMLQuantizationType[type.upper()]
            y = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    except (KeyError, NotImplementedError, ValueError, gguf.quants.QuantError):
        raise LlamaError(f"{type} cannot be tuned; give types such as turbo2, turbo3, turbo4, q4_0, q8_0, f16") from None
    return float(np.square(y - x).mean() / np.square(x).mean())


def finer(measured: Mapping[str, float]) -> str | None:
    """The type to measure next in a layer, given the KLDs measured there; None if what is known will do."""
    type, kld = min(measured.items(), key=lambda item: relative_error(item[0]))
    return _FINER.get(type) if kld > LINEAR else None


def estimate(measured: Mapping[str, float], types: Sequence[str]) -> dict[str, float]:
    """The KLD that each of `types` costs in a layer.

    What is measured is taken as it is; the others are scaled from the measured type whose error is nearest.
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
