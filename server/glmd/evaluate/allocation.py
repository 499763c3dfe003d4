"""One option per item within a budget: the multiple-choice knapsack problem."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Option:
    """Bytes of an item, and what they cost in KL."""

    nbytes: int
    cost: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """The index of each item's option.

    Attributes:
        cost: sum of the options' costs.
        bound: no allocation within the budget costs less (of the linear relaxation).
    """

    chosen: tuple[int, ...]
    nbytes: int
    cost: float
    bound: float


def allocate(items: Sequence[Sequence[Option]], budget: int) -> Allocation | None:
    """Minimise the cost within a budget.

    The greedy algorithm on each item's lower convex hull is optimal for the linear relaxation,
    where at most one item has a mixture of two options (Sinha & Zoltners 1979). The steps that
    still fit behind the first that does not are taken too.

    Returns:
        None: the cheapest options exceed the budget.
    """
    hulls = [_hull(options) for options in items]
    places = [0] * len(items)
    used = sum(items[i][hull[0]].nbytes for i, hull in enumerate(hulls))
    if used > budget:
        return None
    cost = sum(items[i][hull[0]].cost for i, hull in enumerate(hulls))
    bound: float | None = None

    def step(item: int) -> tuple[float, int] | None:
        hull, place = hulls[item], places[item]
        if place + 1 == len(hull):
            return None
        before, after = items[item][hull[place]], items[item][hull[place + 1]]
        return (after.cost - before.cost) / (after.nbytes - before.nbytes), item

    heap = [found for item in range(len(items)) if (found := step(item)) is not None]
    heapq.heapify(heap)
    while heap:
        slope, item = heapq.heappop(heap)
        before = items[item][hulls[item][places[item]]]
        after = items[item][hulls[item][places[item] + 1]]
        more = after.nbytes - before.nbytes
        if used + more > budget:
            if bound is None:
                bound = cost + slope * (budget - used)
            continue
        used += more
        cost += after.cost - before.cost
        places[item] += 1
        if (found := step(item)) is not None:
            heapq.heappush(heap, found)
    chosen = tuple(hull[place] for hull, place in zip(hulls, places, strict=True))
    return Allocation(chosen, used, cost, cost if bound is None else bound)


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull, by increasing bytes."""
    order = sorted(range(len(options)), key=lambda i: (options[i].nbytes, options[i].cost))
    hull: list[int] = []
    for index in order:
        new = options[index]
        if hull and new.cost >= options[hull[-1]].cost:
            continue
        while len(hull) > 1:
            a, b = options[hull[-2]], options[hull[-1]]
            if (b.cost - a.cost) * (new.nbytes - b.nbytes) < (new.cost - b.cost) * (
                b.nbytes - a.nbytes
            ):
                break
            hull.pop()
        hull.append(index)
    return hull
