"""Allocation of bits: one choice for each item, so that the sum of losses is least within a budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Choice", "allocate", "allocate_for_loss", "hull", "least", "most"]


@dataclass(frozen=True)
class Choice:
    """One way to store an item, with its cost (in bits) and its loss (in nats per token)."""

    name: str
    cost: float
    loss: float


Item = Sequence[Choice]


def hull(item: Item) -> list[Choice]:
    """The lower convex hull of an item's choices, in order of ascending cost and descending loss.

    The loss saved per unit of cost decreases from step to step. Choices above the hull are not optimal for any price.
    """
    corners: list[Choice] = []
    for choice in sorted(item, key=lambda one: (one.cost, one.loss)):
        if corners and choice.loss >= corners[-1].loss:
            continue
        while len(corners) > 1 and _price(corners[-2], corners[-1]) <= _price(corners[-1], choice):
            corners.pop()
        corners.append(choice)
    return corners


def allocate(items: Sequence[Item], budget: float) -> list[Choice]:
    """The choices with the least total loss whose total cost is at most `budget`.

    As the price of a bit falls (one Lagrange multiplier for all items), each item advances along its hull; this is the
    optimum for the bits spent so far. When the next step does not fit, the rest of the budget is spent greedily, also
    on choices above the hulls.

    Raises:
        ValueError: the cheapest choices cost more than the budget.
    """
    chosen, slack = _cheapest(items), _slack(budget)
    left = budget - sum(choice.cost for choice in chosen)
    if left < -slack:
        raise ValueError(f"the cheapest choices cost {budget - left:g}, and the budget is {budget:g}")
    climbing = set(range(len(items)))  # later steps of an item require its former steps
    for _, index, corner in _steps(items):
        step = corner.cost - chosen[index].cost
        if index in climbing and step <= left + slack:
            chosen[index] = corner
            left -= step
        else:
            climbing.discard(index)
    return _fill(items, chosen, left, slack)


def allocate_for_loss(items: Sequence[Item], limit: float) -> list[Choice]:
    """The choices with the least total cost whose total loss is at most `limit`, found along the same hulls.

    Raises:
        ValueError: the best choices lose more than the limit.
    """
    chosen = _cheapest(items)
    loss = sum(choice.loss for choice in chosen)
    for _, index, corner in _steps(items):
        if loss <= limit:
            break
        loss += corner.loss - chosen[index].loss
        chosen[index] = corner
    if loss > limit + _slack(limit):
        raise ValueError(f"the best choices lose {loss:g}, and the limit is {limit:g}")
    return _drop(items, chosen, limit - loss, _slack(limit))


def least(items: Sequence[Item]) -> float:
    """The total cost of the cheapest choices."""
    return sum(choice.cost for choice in _cheapest(items))


def most(items: Sequence[Item]) -> float:
    """The total cost of the choices with the least loss."""
    return sum(hull(item)[-1].cost for item in items)


def _slack(scale: float) -> float:
    return 1e-9 * abs(scale)  # tolerance for sums of floats


def _price(cheap: Choice, dear: Choice) -> float:
    """The loss saved per unit of cost."""
    return (cheap.loss - dear.loss) / (dear.cost - cheap.cost)


def _cheapest(items: Sequence[Item]) -> list[Choice]:
    return [hull(item)[0] for item in items]


def _steps(items: Sequence[Item]) -> list[tuple[float, int, Choice]]:
    """All steps along the hulls, in order of descending saving per cost; the steps of an item stay in order."""
    steps = []
    for index, item in enumerate(items):
        corners = hull(item)
        steps += [(_price(a, b), index, b) for a, b in itertools.pairwise(corners)]
    return sorted(steps, key=lambda step: -step[0])


def _fill(items: Sequence[Item], chosen: list[Choice], left: float, slack: float) -> list[Choice]:
    """Spend the rest of the budget, the greatest saving per cost first, then exchange bits between pairs of items."""
    while True:
        better = [
            (_price(chosen[index], choice), index, choice)
            for index, item in enumerate(items)
            for choice in item
            if choice.loss < chosen[index].loss and 0 < choice.cost - chosen[index].cost <= left + slack
        ]
        if not better:
            exchange = _exchange(items, chosen, left, slack)
            if exchange is None:
                return chosen
            for index, choice in exchange:
                left -= choice.cost - chosen[index].cost
                chosen[index] = choice
            continue
        _, index, choice = max(better, key=lambda one: one[0])
        left -= choice.cost - chosen[index].cost
        chosen[index] = choice


def _exchange(
    items: Sequence[Item], chosen: list[Choice], left: float, slack: float
) -> list[tuple[int, Choice]] | None:
    """The best change of two items that fits the budget: one gets fewer bits, the other more."""
    moves = [
        (choice.loss - chosen[index].loss, choice.cost - chosen[index].cost, index, choice)
        for index, item in enumerate(items)
        for choice in item
        if choice != chosen[index]
    ]
    best, gain = None, -_slack(sum(choice.loss for choice in chosen))
    ups = [move for move in moves if move[0] < 0]
    downs = [move for move in moves if move[1] < 0]
    for up in ups:
        for down in downs:
            if up[2] != down[2] and up[1] + down[1] <= left + slack and up[0] + down[0] < gain:
                best, gain = [(up[2], up[3]), (down[2], down[3])], up[0] + down[0]
    return best


def _drop(items: Sequence[Item], chosen: list[Choice], spare: float, slack: float) -> list[Choice]:
    """Remove bits as long as the loss stays within the limit, the greatest savings of bits first."""
    while True:
        cheaper = [
            (chosen[index].cost - choice.cost, index, choice)
            for index, item in enumerate(items)
            for choice in item
            if choice.cost < chosen[index].cost and choice.loss - chosen[index].loss <= spare + slack
        ]
        if not cheaper:
            return chosen
        _, index, choice = max(cheaper, key=lambda one: one[0])
        spare -= choice.loss - chosen[index].loss
        chosen[index] = choice
