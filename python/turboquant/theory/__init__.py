"""The ideas of TurboQuant for experiments, one idea per module, in float64 NumPy and independent of the codec.

- `uniform`: min-max uniform quantization, the baseline that outliers break
- `rotation`: dense random rotation, and the Walsh-Hadamard transform stage by stage
- `codebook`: densities, and the Lloyd-Max quantizer of a density
- `polarquant`: length and direction stored separately, the direction rotated and quantized (TurboQuant's algorithm 1)
- `qjl`: inner products from the signs of random projections, and as a second stage (algorithm 2)
- `errors`: the errors that quantized K and V cause in attention

The code is slow and packs no bytes: `turboquant.reference` has the formats, and `turboquant` the kernels. The notebooks
use this package.

Sources: TurboQuant, arXiv 2504.19874; PolarQuant, arXiv 2502.02617; QJL, arXiv 2406.03482.
"""
from . import codebook, errors, polarquant, qjl, rotation, uniform

__all__ = ["codebook", "errors", "polarquant", "qjl", "rotation", "uniform"]
