"""A decode group in the making: rows of sequences that have as many of them each."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from glmd.engine.attention_metadata import AttentionMetadata
from glmd.engine.sequence import Sequence
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import DecodeGroup


@dataclass(frozen=True, slots=True)
class RunnerGroup:
    """Sequences in row order, and what is known of their rows.

    Attributes:
        width: rows of each sequence.
        tokens, positions: [sequences, width] int32.
    """

    sequences: list[Sequence]
    width: int
    tokens: mx.array
    positions: mx.array
    layout: AttentionMetadata

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.sequences) * self.width

    def to_decode_group(self, first: int, tails: TailPool, heads: int) -> DecodeGroup:
        """The group as the model takes it.

        Args:
            first: its first row in the step.
        """
        layout = self.layout
        tail_positions = self.positions - layout.sealed
        visible = mx.arange(tails.capacity) <= tail_positions[..., None]
        if self.width > 1:
            visible = mx.repeat(visible, heads, axis=1)
        return DecodeGroup(
            start=first,
            sequences=len(self.sequences),
            width=self.width,
            fused_levels=layout.fused_levels,
            levels=layout.levels,
            slots=layout.slots,
            tail_positions=tail_positions.flatten(),
            order=layout.slot_order,
            visible=visible,
        )
