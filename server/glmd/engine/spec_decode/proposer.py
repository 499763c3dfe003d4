"""Draft proposals by the MTP layer, made within the step that confirms the tokens before them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from glmd.engine.attention_metadata import AttentionMetadataBuilder
from glmd.engine.config import MAX_WIDTH
from glmd.engine.scheduler.scheduler import Scheduler
from glmd.engine.step import PendingStep, StepRows
from glmd.model.batch import ForwardBatch
from glmd.model.mtp import MTPLayer
from glmd.model.sampler import SamplingRow, sample


class MTPProposer:
    """Runs the MTP layer behind the main model's forward pass and sampling of a step."""

    def __init__(
        self, layer: MTPLayer, scheduler: Scheduler, metadata_builder: AttentionMetadataBuilder
    ) -> None:
        self._layer = layer
        self._scheduler = scheduler
        self._tails = scheduler.tails
        self._metadata_builder = metadata_builder

    def compute_kv(
        self, rows: StepRows, batch: ForwardBatch, sampled: mx.array | None, hidden: mx.array
    ) -> mx.array:
        """Compute the layer's KV of all rows, which each step does, with or without drafts.

        Args:
            sampled: [sampled rows] int32, tokens chosen behind them; None: none.
            hidden: [N, hidden], of the main model.

        Returns:
            cache vectors [N, kv_width].
        """
        successors = self._successors(rows, sampled)
        return self._layer.compute_kv(successors, hidden, batch, self._tails)

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
        self, step: PendingStep, batch: ForwardBatch, hidden: mx.array, count: int
    ) -> mx.array:
        """Draft `count` tokens behind the last confirmed token of each sampled sequence.

        Drafts are sampled like the model's tokens, with the noise of their positions: where both
        distributions agree, so do the choices. Attends to the step's KV, which must be committed.

        Args:
            hidden: [N, hidden], of the main model.

        Returns:
            [S, count] int32.
        """
        assert step.counts is not None
        assert step.last is not None
        sequences = step.rows.sampled_sequences
        for sequence in sequences:
            self._scheduler.allocate_slot(sequence)
        self._tails.ensure(MAX_WIDTH)
        metadata = self._metadata_builder.build(sequences, 1)
        order = mx.array(metadata.order)
        # The last confirmed row of each sequence.
        first = mx.array([rows.end - rows.num_sampled for rows in step.rows.sampled])
        last = (first + step.counts - 1)[order]
        h, positions, tokens = hidden[last], batch.positions[last], step.last[order]
        sampling = [SamplingRow(sequences[i].draft_sampling, 0, None) for i in metadata.order]
        drafts = []
        for _ in range(count):
            # The KV that this writes to the tails is there already for the last confirmed row, and
            # is overwritten behind it when those positions are confirmed.
            group = self._metadata_builder.decode_group(metadata, 0, positions[:, None])
            h = self._layer.forward(
                tokens, h, ForwardBatch(tokens, positions, [group], []), self._tails
            )
            tokens = sample(self._layer.logits(h), sampling, positions + 2).tokens
            positions = positions + 1
            drafts.append(tokens)
        return mx.stack(drafts, axis=1)[mx.array(np.argsort(metadata.order).astype(np.int32))]
