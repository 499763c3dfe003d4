"""A step on its way: what was launched, what came of it, and when it was over."""

from __future__ import annotations

import time
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from glmd.engine.sequence import Sequence

WAIT = 1e-3
"""Seconds that fetching a step takes at least if it was not done yet."""


@dataclass(slots=True)
class PendingStep:
    """A launched step, whose results have not been read.

    S sequences were sampled, the first `widths[i]` columns of W belonging to sequence i.

    Attributes:
        sequences: the S sequences.
        widths: rows sampled per sequence: 1 + drafts.
        tokens: [S, W] int32, what the model chose behind each row; None if S is 0.
        counts: [S] int32, how many of them are confirmed: a draft is, if the model chose it.
        last: [S] int32, the last confirmed one.
        drafts: [S, k] int32, for the next step; None for k = 0.
        logprobs: by (sequence, column); see `SamplerOutput`.
        done: evaluated when the step is.
        decoding: number of sequences with decode rows.
        dispatched: when MLX had taken it all, and let go of the host.
        fetched: when it was found to be done.
        waited: whether the host had to wait for it then.
        confirmed: the confirmed tokens of each sequence, once fetched.
    """

    sequences: list[Sequence]
    widths: list[int]
    tokens: mx.array | None
    counts: mx.array | None
    last: mx.array | None
    drafts: mx.array | None
    logprobs: dict[tuple[int, int], tuple[mx.array, mx.array, mx.array]]
    ready: mx.array
    num_decoding: int
    prefill_rows: int
    launched: float
    dispatched: float = 0.0
    fetched: float = 0.0
    waited: bool = False
    confirmed: list[list[int]] | None = None

    def wait(self) -> list[list[int]]:
        """Wait for the step. Constraints follow what it confirms, once."""
        if self.confirmed is None:
            asked = time.monotonic()
            mx.eval(self.ready)
            self.fetched = time.monotonic()
            self.waited = self.fetched - asked > WAIT
            self.confirmed = []
            if self.tokens is not None:
                tokens, counts = np.array(self.tokens).tolist(), np.array(self.counts).tolist()
                self.confirmed = [row[:count] for row, count in zip(tokens, counts, strict=True)]
            for sequence, row in zip(self.sequences, self.confirmed, strict=True):
                if sequence.grammar is not None:
                    for token in row:
                        sequence.grammar.accept(token)
        return self.confirmed

    def completed_at(self, before: float) -> float:
        """When it was done, as near as can be told once it was fetched.

        MLX makes the host wait in dispatching a step until all but the last few operations of it
        are done. Then the step before has long been done when it is fetched, and its end is nearer
        to when it had been dispatched.

        Args:
            before: when the step before landed.
        """
        return self.fetched if self.waited or self.dispatched <= before else self.dispatched

    @property
    def all_in_flight(self) -> bool:
        """Whether its tokens are still to come for all of its sequences."""
        return all(s.num_inflight_tokens for s in self.sequences)

    @property
    def index_by_id(self) -> dict[int, int]:
        """Index in `sequences` by identity."""
        return {id(sequence): i for i, sequence in enumerate(self.sequences)}
