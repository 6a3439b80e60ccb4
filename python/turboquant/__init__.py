"""TurboQuant: rotated blocks in 2 to 4 bits per value plus one scale per block, by Lloyd-Max or trellis quantization.

    >>> import numpy as np, turboquant
    >>> x = np.random.default_rng(0).standard_normal((2, 256), dtype=np.float32)
    >>> q = turboquant.quantize(x, "turbo4")
    >>> q.shape, q.dtype
    ((2, 132), dtype('uint8'))
    >>> float(np.square(turboquant.dequantize(q, "turbo4") - x).mean()) < 0.012
    True

The functions run the same C++ core that a patched llama.cpp links. `turboquant.reference` is the same codec in readable
NumPy, `turboquant.theory` has its ideas one by one, and `turboquant.gguf` adds the types to the gguf package.
"""
from . import _core
from ._attention import attention
from ._codec import dequantize, dot, prepare, quantize, query_dtype, rotate, unrotate
from ._kernels import Kernels, kernels, set_kernels, use_kernels
from ._types import TypeInfo, codebook, type_for_head, types

__version__: str = _core.version

__all__ = [
    "Kernels",
    "TypeInfo",
    "__version__",
    "attention",
    "codebook",
    "dequantize",
    "dot",
    "kernels",
    "prepare",
    "quantize",
    "query_dtype",
    "rotate",
    "set_kernels",
    "type_for_head",
    "types",
    "unrotate",
    "use_kernels",
]
