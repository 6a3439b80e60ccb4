"""What the numbers mean: the noise floor, the bands of a verdict, whether the two paths agree, what to recommend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..measure.perplexity import Divergence

__all__ = ["Agreement", "Band", "Candidate", "Noise", "agreement", "band", "bands", "recommend"]

#: Nats above the noise at which each band ends, with its name. A KLD of x costs about x in ln(perplexity).
_STEPS = (
    (0.0, "none", "not to be told from rounding"),
    (0.01, "small", "at most 1 % of perplexity"),
    (0.05, "moderate", "at most 5 % of perplexity"),
    (0.2, "large", "at most 20 % of perplexity"),
    (math.inf, "severe", "more than 20 % of perplexity"),
)
_SIGMAS = 3.0


@dataclass(frozen=True)
class Noise:
    """What f16 differs from itself: mean KLDs in nats per token.

    ``same`` is a second batched run (what storing the predictions rounds away), ``decode`` the run token by token:
    the same cache and the same arithmetic in another order.
    """

    same: float
    decode: float
    decode_error: float

    @property
    def floor(self) -> float:
        """Below this a difference says nothing about a cache: three standard errors above the larger of the two."""
        return max(self.same, self.decode + _SIGMAS * self.decode_error, 1e-6)


@dataclass(frozen=True)
class Band:
    """A verdict, and the mean KLD up to which it holds."""

    name: str
    up_to: float
    meaning: str


def bands(noise: Noise) -> list[Band]:
    """The bands, best first: what lies within twice the noise is no loss, the others are steps above the noise."""
    none = 2 * noise.floor
    return [Band(name, none + step, meaning) for step, name, meaning in _STEPS]


def band(kld: float, scale: Sequence[Band]) -> Band:
    """The band of a mean KLD."""
    return next(one for one in scale if kld <= one.up_to)


@dataclass(frozen=True)
class Agreement:
    """The KLDs of the same tokens on the batched and on the one-token path, and what they may differ by."""

    batched: float
    decode: float
    allowed: float

    @property
    def agree(self) -> bool:
        return abs(self.decode - self.batched) <= self.allowed


def agreement(batched: Divergence, decode: Divergence, noise: Noise) -> Agreement:
    """Compare the paths: three standard errors of both, and the noise that f16 has between its own."""
    errors = math.hypot(batched.kld_error, decode.kld_error)
    return Agreement(batched.kld, decode.kld, _SIGMAS * errors + 2 * noise.floor)


@dataclass(frozen=True)
class Candidate:
    """What `recommend` needs to know of a pair."""

    label: str
    bits: float
    mib: float
    kld: float
    found: int
    asked: int
    agree: bool


def recommend(candidates: Sequence[Candidate], f16: Candidate, scale: Sequence[Band]) -> tuple[Candidate | None, str]:
    """The smallest cache whose loss is none or small, whose paths agree, and which finds what f16 finds.

    Returns:
        The choice and the reason in plain English; no choice if no pair qualifies.
    """
    small = scale[1]

    def objection(one: Candidate) -> str:
        if not one.agree:
            return "its two paths disagree"
        if one.kld > small.up_to:
            return f"its KLD of {one.kld:.4f} is above {small.up_to:.4f}"
        if one.found < f16.found:
            return f"it finds {one.found} of {one.asked} needles, f16 {f16.found}"
        return ""

    others = [one for one in candidates if one.label != f16.label]
    fit = sorted((one for one in others if not objection(one)), key=lambda one: (one.mib, one.kld))
    if not fit:
        nearest = min(others, key=lambda one: (not one.agree, one.kld), default=None)
        why = f" ({nearest.label} comes nearest, but {objection(nearest)})" if nearest else ""
        return None, f"none of the pairs stays within a small loss{why}: keep f16, or try types with more bits"
    best = fit[0]
    verdict = band(best.kld, scale)
    reason = (
        f"it is the smallest of these caches ({best.bits:g} bits per value, {f16.mib / best.mib:.1f} times smaller "
        f"than f16) whose loss is {'small' if verdict.name == 'small' else 'not measurable'}: a KLD of {best.kld:.4f}, "
        f"{verdict.meaning}"
    )
    if best.asked:
        reason += f", with {best.found} of {best.asked} needles found (f16: {f16.found})"
    below = sorted((one for one in others if one.mib < best.mib), key=lambda one: -one.mib)
    if below:
        reason += f". The next smaller, {below[0].label}, is out because {objection(below[0])}"
    return best, reason
