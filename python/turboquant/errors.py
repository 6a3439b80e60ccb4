"""The base class of all errors of this package."""

from __future__ import annotations

__all__ = ["TurboQuantError"]


class TurboQuantError(Exception):
    """Base class of this package's errors. The text says what failed and how to solve it."""
