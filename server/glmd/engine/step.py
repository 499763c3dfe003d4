"""Rows of one step, and the results of a launched step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from glmd.engine.sequence import Sequence
from glmd.ipc import PromptLogprobs, TokenLogprobs

WAIT = 1e-3
"""Seconds from which on a fetch counts as having waited for the device."""


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """Consecutive rows of one sequence in a step, and its state at planning.

    Attributes:
        start, end: rows of the step.
        num_computed_tokens: tokens with KV before the step. Position of row `start`, unless tokens
            are in flight: then only the device knows the position.
        num_inflight_tokens: of the step before, at most.
        num_sampled: last rows behind which a token is sampled. All rows of a decoding sequence;
            of a prefill chunk 1 if the chunk ends the known tokens, else 0.
        sample_start: index of the first of them among all sampled rows of the step.
    """

    sequence: Sequence
    start: int
    end: int
    num_computed_tokens: int
    num_inflight_tokens: int
    num_sampled: int
    sample_start: int

    def __len__(self) -> int:
        """Number of rows."""
        return self.end - self.start


@dataclass(slots=True)
class StepRows:
    """Table of a step's rows, built once and read by every part of the step.

    The parts read positions and counts here rather than from the sequences, so they do not depend
    on when the step's KV is committed.

    Attributes:
        decode: sequences with decode rows (one each) or verify rows (one, and one per draft). Their
            rows come first in the step, and all are sampled: a row's index among the sampled rows
            is the row itself.
        prefill: chunks, behind all decode rows.
        sampled: of both, those with sampled rows.
        sampled_rows: indices of all sampled rows.
        sample_index: sequence to its index in `sampled`.
    """

    decode: list[SequenceRows] = field(default_factory=list)
    prefill: list[SequenceRows] = field(default_factory=list)
    sampled: list[SequenceRows] = field(default_factory=list)
    sampled_rows: list[int] = field(default_factory=list)
    sample_index: dict[Sequence, int] = field(default_factory=dict)
    num_rows: int = 0
    num_decode_rows: int = 0

    def add_decode(self, sequences: list[Sequence], width: int) -> None:
        """Add `width` rows of each sequence: its last token, then its drafts."""
        assert not self.prefill
        for sequence in sequences:
            self.decode.append(self._add(sequence, width, width))
        self.num_decode_rows = self.num_rows

    def add_prefill(self, sequence: Sequence, count: int) -> SequenceRows:
        """Add a chunk of `count` rows."""
        ends = count == sequence.num_uncomputed_tokens
        self.prefill.append(self._add(sequence, count, int(ends)))
        return self.prefill[-1]

    def _add(self, sequence: Sequence, count: int, num_sampled: int) -> SequenceRows:
        start, end = self.num_rows, self.num_rows + count
        rows = SequenceRows(
            sequence,
            start,
            end,
            sequence.num_computed_tokens,
            sequence.num_inflight_tokens,
            num_sampled,
            len(self.sampled_rows),
        )
        if num_sampled:
            self.sample_index[sequence] = len(self.sampled)
            self.sampled.append(rows)
            self.sampled_rows += range(end - num_sampled, end)
        self.num_rows = end
        return rows

    @property
    def num_prefill_rows(self) -> int:
        return self.num_rows - self.num_decode_rows

    @property
    def sampled_sequences(self) -> list[Sequence]:
        return [rows.sequence for rows in self.sampled]


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of consecutive prompt tokens, possibly not evaluated.

    Attributes:
        start: position of the first of them.
        chosen: [tokens] their log-probabilities.
        ids, values: [tokens, k] the most likely ids in their places, and those' log-probabilities.
    """

    sequence: Sequence
    start: int
    chosen: mx.array
    ids: mx.array
    values: mx.array

    def arrays(self) -> list[mx.array]:
        return [self.chosen, self.ids, self.values]

    def read(self) -> PromptLogprobs:
        """Wait for the values."""
        columns = (np.array(array).tolist() for array in self.arrays())
        return PromptLogprobs(self.start, list(map(TokenLogprobs, *columns)))


@dataclass(slots=True)
class PendingStep:
    """A launched step whose results have not been read.

    S sequences have R sampled rows in all.

    Attributes:
        launched: time of the launch, by `time.monotonic`.
        tokens: [R] int32, the token chosen behind each sampled row; None if R is 0.
        counts: [S] int32, confirmed tokens: 1, and 1 per draft that the model chose, too.
        last: [S] int32, the last confirmed token.
        drafts: [S, k] int32, for the next step; None for k = 0.
        drafted: sequences with drafts in `drafts`. The others' rows are arbitrary.
        with_gaps: those of them of whose context the MTP layer did not see all tokens.
        verified_with_gaps: `with_gaps` of the step before, whose drafts this step verifies.
        logprobs: by index among the sampled rows; see `SamplerOutput`.
        prompt_scores: of the step's chunks.
        ready: an array that is evaluated when the step is.
        dispatched: time at which MLX returned from dispatching the step.
        fetched: time at which the step was found to be evaluated.
        waited: the host had to wait for the step.
        confirmed: confirmed tokens of each sequence; None before the first `wait`.
        read: the sequences have the confirmed tokens.
    """

    rows: StepRows
    ready: mx.array
    launched: float
    tokens: mx.array | None = None
    counts: mx.array | None = None
    last: mx.array | None = None
    drafts: mx.array | None = None
    drafted: frozenset[Sequence] = frozenset()
    with_gaps: frozenset[Sequence] = frozenset()
    verified_with_gaps: frozenset[Sequence] = frozenset()
    logprobs: dict[int, tuple[mx.array, mx.array, mx.array]] = field(default_factory=dict)
    prompt_scores: list[PromptScores] = field(default_factory=list)
    dispatched: float = 0.0
    fetched: float = 0.0
    waited: bool = False
    confirmed: list[list[int]] | None = None
    read: bool = False

    def wait(self) -> list[list[int]]:
        """Wait for the step; returns each sampled sequence's confirmed tokens.

        The first call reads all results, and then advances the sequences' grammars: MLX may raise
        at any result, and nothing must have changed by then.
        """
        if self.confirmed is None:
            asked = time.monotonic()
            mx.eval(self.ready)
            self.fetched = time.monotonic()
            self.waited = self.fetched - asked > WAIT
            confirmed: list[list[int]] = []
            if self.tokens is not None:
                mx.eval(self.tokens, self.counts, *self.logprobs.values())
                tokens, counts = np.array(self.tokens).tolist(), np.array(self.counts).tolist()
                for rows, count in zip(self.rows.sampled, counts, strict=True):
                    confirmed.append(tokens[rows.sample_start : rows.sample_start + count])
            self.confirmed = confirmed
            for rows, accepted in zip(self.rows.sampled, self.confirmed, strict=True):
                if rows.sequence.grammar is not None:
                    for token in accepted:
                        rows.sequence.grammar.accept(token)
        return self.confirmed

    def completed_at(self, previous: float) -> float:
        """Estimate when a fetched step ended.

        Dispatching a step blocks until all but the last few operations of it are done. If the next
        step was dispatched meanwhile, `fetched` is late and `dispatched` is the better estimate.

        Args:
            previous: when the step before ended.
        """
        return self.fetched if self.waited or self.dispatched <= previous else self.dispatched

    @property
    def all_in_flight(self) -> bool:
        """Whether no sampled sequence has been read or dropped since the launch."""
        return all(rows.sequence.num_inflight_tokens for rows in self.rows.sampled)
