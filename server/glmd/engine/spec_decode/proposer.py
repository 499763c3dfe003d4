"""Draft proposals by the MTP layer, within the step that samples before them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from glmd.engine.attention_metadata import AttentionMetadataBuilder, build_levels
from glmd.engine.config import MAX_WIDTH
from glmd.engine.executor import DraftInputs, Executor
from glmd.engine.scheduler.scheduler import Scheduler
from glmd.engine.sequence import Sequence
from glmd.engine.spec_decode.controller import DraftPlan
from glmd.engine.step import PendingStep, StepRows
from glmd.kv_cache.node import Lease, Node
from glmd.kv_cache.segment import Segment
from glmd.kv_cache.stored_keys import StoredKeys
from glmd.model.batch import ForwardBatch
from glmd.model.glm4_moe_lite import Glm4MoeLiteModel
from glmd.model.mtp import MTPLayer
from glmd.model.sampler import SamplingRow, sample

CATCH_UP_ROWS = 32
"""Rows of prefill whose work a step may spend on deferred KV, which takes one layer of a row."""


class MTPProposer:
    """Runs the MTP layer behind the main model's forward pass and sampling of a step."""

    def __init__(
        self,
        model: Glm4MoeLiteModel,
        layer: MTPLayer,
        scheduler: Scheduler,
        metadata_builder: AttentionMetadataBuilder,
        executor: Executor,
    ) -> None:
        self._model = model
        self._layer = layer
        self._scheduler = scheduler
        self._tree = scheduler.tree
        self._tails = scheduler.tails
        self._metadata_builder = metadata_builder
        self._executor = executor
        self._complete: set[Lease[Segment]] = set()
        """Leases of decoding sequences whose prefix has no deferred segments."""

    # -- deferred KV --------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget which sequences have no deferred KV."""
        self._complete.clear()

    def catch_up(self, sequences: list[Sequence], plan: DraftPlan) -> None:
        """Compute deferred KV of decoding sequences, as much as a step may.

        Of a limited number of sequences, those are chosen that need least.
        """
        self._complete &= {s.lease for s in sequences if s.lease is not None}
        if plan.with_gaps or len(self._complete) >= (plan.sequences or len(sequences)):
            return
        deferred = [self._deferred(s) for s in sequences if s.can_draft]
        deferred.sort(key=lambda nodes: sum(map(len, nodes)))
        rows = CATCH_UP_ROWS * self._model.args.num_hidden_layers
        for nodes in deferred[: plan.sequences]:
            for node in nodes:
                rows -= self._compute_deferred(node, rows)
                if rows <= 0:
                    return

    def _deferred(self, sequence: Sequence) -> list[Node[Segment]]:
        """The nodes of a sequence's prefix that are deferred."""
        assert sequence.lease is not None
        if sequence.lease in self._complete:
            return []
        path = self._tree.path(sequence.lease)
        nodes = [part.node for part in path if part.node.kv is not None and part.node.kv.deferred]
        if not nodes and not self._tails.deferred:
            self._complete.add(sequence.lease)
        return nodes

    def _compute_deferred(self, node: Node[Segment], limit: int) -> int:
        """Compute the KV of up to `limit` more tokens of a node; returns their number."""
        segment = node.kv
        assert segment is not None
        if not segment.deferred:
            return 0  # Caught up for another sequence.
        start = segment.num_caught_up
        rows = min(limit, len(node) - start)
        end = start + rows
        before = Lease(node, start)
        if not start:
            assert node.parent is not None
            before = Lease(node.parent, node.offset)
        levels = build_levels([self._tree.path(before)], rows)
        spans = [span for level in levels for span in level]
        # A key is a pair of a token and its successor.
        successors = mx.array((node.keys[start:end] & 0xFFFFFFFF).astype(np.int32))
        self._executor.catch_up(segment, successors, node.start + start, spans)
        if end == len(node):
            self._tree.replace(node, segment.completed())
        return rows

    # -- KV and drafts ------------------------------------------------------------------------

    def compute_kv(
        self, rows: StepRows, batch: ForwardBatch, sampled: mx.array | None, hidden: mx.array
    ) -> StoredKeys:
        """Compute the layer's KV of all rows.

        Args:
            sampled: [sampled rows] int32, tokens chosen behind them; None: none.
            hidden: [N, hidden], of the main model.

        Returns:
            cache vectors [N, kv_width].
        """
        successors = self._successors(rows, sampled)
        return self._executor.compute_kv(successors, hidden, batch)

    @staticmethod
    def _successors(rows: StepRows, sampled: mx.array | None) -> mx.array:
        """The token that follows each row's token: [N] int32."""
        parts = []
        if sampled is not None:
            parts.append(sampled[: rows.num_decode_rows])
        for chunk in rows.prefill:
            start = chunk.num_computed_tokens + 1
            known = chunk.sequence.tokens(start, start + len(chunk) - chunk.num_sampled)
            parts.append(mx.array(known))
            if chunk.num_sampled:
                assert sampled is not None
                parts.append(sampled[chunk.sample_start : chunk.sample_start + 1])
        return mx.concatenate(parts)

    def draft(
        self, step: PendingStep, batch: ForwardBatch, hidden: mx.array, plan: DraftPlan
    ) -> None:
        """Draft tokens behind the last confirmed token of sampled sequences.

        Drafts are sampled like the model's tokens, with the noise of their positions: where both
        distributions agree, so do the choices. Attends to the step's KV, which must be committed.

        Args:
            hidden: [N, hidden], of the main model.
        """
        assert step.counts is not None
        assert step.last is not None
        sampled = step.rows.sampled_sequences
        gaps = frozenset(s for s in sampled if s.can_draft and self._deferred(s))
        chosen = [s for s in sampled if s.can_draft and (plan.with_gaps or s not in gaps)]
        chosen = chosen[: plan.sequences]
        if not chosen:
            return
        drafts = self._draft(chosen, step, batch, hidden, plan.drafts)
        if len(chosen) < len(sampled):
            index = mx.array([step.rows.sample_index[s] for s in chosen])
            none = mx.zeros((len(sampled), plan.drafts), drafts.dtype)
            none[index] = drafts
            drafts = none
        step.drafts, step.drafted, step.with_gaps = drafts, frozenset(chosen), gaps

    def _draft(
        self,
        sequences: list[Sequence],
        step: PendingStep,
        batch: ForwardBatch,
        hidden: mx.array,
        count: int,
    ) -> mx.array:
        """Drafts of some sampled sequences, [sequences, count] int32."""
        assert step.counts is not None
        assert step.last is not None
        for sequence in sequences:
            self._scheduler.allocate_slot(sequence)
        self._tails.ensure(MAX_WIDTH)
        metadata = self._metadata_builder.build(sequences, 1, deferred=False)
        order = [step.rows.sample_index[sequences[i]] for i in metadata.order]
        # The last confirmed row of each sequence.
        sampled = step.rows.sampled
        first = mx.array([sampled[i].end - sampled[i].num_sampled for i in order])
        index = mx.array(order)
        last = first + step.counts[index] - 1
        sampling = [SamplingRow(sequences[i].draft_sampling, 0, None) for i in metadata.order]
        drafts = self._executor.draft(
            DraftInputs(metadata, last, step.last[index], batch.positions[last], hidden, count),
            lambda h, positions: sample(self._layer.logits(h), sampling, positions).tokens,
        )
        return mx.stack(drafts, axis=1)[mx.array(np.argsort(metadata.order).astype(np.int32))]
