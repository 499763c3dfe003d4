"""Sizes for people: GB are 10^9 bytes, GiB 2^30."""

from __future__ import annotations


def gb(nbytes: int) -> str:
    """`nbytes` in GB, as `decimal` has it."""
    return decimal(nbytes / 1e9)


def gib(nbytes: int) -> str:
    """`nbytes` in GiB, as `decimal` has it."""
    return decimal(nbytes / 2**30)


def decimal(value: float) -> str:
    """Three decimals, or as many as it takes to show three digits of a small value."""
    return f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"
