"""The size of the KV cache, from the line that llama.cpp logs when it makes one."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["CacheSize", "parse_cache_size"]

_LINE = re.compile(
    r"size\s*=\s*[\d.]+ MiB \(\s*(\d+) cells,\s*(\d+) layers,[^)]*\), "
    r"K \(([^)]+)\):\s*([\d.]+) MiB, V \(([^)]+)\):\s*([\d.]+) MiB"
)


@dataclass(frozen=True)
class CacheSize:
    """Sizes in MiB and the types that K and V really have (``turbo4_64`` where a head of 64 asked for turbo4)."""

    k_mib: float
    v_mib: float
    type_k: str
    type_v: str

    @property
    def mib(self) -> float:
        return self.k_mib + self.v_mib


def parse_cache_size(log: str) -> CacheSize:
    """Add up the caches of a context (a model with sliding-window layers has two).

    Several types in one place are joined with ``+``.

    Raises:
        ValueError: the log has no such line.
    """
    found = _LINE.findall(log)
    if not found:
        raise ValueError("no line 'size = … MiB (… cells, … layers, …), K (…): … MiB, V (…): … MiB' in the log")
    return CacheSize(
        k_mib=round(sum(float(line[3]) for line in found), 2),
        v_mib=round(sum(float(line[5]) for line in found), 2),
        type_k="+".join(dict.fromkeys(line[2] for line in found)),
        type_v="+".join(dict.fromkeys(line[4] for line in found)),
    )
