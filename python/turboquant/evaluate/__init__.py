"""The quality that a KV-cache type costs and the memory that it saves, measured with llama.cpp's own programs.

`turboquant.measure` takes the measurements. `rows` arranges them in the quickstart's table, which `report` prints, and
`demo` generates text. `compare` makes a complete report, which `page` renders. The command of the table is::

    python -m turboquant.evaluate --bin "$(turboquant where)" --model model.gguf --text text.txt

This package does not need the compiled core. It works with every llama.cpp build and the types of that build.
"""

from ..measure.needle import Needle, make_needles
from ..measure.pairs import CachePair, bits_per_value, parse_pairs
from ..measure.perplexity import Divergence, parse_base, parse_divergence
from ..measure.programs import ProgramError, Programs
from .report import table, to_json, to_markdown
from .rows import Options, Row, measure

__all__ = [
    "CachePair",
    "Divergence",
    "Needle",
    "Options",
    "ProgramError",
    "Programs",
    "Row",
    "bits_per_value",
    "make_needles",
    "measure",
    "parse_base",
    "parse_divergence",
    "parse_pairs",
    "table",
    "to_json",
    "to_markdown",
]
