"""Prefill budget on machines of known speed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given

from glmd.engine.config import EngineConfig
from glmd.engine.scheduler.prefill_budget import (
    BASE_STEPS,
    FIRST_CHUNK,
    PREFILL_SHARE,
    PROBE_FACTOR,
    SMALLEST_CHUNK,
    UNKNOWN_BASE_STEPS,
    PrefillBudget,
)

Machine = Callable[[int, int], float]
"""From decode and prefill rows to the seconds of a step."""


def _linear(base: float, row: float) -> Machine:
    """A CPU: every row costs the same."""
    return lambda decode, prefill: base + row * prefill + 1e-4 * base * decode


def _gpu(decode: int, prefill: int) -> float:
    """Few rows multiply one by one; from 64 rows on, a pass over all weights is shared."""
    rows = decode + prefill
    if prefill == 0:
        return 0.018 + 0.005 * decode
    return 0.2 if rows < 64 else max(0.1, 0.0022 * rows)


def _budget(**config: Any) -> PrefillBudget:
    return PrefillBudget(EngineConfig(**config))


@dataclass
class Steps:
    """Prefill rows and seconds of consecutive steps."""

    rows: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def interval(self) -> float:
        """Mean seconds between two tokens of a stream."""
        return float(np.mean(self.seconds))

    @property
    def rate(self) -> float:
        """Prefill rows per second."""
        return sum(self.rows) / sum(self.seconds)


def _run(
    budget: PrefillBudget, machine: Machine, decode: int, steps: int = 200, prefilling: int = 1
) -> Steps:
    """Run steps with the full budget; each is observed after the next one is scheduled."""
    done = Steps()
    previous = None
    for _ in range(steps):
        rows = budget.prefill_budget(decode, prefilling)
        if previous is not None:
            budget.observe(decode, *previous)
        previous = rows, machine(decode, rows)
        done.rows.append(rows)
        done.seconds.append(previous[1])
    assert previous is not None
    budget.observe(decode, *previous)
    return done


def _settled(
    budget: PrefillBudget, machine: Machine, decode: int, steps: int = 200, prefilling: int = 1
) -> Steps:
    """As `_run`, after 60 steps in which the machine is measured."""
    _run(budget, machine, decode, 60)
    return _run(budget, machine, decode, steps, prefilling)


def test_prefill_alone_fills_a_step() -> None:
    assert _budget().prefill_budget(0, 1) == 2048


def test_the_first_step_beside_streams_has_no_prefill() -> None:
    budget = _budget()
    assert budget.prefill_budget(4, 1) == 0
    budget.observe(4, 0, 0.02)
    assert budget.prefill_budget(4, 1) == 4
    assert budget.prefill_budget(5, 1) == 5


def test_the_first_chunk_has_at_most_as_many_rows_as_streams() -> None:
    budget = _budget()
    for streams, rows in ((1, SMALLEST_CHUNK), (8, 8), (100, FIRST_CHUNK)):
        budget.observe(streams, 0, 0.02)
        assert budget.prefill_budget(streams, 1) == rows


@pytest.mark.parametrize("decode", [1, 8, 32])
@pytest.mark.parametrize(
    ("base", "row"), [(0.004, 0.002), (0.02, 0.0002), (0.02, 0.005), (0.06, 0.004)]
)
def test_streams_keep_their_rate_and_prefill_gets_the_rest(
    base: float, row: float, decode: int
) -> None:
    machine = _linear(base, row)
    steps = _settled(_budget(), machine, decode)
    assert steps.interval <= 0.1 * 1.02
    assert max(steps.seconds) <= 0.25
    assert steps.rate * row >= 0.93 * (1 - machine(decode, 0) / 0.1)


@pytest.mark.parametrize("rate", [5.0, 10.0, 20.0])
@pytest.mark.parametrize("gap", [0.06, 0.25, 1.0])
def test_both_settings_hold(rate: float, gap: float) -> None:
    steps = _settled(_budget(min_stream_rate=rate, max_gap=gap), _linear(0.02, 0.001), 4)
    assert steps.interval <= 1.02 / rate
    assert max(steps.seconds) <= gap


def test_prefill_keeps_a_share_where_streams_alone_miss_their_rate() -> None:
    machine = _linear(0.2, 0.002)
    steps = _settled(_budget(), machine, 8)
    assert steps.rate * 0.002 >= 0.9 * PREFILL_SHARE
    assert steps.interval <= 1.05 * machine(8, 0) / (1 - PREFILL_SHARE)


@pytest.mark.parametrize("decode", [1, 8])
def test_chunks_reach_the_number_of_rows_that_share_the_weights(decode: int) -> None:
    """Also if only few rows have been measured before, which look too slow for more."""
    budget = _budget()
    budget.observe(0, 20, 0.2)
    steps = _settled(budget, _gpu, decode)
    assert min(rows for rows in steps.rows if rows) + decode >= 64
    assert max(steps.seconds) <= 0.25
    assert steps.interval <= 0.102


def test_the_compilation_of_kernels_is_no_measurement() -> None:
    budget = _budget()
    budget.observe(0, 20, 0.2)
    budget.observe(0, 100, 3.0)
    steps = _settled(budget, _gpu, 1)
    assert min(rows for rows in steps.rows if rows) + 1 >= 64


@pytest.mark.parametrize("row", [0.0005, 0.002, 0.01])
@pytest.mark.parametrize("alone", [5, 60, 2048])
def test_no_step_stalls_streams_while_the_machine_is_measured(row: float, alone: int) -> None:
    machine = _linear(0.02, row)
    budget = _budget()
    budget.observe(0, alone, machine(0, alone))
    steps = _run(budget, machine, 2)
    assert max(steps.seconds) <= PROBE_FACTOR * 0.25
    assert sum(seconds > 0.25 for seconds in steps.seconds) <= 2
    assert np.mean(steps.seconds[20:]) <= 0.105


@pytest.mark.parametrize(("prefilling", "decode"), [(9, 8), (16, 1)])
def test_many_short_prompts_lower_the_rate_but_keep_the_gap(prefilling: int, decode: int) -> None:
    machine = _linear(0.06, 0.001)
    usual = _settled(_budget(), machine, decode)
    crowd = _settled(_budget(), machine, decode, prefilling=prefilling)
    assert crowd.rate >= 1.5 * usual.rate
    assert max(crowd.seconds) <= 0.25


def test_one_more_short_prompt_than_streams_outweigh_changes_nothing() -> None:
    machine = _linear(0.06, 0.001)
    usual = _settled(_budget(), machine, 8)
    assert _settled(_budget(), machine, 8, prefilling=2).rate == pytest.approx(usual.rate)


def test_unknown_numbers_of_streams_are_measured_soon() -> None:
    machine: Machine = lambda decode, prefill: 0.010 + 0.001 * decode + 0.0005 * prefill  # noqa: E731
    budget = _budget()
    _run(budget, machine, 1, 400)
    steps = _run(budget, machine, 16, UNKNOWN_BASE_STEPS + 3)
    assert 0 in steps.rows


def test_a_measuring_step_is_requested_once() -> None:
    """The next step is scheduled before the measuring step is observed."""
    machine = _linear(0.020, 0.001)
    budget = _budget(min_stream_rate=0.1)
    _settled(budget, machine, 8)
    steps = _run(budget, machine, 8, BASE_STEPS + 2)
    assert steps.rows.count(0) == 1


def test_a_machine_with_free_capacity_fills_the_step() -> None:
    steps = _settled(_budget(max_step_tokens=512), _linear(0.020, 1e-7), 8)
    assert 480 <= max(steps.rows) <= 512 - 8


def test_a_slow_machine_gets_the_smallest_chunk() -> None:
    steps = _settled(_budget(), _linear(0.001, 0.1), 8)
    assert set(steps.rows) == {0, SMALLEST_CHUNK}


def test_the_budget_follows_a_machine_that_changes() -> None:
    budget = _budget()
    for row in (0.0002, 0.002, 0.0002):
        _run(budget, _linear(0.020, row), 8)
        rate = _run(budget, _linear(0.020, row), 8).rate
        assert rate == pytest.approx(0.8 / row, rel=0.1)


def test_an_outlier_hardly_changes_the_budget() -> None:
    machine = _linear(0.020, 0.001)
    budget = _budget()
    usual = _settled(budget, machine, 8).rate
    for rows in (0, 80):
        budget.observe(8, rows, 2.0)  # a page fault, a sleeping laptop
        assert _run(budget, machine, 8, 40).rate >= 0.6 * usual
        assert _run(budget, machine, 8, 40).rate == pytest.approx(usual, rel=0.1)


def test_steps_before_a_prompt_arrives_are_no_debt() -> None:
    """Durations vary, and streams run for hours."""
    budget = _budget()
    budget.observe(0, 100, 0.1)
    for i in range(1000):
        budget.observe(4, 0, 0.02 + 0.01 * (i % 2))
    assert budget.prefill_budget(4, 1) > 0


def test_the_former_setting_still_limits_steps(caplog: pytest.LogCaptureFixture) -> None:
    machine = _linear(0.020, 0.0002)
    with caplog.at_level(logging.WARNING):
        budget = _budget(max_slowdown=2.0)
    assert "deprecated setting: name=max_slowdown use=max_gap" in caplog.text
    assert max(_settled(budget, machine, 8).seconds) <= 2.05 * machine(8, 0)


@given(
    st.floats(0.1, 100.0),
    st.floats(0.01, 10.0),
    st.integers(1, 4096),
    st.lists(
        st.tuples(st.integers(0, 64), st.integers(0, 4096), st.floats(0, 1e3)),
        max_size=20,
    ),
    st.integers(1, 64),
)
@example(10.0, 0.25, 64, [(1, 0, 0.01), (0, 8, 0.0)], 1)  # a clock too coarse for the step
@example(10.0, 0.25, 64, [(1, 0, 0.0), (0, 8, 0.0)], 1)
@example(75.0, 2.0, 1, [(0, 1, 0.0), (1, 0, 0.0), (1, 1, 4.0)], 1)  # 300 tokens earn that row
def test_budgets_are_within_the_step_and_prompts_progress(
    rate: float, gap: float, max_rows: int, steps: list[tuple[int, int, float]], decode: int
) -> None:
    budget = _budget(min_stream_rate=rate, max_gap=gap, max_step_tokens=max_rows)
    for decoding, prefill_rows, seconds in steps:
        budget.observe(decoding, prefill_rows, seconds)
    budgets = []
    # A chunk is believed to take some times the gap at most, and tokens ahead of the rate earn it.
    for _ in range(300 + int(4 * gap * rate)):
        budgets.append(budget.prefill_budget(decode, 1))
        budget.observe(decode, 0, 1e-4)
        assert 0 <= budgets[-1] <= max(max_rows - decode, SMALLEST_CHUNK)
        if len(budgets) >= 300 and max(budgets) > 0:
            break
    if min(rate, 10 * gap) > 1:
        assert max(budgets) > 0
