"""The draft controller drafts where drafts make generation faster."""

from __future__ import annotations

from random import Random

import pytest

from glmd.engine.spec_decode.controller import HOLD_STEPS, DraftController


def run(
    controller: DraftController,
    steps: int,
    *,
    cost: float,
    acceptance: float,
    sequences: int = 1,
    seed: int = 0,
) -> list[int]:
    """Simulate steps in which a draft multiplies the duration by `cost`; returns their drafts."""
    random = Random(seed)
    chosen, before = [], 0
    for _ in range(steps):
        drafts = controller.choose(sequences)
        # Drafts of one step are verified in the next.
        accepted = sum(random.random() < acceptance for _ in range(sequences)) if before else 0
        seconds = (cost if before else 1.0) * random.uniform(0.8, 1.3)
        controller.observe(sequences, before, accepted, seconds)
        chosen.append(drafts)
        before = drafts
    return chosen


@pytest.mark.parametrize("sequences", [1, 4, 16])
def test_drafts_where_accepted_tokens_outweigh_longer_steps(sequences: int) -> None:
    controller = DraftController("auto")
    run(controller, 100, cost=1.35, acceptance=0.85, sequences=sequences)
    held = run(controller, 300, cost=1.35, acceptance=0.85, sequences=sequences)
    assert set(held) == {1}
    assert controller.gain(sequences) == pytest.approx(1.85 / 1.35, rel=0.25)


def test_does_not_draft_where_steps_become_too_long() -> None:
    controller = DraftController("auto")
    run(controller, 100, cost=2.2, acceptance=0.8)
    assert set(run(controller, 300, cost=2.2, acceptance=0.8)) == {0}


def test_decides_again_when_conditions_change() -> None:
    controller = DraftController("auto")
    run(controller, HOLD_STEPS, cost=2.5, acceptance=0.9)
    assert controller.drafts == 0
    run(controller, 2 * HOLD_STEPS, cost=1.2, acceptance=0.9)
    assert controller.drafts == 1


def test_stops_soon_after_drafts_are_no_longer_accepted() -> None:
    controller = DraftController("auto")
    run(controller, 100, cost=1.4, acceptance=0.9)
    assert set(run(controller, 50, cost=1.4, acceptance=0.9)) == {1}
    run(controller, 100, cost=1.4, acceptance=0.1)
    assert set(run(controller, 200, cost=1.4, acceptance=0.1)) == {0}


def test_the_first_measurement_counts_the_drafts_accepted_in_it() -> None:
    controller = DraftController("auto")
    run(controller, 40, cost=1.3, acceptance=0.0)
    assert set(run(controller, 300, cost=1.3, acceptance=0.0)) == {0}


def test_hopeless_acceptance_stops_drafts_for_all_batch_sizes_until_measured_again() -> None:
    controller = DraftController("auto")
    assert sum(run(controller, 200, cost=1.05, acceptance=0.0)) < 40
    assert sum(run(controller, 200, cost=1.05, acceptance=0.0, sequences=8)) == 0
    run(controller, 2 * HOLD_STEPS, cost=1.2, acceptance=0.9)
    assert controller.choose(1) == 1


def test_decides_for_each_batch_size() -> None:
    controller = DraftController("auto")
    for _ in range(40):
        run(controller, 5, cost=1.2, acceptance=0.8, sequences=1)
        run(controller, 5, cost=3.0, acceptance=0.8, sequences=32)
    assert controller.choose(1) == 1
    assert controller.choose(32) == 0


def test_measuring_the_slower_kind_takes_few_steps() -> None:
    controller = DraftController("auto")
    chosen = run(controller, 6000, cost=3.0, acceptance=0.5)
    assert sum(chosen) < 0.05 * len(chosen)


@pytest.mark.parametrize("drafts", [0, 1, 2, 3])
def test_a_fixed_setting_is_kept(drafts: int) -> None:
    controller = DraftController(drafts)  # type: ignore[arg-type]
    assert set(run(controller, 200, cost=5.0, acceptance=0.1)) == {drafts}


def test_steps_with_prefill_count_for_acceptance_but_not_for_durations() -> None:
    controller = DraftController("auto")
    for _ in range(200):
        controller.observe(1, controller.choose(1), 1, None)
    assert controller.gain(1) is None
    assert controller.acceptance > 0.8
