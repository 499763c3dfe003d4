"""Rows of a step, and when it ended."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from engines import request

from glmd.engine.sequence import Sequence, make_sequences
from glmd.engine.step import PendingStep, StepRows
from glmd.ipc import ModelInfo

INFO = ModelInfo(
    path="",
    vocab_size=512,
    max_context=1000,
    eos_token_ids=(1,),
    has_mtp=True,
    weight_bytes=0,
    kv_bytes_per_token=0,
    bits_per_weight=0.0,
    device="",
)


def _sequence(length: int, computed: int, in_flight: int = 0) -> Sequence:
    prompt = np.arange(length, dtype=np.int32)
    (sequence,) = make_sequences(request("a", prompt), prompt, INFO)
    sequence.num_computed_tokens, sequence.num_inflight_tokens = computed, in_flight
    return sequence


def test_the_row_table_partitions_the_step_in_row_order() -> None:
    verified = [_sequence(9, 8, in_flight=2), _sequence(5, 4, in_flight=1)]
    decoding = [_sequence(3, 2)]
    unfinished, finished = _sequence(50, 10), _sequence(30, 25)
    rows = StepRows()
    rows.add_decode(verified, 3)
    rows.add_decode(decoding, 1)
    rows.add_prefill(unfinished, 20)
    rows.add_prefill(finished, 5)
    every = [*rows.decode, *rows.prefill]
    assert [each.sequence for each in every] == [*verified, *decoding, unfinished, finished]
    assert [(each.start, each.end) for each in every] == [
        (0, 3), (3, 6), (6, 7), (7, 27), (27, 32),
    ]  # fmt: skip
    assert (rows.num_rows, rows.num_decode_rows, rows.num_prefill_rows) == (32, 7, 25)
    assert rows.sampled_sequences == [*verified, *decoding, finished]
    assert rows.sampled_rows == [0, 1, 2, 3, 4, 5, 6, 31]
    assert [each.sample_start for each in rows.sampled] == [0, 3, 6, 7]
    assert [each.num_sampled for each in every] == [3, 3, 1, 0, 1]
    assert rows.sample_index == {sequence: i for i, sequence in enumerate(rows.sampled_sequences)}


def test_the_row_table_keeps_the_counters_from_before_the_commit() -> None:
    sequence = _sequence(50, 10)
    rows = StepRows()
    chunk = rows.add_prefill(sequence, 40)
    sequence.num_computed_tokens, sequence.num_inflight_tokens = 50, 1
    assert (chunk.num_computed_tokens, chunk.num_inflight_tokens, chunk.num_sampled) == (10, 0, 1)


@pytest.mark.parametrize(
    ("waited", "dispatched", "completed"),
    [
        (True, 3.0, 5.0),  # the host waited for the end
        (False, 3.0, 3.0),  # it had ended before the next step was dispatched
        (False, 1.0, 5.0),  # dispatched while the step before ran: no better bound is known
    ],
)
def test_a_step_ends_when_it_was_fetched_or_when_it_was_dispatched(
    waited: bool, dispatched: float, completed: float
) -> None:
    step = PendingStep(StepRows(), ready=mx.zeros(1), launched=0.5)
    step.dispatched, step.fetched, step.waited = dispatched, 5.0, waited
    assert step.completed_at(previous=2.0) == completed


def test_estimated_ends_of_consecutive_steps_are_in_order() -> None:
    completed = 0.0
    for dispatched, fetched, waited in [(1, 2, True), (1.5, 3, False), (4, 5, False), (5, 6, True)]:
        step = PendingStep(StepRows(), ready=mx.zeros(1), launched=0.0)
        step.dispatched, step.fetched, step.waited = dispatched, fetched, waited
        after = step.completed_at(completed)
        assert after > completed
        completed = after
