"""What the benchmarks share; it needs the standard library alone."""

from __future__ import annotations

import argparse


class Problem(Exception):
    """An error that the user can correct."""


def numbers(text: str, least: int = 1) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted whole numbers with commas between them") from None
    if min(values) < least:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted numbers above {least - 1}")
    return values


def pairs(text: str, *first: str) -> list[str]:
    """The pairs K:V. `first` are the pairs with which all others are compared; without any it is f16."""
    names = [name if ":" in name else f"{name}:{name}" for name in text.split(",") if name]
    return list(dict.fromkeys([*(first or ("f16:f16",)), *names]))


def shown(pair: str) -> str:
    type_k, type_v = pair.split(":")
    return type_k if type_k == type_v else f"{type_k}/{type_v}"
