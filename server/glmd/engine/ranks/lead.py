"""Rank 0: its executor, tails and segments tell the other ranks what they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from glmd.engine.attention_metadata import AttentionMetadata, AttentionMetadataBuilder
from glmd.engine.executor import Choose, DraftInputs
from glmd.engine.ranks import plan
from glmd.engine.ranks.executor import RankExecutor
from glmd.engine.ranks.group import RankGroup
from glmd.kv_cache.segment import Segment
from glmd.kv_cache.stored_keys import StoredKeys
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch, KVSpan
from glmd.model.loader import LoadedModel


class LeadSegment(Segment):
    """A segment that the other ranks have, too, under a number.

    Attributes:
        number: of the segment; of a `head`, that of the segment whose first tokens these are.
    """

    __slots__ = ("_owner", "_ranks", "number")

    def __init__(
        self, segment: Segment, ranks: RankGroup, number: int, *, owner: bool = True
    ) -> None:
        super().__init__(segment.layers, deferred=segment.deferred)
        self.number = number
        self._ranks = ranks
        self._owner = owner

    def __del__(self) -> None:
        if self._owner:
            self._ranks.record(plan.Drop(self.number))

    def slice(self, start: int, end: int) -> Segment:
        if start == 0 and end == len(self):
            return self
        number = self._ranks.new_number()
        self._ranks.record(plan.Slice(number, self.number, start, end))
        return LeadSegment(super().slice(start, end), self._ranks, number)

    def head(self, end: int) -> Segment:
        return LeadSegment(super().head(end), self._ranks, self.number, owner=False)

    def concat(self, *others: Segment) -> Segment:
        number = self._ranks.new_number()
        parts = [(number_of(part), len(part)) for part in (self, *others)]
        self._ranks.record(plan.Concat(number, parts))
        return LeadSegment(super().concat(*others), self._ranks, number)

    def completed(self) -> Segment:
        number = self._ranks.new_number()
        self._ranks.record(plan.Complete(number, self.number))
        return LeadSegment(super().completed(), self._ranks, number)


def number_of(segment: Segment) -> int:
    assert isinstance(segment, LeadSegment)
    return segment.number


class LeadTails(TailPool):
    """A tail pool that the other ranks have, too."""

    def __init__(self, ranks: RankGroup, *args: Any, **options: Any) -> None:
        self._ranks = ranks
        super().__init__(*args, **options)

    def set_deferred(self, deferred: bool, *, screening: bool = False) -> None:
        self._ranks.record(plan.DeferTails(deferred, screening))
        super().set_deferred(deferred, screening=screening)

    def reset(self) -> None:
        self._ranks.record(plan.ResetTails())
        super().reset()

    def resize(self, slots: int, capacity: int) -> None:
        self._ranks.record(plan.ResizeTails(slots, capacity))
        super().resize(slots, capacity)

    def copy_out(self, slot: int, tokens: int) -> Segment:
        number = self._ranks.new_number()
        self._ranks.record(plan.CopyTail(number, slot, tokens))
        return LeadSegment(super().copy_out(slot, tokens), self._ranks, number)

    def copy_slot(self, source: int, target: int) -> None:
        self._ranks.record(plan.CopySlot(source, target))
        super().copy_slot(source, target)

    def shift(self, slot: int, start: int, count: int) -> None:
        self._ranks.record(plan.ShiftTail(slot, start, count))
        super().shift(slot, start, count)


def make_tails(model: LoadedModel, deferred_width: int | None, ranks: RankGroup | None) -> TailPool:
    """Make the tail pool of an engine; with other ranks, let them make theirs."""
    shape = model.shape
    make: Callable[..., TailPool] = TailPool
    if ranks is not None:
        limits = shape.score_bytes, shape.expanded_bytes, shape.kv_bits
        ranks.record(plan.Setup(*limits, deferred_width))
        make = partial(LeadTails, ranks)
    return make(
        model.kv_layers, shape.kv_width, model.dtype, shape.kv_bits, deferred_width=deferred_width
    )


class LeadExecutor(RankExecutor):
    """Sends the others what it is about to do: they must come along in its collectives."""

    def __init__(
        self,
        model: LoadedModel,
        tails: TailPool,
        builder: AttentionMetadataBuilder,
        ranks: RankGroup,
    ) -> None:
        super().__init__(model, tails, builder, ranks.collectives)
        self._ranks = ranks

    def forward(
        self, batch: ForwardBatch, layouts: list[AttentionMetadata]
    ) -> tuple[mx.array, list[StoredKeys]]:
        chunks = [
            plan.Chunk(
                chunk.start, chunk.end, _spans(chunk.spans), chunk.expanded, chunk.logits_rows
            )
            for chunk in batch.chunks
        ]
        rows = batch.tokens.shape[0]
        self._ranks.record(
            plan.Forward(rows, [_layout(each) for each in layouts], chunks, batch.deferred)
        )
        # The engine has read the step before the one in flight.
        self._ranks.flush(self.steps - 1, self.digest(self.steps - 1))
        tokens, positions = self.share_rows(batch.tokens, batch.positions)
        return super().forward(replace(batch, tokens=tokens, positions=positions), layouts)

    def compute_kv(self, successors: mx.array, hidden: mx.array, batch: ForwardBatch) -> StoredKeys:
        self._ranks.record(plan.ComputeKV())
        self._ranks.flush()
        return super().compute_kv(successors, hidden, batch)

    def draft(self, inputs: DraftInputs, choose: Choose) -> list[mx.array]:
        self._ranks.record(plan.Draft(_layout(inputs.layout), inputs.count))
        self._ranks.flush()
        return super().draft(inputs, choose)

    def catch_up(
        self, segment: Segment, successors: mx.array, position: int, spans: list[KVSpan]
    ) -> None:
        known = np.array(successors).tobytes()
        self._ranks.record(plan.CatchUp(number_of(segment), known, position, _spans(spans)))
        self._ranks.flush()
        super().catch_up(segment, successors, position, spans)

    def seal(self, caches: list[StoredKeys], start: int, end: int) -> Segment:
        number = self._ranks.new_number()
        self._ranks.record(plan.Seal(number, start, end))
        return LeadSegment(super().seal(caches, start, end), self._ranks, number)

    def begin_tails(self, caches: list[StoredKeys], rows: list[int], slots: list[int]) -> None:
        self._ranks.record(plan.BeginTails(rows, slots))
        super().begin_tails(caches, rows, slots)

    def stats(self) -> dict[str, Any]:
        latency, bandwidth = self._ranks.latency, self._ranks.bandwidth
        transfer = self.collective_bytes / bandwidth if bandwidth else 0.0
        return {
            "ranks": self._ranks.size,
            "rank_latency": latency,
            "rank_bandwidth": bandwidth,
            "rank_sums": self.collectives,
            "rank_sum_bytes": self.collective_bytes,
            "rank_sum_seconds": self.collectives * latency + transfer,
        }

    def end_step(self) -> None:
        self._ranks.flush()


def _layout(metadata: AttentionMetadata) -> plan.Layout:
    inputs = metadata.inputs
    paths = []
    for path in inputs.paths:
        segments = [(part.node.kv, part.length) for part in path]
        paths.append([(number_of(kv), length) for kv, length in segments if kv is not None])
    return plan.Layout(paths, inputs.slots, inputs.tail_starts, metadata.width)


def _spans(spans: list[KVSpan]) -> list[plan.Span]:
    return [
        plan.Span(
            [(number_of(part.segment), part.start, part.end) for part in span.slices],
            span.start,
            span.end,
        )
        for span in spans
    ]
