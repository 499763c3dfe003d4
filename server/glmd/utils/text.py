"""Text for messages: quotations, suggestions for names, sizes with units."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_QUOTED = 100
"""Characters of a text that a message quotes."""


def quoted(text: str) -> str:
    """Return `text` as a literal, cut, as `repr` of 4 MiB holds the GIL for 0.3 s."""
    return repr(text) if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]!r}…"


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
