"""The meaning of the numbers: noise floor, bands of the verdict, agreement of the paths, recommendation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..measure.perplexity import Divergence

__all__ = ["Agreement", "Band", "Candidate", "Noise", "agreement", "band", "bands", "recommend"]

#: The end of each band in nats above the noise, its name and its meaning. A KLD of x costs about x in ln(perplexity).
_STEPS = (
    (0.0, "none", "not distinguishable from rounding"),
    (0.01, "small", "at most 1 % of perplexity"),
    (0.05, "moderate", "at most 5 % of perplexity"),
    (0.2, "large", "at most 20 % of perplexity"),
    (math.inf, "severe", "more than 20 % of perplexity"),
)
_SIGMAS = 3.0


@dataclass(frozen=True)
class Noise:
    """How far runs with an f16 cache differ from the batched f16 run: mean KLDs in nats per token.

    ``same`` is that of a second batched run, which differs because stored predictions are rounded. ``decode`` is that
    of the token-by-token run, which computes the same sums in another order.
    """

    same: float
    decode: float
    decode_error: float

    @property
    def floor(self) -> float:
        """A KLD below this is not caused by the cache type: the greater of ``same`` and ``decode`` plus 3 errors."""
        return max(self.same, self.decode + _SIGMAS * self.decode_error, 1e-6)


@dataclass(frozen=True)
class Band:
    """A verdict, and the mean KLD up to which it holds."""

    name: str
    up_to: float
    meaning: str


def bands(noise: Noise) -> list[Band]:
    """The bands, best first. Up to twice the noise floor there is no loss; the other bands end at steps above that."""
    none = 2 * noise.floor
    return [Band(name, none + step, meaning) for step, name, meaning in _STEPS]


def band(kld: float, scale: Sequence[Band]) -> Band:
    """The band of a mean KLD."""
    return next(one for one in scale if kld <= one.up_to)


@dataclass(frozen=True)
class Agreement:
    """The KLDs of the same tokens on the batched and on the one-token path, and the greatest allowed difference."""

    batched: float
    decode: float
    allowed: float

    @property
    def agree(self) -> bool:
        return abs(self.decode - self.batched) <= self.allowed


def agreement(batched: Divergence, decode: Divergence, noise: Noise) -> Agreement:
    """Compare the paths. They may differ by three standard errors of the difference plus twice the noise floor."""
    errors = math.hypot(batched.kld_error, decode.kld_error)
    return Agreement(batched.kld, decode.kld, _SIGMAS * errors + 2 * noise.floor)


@dataclass(frozen=True)
class Candidate:
    """What `recommend` needs to know about a pair: its label, size, loss, needles, and whether its paths agree."""

    label: str
    bits: float
    mib: float
    kld: float
    found: int
    asked: int
    agree: bool


def recommend(candidates: Sequence[Candidate], f16: Candidate, scale: Sequence[Band]) -> tuple[Candidate | None, str]:
    """The smallest cache whose loss is none or small, whose paths agree, and which finds as many needles as f16.

    Returns:
        The choice and the reason in plain English. The choice is None if no pair qualifies.
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
