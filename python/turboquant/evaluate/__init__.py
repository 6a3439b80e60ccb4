"""What a KV-cache type costs in quality and gives in memory, measured with llama.cpp's own programs.

`turboquant.measure` takes the measurements. `rows` makes the quickstart's table of them, which `report` draws, and
`demo` writes some text; `compare` makes a whole report, which `page` draws. From a shell::

    python -m turboquant.evaluate --bin "$(turboquant where)" --model model.gguf --text text.txt

Nothing here needs the compiled core: the programs of any llama.cpp build do, with the types that they know.
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
