"""The LRU cache's bound."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from glmd.utils.lru import LRUCache


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12))))
def test_the_cache_never_exceeds_its_capacity(puts: list[tuple[int, int]]) -> None:
    kept: LRUCache[int, int] = LRUCache(10)
    for key, size in puts:
        kept.put(key, size, size)
        assert kept.size <= 10
        assert (kept.get(key) == size) == (size <= 10)
    assert kept.size == sum(kept.get(key) or 0 for key in range(6))
