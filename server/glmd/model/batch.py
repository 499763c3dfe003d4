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
class SegmentSlice:
    """The keys from `start` to `stop` of a segment."""

    segment: Segment
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def keys(self, layer: int) -> mx.array:
        """[len(self), kv_width]"""
        keys = self.segment.layers[layer]
        whole = len(self) == keys.shape[0]
        return keys if whole else keys[self.start : self.end]


@dataclass(frozen=True, slots=True)
class KVSpan:
    """Rows `start` to `last` of a group see all keys of some stretches."""

    slices: tuple[SegmentSlice, ...]
    start: int
    end: int

    def __len__(self) -> int:
        """Number of keys."""
        return sum(map(len, self.slices))

    def keys(self, layer: int) -> list[mx.array]:
        """One after the other, each [keys, kv_width]."""
        return [stretch.keys(layer) for stretch in self.slices]


@dataclass(frozen=True, slots=True)
class PaddedSpans:
    """Spans of as many rows each, met in one batched product.

    Their keys are copied for it, so they are short: then a product of its own for each would
    cost more in its dozen operations than in reading keys.
    """

    spans: list[KVSpan]
    padding: list[mx.array]
    """For each span [longest - its own, kv_width]: it makes them equally long, end to end."""
    visible: mx.array | None
    """[spans, 1, longest] bool: which keys are none of that; None: all."""
    rows: mx.array | None
    """[spans * rows each] int32; None: all from `start` to `last`."""

    @property
    def start(self) -> int:
        return self.spans[0].start

    @property
    def end(self) -> int:
        return self.spans[-1].end

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
class SpanLevel:
    """Spans over disjoint rows of a decode group. A row meets at most one span in each level."""

    parts: list[KVSpan | PaddedSpans]
    order: mx.array | None
    """[rows] int32: where each row is among those of `parts`, one behind the other; one behind the
    last for rows that no span names. None: just there, with none unnamed."""


@dataclass(frozen=True, slots=True)
class SlotPermutation:
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

    start: int
    sequences: int
    width: int
    """Rows per sequence: 1, or 1 + number of drafts."""
    fused_levels: list[SpanLevel]
    """What shares a softmax with the tails, which is less to do than merging. All but the last
    have one part, which all rows see; the last has no order."""
    levels: list[SpanLevel]
    """What rows see beside that."""
    slots: mx.array
    """[rows] int32: the tail that each row writes to."""
    tail_positions: mx.array
    """[rows] int32: where in the tail."""
    order: SlotPermutation | None
    """None: sequence i has slot i, and there are no others."""
    visible: mx.array
    """The tail keys that a row sees: bool, [sequences, width * heads, capacity], or 1 in place of
    the rows where there is one of each sequence."""

    @property
    def end(self) -> int:
        return self.start + self.sequences * self.width


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive rows of one sequence: they see `spans`, then each other causally."""

    start: int
    end: int
    spans: list[KVSpan]
    expanded: bool
    """Which form of MLA to take; see `glmd.model.mla`."""
    logits_rows: int
    """How many of the last rows' hidden states are asked for; of the others the last layer computes
    nothing but cache vectors."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's rows.

    Shapes: tokens [N] int32, positions [N] int32. The groups partition rows 0 to N in order.
    """

    tokens: mx.array
    positions: mx.array
    decode: list[DecodeGroup]
    chunks: list[PrefillChunk]

    @property
    def logits_rows(self) -> list[int]:
        """The rows whose hidden states are asked for: all that decode, and some of each chunk."""
        decoding = self.decode[-1].end if self.decode else 0
        rows = list(range(decoding))
        for chunk in self.chunks:
            rows += range(chunk.end - chunk.logits_rows, chunk.end)
        return rows
