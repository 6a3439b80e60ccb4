"""The error that all others of this package are kinds of."""

from __future__ import annotations

__all__ = ["TurboQuantError"]


class TurboQuantError(Exception):
    """Something cannot be done. The text says what, and what to do about it."""
