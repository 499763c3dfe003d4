"""Format sizes: a GB is 10^9 bytes, a GiB 2^30 bytes."""

from __future__ import annotations


def gb(nbytes: int) -> str:
    """Format bytes as GB, without the unit."""
    return decimal(nbytes / 1e9)


def gib(nbytes: int) -> str:
    """Format bytes as GiB, without the unit."""
    return decimal(nbytes / 2**30)


def decimal(value: float) -> str:
    """Format with three decimals, or with three significant digits below 0.1."""
    return f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"
