"""Pairs of a K type and a V type, with their exact window: names on the command line, and bits per value."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from .._types import types

__all__ = ["CachePair", "Window", "bits_per_value", "block_of", "parse_pairs"]

# (values, bytes) of a block of llama.cpp's own cache types; fixed by the GGUF format.
_STOCK = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q5_1": (32, 24),
    "q5_0": (32, 22),
    "q4_1": (32, 20),
    "q4_0": (32, 18),
    "iq4_nl": (32, 18),
}
_BLOCKS = _STOCK | {info.name: (info.block, info.block_bytes) for info in types()}


@dataclass(frozen=True)
class Window:
    """The exact window: the number of the newest tokens that layers with a turbo type also store in `type`, or 0."""

    tokens: int = 256
    type: str = "q8_0"

    VARIABLE = "LLAMA_ARG_CACHE_WINDOW"

    @classmethod
    def parse(cls, text: str) -> Window:
        """Parse a value of ``--cache-window``: ``"256"`` or ``"256:f16"``.

        Raises:
            ValueError: the number of tokens or the type is invalid.
        """
        number, colon, type = text.partition(":")
        if not re.fullmatch("[0-9]{1,6}", number) or (colon and type not in ("q8_0", "f16")):
            raise ValueError(f"window: got {text!r}, wanted tokens and a type, q8_0 or f16: 256 or 256:f16; 0 is none")
        return cls(int(number), type or cls.type)

    @classmethod
    def default(cls) -> Window:
        """The window of the environment variable, or llama.cpp's default. ValueError if the variable is invalid."""
        given = os.environ.get(cls.VARIABLE)
        return cls.parse(given) if given else cls()

    def __str__(self) -> str:
        return f"{self.tokens}:{self.type}" if self.tokens else "0"


@dataclass(frozen=True)
class CachePair:
    """The types of a cache's K and V, e.g. ``CachePair("q8_0", "turbo3")``.

    ``CachePair("auto", "auto", plan)`` stands for the types of a plan file. Without a plan file, "auto" stands for the
    plan in the model's metadata. A `window` of None is llama.cpp's default; see `with_window`.
    """

    k: str
    v: str
    plan: Path | None = None
    window: Window | None = None

    @classmethod
    def parse(cls, text: str) -> CachePair:
        """Read ``"turbo4"`` (both) or ``"q8_0/turbo3"`` (K/V; a colon separates them as well).

        Raises:
            ValueError: a name is empty, or there is more than one separator.
        """
        parts = [part.strip() for part in re.split("[/:]", text)]
        if len(parts) > 2 or not all(parts):
            raise ValueError(f"cache types: expected TYPE or TYPE_K/TYPE_V, got {text!r}")
        return cls(parts[0], parts[-1])

    def __str__(self) -> str:
        if self.plan:
            return self.plan.name
        return self.k if self.k == self.v else f"{self.k}/{self.v}"

    @property
    def may_have_window(self) -> bool:
        """Whether a layer may have an exact window: it needs a turbo type."""
        return any(name == "auto" or name.startswith("turbo") for name in (self.k, self.v))

    def with_window(self, window: Window | None) -> CachePair:
        """The same types with this window; a pair that cannot have a window stays unchanged."""
        return replace(self, window=window if self.may_have_window else None)

    @property
    def arguments(self) -> list[str]:
        """The options that select these types in llama.cpp's programs; a plan also needs `environment`."""
        return ["-ctk", self.k, "-ctv", self.v]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for the programs, because llama-bench has no options for a plan and a window."""
        plan = {"LLAMA_ARG_CACHE_PLAN": str(self.plan)} if self.plan else {}
        return plan | ({Window.VARIABLE: str(self.window)} if self.window else {})

    @property
    def identity(self) -> str:
        """The key of stored results. For a plan it contains the plan's content, because the file can change.

        Raises:
            OSError: the plan cannot be read.
        """
        types = f"plan {hashlib.sha256(self.plan.read_bytes()).hexdigest()}" if self.plan else str(self)
        # Without a window of the pair, that of the environment holds.
        window = self.window or (os.environ.get(Window.VARIABLE) if self.may_have_window else None)
        return f"{types}, window {window}" if window else types


def parse_pairs(text: str) -> list[CachePair]:
    """Read a comma-separated list such as ``"q8_0,turbo4,q8_0/turbo3"``; repeated pairs are dropped.

    Raises:
        ValueError: the list or one of its entries is empty or malformed.
    """
    return list(dict.fromkeys(CachePair.parse(part) for part in text.split(",")))


def block_of(name: str) -> tuple[int, int] | None:
    """Values and bytes of a block of a cache type: (128, 66) for ``"turbo4"``, None for an unknown name."""
    return _BLOCKS.get(name)


def bits_per_value(name: str) -> float | None:
    """Bits per value of a cache type, scales included: 4.125 for ``"turbo4"``, None for an unknown name."""
    block = block_of(name)
    return None if block is None else 8 * block[1] / block[0]
