"""Layout of the rows of one step.

A step is N token rows. Consecutive rows form groups: decode groups (a few rows of each of many
sequences, written to tails) and prefill chunks (many rows of one sequence, sealed after the step).
Only attention looks at groups; all else runs over N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from glmd.kv_cache.segment import Segment
from glmd.kv_cache.stored_keys import StoredKeys, map_arrays


@dataclass(frozen=True, slots=True)
class SegmentSlice:
    """Keys `start` to `end` of a segment."""

    segment: Segment
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def keys(self, layer: int) -> StoredKeys:
        """[len(self), kv_width]"""
        keys = self.segment.layers[layer]
        whole = len(self) == keys.shape[0]
        return keys if whole else keys[self.start : self.end]


@dataclass(frozen=True, slots=True)
class KVSpan:
    """Rows `start` to `end` of a group see all keys of `slices`."""

    slices: tuple[SegmentSlice, ...]
    start: int
    end: int

    def __len__(self) -> int:
        """Number of keys."""
        return sum(map(len, self.slices))

    def keys(self, layer: int) -> list[StoredKeys]:
        """One array per slice, each [keys, kv_width]."""
        return [piece.keys(layer) for piece in self.slices]


@dataclass(frozen=True, slots=True)
class PaddedSpans:
    """Spans over equal numbers of rows, padded to equal lengths for one product.

    For short spans: copying their keys costs less than the dozen operations of a product for each.
    """

    spans: list[KVSpan]
    padding: list[StoredKeys]
    """For each span [longest - length, kv_width], appended to its keys."""
    visible: mx.array | None
    """[spans, 1, longest] bool, False for padding; None: there is no padding."""
    rows: mx.array | None
    """[spans * rows per span] int32: rows of the group; None: rows `start` to `end`."""

    @property
    def start(self) -> int:
        return self.spans[0].start

    @property
    def end(self) -> int:
        return self.spans[-1].end

    def __len__(self) -> int:
        """Number of keys per row, with padding."""
        return len(self.spans[0]) + self.padding[0].shape[0]

    def keys(self, layer: int) -> list[StoredKeys]:
        """One array [spans, longest, kv_width]."""
        parts: list[StoredKeys] = []
        for span, padding in zip(self.spans, self.padding, strict=True):
            parts += span.keys(layer)
            if padding.shape[0]:
                parts.append(padding)

        def join(*arrays: mx.array) -> mx.array:
            joined = mx.concatenate(list(arrays))
            return joined.reshape(len(self.spans), -1, joined.shape[-1])

        return [map_arrays(join, *parts)]


@dataclass(frozen=True, slots=True)
class SpanLevel:
    """Spans over disjoint rows of a decode group: at most one span per row."""

    parts: list[KVSpan | PaddedSpans]
    order: mx.array | None
    """[rows] int32: gather index into the concatenated outputs of `parts`; their number (a zero
    row) for rows without span. None: identity."""


@dataclass(frozen=True, slots=True)
class SlotPermutation:
    """Mapping between the sequences of a decode group and the slots of the tail pool."""

    sequences: mx.array
    """[slots] int32: the sequence of each slot; 0 for unused slots."""
    slots: mx.array
    """[sequences] int32: the slot of each sequence."""


@dataclass(frozen=True, slots=True)
class KernelLaunch:
    """One launch of the kernel of `glmd.model.mla_kernel`."""

    items: mx.array
    """[items, fields] int32: index in `segments` or -1 for a tail; first key and last + 1 (of a
    tail 0); first row; rows; slot of the tail."""
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """A decode group's keys, divided into items for that kernel.

    The same for all layers.
    """

    launches: tuple[KernelLaunch, ...]
    item_rows: int
    """Most rows of an item."""
    offsets: mx.array
    """[rows + 1] int32: where each row's `entries` begin."""
    entries: mx.array
    """[all rows' items, 2] int32: launch, and index of the row's first head in its results."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """`sequences` × `width` rows; row i belongs to sequence i // width.

    Tail keys of all sequences are multiplied in one batched product over the pool's slots. Unless
    the sequences are in slot order, the queries are gathered into slot order, as they are smaller
    than the keys, and the result is gathered back.
    """

    start: int
    sequences: int
    width: int
    """Rows per sequence: 1 + number of drafts."""
    fused_levels: list[SpanLevel]
    """Levels fused into the tails' softmax, which is cheaper than merging partial results.
    Invariant: all but the last have exactly one part covering all rows; the last has `order` None.
    """
    levels: list[SpanLevel]
    """The other levels."""
    slots: mx.array
    """[rows] int32: the tail that each row writes to."""
    tail_positions: mx.array
    """[rows] int32: the position in that tail."""
    order: SlotPermutation | None
    """None: sequence i has slot i, and there are no other slots."""
    tail_mask: mx.array
    """[slots, width * heads, capacity] in the dtype of queries: 0 for the tail keys that each row
    sees, else -inf. With `width` 1 the middle axis may be 1."""
    plan: KernelPlan | None = None
    """For `glmd.model.mla_kernel`, in place of all levels; None: it is not used."""

    @property
    def end(self) -> int:
        return self.start + self.sequences * self.width


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive rows of one sequence, which see `spans` and, causally, each other."""

    start: int
    end: int
    spans: list[KVSpan]
    expanded: bool
    """Whether to use the expanded form of MLA; see `glmd.model.mla`."""
    logits_rows: int
    """Number of rows, the last ones, whose final hidden states are needed. For other rows the last
    layer computes only cache vectors."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The rows of one step.

    Shapes: tokens [N] int32, positions [N] int32. The groups partition rows 0 to N in order,
    decode groups first.
    """

    tokens: mx.array
    positions: mx.array
    decode: list[DecodeGroup]
    chunks: list[PrefillChunk]
    deferred: bool = False
    """The MTP layer's KV will be computed later, from the input of the last layer."""

    @property
    def uses_kernel(self) -> bool:
        """Whether decode groups attend in `glmd.model.mla_kernel`."""
        return any(group.plan is not None for group in self.decode)

    @property
    def logits_rows(self) -> list[int]:
        """Rows whose final hidden states are needed: decode rows, some of each chunk."""
        decoding = self.decode[-1].end if self.decode else 0
        rows = list(range(decoding))
        for chunk in self.chunks:
            rows += range(chunk.end - chunk.logits_rows, chunk.end)
        return rows
