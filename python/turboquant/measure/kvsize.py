"""The size of the KV cache, read from the line that llama.cpp logs when it creates one."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Cache", "CacheSize", "Caches", "parse_cache_size", "parse_caches"]

_LINE = re.compile(
    r"size\s*=\s*[\d.]+ MiB \(\s*(\d+) cells,\s*(\d+) layers,\s*\d+/(\d+) seqs\), "
    r"K \(([^)]+)\):\s*([\d.]+) MiB, V \(([^)]+)\):\s*([\d.]+) MiB"
)
_TYPES = re.compile(r"turboquant: cache types: K (\S+); V (\S+)")
_WINDOW = re.compile(r"n_swa\s*=\s*(\d+)")
_EXACT = re.compile(r"turboquant: window: the newest (\d+) tokens in (\S+) \(\d+ of \d+ layers\), ([\d.]+) MiB")
_UBATCH = 512  # llama.cpp's default batch; its sliding-window caches hold so many tokens more than the window


@dataclass(frozen=True)
class CacheSize:
    """Sizes in MiB, and the types of K and V in the cache (``turbo4_64`` for turbo4 and heads of 64 values).

    If layers have different types, because of a plan or the guard, all types are named: ``turbo4_64+q8_0``. The exact
    window, which holds the newest tokens in its own type, is counted separately from K and V.
    """

    k_mib: float
    v_mib: float
    type_k: str
    type_v: str
    window_tokens: int = 0  #: 0 if there is no exact window
    window_type: str = ""
    window_mib: float = 0.0

    @property
    def mib(self) -> float:
        """Size of K, V and the exact window together."""
        return self.k_mib + self.v_mib + self.window_mib


@dataclass(frozen=True)
class Cache:
    """One line of the log: the cache of some layers, with `cells` tokens for each of `streams` sequences."""

    cells: int
    streams: int
    size: CacheSize


@dataclass(frozen=True)
class Caches:
    """The caches of a context in the order of the log, and the model's sliding window in tokens (0 if it has none).

    A model with a sliding window has two caches: first that of the other layers, then that of the layers with the
    window.
    """

    caches: list[Cache]
    window: int
    types_k: str = ""  #: types of each layer in a plan's compact syntax; empty if libllama does not log them
    types_v: str = ""

    def total(self) -> CacheSize:
        """Sizes and types as logged. Several types of K or of V are joined with ``+``."""
        return _sum([cache.size for cache in self.caches])

    def at(self, context: int, newest: int | None = None) -> CacheSize:
        """Sizes and types for one sequence with a context of `context` tokens.

        A cache grows with the context; that of layers with a sliding window grows only up to the window plus a batch.
        The exact window holds `newest` tokens (by default as many as logged), or all cells if there are fewer.
        """
        sizes = []
        for index, cache in enumerate(self.caches):
            cells = context
            if self.window and index:
                cells = min(context, -(-(self.window + _UBATCH) // 256) * 256)
            scale, size = cells / (cache.cells * cache.streams), cache.size
            tokens, mib = size.window_tokens, size.window_mib
            if tokens:  # every stream has its slots; one more row receives tokens without a slot
                rows = tokens * cache.streams + 1
                tokens = min(newest or tokens, cells)
                mib *= (tokens + 1) / rows
            sizes.append(
                CacheSize(size.k_mib * scale, size.v_mib * scale, size.type_k, size.type_v, tokens, size.window_type, mib)
            )
        return _sum(sizes)

    def as_dict(self) -> dict[str, Any]:
        """The contents as JSON values for the results cache; `from_dict` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Caches:
        caches = [Cache(**{**cache, "size": CacheSize(**cache["size"])}) for cache in stored["caches"]]
        return cls(**{**stored, "caches": caches})


def parse_caches(log: str) -> Caches:
    """Read the caches of a context from llama.cpp's log.

    Raises:
        ValueError: the log has no such line.
    """
    found = list(_LINE.finditer(log))
    if not found:
        raise ValueError("no line 'size = … MiB (… cells, … layers, …), K (…): … MiB, V (…): … MiB' in the log")
    window = _WINDOW.search(log)
    types = _TYPES.search(log)
    mixed_k, mixed_v = (_mixed(types[1]), _mixed(types[2])) if types else ("", "")
    caches = []
    logged = 0
    for line in found:
        cells, _, streams, type_k, k_mib, type_v, v_mib = line.groups()
        # the log has the window of a cache before its size
        exact = _EXACT.search(log, logged, line.start())
        newest = (int(exact[1]), exact[2], float(exact[3])) if exact else (0, "", 0.0)
        size = CacheSize(float(k_mib), float(v_mib), mixed_k or type_k, mixed_v or type_v, *newest)
        caches.append(Cache(int(cells), int(streams), size))
        logged = line.end()
    return Caches(caches, int(window[1]) if window else 0, *(types.groups() if types else ()))


def parse_cache_size(log: str) -> CacheSize:
    """The sum of the caches that `parse_caches` reads.

    Raises:
        ValueError: the log has no such line.
    """
    return parse_caches(log).total()


def _mixed(types: str) -> str:
    """The types in a text such as "turbo4*3,q8_0,-", the most frequent first; empty if there is only one."""
    counts: dict[str, int] = {}
    for item in types.split(","):
        name, _, count = item.partition("*")
        if name != "-":
            counts[name] = counts.get(name, 0) + int(count or 1)
    return "+".join(sorted(counts, key=lambda name: -counts[name])) if len(counts) > 1 else ""


def _sum(sizes: list[CacheSize]) -> CacheSize:
    return CacheSize(
        k_mib=round(sum(size.k_mib for size in sizes), 2),
        v_mib=round(sum(size.v_mib for size in sizes), 2),
        type_k="+".join(dict.fromkeys(size.type_k for size in sizes)),
        type_v="+".join(dict.fromkeys(size.type_v for size in sizes)),
        window_tokens=max(size.window_tokens for size in sizes),
        window_type="+".join(dict.fromkeys(size.window_type for size in sizes if size.window_type)),
        window_mib=round(sum(size.window_mib for size in sizes), 2),
    )
