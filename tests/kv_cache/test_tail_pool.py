"""The pool of tails against plain lists of rows."""

from __future__ import annotations

import gc

import hypothesis.strategies as st
import mlx.core as mx
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from glmd.kv_cache.segment import Segment
from glmd.kv_cache.tail_pool import TAIL_TOKENS, TailPool

LAYERS, WIDTH = 2, 3


class PoolAgainstLists(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = TailPool(LAYERS, WIDTH, mx.float32)
        self.tails: dict[int, list[int]] = {}
        """Numbers written to each slot in use, one per token."""
        self.written = 0

    @rule()
    def allocate(self) -> None:
        if len(self.tails) >= 20:
            return
        growth = self.pool.growth(1, self.pool.capacity)
        before = self.pool.slots * self.pool.capacity
        slot = self.pool.allocate()
        assert slot not in self.tails
        assert self.pool.slots * self.pool.capacity - before == growth
        self.tails[slot] = []

    @precondition(lambda self: self.tails)
    @rule(which=st.integers(0, 10**6))
    def release(self, which: int) -> None:
        slot = sorted(self.tails)[which % len(self.tails)]
        del self.tails[slot]
        self.pool.release(slot)

    @precondition(lambda self: self.tails)
    @rule()
    def pack(self) -> None:
        """All tails move to the lowest slots, and none changes."""
        for slot in sorted(self.tails, reverse=True):
            tail = self.tails.pop(slot)
            self.tails[self.pool.move_down(slot)] = tail
        assert sorted(self.tails) == list(range(len(self.tails)))
        assert self.pool.slots < 2 * max(8, len(self.tails))

    @precondition(lambda self: self.tails)
    @rule(which=st.sets(st.integers(0, 19), min_size=1))
    def write_one_row_to_some(self, which: set[int]) -> None:
        """A decode step."""
        slots = [slot for i, slot in enumerate(sorted(self.tails)) if i in which]
        slots = [slot for slot in slots if len(self.tails[slot]) < TAIL_TOKENS]
        if not slots:
            return
        longest = max(len(tail) for tail in self.tails.values())
        growth = self.pool.growth(0, longest + 1)
        before = self.pool.nbytes
        self.pool.reserve(longest + 1)
        assert self.pool.nbytes - before <= growth * LAYERS * WIDTH * 4
        assert longest < self.pool.capacity <= longest + 1 + 31
        positions = [len(self.tails[slot]) for slot in slots]
        values = [self.written + i for i in range(len(slots))]
        self.written += len(slots)
        for layer in range(LAYERS):
            rows = np.outer(values, np.ones(WIDTH)) + layer / 2
            self.pool.write(
                layer, mx.array(slots), mx.array(positions), mx.array(rows.astype(np.float32))
            )
        for slot, value in zip(slots, values, strict=True):
            self.tails[slot].append(value)

    @precondition(lambda self: any(self.tails.values()))
    @rule(which=st.integers(0, 10**6), kept=st.integers(0, 3))
    def seal(self, which: int, kept: int) -> None:
        """Copy a tail out, and move the tokens behind the sealed ones to its beginning."""
        slot = sorted(s for s in self.tails if self.tails[s])[
            which % sum(bool(tail) for tail in self.tails.values())
        ]
        tail = self.tails[slot]
        segment = self.pool.copy_out(slot, len(tail))
        assert len(segment) == len(tail)
        assert segment.nbytes == len(tail) * LAYERS * WIDTH * 4
        for layer, array in enumerate(segment.layers):
            assert (np.array(array) == np.array(tail)[:, None] + layer / 2).all()
        kept = min(kept, len(tail))
        if kept:
            self.pool.shift(slot, len(tail) - kept, kept)
        self.tails[slot] = tail[len(tail) - kept :]

    @invariant()
    def slots_hold_the_written_numbers(self) -> None:
        assert self.pool.used == len(self.tails)
        if not self.tails:
            assert self.pool.nbytes == self.pool.slots == self.pool.capacity == 0
            return
        assert max(self.tails) < self.pool.slots
        assert self.pool.slots < 2 * max(8, max(self.tails) + 9)
        assert self.pool.nbytes == self.pool.slots * self.pool.capacity * LAYERS * WIDTH * 4
        for layer in range(LAYERS):
            view = np.array(self.pool.view(layer))
            for slot, tail in self.tails.items():
                assert (view[slot, : len(tail)] == np.array(tail)[:, None] + layer / 2).all()


def test_pool_behaves_as_lists_of_rows() -> None:
    PoolAgainstLists.TestCase.settings = settings(
        max_examples=40, stateful_step_count=40, deadline=None
    )
    PoolAgainstLists.TestCase().runTest()


def test_memory_returns_to_zero_when_the_last_tail_ends() -> None:
    gc.collect()
    before = mx.get_active_memory()
    pool = TailPool(4, 64, mx.float32)
    slots = [pool.allocate() for _ in range(9)]
    pool.reserve(TAIL_TOKENS)
    mx.eval(pool.arrays())
    assert mx.get_active_memory() - before >= 9 * TAIL_TOKENS * 4 * 64 * 4
    for slot in slots:
        pool.release(slot)
    mx.synchronize()
    assert mx.get_active_memory() == before


def test_pool_shrinks_after_a_burst() -> None:
    pool = TailPool(1, 8, mx.float32)
    slots = [pool.allocate() for _ in range(32)]
    pool.reserve(100)
    for slot in slots[2:]:
        pool.release(slot)
    assert pool.slots == 2
    mx.eval(pool.arrays())
    assert pool.nbytes == 2 * pool.capacity * 8 * 4
    assert pool.allocate() == 2


def test_a_segment_owns_its_memory_and_no_more() -> None:
    """A view would keep all of a step's activations, or the whole pool, alive."""
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()
    whole = mx.zeros((1000, 64)) + 1
    mx.eval(whole)
    segments = [
        Segment.copy_of([whole], 0, 10),
        Segment.copy_of([whole], 100, 110),
        Segment.copy_of([whole[100:200]], 0, 10),
        Segment.copy_of([whole], 0, 1000).slice(0, 10),
        Segment.copy_of([whole * 2], 0, 1000).slice(990, 1000),
        Segment.copy_of([whole], 0, 4).concat(Segment.copy_of([whole], 4, 10)),
    ]
    mx.eval([segment.layers for segment in segments])
    del whole
    gc.collect()
    assert [segment.nbytes for segment in segments] == [10 * 64 * 4] * 6
    # The allocator rounds up to its pages and blocks.
    assert mx.get_active_memory() - before <= 6 * (10 * 64 * 4 + 16_384)


def test_parts_and_joins_keep_the_rows() -> None:
    layers = [mx.arange(60).reshape(20, 3) + 100 * layer for layer in range(2)]
    segment = Segment.copy_of(layers, 0, 20)
    assert segment.slice(0, 20) is segment
    joined = segment.slice(0, 7).concat(segment.slice(7, 20))
    assert len(joined) == 20
    for array, expected in zip(joined.layers, layers, strict=True):
        assert (np.array(array) == np.array(expected)).all()
