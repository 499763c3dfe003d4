"""The sealed KV of consecutive tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx


class Segment:
    """KV of `len(self)` consecutive tokens, immutable: one [tokens, width] array per layer.

    The arrays own their memory (no views of larger buffers), so dropping the segment frees
    `nbytes`.
    """

    __slots__ = ("layers",)

    def __init__(self, layers: Sequence[mx.array]) -> None:
        self.layers = list(layers)

    def __len__(self) -> int:
        return self.layers[0].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def arrays(self) -> dict[str, mx.array]:
        """The segment's arrays by name, [tokens, …] each; inverted by `from_arrays`."""
        return {str(index): layer for index, layer in enumerate(self.layers)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, mx.array]) -> Segment:
        return cls(list(arrays.values()))

    @classmethod
    def copy_of(cls, layers: Sequence[mx.array], start: int, end: int) -> Segment:
        """Copy rows `start` to `end` of each layer, [rows, width], into a segment.

        Taken by index, as a slice would be a view that keeps the larger buffer alive. Evaluation
        is started here, as a lazy array would keep the whole step's graph alive.
        """
        rows = mx.arange(start, end)
        copies = [mx.take(layer, rows, axis=0) for layer in layers]
        mx.async_eval(*copies)
        return cls(copies)

    def slice(self, start: int, end: int) -> Segment:
        """Tokens `start` to `end` as a segment with its own memory."""
        if start == 0 and end == len(self):
            return self
        return Segment.copy_of(self.layers, start, end)

    def head(self, end: int) -> Segment:
        """The first `end` tokens, in this segment's memory: to be copied by `concat`."""
        return self if end == len(self) else Segment([layer[:end] for layer in self.layers])

    def concat(self, *others: Segment) -> Segment:
        """Copy this segment and `others` into one."""
        parts = [self.layers, *(other.layers for other in others)]
        layers = [mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True)]
        mx.async_eval(*layers)
        return Segment(layers)
