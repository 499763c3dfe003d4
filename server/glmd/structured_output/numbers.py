"""What a schema says of numbers: their bounds and `multipleOf`."""

from __future__ import annotations

import math
from decimal import Decimal

from glmd.chat.types import Json
from glmd.structured_output.schema_context import SchemaContext, malformed
from glmd.structured_output.values import is_exact

MAX_MULTIPLE = 10_000
"""Of `multipleOf`, its decimals taken as units: compiling takes 20 ms for each 1,000."""


def read_bound(reading: SchemaContext, keyword: str, value: Json) -> None:
    """`minimum`, `exclusiveMaximum` and the like."""
    if isinstance(value, bool) and keyword.startswith("exclusive"):  # draft 4
        other = keyword.replace("exclusiveM", "m")
        if value and other in reading.schema:
            read_bound(reading, keyword, reading.schema[other])
        return
    if not _is_number(value):
        raise malformed(reading.where(keyword), "a number")
    if not is_exact(value):
        reading.relax(keyword, ": doubles cannot hold it")
        return
    assert isinstance(value, int | float)
    tighter = max if keyword in ("minimum", "exclusiveMinimum") else min
    if keyword.startswith("exclusive") and value == int(value) and abs(value) < 1e11:
        # llguidance would take 0 for a number above 0 and below 0.5.
        step = 1e-9 if abs(value) < 1e6 else 1e-3
        value += step if tighter is max else -step
        keyword = keyword.removeprefix("exclusive").lower()
    reading.node[keyword] = tighter(value, reading.node.get(keyword, value))


def read_multiple(reading: SchemaContext, keyword: str, value: Json) -> None:
    """`multipleOf`."""
    if not _is_number(value) or not isinstance(value, int | float) or value <= 0:
        raise malformed(reading.where(keyword), "a number above 0")
    digits = Decimal(str(value)).normalize().as_tuple().digits
    if int("".join(map(str, digits))) > MAX_MULTIPLE:
        reading.relax(keyword, f" beyond {MAX_MULTIPLE}, or with as many decimals")
        return
    reading.node[keyword] = value


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
