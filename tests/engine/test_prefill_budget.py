"""The prefill share of a step, on machines of known speed."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from glmd.engine.scheduler.prefill_budget import (
    BASE_STEPS,
    FIRST_CHUNK,
    SMALLEST_CHUNK,
    STRANGE_STEPS,
    PrefillBudget,
)

Machine = Callable[[int, int], float]
"""Seconds of a step with that many decode and prefill rows."""


def _linear(base: float, row: float) -> Machine:
    return lambda decode, prefill: base + row * prefill + 1e-4 * base * decode


def _run(pace: PrefillBudget, machine: Machine, decode: int, steps: int = 60) -> int:
    """Steps with as much prefill as allowed; returns the last share that was not none."""
    share = 0
    for _ in range(steps):
        prefill = pace.prefill_budget(decode, 1)
        pace.observe(decode, prefill, machine(decode, prefill))
        share = prefill or share
    return share


def test_prefill_alone_may_fill_a_step() -> None:
    assert PrefillBudget(2.0, 2048).prefill_budget(0, 1) == 2048


def test_the_first_step_beside_streams_shows_what_they_take_alone() -> None:
    pace = PrefillBudget(2.0, 2048)
    assert pace.prefill_budget(4, 1) == 0
    pace.observe(4, 0, 0.02)
    assert pace.prefill_budget(4, 1) == 4
    assert pace.prefill_budget(5, 1) == 5


def test_the_first_chunk_has_no_more_rows_than_there_are_streams_nor_than_it_takes() -> None:
    pace = PrefillBudget(2.0, 2048)
    for streams, rows in ((1, SMALLEST_CHUNK), (8, 8), (100, FIRST_CHUNK)):
        pace.observe(streams, 0, 0.02)
        assert pace.prefill_budget(streams, 1) == rows


def test_strange_numbers_of_streams_wait_little_for_their_measure() -> None:
    """By what one stream takes a step with more is not too long; what rows cost beside more is not
    learnt from that, but from a step without, which comes soon."""
    machine: Machine = lambda decode, prefill: 0.010 + 0.001 * decode + 0.0005 * prefill  # noqa: E731
    pace = PrefillBudget(2.0, 2048)
    _run(pace, machine, 1)
    by_one = pace.prefill_budget(1, 1)
    assert by_one == pytest.approx(machine(1, 0) / 0.0005, rel=0.03)
    pace.observe(1, 0, machine(1, 0))
    shares = []
    for _ in range(STRANGE_STEPS + 2):
        shares.append(pace.prefill_budget(16, 1))
        pace.observe(16, shares[-1], machine(16, shares[-1]))
    assert shares[:STRANGE_STEPS] == [by_one] * STRANGE_STEPS
    assert shares[STRANGE_STEPS] == 0
    assert shares[-1] == pytest.approx(machine(16, 0) / 0.0005, rel=0.03)


def test_a_step_that_measures_is_asked_for_once() -> None:
    """The next is planned before it has been observed."""
    pace = PrefillBudget(2.0, 2048)
    usual = _run(pace, _linear(0.020, 0.0002), 8)
    shares = []
    for _ in range(BASE_STEPS + 2):
        shares.append(pace.prefill_budget(8, 1))
        pace.observe(8, usual, 0.04)
    assert shares.count(0) == 1


def test_by_what_many_take_a_few_are_not_slowed_down_more() -> None:
    machine: Machine = lambda decode, prefill: 0.001 * decode + 0.0001 * prefill  # noqa: E731
    pace = PrefillBudget(2.0, 2048)
    _run(pace, machine, 16)
    rows = pace.prefill_budget(2, 1)
    assert machine(2, rows) <= 2.05 * machine(2, 0)


def test_streams_that_join_are_not_taken_for_the_cost_of_prefill() -> None:
    machine: Machine = lambda decode, prefill: 0.010 + 0.005 * decode + 0.0005 * prefill  # noqa: E731
    pace = PrefillBudget(2.0, 2048)
    for decode in range(1, 17):
        for _ in range(4):
            rows = pace.prefill_budget(decode, 1)
            pace.observe(decode, rows, machine(decode, rows))
    assert machine(16, rows) / machine(16, 0) == pytest.approx(2.0, rel=0.2)


@pytest.mark.parametrize("slowdown", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("decode", [1, 8, 32])
def test_steps_take_the_allowed_multiple_of_a_decode_step(slowdown: float, decode: int) -> None:
    machine = _linear(0.020, 0.0002)
    prefill = _run(PrefillBudget(slowdown, 2048), machine, decode)
    assert machine(decode, prefill) / machine(decode, 0) == pytest.approx(slowdown, rel=0.03)


@pytest.mark.parametrize(("prefilling", "times"), [(1, 1), (2, 1), (3, 2), (4, 3), (9, 8)])
def test_more_in_prefill_than_decoding_have_so_much_more_of_a_step(
    prefilling: int, times: int
) -> None:
    pace = PrefillBudget(2.0, 4096)
    usual = _run(pace, _linear(0.020, 0.0002), 8)
    assert pace.prefill_budget(8, prefilling) == pytest.approx(times * usual, rel=0.02)


def test_a_machine_with_room_to_spare_fills_the_step() -> None:
    pace = PrefillBudget(2.0, 512)
    assert _run(pace, _linear(0.020, 1e-7), 8) == 512 - 8


def test_a_slow_machine_gets_on_all_the_same() -> None:
    assert _run(PrefillBudget(2.0, 2048), _linear(0.001, 0.1), 8) == SMALLEST_CHUNK


def test_the_share_follows_a_machine_that_changes() -> None:
    pace = PrefillBudget(2.0, 2048)
    fast = _run(pace, _linear(0.020, 0.0002), 8)
    slow = _run(pace, _linear(0.020, 0.002), 8)
    again = _run(pace, _linear(0.020, 0.0002), 8)
    assert slow == pytest.approx(10, abs=1)
    assert fast == pytest.approx(100, rel=0.03)
    assert again == pytest.approx(100, rel=0.03)


def test_one_odd_step_hardly_moves_the_share() -> None:
    pace = PrefillBudget(2.0, 2048)
    usual = _run(pace, _linear(0.020, 0.0002), 8)
    pace.observe(8, 0, 0.2)  # ten times as long: a page fault, a sleeping laptop
    assert usual / 2 <= pace.prefill_budget(8, 1) <= 2 * usual
    pace.observe(8, usual, 2.0)
    assert pace.prefill_budget(8, 1) >= usual / 2


def test_a_batch_size_not_seen_before_is_judged_by_one_near() -> None:
    pace = PrefillBudget(2.0, 2048)
    usual = _run(pace, _linear(0.020, 0.0002), 8)
    assert pace.prefill_budget(9, 1) == pytest.approx(usual, rel=0.03)


@given(
    st.floats(1.0, 8.0),
    st.integers(1, 4096),
    st.lists(
        st.tuples(st.integers(0, 64), st.integers(0, 4096), st.floats(0, 1e3)),
        max_size=20,
    ),
    st.integers(0, 64),
)
@example(2.0, 64, [(1, 0, 0.01), (0, 8, 0.0)], 1)  # a clock too coarse for the step
def test_a_prompt_always_gets_rows_and_a_step_stays_within_bounds(
    slowdown: float, max_rows: int, steps: list[tuple[int, int, float]], decode: int
) -> None:
    pace = PrefillBudget(slowdown, max_rows)
    for decoding, prefill_rows, seconds in steps:
        pace.observe(decoding, prefill_rows, seconds)
    if pace.prefill_budget(decode, 1) == 0:
        pace.observe(decode, 0, 0.01)
    assert 1 <= pace.prefill_budget(decode, 1) <= max(max_rows - decode, SMALLEST_CHUNK)
