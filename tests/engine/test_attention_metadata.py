"""Spans of decode groups: each row sees each key of its path exactly once."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import mlx.core as mx
import numpy as np
from hypothesis import given, settings

from glmd.engine.attention_metadata import (
    MAX_FUSED_SCORES,
    MAX_JOINED_SPAN,
    MAX_PADDED_SPAN_BYTES,
    build_levels,
    pad_short_spans,
    sort_by_prefix,
    split_fused_levels,
)
from glmd.kv_cache.node import Node, PathNode
from glmd.model.batch import KVSpan, PaddedSpans

KV_WIDTH = 1024
PADDED = MAX_PADDED_SPAN_BYTES // (4 * KV_WIDTH)


@dataclass
class Keys:
    """Stand-in for a segment, compared by identity."""

    length: int

    @property
    def layers(self) -> list[mx.array]:
        return [mx.zeros((self.length, KV_WIDTH))]


def _sort(paths: list[list[PathNode[Any]]]) -> list[int]:
    """Order the paths of sequences in slots 0, 1, …"""
    rows: list[Any] = [SimpleNamespace(slot=slot) for slot in range(len(paths))]
    return sort_by_prefix(rows, paths)


@dataclass
class Branch:
    """Description of a node, with children at offsets."""

    length: int
    children: list[tuple[int, Branch]] = field(default_factory=list)


def _branches(depth: int) -> st.SearchStrategy[Branch]:
    if depth == 0:
        return st.builds(Branch, st.integers(1, 6))
    child = st.tuples(st.integers(1, 6), _branches(depth - 1))
    return st.builds(Branch, st.integers(1, 6), st.lists(child, max_size=3))


def _paths(branch: Branch, before: list[PathNode[Any]]) -> list[list[PathNode[Any]]]:
    """All paths from the root into a tree of branches."""
    node: Node[Any] = Node(np.zeros(branch.length, np.int32), Keys(branch.length), None, 0)
    found = [[*before, PathNode(node, end)] for end in range(1, branch.length + 1)]
    for offset, child in branch.children:
        found += _paths(child, [*before, PathNode(node, min(offset, branch.length))])
    return found


@st.composite
def _rows(draw: st.DrawFn) -> list[list[PathNode[Any]]]:
    roots = draw(st.lists(_branches(3), min_size=1, max_size=3))
    every: list[list[PathNode[Any]]] = [[]]
    for root in roots:
        every += _paths(root, [])
    return draw(st.lists(st.sampled_from(every), min_size=1, max_size=24))


@settings(max_examples=300, deadline=None)
@given(_rows(), st.integers(1, 4))
def test_every_row_sees_every_key_of_its_path_exactly_once(
    paths: list[list[PathNode[Any]]], width: int
) -> None:
    order = _sort(paths)
    assert sorted(order) == list(range(len(paths)))
    paths = [paths[i] for i in order]
    seen: list[list[tuple[int, int]]] = [[] for _ in range(len(paths) * width)]
    for level in build_levels(paths, width):
        assert level
        last = 0
        for span in level:
            assert last <= span.start < span.end <= len(seen), "spans of a level overlap"
            last = span.end
            for part in span.slices:
                assert 0 <= part.start < part.end
                assert part.end <= part.segment.length  # type: ignore[attr-defined]
                for row in range(span.start, span.end):
                    seen[row] += [(id(part.segment), at) for at in range(part.start, part.end)]
    for row, keys in enumerate(seen):
        expected = [
            (id(piece.node.kv), at) for piece in paths[row // width] for at in range(piece.length)
        ]
        assert keys == expected


@settings(max_examples=300, deadline=None)
@given(_rows())
def test_a_slice_is_read_once_for_all_rows_that_share_it(
    paths: list[list[PathNode[Any]]],
) -> None:
    order = _sort(paths)
    read: dict[int, int] = {}
    for level in build_levels([paths[i] for i in order], 1):
        for part in (part for span in level for part in span.slices):
            read[id(part.segment)] = read.get(id(part.segment), 0) + len(part)
    for path in paths:
        for piece in path:
            longest = max(p.length for other in paths for p in other if p.node is piece.node)
            assert read[id(piece.node.kv)] == longest


def _part(length: int, used: int) -> PathNode[Any]:
    return PathNode(Node(np.zeros(length, np.int32), Keys(length), None, 0), used)


def test_short_slices_of_one_path_are_joined_and_an_empty_path_has_no_span() -> None:
    path = [
        _part(9, 5),
        _part(3, 3),
        _part(MAX_JOINED_SPAN, MAX_JOINED_SPAN - 8),
        _part(2, 2),
        _part(2, 1),
    ]
    joined, rest = build_levels([path], 3)
    ((span,), (other,)) = joined, rest
    assert (span.start, span.end) == (other.start, other.end) == (0, 3)
    assert [(s.start, s.end) for s in span.slices] == [(0, 5), (0, 3), (0, MAX_JOINED_SPAN - 8)]
    assert [(s.start, s.end) for s in other.slices] == [(0, 2), (0, 1)]
    assert build_levels([[], []], 2) == []


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2, PADDED, PADDED + 1]), max_size=8), st.integers(1, 3))
def test_short_spans_of_single_sequences_are_padded_together_in_row_order(
    lengths: list[int], width: int
) -> None:
    paths = [[_part(length, length)] if length else [] for length in lengths]
    for spans in build_levels(paths, width):
        level = pad_short_spans(spans, width, len(paths) * width, KV_WIDTH, mx.float32)
        short = [s for s in spans if len(s) <= PADDED]
        padded = [part for part in level.parts if isinstance(part, PaddedSpans)]
        assert len(padded) == (len(short) > 1)
        found: list[int] = []
        for part in level.parts:
            if isinstance(part, KVSpan) or part.rows is None:
                found += range(part.start, part.end)
            else:
                found += np.array(part.rows).tolist()
        for part in padded:
            assert part.spans == short
            longest = max(map(len, short))
            assert len(part) == longest
            padding = [longest - len(span) for span in short]
            assert [array.shape for array in part.padding] == [
                (missing, KV_WIDTH) for missing in padding
            ]
            if part.visible is None:
                assert not any(padding)
            else:
                assert np.array(part.visible).sum(axis=(1, 2)).tolist() == [*map(len, short)]
        found += [-1]  # rows without a span
        order = range(len(found) - 1) if level.order is None else np.array(level.order).tolist()
        assert [found[at] for at in order] == [
            i * width + j if length else -1
            for i, length in enumerate(lengths)
            for j in range(width)
        ]


@settings(max_examples=300, deadline=None)
@given(_rows(), st.integers(1, 3), st.integers(0, 40), st.sampled_from([1, MAX_FUSED_SCORES // 50]))
def test_fused_levels_are_in_row_order_and_within_the_score_limit(
    paths: list[list[PathNode[Any]]], width: int, tail_keys: int, heads: int
) -> None:
    order = _sort(paths)
    rows = len(paths) * width
    found = [
        pad_short_spans(spans, width, rows, KV_WIDTH, mx.float32)
        for spans in build_levels([paths[i] for i in order], width)
    ]
    fused, others = split_fused_levels(found, tail_keys, heads)
    assert sorted([*map(id, fused), *map(id, others)]) == sorted(map(id, found))
    scores = [tail_keys] * rows
    for level in fused:
        assert level.order is None
        seen = [row for part in level.parts for row in range(part.start, part.end)]
        assert seen == list(range(rows))
        for part in level.parts:
            for row in range(part.start, part.end):
                scores[row] += len(part)
    assert all(len(level.parts) == 1 for level in fused[:-1])
    assert not fused or sum(scores) * heads <= MAX_FUSED_SCORES
    if heads == 1 and found and found[0].order is None:
        assert found[0] in fused
