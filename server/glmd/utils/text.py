"""Text for messages: suggestions for misspelled names, sizes with units."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean PORT?` for the known name most like `name`, or `.` for none."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else "."


def gb(nbytes: int) -> str:
    """Format bytes as GB, without the unit."""
    return decimal(nbytes / 1e9)


def gib(nbytes: int) -> str:
    """Format bytes as GiB, without the unit."""
    return decimal(nbytes / 2**30)


def decimal(value: float) -> str:
    """Format with three decimals, or with three significant digits below 0.1."""
    return f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"
