"""The list of kernels (one per instruction set), and which of them is in use."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from . import _core


class Kernels(NamedTuple):
    """One set of kernels. All give the same bytes and the same floats; only `dot` and `attention` round differently."""

    name: str  #: "avx512vbmi", "avx512vnni", "avx512", "avxvnni", "avx2", "neon_dotprod", "neon" or "scalar"
    supported: bool  #: this CPU can run them
    selected: bool  #: they are in use


def kernels() -> tuple[Kernels, ...]:
    """The kernels of this build, best first.

    At first use the best supported ones are selected, or those that the environment variable TURBOQUANT_KERNELS names.
    If it names unknown or unsupported ones, none is selected here and every function that needs them raises ValueError.
    """
    selected = _core.kernels_selected()
    return tuple(Kernels(name, supported, name == selected) for name, supported in _core.kernels())


def set_kernels(name: str | None) -> None:
    """Select kernels by name for the whole process; None selects the best that the CPU supports.

    ValueError, with the list, if this build has none of that name or the CPU cannot run them.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name: got {name!r} ({type(name).__name__}), wanted a str or None")
    if name == "":  # the C ABI's word for "the best", but here more likely a mistake
        raise ValueError("name: got '', wanted a kernels' name or None")
    _core.kernels_select(name or "")


@contextmanager
def use_kernels(name: str | None) -> Iterator[None]:
    """``with use_kernels("scalar"): ...`` selects kernels as `set_kernels` does, and the former ones afterwards.

    The selection is the process's, not the thread's.
    """
    before = _core.kernels_selected()
    set_kernels(name)
    try:
        yield
    finally:
        set_kernels(before)
