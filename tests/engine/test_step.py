"""When a step was over, from what the host could see of it."""

from __future__ import annotations

import mlx.core as mx
import pytest

from glmd.engine.step import PendingStep


@pytest.mark.parametrize(
    ("waited", "dispatched", "landed"),
    [
        (True, 3.0, 5.0),  # the host came before its end, and saw it
        (False, 3.0, 3.0),  # it was over before the next step had been dispatched
        (False, 1.0, 5.0),  # let go while the step before ran: no nearer bound is known
    ],
)
def test_a_step_ends_where_it_was_seen_to_or_had_been_dispatched(
    waited: bool, dispatched: float, landed: float
) -> None:
    flight = PendingStep(
        sequences=[],
        widths=[],
        tokens=None,
        counts=None,
        last=None,
        drafts=None,
        logprobs={},
        ready=mx.zeros(1),
        num_decoding=0,
        prefill_rows=0,
        launched=0.5,
        dispatched=dispatched,
        fetched=5.0,
        waited=waited,
    )
    assert flight.completed_at(before=2.0) == landed


def test_steps_in_a_row_end_in_order_whatever_was_seen() -> None:
    """Each takes no less than nothing: what one took is not counted for another."""
    landed = 0.0
    for dispatched, fetched, waited in [(1, 2, True), (1.5, 3, False), (4, 5, False), (5, 6, True)]:
        flight = PendingStep([], [], None, None, None, None, {}, mx.zeros(1), 0, 0, 0.0)
        flight.dispatched, flight.fetched, flight.waited = dispatched, fetched, waited
        after = flight.completed_at(landed)
        assert after > landed
        landed = after
