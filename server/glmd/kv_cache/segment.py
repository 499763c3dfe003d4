"""The sealed KV of consecutive tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from glmd.kv_cache.stored_keys import QuantizedKeys, StoredKeys, arrays_of, map_arrays

DEFERRED = "deferred"
"""Name of the last layer's input in the arrays of a deferred segment."""


class Segment:
    """KV of `len(self)` consecutive tokens, immutable: [tokens, width] per layer.

    The arrays own their memory (no views of larger buffers), so dropping the segment frees
    `nbytes`.

    Attributes:
        deferred: the MTP layer's KV is not computed yet. The last array is the input of the main
            model's last layer, from which it can be: [tokens, hidden].
        caught_up: the MTP layer's KV of the first tokens of a deferred segment, in parts.
    """

    __slots__ = ("caught_up", "deferred", "layers")

    def __init__(self, layers: Sequence[StoredKeys], *, deferred: bool = False) -> None:
        self.layers = list(layers)
        self.deferred = deferred
        self.caught_up: list[mx.array] = []

    def __len__(self) -> int:
        return self.layers[0].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def num_caught_up(self) -> int:
        """Number of tokens in `caught_up`."""
        return sum(part.shape[0] for part in self.caught_up)

    def completed(self) -> Segment:
        """This deferred segment with the KV in `caught_up`, which is of all its tokens."""
        last = mx.concatenate(self.caught_up)
        mx.async_eval(last)
        return Segment([*self.layers[:-1], last])

    def arrays(self) -> dict[str, mx.array]:
        """The segment's arrays by name, [tokens, …] each; inverted by `from_arrays`."""
        names = [str(index) for index in range(len(self.layers))]
        if self.deferred:
            names[-1] = DEFERRED
        return {
            f"{name}.{part}" if part else name: array
            for name, layer in zip(names, self.layers, strict=True)
            for part, array in enumerate(arrays_of(layer))
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, mx.array], kv_bits: int = 16) -> Segment:
        """Build a segment of the arrays of another with the same `kv_bits`."""
        if kv_bits == 16:
            return cls(list(arrays.values()), deferred=DEFERRED in arrays)
        layers = [name for name in arrays if "." not in name]
        parts = [(arrays[n], arrays[f"{n}.1"], arrays[f"{n}.2"]) for n in layers]
        return cls([QuantizedKeys(part, kv_bits) for part in parts])

    @classmethod
    def copy_of(
        cls, layers: Sequence[StoredKeys], start: int, end: int, *, deferred: bool = False
    ) -> Segment:
        """Copy rows `start` to `end` of each layer, [rows, width], into a segment.

        Taken by index, as a slice would be a view that keeps the larger buffer alive. Evaluation
        is started here, as a lazy array would keep the whole step's graph alive.
        """
        rows = mx.arange(start, end)
        copies = [map_arrays(lambda array: mx.take(array, rows, axis=0), k) for k in layers]
        copy = cls(copies, deferred=deferred)
        mx.async_eval(*copy.arrays().values())
        return copy

    def slice(self, start: int, end: int) -> Segment:
        """Tokens `start` to `end` as a segment with its own memory."""
        if start == 0 and end == len(self):
            return self
        return Segment.copy_of(self.layers, start, end, deferred=self.deferred)

    def joins(self, other: Segment) -> bool:
        """Whether both can be one segment."""
        return self.deferred == other.deferred

    def head(self, end: int) -> Segment:
        """The first `end` tokens, in this segment's memory: to be copied by `concat`."""
        if end == len(self):
            return self
        return Segment([layer[:end] for layer in self.layers], deferred=self.deferred)

    def concat(self, *others: Segment) -> Segment:
        """Copy this segment and `others` into one."""
        parts = [self.layers, *(other.layers for other in others)]
        joined = Segment(
            [
                map_arrays(lambda *arrays: mx.concatenate(list(arrays)), *layer)
                for layer in zip(*parts, strict=True)
            ],
            deferred=self.deferred,
        )
        mx.async_eval(*joined.arrays().values())
        return joined
