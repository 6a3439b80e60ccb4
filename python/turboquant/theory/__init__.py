"""What TurboQuant is made of, one idea to a module: for experiments, in float64 NumPy, beside the codec.

- `uniform`: min-max uniform quantization, the baseline that outliers break
- `rotation`: dense random rotation, and the Walsh-Hadamard transform stage by stage
- `codebook`: densities, and the Lloyd-Max quantizer of any of them
- `polarquant`: length and direction apart, the direction rotated and quantized (TurboQuant's algorithm 1)
- `qjl`: inner products from the signs of random projections, and as a second stage (algorithm 2)
- `errors`: what quantized K and V do to attention

Nothing here is fast, and no bytes are packed: `turboquant.reference` has the formats, `turboquant` the kernels. The
notebooks use this package throughout.

Sources: TurboQuant, arXiv 2504.19874; PolarQuant, arXiv 2502.02617; QJL, arXiv 2406.03482.
"""
from . import codebook, errors, polarquant, qjl, rotation, uniform

__all__ = ["codebook", "errors", "polarquant", "qjl", "rotation", "uniform"]
