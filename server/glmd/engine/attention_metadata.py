"""Attention metadata of decode groups: rows and the segment slices they see.

Sequences are sorted so that those sharing a slice are adjacent. Each slice then is in one span over
consecutive rows and is read once for all of them. Short slices are joined or padded together, since
each span costs a dozen operations in every layer, whatever its length.
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
from glmd.kv_cache.stored_keys import StoredKeys, map_arrays
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import (
    DecodeGroup,
    KernelPlan,
    KVSpan,
    PaddedSpans,
    SegmentSlice,
    SlotPermutation,
    SpanLevel,
)
from glmd.model.mla import MLAShape
from glmd.model.mla_kernel import plan_items

TreePath = list[PathNode[Segment]]

MAX_FUSED_SCORES = 1 << 21
"""Attention scores (rows by heads by keys) up to which segments share one softmax with the tails:
8 MiB in float32."""

MAX_JOINED_SPAN = 4096
"""Tokens up to which consecutive slices of the same rows are one span."""

MAX_PADDED_SPAN_BYTES = 288 << 10
"""Size of one layer's keys up to which spans of single sequences are padded together: 128 tokens of
GLM-4.7-Flash in float32. Padding copies the keys each time they are read."""

MAX_PADDED_SPAN_BYTES_GPU = 1792 << 10
"""The same on a GPU: 1,592 tokens in bfloat16. A span of its own is eight to eleven kernels, 12 to
16 µs; the copy takes as long from 1.5 MiB on at 220 GB/s, from 3 MiB on at 430 GB/s."""

MAX_PADDING = 2
"""Factor by which padding may multiply the keys of spans of more than `MAX_PADDED_SPAN_BYTES`."""


@dataclass(frozen=True, slots=True)
class LayoutInputs:
    """What metadata was built from; see `AttentionMetadataBuilder.layout`."""

    paths: list[TreePath]
    slots: list[int]
    tail_starts: list[int]


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """The part of a decode group that stays the same from step to step.

    Attributes:
        order: the group's sequences, as indices into those it was built for.
        width: rows of each sequence.
        fused_levels, levels, slots, slot_order, plan: see `DecodeGroup`.
        tail_starts: [sequences, 1] int32, the position at which each tail begins.
    """

    order: list[int]
    width: int
    fused_levels: list[SpanLevel]
    levels: list[SpanLevel]
    slots: mx.array
    slot_order: SlotPermutation | None
    tail_starts: mx.array
    plan: KernelPlan | None
    inputs: LayoutInputs


class AttentionMetadataBuilder:
    """Builds the metadata of decode groups, and reuses them while consecutive steps do.

    Args:
        shape, dtype: of the model.

    Attributes:
        kernel: whether groups get a plan for `glmd.model.mla_kernel`.
    """

    def __init__(
        self, tree: PrefixTree[Segment], tails: TailPool, shape: MLAShape, dtype: mx.Dtype
    ) -> None:
        self._tree = tree
        self._tails = tails
        self._shape = shape
        self._dtype = dtype
        self.kernel = shape.kernel
        self._gpu = not shape.slices_copied
        self._previous: dict[Hashable, AttentionMetadata] = {}
        self._current: dict[Hashable, AttentionMetadata] = {}

    def next_step(self) -> None:
        """Forget what this step did not use."""
        self._previous, self._current = self._current, {}

    def clear(self) -> None:
        """Forget everything, and with it all references to segments."""
        self._previous, self._current = {}, {}

    def build(
        self, sequences: list[Sequence], width: int, *, deferred: bool = True
    ) -> AttentionMetadata:
        """Metadata for `width` rows of each sequence. All need a slot and a lease.

        Args:
            deferred: include deferred segments, which have no KV of the MTP layer.
        """
        ends = tuple(
            (s.slot, s.num_cached_tokens, s.lease.node, s.lease.length)
            for s in sequences
            if s.lease is not None
        )
        # The tree may join or cut segments without moving a lease: hence its version.
        key = (ends, width, deferred, self._tails.slots, self._tree.version)
        found = self._previous.get(key) or self._current.get(key)
        if found is None:
            found = self._build(sequences, width, deferred=deferred)
        self._current[key] = found
        return found

    def _build(self, sequences: list[Sequence], width: int, *, deferred: bool) -> AttentionMetadata:
        paths = [self._tree.path(s.lease) for s in sequences if s.lease is not None]
        if not deferred:
            paths = [[p for p in path if p.node.kv and not p.node.kv.deferred] for path in paths]
        order = sort_by_prefix(sequences, paths)
        return self.layout(
            order,
            [paths[i] for i in order],
            [sequences[i].slot for i in order],
            [sequences[i].num_cached_tokens for i in order],
            width,
        )

    def layout(
        self,
        order: list[int],
        paths: list[TreePath],
        slots: list[int],
        tail_starts: list[int],
        width: int,
    ) -> AttentionMetadata:
        """Metadata for `width` rows of each path, in the order of `sort_by_prefix`."""
        shape = self._shape
        spans = build_levels(paths, width)
        plan: KernelPlan | None = None
        if self.kernel:
            plan = plan_items(shape, [span for level in spans for span in level], slots, width)
        fused: list[SpanLevel] = []
        levels: list[SpanLevel] = []
        if plan is None:
            rows = len(paths) * width
            all_levels = [
                pad_short_spans(level, width, rows, shape.kv_width, self._dtype, gpu=self._gpu)
                for level in spans
            ]
            fused, levels = split_fused_levels(all_levels, self._tails.capacity, shape.heads)
        return AttentionMetadata(
            order=order,
            width=width,
            fused_levels=fused,
            levels=levels,
            slots=mx.array(np.repeat(np.array(slots, np.int32), width)),
            slot_order=slot_order(slots, self._tails.slots),
            tail_starts=mx.array([[start] for start in tail_starts], mx.int32),
            plan=plan,
            inputs=LayoutInputs(paths, slots, tail_starts),
        )

    def decode_group(
        self, metadata: AttentionMetadata, start: int, positions: mx.array
    ) -> DecodeGroup:
        """The model's description of a group in one step.

        Args:
            start: the group's first row in the step.
            positions: [sequences, width] int32, in the metadata's order.
        """
        tail_positions = positions - metadata.tail_starts
        visible = mx.arange(self._tails.capacity) <= tail_positions[..., None]
        if metadata.slot_order is not None:
            visible = visible[metadata.slot_order.sequences]
        if metadata.width > 1:
            visible = mx.repeat(visible, self._shape.heads, axis=1)
        return DecodeGroup(
            start=start,
            sequences=len(metadata.order),
            width=metadata.width,
            fused_levels=metadata.fused_levels,
            levels=metadata.levels,
            slots=metadata.slots,
            tail_positions=tail_positions.flatten(),
            order=metadata.slot_order,
            tail_mask=mx.where(visible, 0.0, -mx.inf).astype(self._dtype),
            plan=metadata.plan,
        )


def sort_by_prefix(sequences: list[Sequence], paths: list[TreePath]) -> list[int]:
    """An order in which the rows that share any slice of any node are consecutive.

    Within a node, rows that use more of the node come first: then the rows that use at least x of
    its tokens are consecutive for every x. Otherwise rows are in slot order, in which tails need no
    permutation.
    """
    lowest_slot: dict[int, int] = {}
    for sequence, path in zip(sequences, paths, strict=True):
        for part in path:
            node = id(part.node)
            lowest_slot[node] = min(sequence.slot, lowest_slot.get(node, sequence.slot))

    def key(i: int) -> tuple[list[tuple[int, int, int]], int]:
        nodes = ((id(part.node), part.length) for part in paths[i])
        return [(lowest_slot[node], node, -length) for node, length in nodes], sequences[i].slot

    return sorted(range(len(sequences)), key=key)


def slot_order(slots: list[int], pool: int) -> SlotPermutation | None:
    """The permutation between sequences and the `pool` slots.

    None if it is the identity.
    """
    if slots == list(range(pool)):
        return None
    sequences = np.zeros(pool, np.int32)
    sequences[slots] = np.arange(len(slots))
    return SlotPermutation(mx.array(sequences), mx.array(slots, mx.int32))


def split_fused_levels(
    all_levels: list[SpanLevel], tail_keys: int, heads: int
) -> tuple[list[SpanLevel], list[SpanLevel]]:
    """Split levels into those that share a softmax with the tails (see `DecodeGroup`) and others.

    Args:
        tail_keys: tail keys of each row.
    """
    fused: list[SpanLevel] = []
    others: list[SpanLevel] = []
    keys = tail_keys
    complete = False
    for level in all_levels:
        sizes = [(part.end - part.start) * (keys + len(part)) for part in level.parts]
        if complete or level.order is not None or sum(sizes) * heads > MAX_FUSED_SCORES:
            others.append(level)
            continue
        fused.append(level)
        complete = len(level.parts) > 1
        keys += len(level.parts[0])
    return fused, others


def pad_short_spans(
    spans: list[KVSpan],
    width: int,
    rows: int,
    kv_width: int,
    dtype: mx.Dtype,
    *,
    gpu: bool = False,
) -> SpanLevel:
    """One level's spans, over `rows` rows in all, with short ones padded together.

    Args:
        kv_width: values of a token's key in one layer, of `dtype`.
        gpu: whether launching a kernel costs more than copying.
    """
    token_bytes = kv_width * dtype.size
    limits = [MAX_PADDED_SPAN_BYTES // token_bytes]
    if gpu:
        limits.insert(0, MAX_PADDED_SPAN_BYTES_GPU // token_bytes)
    for limit in limits:
        short: list[KVSpan] = []
        others: list[KVSpan] = []
        for span in spans:
            single = span.end - span.start == width
            (short if single and len(span) <= limit else others).append(span)
        lengths = [len(span) for span in short]
        if lengths and max(lengths) * len(lengths) <= MAX_PADDING * sum(lengths):
            break
    if len(short) < 2:
        short, others = [], spans
    parts: list[KVSpan | PaddedSpans] = [*others]
    contiguous = True
    if short:
        contiguous = short[-1].end - short[0].start == len(short) * width
        parts.append(_pad(short, contiguous=contiguous))
    if contiguous:
        parts.sort(key=lambda part: part.start)
    covered = np.concatenate([_rows(part) for part in parts])
    if len(covered) == rows and (np.diff(covered) == 1).all():
        return SpanLevel(parts, None)
    order = np.full(rows, len(covered), np.int32)
    order[covered] = np.arange(len(covered), dtype=np.int32)
    return SpanLevel(parts, mx.array(order))


def _pad(spans: list[KVSpan], *, contiguous: bool) -> PaddedSpans:
    lengths = np.array([len(span) for span in spans], np.int32)
    longest = int(lengths.max())
    visible = np.arange(longest) < lengths[:, None, None]
    like = spans[0].slices[0].segment.layers[0]

    def zeros(count: int) -> StoredKeys:
        return map_arrays(lambda array: mx.zeros((count, array.shape[-1]), array.dtype), like)

    padding = [zeros(longest - len(span)) for span in spans]
    rows = np.concatenate([_rows(span) for span in spans])
    return PaddedSpans(
        spans,
        padding,
        None if visible.all() else mx.array(visible),
        None if contiguous else mx.array(rows),
    )


def _rows(part: KVSpan | PaddedSpans) -> npt.NDArray[np.int32]:
    spans = [part] if isinstance(part, KVSpan) else part.spans
    return np.concatenate([np.arange(s.start, s.end, dtype=np.int32) for s in spans])


def build_levels(paths: list[TreePath], width: int) -> list[list[KVSpan]]:
    """Spans for sequences in the order of `sort_by_prefix`, each of `width` rows.

    Every row sees every token of its path in exactly one span. Rows that share a slice have the
    same path before it, so the slice's level is the number of spans of that path. The spans of a
    level are over disjoint rows, in row order.
    """
    builder = _LevelBuilder(paths, width)
    builder.add(0, len(paths), depth=0, level=0)
    return builder.levels


class _LevelBuilder:
    def __init__(self, paths: list[TreePath], width: int) -> None:
        self.levels: list[list[KVSpan]] = []
        self._paths = paths
        self._width = width

    def add(self, start: int, end: int, *, depth: int, level: int) -> None:
        """Add the spans of sequences `start` to `end` from depth `depth` of their paths on.

        Above that depth the paths are the same.
        """
        paths = self._paths
        while start < end:
            if depth == len(paths[start]):
                start += 1
                continue
            node = paths[start][depth].node
            node_end = start
            while (
                node_end < end
                and depth < len(paths[node_end])
                and paths[node_end][depth].node is node
            ):
                node_end += 1
            self._add_node(start, node_end, depth=depth, level=level)
            start = node_end

    def _add_node(self, start: int, end: int, *, depth: int, level: int) -> None:
        """Add the spans of one node, whose used length descends over the sequences, and below."""
        segment = self._paths[start][depth].node.kv
        assert segment is not None
        slice_start = 0
        while end > start:
            slice_end = self._paths[end - 1][depth].length
            part = SegmentSlice(segment, slice_start, slice_end)
            level = self._add_span(level, KVSpan((part,), start * self._width, end * self._width))
            shorter_end = end
            while end > start and self._paths[end - 1][depth].length == slice_end:
                end -= 1
            self.add(end, shorter_end, depth=depth + 1, level=level)
            slice_start = slice_end

    def _add_span(self, level: int, span: KVSpan) -> int:
        """Add a span, or join it to the same rows' span one level above.

        Returns the next level.

        Spans come in any row order: those of a longer use of a node after those below a shorter.
        """
        if level:
            above = self.levels[level - 1]
            at = bisect_left(above, span.start, key=lambda other: other.start)
            if at < len(above) and (above[at].start, above[at].end) == (span.start, span.end):
                joined = KVSpan(above[at].slices + span.slices, span.start, span.end)
                if len(joined) <= MAX_JOINED_SPAN:
                    above[at] = joined
                    return level
        if level == len(self.levels):
            self.levels.append([])
        insort(self.levels[level], span, key=lambda other: other.start)
        return level + 1
