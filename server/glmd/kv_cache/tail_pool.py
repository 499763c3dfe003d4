"""Tails: the private, growing KV of running sequences, in one pool.

A tail holds the tokens that a sequence has computed since its last sealed segment. All tails are
in one [slots, capacity, width] array per layer, so writing the rows of a step is one scatter per
layer at any number of sequences. Tails are short (`TAIL_TOKENS`), so padding to equal lengths and
copying the pool cost little.
"""

from __future__ import annotations

import heapq

import mlx.core as mx

from glmd.kv_cache.segment import Segment
from glmd.kv_cache.stored_keys import StoredKeys, arrays_of, map_arrays, zeros

TAIL_TOKENS = 128
"""Length at which a tail is sealed. Longer tails mean fewer copies into the tree but more padding
where sequences of unequal age run together."""

_GROW_TOKENS = 32
"""The capacity of the slots is a multiple of this many tokens."""


class TailPool:
    """Slots for tails of up to `TAIL_TOKENS` tokens plus drafts.

    Args:
        layers: number of layers.
        width: values of a token's KV in one layer.
        deferred_width: width of the array that is in the place of the last layer's KV while the
            tails are deferred, as they are at first; None: they never are.

    Attributes:
        slots: number of slots.
        capacity: tokens that fit into each slot.
        deferred: tails become deferred segments; see `Segment`.
        screening: deferred tails have the last layer's KV as well, in front of that array, for
            drafts. Segments do not get it.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        dtype: mx.Dtype,
        bits: int = 16,
        *,
        deferred_width: int | None = None,
    ) -> None:
        self._bits = bits
        self._layers = layers
        self._width = width
        self._deferred_width = deferred_width
        self._widths = [width] * layers
        self._dtype = dtype
        self.deferred = self.screening = False
        self._pools: list[StoredKeys]
        self.slots: int
        self.capacity: int
        self.reset()
        self.set_deferred(self.defers)

    @property
    def defers(self) -> bool:
        """Whether the tails can be deferred."""
        return self._deferred_width is not None

    @property
    def has_all_kv(self) -> bool:
        """Whether the tails have the KV of all layers."""
        return not self.deferred or self.screening

    @property
    def deferred_index(self) -> int:
        """Index of the array for deferred segments, in place of a layer's."""
        return len(self._widths) - 1

    def set_deferred(self, deferred: bool, *, screening: bool = False) -> None:
        """Change what the tails hold. They must be empty, unless they were screening."""
        had, self.deferred, self.screening = self.screening, deferred, screening
        widths = [self._width] * (self._layers - 1)
        if self.has_all_kv:
            widths.append(self._width)
        if deferred:
            assert self._deferred_width is not None
            widths.append(self._deferred_width)
        self._widths = widths
        if not self._pools:
            return
        others = self._pools[: self._layers - 1]
        if had:
            self._pools = [*others, self._pools[-1 if deferred else -2]]
        else:
            shape = self.slots, self.capacity
            new = [mx.zeros((*shape, width), self._dtype) for width in widths[len(others) :]]
            self._pools = [*others, *new]

    def in_order(self, caches: list[StoredKeys], last: StoredKeys) -> list[StoredKeys]:
        """Add the last layer's KV to what the main model gives, in the order of the tails."""
        place = self._layers - 1
        return [*caches[:place], last, *caches[place:]]

    def for_segment(self, layers: list[StoredKeys]) -> list[StoredKeys]:
        """Leave out the last layer's KV, of arrays in the order of the tails, while screening."""
        return [*layers[:-2], layers[-1]] if self.screening else layers

    def reset(self) -> None:
        """Release all slots and free the pool's memory."""
        self._pools = []
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
        """Return the lowest free slot, so that the slots in use stay close together."""
        if not self._free:
            grown = self._slots_for(self.slots + 1)
            self._free = list(range(self.slots, grown))
            self.resize(grown, self.capacity)
        slot = heapq.heappop(self._free)
        self._used.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Free a slot. The pool's memory is freed with the last one.

        The pool shrinks when half of it lies beyond the slots in use, as attention reads all slots.
        """
        self._used.remove(slot)
        heapq.heappush(self._free, slot)
        if not self._used:
            self.reset()
            return
        needed = self._slots_for(max(self._used) + 1)
        if needed <= self.slots // 2:
            self._free = [free for free in self._free if free < needed]
            heapq.heapify(self._free)
            self.resize(needed, self.capacity)

    def move_down(self, slot: int) -> int:
        """Move a tail to the lowest free slot if that is lower; return the tail's slot."""
        if not self._free or self._free[0] > slot:
            return slot
        lowest = self.allocate()
        self.copy_slot(slot, lowest)
        self.release(slot)
        return lowest

    def copy_slot(self, source: int, target: int) -> None:
        """Copy a tail to another slot."""
        for array in self.arrays():
            array[target] = array[source]

    def reserve(self, tokens: int) -> None:
        """Resize the slots to hold `tokens` tokens, rounded up."""
        capacity = _capacity_for(tokens)
        if capacity != self.capacity:
            self.resize(self.slots, capacity)

    def ensure(self, tokens: int) -> None:
        """Grow the slots to hold at least `tokens` tokens."""
        if tokens > self.capacity:
            self.reserve(tokens)

    def growth(self, more_slots: int, tokens: int) -> int:
        """Tokens by which the pool grows for `more_slots` slots and `tokens` tokens in each."""
        missing = max(0, more_slots - len(self._free))
        slots = self._slots_for(self.slots + missing)
        return max(0, slots * _capacity_for(tokens) - self.slots * self.capacity)

    def write(self, layer: int, slots: mx.array, positions: mx.array, kv: StoredKeys) -> None:
        """Store one row per (slot, position).

        Args:
            slots, positions: [rows] int32.
            kv: [rows, width].
        """
        for pool, new in zip(arrays_of(self._pools[layer]), arrays_of(kv), strict=True):
            pool[slots, positions] = new

    def view(self, layer: int) -> StoredKeys:
        """All slots of a layer: [slots, capacity, width]."""
        return self._pools[layer]

    def copy_out(self, slot: int, tokens: int) -> Segment:
        """Copy the first `tokens` tokens of a tail into a segment."""
        layers = [pool[slot] for pool in self.for_segment(self._pools)]
        return Segment.copy_of(layers, 0, tokens, deferred=self.deferred)

    def shift(self, slot: int, start: int, count: int) -> None:
        """Move `count` tokens from `start` to the beginning of a tail, after it was sealed."""
        for pool in self._pools:
            for array in arrays_of(pool):
                array[slot, :count] = array[slot, start : start + count]

    def arrays(self) -> list[mx.array]:
        """The pool's arrays, to be evaluated with a step that wrote to them."""
        return [array for pool in self._pools for array in arrays_of(pool)]

    @staticmethod
    def _slots_for(count: int) -> int:
        """Round a number of slots up to a power of two, and from 8 to a multiple of 8."""
        return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8

    def resize(self, slots: int, capacity: int) -> None:
        """Change the pool's size. The tails in use must fit."""
        if not self._pools:
            self._pools = [
                zeros((slots, capacity, width), self._dtype, self._bits) for width in self._widths
            ]
        else:
            pad = [(0, max(slots - self.slots, 0)), (0, max(capacity - self.capacity, 0)), (0, 0)]
            self._pools = [
                map_arrays(lambda array: mx.pad(array[:slots, :capacity], pad), pool)
                for pool in self._pools
            ]
        mx.async_eval(*self.arrays())
        self.slots, self.capacity = slots, capacity


def _capacity_for(tokens: int) -> int:
    return -(-tokens // _GROW_TOKENS) * _GROW_TOKENS
