"""Prefill budget on machines of known speed."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from glmd.engine.scheduler.prefill_budget import (
    BASE_STEPS,
    FIRST_CHUNK,
    SMALLEST_CHUNK,
    UNKNOWN_BASE_STEPS,
    PrefillBudget,
)

Machine = Callable[[int, int], float]
"""From decode and prefill rows to the seconds of a step."""


def _linear(base: float, row: float) -> Machine:
    return lambda decode, prefill: base + row * prefill + 1e-4 * base * decode


def _run(budget: PrefillBudget, machine: Machine, decode: int, steps: int = 60) -> int:
    """Run steps with the full budget; returns the last budget above 0."""
    share = 0
    for _ in range(steps):
        prefill = budget.prefill_budget(decode, 1)
        budget.observe(decode, prefill, machine(decode, prefill))
        share = prefill or share
    return share


def test_prefill_alone_fills_a_step() -> None:
    assert PrefillBudget(2.0, 2048).prefill_budget(0, 1) == 2048


def test_the_first_step_beside_streams_has_no_prefill() -> None:
    budget = PrefillBudget(2.0, 2048)
    assert budget.prefill_budget(4, 1) == 0
    budget.observe(4, 0, 0.02)
    assert budget.prefill_budget(4, 1) == 4
    assert budget.prefill_budget(5, 1) == 5


def test_the_first_chunk_has_at_most_as_many_rows_as_streams() -> None:
    budget = PrefillBudget(2.0, 2048)
    for streams, rows in ((1, SMALLEST_CHUNK), (8, 8), (100, FIRST_CHUNK)):
        budget.observe(streams, 0, 0.02)
        assert budget.prefill_budget(streams, 1) == rows


def test_unknown_numbers_of_streams_are_measured_soon() -> None:
    """The duration with one stream is a lower bound at first. The cost of rows is learnt only
    after a step without prefill, which is requested soon."""
    machine: Machine = lambda decode, prefill: 0.010 + 0.001 * decode + 0.0005 * prefill  # noqa: E731
    budget = PrefillBudget(2.0, 2048)
    _run(budget, machine, 1)
    by_one = budget.prefill_budget(1, 1)
    assert by_one == pytest.approx(machine(1, 0) / 0.0005, rel=0.03)
    budget.observe(1, 0, machine(1, 0))
    shares = []
    for _ in range(UNKNOWN_BASE_STEPS + 2):
        shares.append(budget.prefill_budget(16, 1))
        budget.observe(16, shares[-1], machine(16, shares[-1]))
    assert shares[:UNKNOWN_BASE_STEPS] == [by_one] * UNKNOWN_BASE_STEPS
    assert shares[UNKNOWN_BASE_STEPS] == 0
    assert shares[-1] == pytest.approx(machine(16, 0) / 0.0005, rel=0.03)


def test_a_measuring_step_is_requested_once() -> None:
    """The next step is scheduled before the measuring step is observed."""
    budget = PrefillBudget(2.0, 2048)
    usual = _run(budget, _linear(0.020, 0.0002), 8)
    shares = []
    for _ in range(BASE_STEPS + 2):
        shares.append(budget.prefill_budget(8, 1))
        budget.observe(8, usual, 0.04)
    assert shares.count(0) == 1


def test_the_base_of_many_streams_is_not_used_for_few() -> None:
    machine: Machine = lambda decode, prefill: 0.001 * decode + 0.0001 * prefill  # noqa: E731
    budget = PrefillBudget(2.0, 2048)
    _run(budget, machine, 16)
    rows = budget.prefill_budget(2, 1)
    assert machine(2, rows) <= 2.05 * machine(2, 0)


def test_new_streams_do_not_count_as_cost_of_prefill() -> None:
    machine: Machine = lambda decode, prefill: 0.010 + 0.005 * decode + 0.0005 * prefill  # noqa: E731
    budget = PrefillBudget(2.0, 2048)
    for decode in range(1, 17):
        for _ in range(4):
            rows = budget.prefill_budget(decode, 1)
            budget.observe(decode, rows, machine(decode, rows))
    assert machine(16, rows) / machine(16, 0) == pytest.approx(2.0, rel=0.2)


@pytest.mark.parametrize("slowdown", [1.5, 2.0, 4.0])
@pytest.mark.parametrize("decode", [1, 8, 32])
def test_steps_take_the_allowed_multiple_of_a_decode_step(slowdown: float, decode: int) -> None:
    machine = _linear(0.020, 0.0002)
    prefill = _run(PrefillBudget(slowdown, 2048), machine, decode)
    assert machine(decode, prefill) / machine(decode, 0) == pytest.approx(slowdown, rel=0.03)


@pytest.mark.parametrize(("prefilling", "times"), [(1, 1), (2, 1), (3, 2), (4, 3), (9, 8)])
def test_many_short_prompts_multiply_the_budget(prefilling: int, times: int) -> None:
    budget = PrefillBudget(2.0, 4096)
    usual = _run(budget, _linear(0.020, 0.0002), 8)
    assert budget.prefill_budget(8, prefilling) == pytest.approx(times * usual, rel=0.02)


def test_a_machine_with_free_capacity_fills_the_step() -> None:
    budget = PrefillBudget(2.0, 512)
    assert _run(budget, _linear(0.020, 1e-7), 8) == 512 - 8


def test_a_slow_machine_gets_the_smallest_chunk() -> None:
    assert _run(PrefillBudget(2.0, 2048), _linear(0.001, 0.1), 8) == SMALLEST_CHUNK


def test_the_budget_follows_a_machine_that_changes() -> None:
    budget = PrefillBudget(2.0, 2048)
    fast = _run(budget, _linear(0.020, 0.0002), 8)
    slow = _run(budget, _linear(0.020, 0.002), 8)
    again = _run(budget, _linear(0.020, 0.0002), 8)
    assert slow == pytest.approx(10, abs=1)
    assert fast == pytest.approx(100, rel=0.03)
    assert again == pytest.approx(100, rel=0.03)


def test_an_outlier_hardly_changes_the_budget() -> None:
    budget = PrefillBudget(2.0, 2048)
    usual = _run(budget, _linear(0.020, 0.0002), 8)
    budget.observe(8, 0, 0.2)  # ten times as long: a page fault, a sleeping laptop
    assert usual / 2 <= budget.prefill_budget(8, 1) <= 2 * usual
    budget.observe(8, usual, 2.0)
    assert budget.prefill_budget(8, 1) >= usual / 2


def test_an_unknown_number_of_streams_uses_a_similar_one() -> None:
    budget = PrefillBudget(2.0, 2048)
    usual = _run(budget, _linear(0.020, 0.0002), 8)
    assert budget.prefill_budget(9, 1) == pytest.approx(usual, rel=0.03)


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
def test_budgets_are_positive_and_within_the_step(
    slowdown: float, max_rows: int, steps: list[tuple[int, int, float]], decode: int
) -> None:
    budget = PrefillBudget(slowdown, max_rows)
    for decoding, prefill_rows, seconds in steps:
        budget.observe(decoding, prefill_rows, seconds)
    if budget.prefill_budget(decode, 1) == 0:
        budget.observe(decode, 0, 0.01)
    assert 1 <= budget.prefill_budget(decode, 1) <= max(max_rows - decode, SMALLEST_CHUNK)
