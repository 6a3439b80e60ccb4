"""The list of kernels (one per instruction set), and which of them is in use."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from . import _core


class Kernels(NamedTuple):
    """One set of kernels. All give the same bytes and the same floats; only `dot` and `attention` round differently."""

    name: str  #: "avx512vbmi", "avx512vnni", "avx512", "avxvnni", "avx2", "neon_dotprod", "neon" or "scalar"
    supported: bool  #: whether this CPU can run them
    selected: bool  #: whether they are selected


def kernels() -> tuple[Kernels, ...]:
    """The kernels of this build, best first.

    At first use the best supported kernels are selected, or those that the environment variable TURBOQUANT_KERNELS
    names. If it names unknown or unsupported kernels, no entry is selected, and functions that need kernels raise
    ValueError.
    """
    selected = _core.kernels_selected()
    return tuple(Kernels(name, supported, name == selected) for name, supported in _core.kernels())


def set_kernels(name: str | None) -> None:
    """Select kernels by name for the whole process; None selects the best that the CPU supports.

    Raises:
        ValueError: this build has no kernels of that name, or the CPU cannot run them. The text lists all names.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name: got {name!r} ({type(name).__name__}), wanted a str or None")
    if name == "":  # The C ABI takes "" for the best kernels; here it is more likely a mistake.
        raise ValueError("name: got '', wanted a kernels' name or None")
    _core.kernels_select(name or "")


@contextmanager
def use_kernels(name: str | None) -> Iterator[None]:
    """Select kernels as `set_kernels` does for a ``with`` block, and restore the former selection afterwards.

    The selection applies to the process, not to the thread.
    """
    before = _core.kernels_selected()
    set_kernels(name)
    try:
        yield
    finally:
        set_kernels(before)
