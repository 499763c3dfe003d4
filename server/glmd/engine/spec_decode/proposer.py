"""Drafting: the MTP layer's part of a step.

Its KV is kept for every row, drafts or none. Drafts are made behind what a step confirms, for the
step after it. So both come after the sampling, and work on arrays that are still to be computed.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from glmd.engine.attention_metadata import AttentionMetadataBuilder
from glmd.engine.config import MAX_WIDTH
from glmd.engine.decode_group import RunnerGroup
from glmd.engine.scheduler.scheduler import Scheduler, SchedulerOutput
from glmd.engine.sequence import Sequence
from glmd.engine.step import PendingStep
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch
from glmd.model.mtp import MTPLayer
from glmd.model.sampler import SamplingRow, sample


class MTPProposer:
    """Runs the MTP layer in a step's wake.

    Args:
        heads: of the layer's attention.
        layouts: those of the steps, which a draft's rows share.
    """

    def __init__(
        self,
        layer: MTPLayer,
        heads: int,
        scheduler: Scheduler,
        tails: TailPool,
        layouts: AttentionMetadataBuilder,
    ) -> None:
        self._layer = layer
        self._heads = heads
        self._scheduler = scheduler
        self._tails = tails
        self._layouts = layouts

    def compute_kv(
        self,
        plan: SchedulerOutput,
        groups: list[RunnerGroup],
        flight: PendingStep,
        hidden: mx.array,
        batch: ForwardBatch,
    ) -> mx.array:
        """Compute the layer's KV of a step's rows; see `MTPLayer.keep`."""
        successors = self._successors(plan, groups, flight)
        return self._layer.compute_kv(successors, hidden, batch, self._tails)

    def draft(
        self,
        plan: SchedulerOutput,
        groups: list[RunnerGroup],
        flight: PendingStep,
        hidden: mx.array,
        count: int,
    ) -> mx.array:
        """Draft `count` tokens behind the last confirmed one of every sampled sequence.

        Drafts are sampled as the model's tokens are, with the noise of the position that they
        are for: where both distributions agree, so do the choices.

        Args:
            hidden: [N, hidden], the main model's, of all rows of the step.

        Returns:
            [S, count] int32.
        """
        assert flight.counts is not None
        assert flight.last is not None
        rows, positions = self._last_rows(plan, groups)
        h = hidden[rows + flight.counts - 1]
        at = positions + flight.counts - 1
        token = flight.last
        specs = [SamplingRow(s.draft_sampling, 0, None) for s in flight.sequences]
        drafts = []
        for _ in range(count):
            h = self._draft_one(flight.sequences, token, h, at)
            token = sample(self._layer.logits(h), specs, at + 2).tokens
            at = at + 1
            drafts.append(token)
        return mx.stack(drafts, axis=1)

    def _successors(
        self, plan: SchedulerOutput, groups: list[RunnerGroup], flight: PendingStep
    ) -> mx.array:
        """The token that follows each row's, as far as the step knows: [N] int32."""
        parts = []
        if groups:
            assert flight.tokens is not None
            place = 0
            for group in groups:
                n = len(group.sequences)
                parts.append(flight.tokens[place : place + n, : group.width].flatten())
                place += n
        sampled = flight.index_by_id
        for sequence, count in plan.chunks:
            start = sequence.num_computed_tokens
            stop = min(start + count + 1, sequence.length)
            parts.append(mx.array(sequence.tokens(start + 1, stop)))
            if id(sequence) in sampled:
                assert flight.last is not None
                place = sampled[id(sequence)]
                parts.append(flight.last[place : place + 1])
        return mx.concatenate(parts)

    def _last_rows(
        self, plan: SchedulerOutput, groups: list[RunnerGroup]
    ) -> tuple[mx.array, mx.array]:
        """For each sampled sequence its first sampled row, and that row's position."""
        rows: list[int] = []
        positions = []
        first = 0
        for group in groups:
            n = len(group.sequences)
            rows += range(first, first + n * group.width, group.width)
            positions.append(group.positions[:, 0])
            first += group.rows
        ends = []
        for sequence, count in plan.chunks:
            first += count
            if sequence.num_computed_tokens == sequence.length:
                rows.append(first - 1)
                ends.append(sequence.length - 1)
        if ends:
            positions.append(mx.array(ends, mx.int32))
        return mx.array(rows), mx.concatenate(positions)

    def _draft_one(
        self, sequences: list[Sequence], token: mx.array, hidden: mx.array, at: mx.array
    ) -> mx.array:
        """Run the MTP layer on one row of each sequence, at positions `at`.

        What this leaves in the tails is there already for the last confirmed row; behind it, it is
        overwritten when the positions are confirmed.

        Args:
            token: [S] int32, what follows each row's.
            hidden: [S, hidden], the main model's, or the layer's own for its own draft.

        Returns:
            [S, hidden], the layer's.
        """
        for sequence in sequences:
            self._scheduler.allocate_slot(sequence)
        self._tails.ensure(MAX_WIDTH)
        layout = self._layouts.build(sequences, 1)
        order = layout.order
        moved = order != sorted(order)
        if moved:
            by_row = mx.array(order)
            token, hidden, at = token[by_row], hidden[by_row], at[by_row]
        group = RunnerGroup([sequences[i] for i in order], 1, token[:, None], at[:, None], layout)
        batch = ForwardBatch(token, at, [group.to_decode_group(0, self._tails, self._heads)], [])
        h = self._layer.forward(token, hidden, batch, self._tails)
        return h[mx.array(np.argsort(order).astype(np.int32))] if moved else h
