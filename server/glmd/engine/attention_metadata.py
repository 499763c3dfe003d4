"""Which rows of a decode group see which stretches of which segments.

Sequences are sorted so that those sharing a stretch stand next to each other; each stretch
then is in one span over consecutive rows, and is read once for all of them. Short ones are put
together, as every span costs a dozen operations in every layer, whatever its length.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from glmd.engine.sequence import Sequence
from glmd.kv_cache.node import PathNode
from glmd.kv_cache.prefix_tree import PrefixTree
from glmd.kv_cache.segment import Segment
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import KVSpan, PaddedSpans, SegmentSlice, SlotPermutation, SpanLevel
from glmd.model.mla import MLAShape

TreePath = list[PathNode[Segment]]

MAX_FUSED_SCORES = 1 << 21
"""Attention scores, rows by heads by keys, up to which segments are met in one softmax with the
tails: 8 MiB in float32."""

MAX_JOINED_SPAN = 4096
"""Tokens up to which stretches that the same rows see one after the other are one span."""

MAX_PADDED_SPAN_BYTES = 288 << 10
"""Of one layer's keys: the size up to which the spans of single sequences are gathered, 128 tokens
of GLM-4.7-Flash in float32. Gathering copies the keys, each time that they are read."""


def sort_by_prefix(sequences: list[Sequence], paths: list[TreePath]) -> list[int]:
    """An order in which the rows that share any stretch of any node are consecutive.

    Within a node, rows that use more of it come first, so that those using at least x tokens
    of it are consecutive for every x. Otherwise they are in the order of their slots, in which
    tails need not be reordered.
    """
    first: dict[int, int] = {}
    for sequence, path in zip(sequences, paths, strict=True):
        for piece in path:
            node = id(piece.node)
            first[node] = min(sequence.slot, first.get(node, sequence.slot))

    def key(i: int) -> tuple[list[tuple[int, int, int]], int]:
        nodes = ((id(piece.node), piece.length) for piece in paths[i])
        return [(first[node], node, -length) for node, length in nodes], sequences[i].slot

    return sorted(range(len(sequences)), key=key)


def slot_order(slots: list[int], pool: int) -> SlotPermutation | None:
    """The order of sequences' slots among the `pool` that there are; None if it is theirs."""
    if slots == list(range(pool)):
        return None
    sequences = np.zeros(pool, np.int32)
    sequences[slots] = np.arange(len(slots))
    return SlotPermutation(mx.array(sequences), mx.array(slots, mx.int32))


def split_fused_levels(
    found: list[SpanLevel], tail_keys: int, rows: int, heads: int
) -> tuple[list[SpanLevel], list[SpanLevel]]:
    """Of the levels, those that share one softmax with the tails (see `DecodeGroup`); the others.

    Args:
        tail_keys: of each row.
    """
    chosen: list[SpanLevel] = []
    others: list[SpanLevel] = []
    shared = tail_keys
    split = False
    for level in found:
        sizes = [(part.end - part.start) * (shared + len(part)) for part in level.parts]
        if split or level.order is not None or sum(sizes) * heads > MAX_FUSED_SCORES:
            others.append(level)
            continue
        chosen.append(level)
        split = len(level.parts) > 1
        shared += len(level.parts[0])
    return chosen, others


def build_levels(paths: list[TreePath], width: int) -> list[list[KVSpan]]:
    """Spans for sequences in the order of `sort_by_prefix`, each of `width` rows.

    Every row sees every token of its path in exactly one span. Rows that share a stretch have
    the same history before it, so its level is that history's number of spans. The spans of a
    level are over disjoint rows, in row order.
    """
    builder = _Builder(paths, width)
    builder.add(0, len(paths), depth=0, level=0)
    return builder.levels


def pad_short_spans(
    spans: list[KVSpan], width: int, rows: int, kv_width: int, dtype: mx.Dtype
) -> SpanLevel:
    """A level of spans, over `rows` rows in all, with what can be met together.

    Args:
        kv_width: values of a token's key in one layer, of `dtype`.
    """
    longest = MAX_PADDED_SPAN_BYTES // (kv_width * dtype.size)
    short: list[KVSpan] = []
    others: list[KVSpan] = []
    for span in spans:
        alone = span.end - span.start == width
        (short if alone and len(span) <= longest else others).append(span)
    if len(short) < 2:
        short, others = [], spans
    parts: list[KVSpan | PaddedSpans] = [*others]
    together = True
    if short:
        together = short[-1].end - short[0].start == len(short) * width
        parts.append(_gathered(short, kv_width, dtype, together=together))
    if together:
        parts.sort(key=lambda part: part.start)
    at = np.concatenate([_rows(part) for part in parts])
    if len(at) == rows and (np.diff(at) == 1).all():
        return SpanLevel(parts, None)
    order = np.full(rows, len(at), np.int32)
    order[at] = np.arange(len(at), dtype=np.int32)
    return SpanLevel(parts, mx.array(order))


def _gathered(
    spans: list[KVSpan], kv_width: int, dtype: mx.Dtype, *, together: bool
) -> PaddedSpans:
    lengths = np.array([len(span) for span in spans], np.int32)
    longest = int(lengths.max())
    visible = np.arange(longest) < lengths[:, None, None]
    padding = [mx.zeros((longest - len(span), kv_width), dtype) for span in spans]
    at = np.concatenate([_rows(span) for span in spans])
    return PaddedSpans(
        spans,
        padding,
        None if visible.all() else mx.array(visible),
        None if together else mx.array(at),
    )


def _rows(part: KVSpan | PaddedSpans) -> npt.NDArray[np.int32]:
    spans = [part] if isinstance(part, KVSpan) else part.spans
    return np.concatenate([np.arange(s.start, s.end, dtype=np.int32) for s in spans])


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """What of a decode group stays the same from step to step.

    Attributes:
        order: of its sequences, by index in those that it was asked for.
        near, levels, slots, slot_order: see `DecodeGroup`.
        sealed: [sequences, 1] int32, the position at which each tail begins.
    """

    order: list[int]
    fused_levels: list[SpanLevel]
    levels: list[SpanLevel]
    slots: mx.array
    slot_order: SlotPermutation | None
    sealed: mx.array


class AttentionMetadataBuilder:
    """Layouts of decode groups, each kept while the step after needs it, too.

    Args:
        shape, dtype: of the model.
    """

    def __init__(
        self, tree: PrefixTree[Segment], tails: TailPool, shape: MLAShape, dtype: mx.Dtype
    ) -> None:
        self._tree = tree
        self._tails = tails
        self._shape = shape
        self._dtype = dtype
        self._before: dict[Hashable, AttentionMetadata] = {}
        self._now: dict[Hashable, AttentionMetadata] = {}

    def next_step(self) -> None:
        """Forget what this step did not ask for."""
        self._before, self._now = self._now, {}

    def clear(self) -> None:
        """Let go of all segments."""
        self._before, self._now = {}, {}

    def build(self, sequences: list[Sequence], width: int) -> AttentionMetadata:
        """The layout of `width` rows of each sequence; all have slots and leases."""
        ends = tuple(
            (s.slot, s.num_cached_tokens, s.lease.node, s.lease.length)
            for s in sequences
            if s.lease is not None
        )
        # Joining or cutting segments may leave a lease where it is, and its layout with old ones.
        key = (ends, width, self._tails.slots, self._tree.version)
        layout = self._before.get(key) or self._now.get(key) or self._make(sequences, width)
        self._now[key] = layout
        return layout

    def _make(self, sequences: list[Sequence], width: int) -> AttentionMetadata:
        paths = [self._tree.path(s.lease) for s in sequences if s.lease is not None]
        order = sort_by_prefix(sequences, paths)
        rows = len(sequences) * width
        found = build_levels([paths[i] for i in order], width)
        shape = self._shape
        gathered = [
            pad_short_spans(spans, width, rows, shape.kv_width, self._dtype) for spans in found
        ]
        closest, others = split_fused_levels(gathered, self._tails.capacity, rows, shape.heads)
        slots = [sequences[i].slot for i in order]
        return AttentionMetadata(
            order=order,
            fused_levels=closest,
            levels=others,
            slots=mx.array(np.repeat(np.array(slots, np.int32), width)),
            slot_order=slot_order(slots, self._tails.slots),
            sealed=mx.array([[sequences[i].num_cached_tokens] for i in order], mx.int32),
        )


class _Builder:
    def __init__(self, paths: list[TreePath], width: int) -> None:
        self.levels: list[list[KVSpan]] = []
        self._paths = paths
        self._width = width

    def add(self, first: int, last: int, *, depth: int, level: int) -> None:
        """Add the spans of sequences `first` to `last` from piece `depth` on; they agree before."""
        paths = self._paths
        start = first
        while start < last:
            if depth == len(paths[start]):
                start += 1
                continue
            node = paths[start][depth].node
            stop = start
            while stop < last and depth < len(paths[stop]) and paths[stop][depth].node is node:
                stop += 1
            self._add_node(start, stop, depth=depth, level=level)
            start = stop

    def _add_node(self, first: int, last: int, *, depth: int, level: int) -> None:
        """Add the spans of one node, whose lengths descend over the rows, and what follows it."""
        segment = self._paths[first][depth].node.kv
        assert segment is not None
        start = 0
        while last > first:
            stop = self._paths[last - 1][depth].length
            stretch = SegmentSlice(segment, start, stop)
            span = KVSpan((stretch,), first * self._width, last * self._width)
            level = self._add_span(level, span)
            shorter = last
            while last > first and self._paths[last - 1][depth].length == stop:
                last -= 1
            self.add(last, shorter, depth=depth + 1, level=level)
            start = stop

    def _add_span(self, level: int, span: KVSpan) -> int:
        """Add a span, or join it to the same rows' span before; returns the next one's level.

        Spans come in any row order: those of longer use of a node after those behind shorter.
        """
        if level:
            before = self.levels[level - 1]
            at = bisect_left(before, span.start, key=lambda other: other.start)
            if at < len(before) and (before[at].start, before[at].end) == (span.start, span.end):
                joined = KVSpan(before[at].slices + span.slices, span.start, span.end)
                if len(joined) <= MAX_JOINED_SPAN:
                    before[at] = joined
                    return level
        if level == len(self.levels):
            self.levels.append([])
        insort(self.levels[level], span, key=lambda other: other.start)
        return level + 1
