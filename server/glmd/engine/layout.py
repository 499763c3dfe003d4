"""Which rows of a decode group see which stretches of which segments.

Sequences are sorted so that those sharing a stretch stand next to each other; each stretch
then is in one span over consecutive rows, and is read once for all of them. Short ones are put
together, as every span costs a dozen operations in every layer, whatever its length.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import mlx.core as mx
import numpy as np

from glmd.engine.sequence import Sequence
from glmd.kv.segment import Segment
from glmd.kv.tree import Piece
from glmd.model.rows import Gathered, Level, Span, Stretch

TreePath = list[Piece[Segment]]

JOINED = 1024
"""Tokens up to which stretches that the same rows see one after the other are one span."""

GATHERED = 128
"""Tokens up to which the spans of single sequences are gathered. Joining and gathering copy
the keys, each time that they are read."""


def sort_by_prefix(sequences: list[Sequence], paths: list[TreePath]) -> list[int]:
    """An order in which the rows that share any stretch of any node are consecutive.

    Within a node, rows that use more of it come first, so that those using at least x tokens
    of it are consecutive for every x.
    """

    def key(i: int) -> tuple[list[tuple[int, int]], int]:
        return [(id(piece.node), -piece.length) for piece in paths[i]], sequences[i].slot

    return sorted(range(len(sequences)), key=key)


def levels(paths: list[TreePath], width: int) -> list[list[Span]]:
    """Spans for sequences in the order of `sort_by_prefix`, each of `width` rows.

    Every row sees every token of its path in exactly one span. Rows that share a stretch have
    the same history before it, so its level is that history's number of spans. The spans of a
    level are over disjoint rows, in row order.
    """
    builder = _Builder(paths, width)
    builder.add(0, len(paths), depth=0, level=0)
    return builder.levels


def gather(spans: list[Span], width: int, rows: int) -> Level:
    """A level of spans, over `rows` rows in all, with what can be met together."""
    short: list[Span] = []
    others: list[Span] = []
    for span in spans:
        alone = span.last - span.first == width
        (short if alone and len(span) <= GATHERED else others).append(span)
    if len(short) < 2:
        short, others = [], spans
    gathered = _gathered(short) if short else None
    at = np.concatenate([np.arange(s.first, s.last, dtype=np.int32) for s in [*short, *others]])
    if len(at) == rows and (np.diff(at) == 1).all():
        return Level(gathered, others, None)
    order = np.full(rows, len(at), np.int32)
    order[at] = np.arange(len(at), dtype=np.int32)
    return Level(gathered, others, mx.array(order))


def _gathered(spans: list[Span]) -> Gathered:
    lengths = np.array([len(span) for span in spans], np.int32)
    within = np.arange(lengths.max(), dtype=np.int32)
    visible = within < lengths[:, None]
    # Where there is no key, any will do.
    keys = np.where(visible, (np.cumsum(lengths) - lengths)[:, None] + within, 0)
    rows = np.concatenate([np.arange(s.first, s.last, dtype=np.int32) for s in spans])
    return Gathered(
        spans, mx.array(keys.astype(np.int32)), mx.array(visible[:, None]), mx.array(rows)
    )


class _Builder:
    def __init__(self, paths: list[TreePath], width: int) -> None:
        self.levels: list[list[Span]] = []
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
            stretch = Stretch(segment, start, stop)
            span = Span((stretch,), first * self._width, last * self._width)
            level = self._add_span(level, span)
            shorter = last
            while last > first and self._paths[last - 1][depth].length == stop:
                last -= 1
            self.add(last, shorter, depth=depth + 1, level=level)
            start = stop

    def _add_span(self, level: int, span: Span) -> int:
        """Add a span, or join it to the same rows' span before; returns the next one's level.

        Spans come in any row order: those of longer use of a node after those behind shorter.
        """
        if level:
            before = self.levels[level - 1]
            at = bisect_left(before, span.first, key=lambda other: other.first)
            if at < len(before) and (before[at].first, before[at].last) == (span.first, span.last):
                joined = Span(before[at].stretches + span.stretches, span.first, span.last)
                if len(joined) <= JOINED:
                    before[at] = joined
                    return level
        if level == len(self.levels):
            self.levels.append([])
        insort(self.levels[level], span, key=lambda other: other.first)
        return level + 1
