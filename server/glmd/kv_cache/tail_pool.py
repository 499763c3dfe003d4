"""Tails: the private, growing KV of running sequences, pooled so that one write serves all rows.

A tail holds the tokens that a sequence has computed since its last sealed segment. All tails
live in one [slots, capacity, width] array per layer; writing a step's rows is one scatter per
layer, whatever the number of sequences. Tails are short (`TAIL_TOKENS`), so unequal lengths
waste little, and a copy of the pool, should the runtime make one, costs little too.
"""

from __future__ import annotations

import heapq

import mlx.core as mx

from glmd.kv_cache.segment import Segment

TAIL_TOKENS = 128
"""A tail that has grown to this many tokens is sealed. Longer tails mean fewer copies into the
tree but more padding where sequences of unequal age run together."""

_GROW_TOKENS = 32
"""The pool's capacity per slot grows in steps of this many tokens."""


class TailPool:
    """Slots for tails of up to `TAIL_TOKENS` tokens plus drafts.

    Attributes:
        capacity: tokens that each slot has room for now.
    """

    def __init__(self, layers: int, width: int, dtype: mx.Dtype) -> None:
        self._width = width
        self._dtype = dtype
        self._count = layers
        self._pools: list[mx.array] = []
        self._free: list[int] = []
        self._used: set[int] = set()
        self.slots = 0
        self.capacity = 0

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self._pools)

    @property
    def used(self) -> int:
        """Number of slots in use."""
        return len(self._used)

    def allocate(self) -> int:
        """A free slot, the lowest, so that the slots in use stay close together."""
        if not self._free:
            grown = self._slots_for(self.slots + 1)
            for slot in range(self.slots, grown):
                heapq.heappush(self._free, slot)
            self._resize(grown, self.capacity)
        slot = heapq.heappop(self._free)
        self._used.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back. The last one frees the pool's memory.

        The pool shrinks when half of it lies beyond the slots in use: attention reads all of it.
        """
        self._used.remove(slot)
        heapq.heappush(self._free, slot)
        if not self._used:
            self._pools, self._free, self.slots, self.capacity = [], [], 0, 0
            return
        needed = self._slots_for(max(self._used) + 1)
        if needed <= self.slots // 2:
            self._free = [free for free in self._free if free < needed]
            heapq.heapify(self._free)
            self._resize(needed, self.capacity)

    def reset(self) -> None:
        """Take all slots back, whatever is in them."""
        self._pools, self._free, self.slots, self.capacity = [], [], 0, 0
        self._used = set()

    def reserve(self, tokens: int) -> None:
        """Set the capacity: room for `tokens` tokens in every slot, and little more."""
        capacity = _capacity_for(tokens)
        if capacity != self.capacity:
            self._resize(self.slots, capacity)

    def ensure(self, tokens: int) -> None:
        """Make room for `tokens` tokens in every slot."""
        if tokens > self.capacity:
            self.reserve(tokens)

    def growth(self, more_slots: int, tokens: int) -> int:
        """Tokens by which the pool grows for `more_slots` slots, all with room for `tokens`."""
        missing = max(0, more_slots - len(self._free))
        slots = self._slots_for(self.slots + missing)
        return max(0, slots * _capacity_for(tokens) - self.slots * self.capacity)

    def write(self, layer: int, slots: mx.array, positions: mx.array, kv: mx.array) -> None:
        """Store one row per (slot, position).

        Args:
            slots, positions: [rows] int32.
            kv: [rows, width].
        """
        self._pools[layer][slots, positions] = kv

    def view(self, layer: int) -> mx.array:
        """All slots of a layer: [slots, capacity, width]."""
        return self._pools[layer]

    def copy_out(self, slot: int, tokens: int) -> Segment:
        """The first `tokens` tokens of a tail, as a segment of its own memory."""
        return Segment.copy_of([pool[slot] for pool in self._pools], 0, tokens)

    def shift(self, slot: int, start: int, count: int) -> None:
        """Move `count` tokens from `start` on to the beginning of a tail, after it was sealed."""
        for pool in self._pools:
            pool[slot, :count] = pool[slot, start : start + count]

    def arrays(self) -> list[mx.array]:
        """The pool's arrays, to be evaluated with a step that wrote to them."""
        return self._pools

    @staticmethod
    def _slots_for(count: int) -> int:
        """Slots of a pool with room for `count`: the next power of two, then multiples of 8."""
        return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8

    def _resize(self, slots: int, capacity: int) -> None:
        more_slots, more_tokens = slots - self.slots, capacity - self.capacity
        shape = (slots, capacity, self._width)
        if not self._pools:
            self._pools = [mx.zeros(shape, self._dtype) for _ in range(self._count)]
        else:
            pad = [(0, max(more_slots, 0)), (0, max(more_tokens, 0)), (0, 0)]
            self._pools = [mx.pad(pool[:slots, :capacity], pad) for pool in self._pools]
        mx.async_eval(*self._pools)
        self.slots, self.capacity = slots, capacity


def _capacity_for(tokens: int) -> int:
    return -(-tokens // _GROW_TOKENS) * _GROW_TOKENS
