"""The sealed KV of consecutive tokens."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


class Segment:
    """KV of `len(self)` consecutive tokens, immutable: one [tokens, width] array per layer.

    The arrays own their memory (no views of larger buffers), so that `nbytes` is what
    dropping the segment frees.
    """

    __slots__ = ("layers",)

    def __init__(self, layers: Sequence[mx.array]) -> None:
        self.layers = list(layers)

    def __len__(self) -> int:
        return self.layers[0].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @classmethod
    def copy_of(cls, layers: Sequence[mx.array], start: int, stop: int) -> Segment:
        """Rows `start` to `stop` of each layer, [rows, width], as a segment of its own memory.

        Taken by index, because a slice would be a view that keeps the larger buffer alive. The
        evaluation is started here: a lazy array would keep the whole step's graph alive.
        """
        rows = mx.arange(start, stop)
        copies = [mx.take(layer, rows, axis=0) for layer in layers]
        mx.async_eval(*copies)
        return cls(copies)

    def part(self, start: int, stop: int) -> Segment:
        """Tokens `start` to `stop` as a segment of its own memory."""
        if start == 0 and stop == len(self):
            return self
        return Segment.copy_of(self.layers, start, stop)

    def joined(self, *others: Segment) -> Segment:
        """This segment followed by `others`, copied into one."""
        parts = [self.layers, *(other.layers for other in others)]
        layers = [mx.concatenate(list(pieces)) for pieces in zip(*parts, strict=True)]
        mx.async_eval(*layers)
        return Segment(layers)
