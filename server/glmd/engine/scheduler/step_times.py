"""Measured step times: without prefill by decoding sequences, with prefill over all rows.

The time of a step with prefill is a measured curve, not a line: on a GPU the first hundred rows
cost one pass over the weights, whatever their number, and on a CPU every row counts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import log2

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BUCKETS_PER_OCTAVE = 4
"""Buckets in which steps of similar numbers of rows are measured together, for each doubling."""

WINDOW = 9
"""Observations kept of each kind. Unlike a running mean, their quantiles forget an outlier soon."""

BASE_QUANTILE = 0.25
"""Of steps without prefill: behind a step with prefill they still insert its chunks."""

PREFILL_QUANTILE = 0.75
"""Of the time per row with prefill. With the median, every second step would take too long."""

GROUPED_ROWS = 64
"""Rows of a step from which MLX reads each expert once, rather than for each row: 4 pairs of rows
and experts per expert. Fewer rows can take longer, so both sides have a curve of their own."""

RETRY_AFTER = 64
"""Steps with prefill after which measurements of fewer rows count as newer."""

FORGET_AFTER = 512
"""Steps with prefill after which a measurement is dropped. Contexts, and the time that attention to
them takes, will have changed."""


@dataclass(slots=True)
class _Bucket:
    """Observations of similar numbers of rows."""

    rows: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW))
    per_row: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    last: int = 0
    """When the last was made, in observations."""


class StepTimeCurve:
    """Seconds of a step with prefill, by the number of all rows."""

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}
        self._points: list[tuple[float, float]] | None = None

    def observe(self, rows: int, seconds: float, now: int) -> None:
        """Add a measurement.

        Args:
            now: number of steps with prefill so far.
        """
        bucket = self._buckets.setdefault(int(BUCKETS_PER_OCTAVE * log2(rows)), _Bucket())
        bucket.rows.append(rows)
        bucket.per_row.append(seconds / rows)
        bucket.last = now
        self._points = None
        for size in [s for s, b in self._buckets.items() if b.last < now - FORGET_AFTER]:
            del self._buckets[size]

    @property
    def points(self) -> list[tuple[float, float]]:
        """Measured (rows, seconds), ascending.

        More rows take no less time, and no more per row. Where a measurement contradicts a newer
        one, it is moved to the nearest time that does not. One that was made only once does not
        overrule others.
        """
        if self._points is None:
            points: list[tuple[float, float]] = []
            buckets = self._buckets.values()
            for bucket in sorted(buckets, key=lambda b: (len(b.rows) == 1, -b.last)):
                rows = float(np.mean(bucket.rows))
                # Rounded down: the first of two measurements may include compiling kernels.
                ordered = sorted(bucket.per_row)
                seconds = rows * ordered[int(PREFILL_QUANTILE * (len(ordered) - 1))]
                for other_rows, other in points:
                    in_proportion = other * rows / other_rows
                    least, most = sorted((other, in_proportion))
                    seconds = min(max(seconds, least), most)
                points.append((rows, seconds))
            self._points = sorted(points)
        return self._points

    @property
    def observations(self) -> int:
        """Number of measurements kept."""
        return sum(len(bucket.rows) for bucket in self._buckets.values())

    @property
    def last(self) -> int:
        """When the last measurement was made; 0: never."""
        return max((bucket.last for bucket in self._buckets.values()), default=0)

    def seconds(self, rows: Ints, decoding: int, base: float, beyond: float) -> Floats:
        """Estimate the seconds of each number of rows.

        Interpolated between measured numbers and the step without prefill.

        Args:
            decoding, base: rows and seconds of the step without prefill.
            beyond: factor on the time of more rows than were measured, against proportion.
        """
        known = [point for point in self.points if point[0] > decoding]
        if not known:
            known = [(decoding + self.points[-1][0], base + self.points[-1][1])]
        last_rows, last_seconds = known[-1]
        added_rows, added = last_rows - decoding, max(0.0, last_seconds - base)
        more = [(decoding + n * added_rows, base + n * beyond * added) for n in (2, 1e6)]
        x, y = zip((decoding, base), *known, *more, strict=True)
        estimated: Floats = np.interp(rows, x, y)
        return estimated

    def __bool__(self) -> bool:
        return bool(self._buckets)


class StepTimes:
    """Step times with and without prefill."""

    def __init__(self) -> None:
        self._base: dict[int, deque[float]] = {}
        self._ungrouped, self._grouped = StepTimeCurve(), StepTimeCurve()
        self._prefill_steps = 0

    def observe(self, decoding: int, prefill_rows: int, seconds: float) -> None:
        """Learn from the duration of a step with `decoding` sequences."""
        if prefill_rows:
            self._prefill_steps += 1
            rows = decoding + prefill_rows
            curve = self._grouped if rows >= GROUPED_ROWS else self._ungrouped
            curve.observe(rows, seconds, self._prefill_steps)
        elif decoding:
            self._base.setdefault(decoding, deque(maxlen=WINDOW)).append(seconds)

    def base(self, decoding: int) -> float | None:
        """Seconds of a step with about `decoding` sequences and no prefill; None: unknown.

        Measured for similar numbers only: extrapolated from one sequence to eight, streams would
        seem to cost too little.
        """
        nearest = min(self._base, key=lambda known: abs(known - decoding), default=None)
        if nearest is None or abs(nearest - decoding) > decoding // 4:
            return None
        return self._measured(nearest)

    def lower_bound(self, decoding: int) -> float | None:
        """Least seconds of such a step, from other numbers of sequences; None if there are none."""
        known = [self._measured(n) * min(1.0, decoding / n) for n in self._base]
        return max(known, default=None)

    def _measured(self, decoding: int) -> float:
        # Called in each step, where numpy's quantile of nine numbers takes 0.1 ms.
        ordered = sorted(self._base[decoding])
        place = BASE_QUANTILE * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    @property
    def has_prefill(self) -> bool:
        """Whether any step with prefill has been measured."""
        return bool(self._grouped or self._ungrouped)

    @property
    def has_ungrouped(self) -> bool:
        """Whether a step with prefill and fewer than `GROUPED_ROWS` rows has been measured."""
        return bool(self._ungrouped)

    @property
    def few_grouped(self) -> bool:
        """Whether fewer than two steps with prefill of `GROUPED_ROWS` rows have been measured.

        The first may include the compilation of kernels.
        """
        return self._grouped.observations < 2

    def with_prefill(
        self, decoding: int, rows: Ints, base: float, *, beyond: float = 1.0
    ) -> Floats:
        """Estimate the seconds of a step with each number of prefill rows.

        Numbers of rows on a side of `GROUPED_ROWS` without measurements are estimated from the
        other side. Grouped rows do not take longer than ungrouped ones, if these are newer.

        Args:
            base: seconds without prefill.
            beyond: as in `StepTimeCurve.seconds`.
        """
        total = decoding + rows
        curves = self._ungrouped or self._grouped, self._grouped or self._ungrouped
        ungrouped, grouped = (curve.seconds(total, decoding, base, beyond) for curve in curves)
        few = self._grouped.observations < 2
        if few or self._ungrouped.last > self._grouped.last + RETRY_AFTER:
            grouped = np.minimum(grouped, ungrouped)
        return np.where(total >= GROUPED_ROWS, grouped, ungrouped)
