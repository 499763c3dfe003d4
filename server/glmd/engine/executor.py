"""Work on the device: what changes KV, or runs layers.

What is to be done is decided elsewhere, by scheduler, tree and sampler. With several ranks
(`glmd.engine.ranks`), each of them does the same work on its part of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from glmd.engine.attention_metadata import AttentionMetadata, AttentionMetadataBuilder
from glmd.kv_cache.segment import Segment
from glmd.kv_cache.stored_keys import StoredKeys, dequantize
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch, KVSpan, PrefillChunk
from glmd.model.loader import LoadedModel

Choose = Callable[[mx.array, mx.array], mx.array]
"""Chooses tokens [rows] int32 behind hidden states [rows, hidden] for positions [rows]."""


@dataclass(frozen=True, slots=True)
class DraftInputs:
    """Rows of the step behind which tokens are drafted.

    Attributes:
        layout: one row of each sequence.
        last: [sequences] int32, the row of each one's last confirmed token, in the layout's order.
        tokens: [sequences] int32, behind these rows.
        positions: [sequences] int32, of these rows.
        hidden: [N, hidden], of the main model.
        count: drafts of each sequence.
    """

    layout: AttentionMetadata
    last: mx.array
    tokens: mx.array
    positions: mx.array
    hidden: mx.array
    count: int


class Executor:
    """Runs a model and its MTP layer, and moves KV of finished rows.

    Attributes:
        tails: of running sequences.
    """

    def __init__(
        self, model: LoadedModel, tails: TailPool, builder: AttentionMetadataBuilder
    ) -> None:
        self.tails = tails
        self._model = model
        self._builder = builder

    def forward(
        self,
        batch: ForwardBatch,
        layouts: list[AttentionMetadata],
    ) -> tuple[mx.array, list[StoredKeys]]:
        """Run the main model; see `Glm4MoeLiteModel.forward`.

        Args:
            layouts: of the batch's decode groups.
        """
        return self._model.forward(batch, self.tails)

    def compute_kv(self, successors: mx.array, hidden: mx.array, batch: ForwardBatch) -> StoredKeys:
        """Compute the MTP layer's KV of the step's rows; see `MTPLayer.compute_kv`."""
        assert self._model.mtp is not None
        return self._model.mtp.compute_kv(successors, hidden, batch, self.tails)

    def draft(self, inputs: DraftInputs, choose: Choose) -> list[mx.array]:
        """Draft tokens behind rows of the step; each [sequences] int32."""
        assert self._model.mtp is not None
        tokens, positions = inputs.tokens, inputs.positions
        h, drafts = inputs.hidden[inputs.last], []
        for _ in range(inputs.count):
            # The KV that this writes to the tails is there already for the last confirmed row, and
            # is overwritten behind it when those positions are confirmed.
            group = self._builder.decode_group(inputs.layout, 0, positions[:, None])
            batch = ForwardBatch(tokens, positions, [group], [])
            h = self._model.mtp.forward(tokens, h, batch, self.tails)
            tokens = choose(h, positions + 2)
            positions = positions + 1
            drafts.append(tokens)
        return drafts

    def catch_up(
        self, segment: Segment, successors: mx.array, position: int, spans: list[KVSpan]
    ) -> None:
        """Compute the MTP layer's KV of the next tokens of a deferred segment.

        Args:
            successors: [rows] int32, the tokens behind them.
            position: of the first of them.
            spans: the KV before them.
        """
        assert self._model.mtp is not None
        rows = successors.shape[0]
        start = segment.num_caught_up
        expanded = rows >= self._model.shape.break_even_rows
        chunk = PrefillChunk(0, rows, spans, expanded, rows)
        positions = mx.arange(position, position + rows, dtype=mx.int32)
        batch = ForwardBatch(successors, positions, [], [chunk])
        # KV is deferred only where it is not quantised.
        inputs = dequantize(segment.layers[-1])[start : start + rows]
        hidden = self._model.forward_deferred(inputs, batch, self.tails)
        kv = dequantize(self._model.mtp.compute_kv(successors, hidden, batch, self.tails))
        segment.caught_up.append(kv)
        mx.async_eval(kv)

    def seal(self, caches: list[StoredKeys], start: int, end: int) -> Segment:
        """Copy the KV of rows of the step into a segment.

        Args:
            caches: of each layer [N, kv_width], in the order of the tails.
        """
        kept = self.tails.for_segment(caches)
        return Segment.copy_of(kept, start, end, deferred=self.tails.deferred)

    def begin_tails(self, caches: list[StoredKeys], rows: list[int], slots: list[int]) -> None:
        """Copy the KV of rows of the step to the beginning of tails."""
        to, taken = mx.array(slots), mx.array(rows)
        for layer, vectors in enumerate(caches):
            self.tails.write(layer, to, mx.zeros_like(to), vectors[taken])

    def stats(self) -> dict[str, Any]:
        """Fields of `EngineStats` about ranks."""
        return {}

    def end_step(self) -> None:
        """Note that nothing more follows for the step."""
