"""What a KV-cache type costs in quality and gives in memory, measured with llama.cpp's own programs.

`perplexity` runs llama-perplexity, `needle` asks for a number that stands thousands of characters earlier, `demo`
writes some text, `report` draws the table, and `measure` ties them together and remembers every result. From a shell::

    python -m turboquant.evaluate --bin "$(turboquant where)" --model model.gguf --text text.txt

Nothing here needs the compiled core: the programs of any llama.cpp build do, with the types that they know.
"""

from .measure import Options, Row, measure
from .needle import Needle, make_needles
from .pairs import CachePair, bits_per_value, parse_pairs
from .perplexity import Divergence, parse_base, parse_divergence
from .programs import ProgramError, Programs
from .report import table, to_json, to_markdown

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
