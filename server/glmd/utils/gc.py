"""Garbage collection in processes with latency-critical loops."""

from __future__ import annotations

import gc


def freeze_gc_heap() -> None:
    """Exclude all objects that exist now from later garbage collections.

    A full collection takes 40 ms in the API process and 80 ms in the engine process, during which
    all streams stall.
    """
    gc.collect()
    gc.freeze()
