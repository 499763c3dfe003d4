"""The LRU cache's bound, and how values are weighed."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from glmd.utils.lru import ENTRY_BYTES, LRUCache, memory_bytes


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1200))))
def test_the_cache_never_exceeds_its_capacity(puts: list[tuple[int, int]]) -> None:
    kept: LRUCache[int, int] = LRUCache(1000)
    for key, nbytes in puts:
        size = nbytes + memory_bytes(key) + ENTRY_BYTES
        assert kept.put(key, size, nbytes) == (size <= 1000)
        assert kept.size <= 1000
        assert (kept.get(key) == size) == (size <= 1000)
    assert kept.size == sum(kept.get(key) or 0 for key in range(6))


class Item(BaseModel):
    id: str
    parts: list[dict[str, object]]


def items(number: int) -> list[Item]:
    return [Item(id=f"item {number} {at}", parts=[{"text": f"{at}", "of": []}]) for at in range(9)]


@pytest.mark.parametrize(
    "make",
    [
        lambda number: json.loads(f"[{','.join(['[]'] * 500)}]"),
        lambda number: {f"a{number}": [1.5, f"text {number}", {"b": None}]},
        lambda number: "é" * (100 + number),
        lambda number: (np.zeros(500, np.int32), np.frombuffer(bytes(4000), np.int32)),
        items,
    ],
    ids=["arrays", "members", "text", "ids", "models"],
)
def test_the_counted_memory_is_what_the_entries_take(make: Callable[[int], object]) -> None:
    kept: LRUCache[bytes, object] = LRUCache(1 << 40)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(200):
            kept.put(number.to_bytes(16, "big"), make(number))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.6 < (after - before) / kept.size < 1.1


def test_shared_objects_count_once_in_a_value() -> None:
    shared = ["a" * 1000]
    assert memory_bytes([shared] * 100) < 3000


def test_cycles_end() -> None:
    cycle: list[object] = []
    cycle.append(cycle)
    assert memory_bytes(cycle) < 200
