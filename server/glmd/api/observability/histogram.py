"""Histograms for the hot path: one bisection and three additions for each observation."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence


class Histogram:
    """Counts of values by bucket, as Prometheus has them: a bucket's bound belongs to it.

    Attributes:
        bounds: upper bounds, rising; a last bucket without one follows.
        counts: values by bucket, not cumulated.
        sum: of all values.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value that was seen `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)

    def cumulated(self) -> Iterator[tuple[str, int]]:
        """Pairs of an upper bound, spelt, and how many values are no larger."""
        total = 0
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            total += count
            yield "+Inf" if bound is None else str(float(bound)), total
