"""How the rows of one step are laid out: who is whose, and which rows see which keys.

A step is N token rows. They are divided into groups of consecutive rows: decode groups (a few
rows of each of many sequences, writing to tails) and chunks (many rows of one sequence, about
to be sealed). Only attention looks at groups; everything else sees N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from glmd.kv_cache.segment import Segment


@dataclass(frozen=True, slots=True)
class Stretch:
    """The keys from `start` to `stop` of a segment."""

    segment: Segment
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def keys(self, layer: int) -> mx.array:
        """[len(self), kv_width]"""
        keys = self.segment.layers[layer]
        whole = len(self) == keys.shape[0]
        return keys if whole else keys[self.start : self.stop]


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `first` to `last` of a group see all keys of some stretches."""

    stretches: tuple[Stretch, ...]
    first: int
    last: int

    def __len__(self) -> int:
        """Number of keys."""
        return sum(map(len, self.stretches))

    def keys(self, layer: int) -> list[mx.array]:
        """One after the other, each [keys, kv_width]."""
        return [stretch.keys(layer) for stretch in self.stretches]


@dataclass(frozen=True, slots=True)
class Gathered:
    """Spans of as many rows each, met in one batched product.

    Their keys are copied for it, so they are short: then a product of its own for each would
    cost more in its dozen operations than in reading keys.
    """

    spans: list[Span]
    padding: list[mx.array]
    """For each span [longest - its own, kv_width]: it makes them equally long, end to end."""
    visible: mx.array | None
    """[spans, 1, longest] bool: which keys are none of that; None: all."""
    rows: mx.array | None
    """[spans * rows each] int32; None: all from `first` to `last`."""

    @property
    def first(self) -> int:
        return self.spans[0].first

    @property
    def last(self) -> int:
        return self.spans[-1].last

    def __len__(self) -> int:
        """Number of keys that each row meets, with padding."""
        return len(self.spans[0]) + self.padding[0].shape[0]

    def keys(self, layer: int) -> list[mx.array]:
        """One array [spans, longest, kv_width]."""
        parts: list[mx.array] = []
        for span, padding in zip(self.spans, self.padding, strict=True):
            parts += span.keys(layer)
            if padding.shape[0]:
                parts.append(padding)
        keys = mx.concatenate(parts)
        return [keys.reshape(len(self.spans), -1, keys.shape[-1])]


@dataclass(frozen=True, slots=True)
class Level:
    """Spans over disjoint rows of a decode group. A row meets at most one span in each level."""

    parts: list[Span | Gathered]
    order: mx.array | None
    """[rows] int32: where each row is among those of `parts`, one behind the other; one behind the
    last for rows that no span names. None: just there, with none unnamed."""


@dataclass(frozen=True, slots=True)
class SlotOrder:
    """How sequences and slots of tails correspond, where they are not one and the same order."""

    sequences: mx.array
    """[slots] int32; unused slots name sequence 0."""
    slots: mx.array
    """[sequences] int32."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """`sequences` × `width` rows; row i belongs to sequence i // width.

    Tail keys of all sequences are met in one batched product over the pool's slots, so the
    queries are brought into slot order (they are smaller than the keys) and the result back, unless
    sequences are in that order already.
    """

    first: int
    sequences: int
    width: int
    """Rows per sequence: 1, or 1 + number of drafts."""
    near: list[Level]
    """What shares a softmax with the tails, which is less to do than merging. All but the last
    have one part, which all rows see; the last has no order."""
    levels: list[Level]
    """What rows see beside that."""
    slots: mx.array
    """[rows] int32: the tail that each row writes to."""
    tail_positions: mx.array
    """[rows] int32: where in the tail."""
    order: SlotOrder | None
    """None: sequence i has slot i, and there are no others."""
    visible: mx.array
    """The tail keys that a row sees: bool, [sequences, width * heads, capacity], or 1 in place of
    the rows where there is one of each sequence."""

    @property
    def last(self) -> int:
        return self.first + self.sequences * self.width


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of one sequence: they see `spans`, then each other causally."""

    first: int
    last: int
    spans: list[Span]
    expanded: bool
    """Which form of MLA to take; see `glmd.model.mla`."""
    wanted: int
    """How many of the last rows' hidden states are asked for; of the others the last layer computes
    nothing but cache vectors."""


@dataclass(frozen=True, slots=True)
class RowBatch:
    """One step's rows.

    Shapes: tokens [N] int32, positions [N] int32. The groups partition rows 0 to N in order.
    """

    tokens: mx.array
    positions: mx.array
    decode: list[DecodeGroup]
    chunks: list[Chunk]

    @property
    def wanted(self) -> list[int]:
        """The rows whose hidden states are asked for: all that decode, and some of each chunk."""
        decoding = self.decode[-1].last if self.decode else 0
        rows = list(range(decoding))
        for chunk in self.chunks:
            rows += range(chunk.last - chunk.wanted, chunk.last)
        return rows
