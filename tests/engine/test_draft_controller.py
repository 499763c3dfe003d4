"""The draft gate drafts where that is faster, and only there."""

from __future__ import annotations

from random import Random

import pytest

from glmd.engine.spec_decode.controller import HOLD_STEPS, DraftController


def run(
    gate: DraftController,
    steps: int,
    *,
    cost: float,
    acceptance: float,
    sequences: int = 1,
    seed: int = 0,
) -> list[int]:
    """Steps in which a draft makes a step `cost` times as long; returns the drafts of each."""
    random = Random(seed)
    chosen, before = [], 0
    for _ in range(steps):
        drafts = gate.choose(sequences)
        # What is drafted in one step is verified in the next.
        accepted = sum(random.random() < acceptance for _ in range(sequences)) if before else 0
        seconds = (cost if before else 1.0) * random.uniform(0.8, 1.3)
        gate.observe(sequences, before, accepted, seconds)
        chosen.append(drafts)
        before = drafts
    return chosen


@pytest.mark.parametrize("sequences", [1, 4, 16])
def test_drafts_where_accepted_tokens_outweigh_longer_steps(sequences: int) -> None:
    gate = DraftController("auto")
    run(gate, 100, cost=1.35, acceptance=0.85, sequences=sequences)
    held = run(gate, 300, cost=1.35, acceptance=0.85, sequences=sequences)
    assert set(held) == {1}
    assert gate.gain(sequences) == pytest.approx(1.85 / 1.35, rel=0.25)


def test_does_not_draft_where_steps_become_too_long() -> None:
    gate = DraftController("auto")
    run(gate, 100, cost=2.2, acceptance=0.8)
    assert set(run(gate, 300, cost=2.2, acceptance=0.8)) == {0}


def test_changes_its_mind_when_conditions_do() -> None:
    gate = DraftController("auto")
    run(gate, HOLD_STEPS, cost=2.5, acceptance=0.9)
    assert gate.drafts == 0
    run(gate, 2 * HOLD_STEPS, cost=1.2, acceptance=0.9)
    assert gate.drafts == 1


def test_stops_at_once_where_drafts_are_no_longer_accepted() -> None:
    gate = DraftController("auto")
    run(gate, 100, cost=1.4, acceptance=0.9)
    assert set(run(gate, 50, cost=1.4, acceptance=0.9)) == {1}
    run(gate, 100, cost=1.4, acceptance=0.1)
    assert set(run(gate, 200, cost=1.4, acceptance=0.1)) == {0}


def test_the_first_trial_counts_what_was_accepted_in_it() -> None:
    gate = DraftController("auto")
    run(gate, 40, cost=1.3, acceptance=0.0)
    assert set(run(gate, 300, cost=1.3, acceptance=0.0)) == {0}


def test_hopeless_drafts_are_given_up_for_all_batch_sizes_and_tried_again_later() -> None:
    gate = DraftController("auto")
    assert sum(run(gate, 200, cost=1.05, acceptance=0.0)) < 40
    assert sum(run(gate, 200, cost=1.05, acceptance=0.0, sequences=8)) == 0
    run(gate, 2 * HOLD_STEPS, cost=1.2, acceptance=0.9)
    assert gate.choose(1) == 1


def test_decides_for_each_batch_size_apart() -> None:
    gate = DraftController("auto")
    for _ in range(40):
        run(gate, 5, cost=1.2, acceptance=0.8, sequences=1)
        run(gate, 5, cost=3.0, acceptance=0.8, sequences=32)
    assert gate.choose(1) == 1
    assert gate.choose(32) == 0


def test_trials_of_the_slower_kind_take_few_steps() -> None:
    gate = DraftController("auto")
    chosen = run(gate, 6000, cost=3.0, acceptance=0.5)
    assert sum(chosen) < 0.05 * len(chosen)


@pytest.mark.parametrize("drafts", [0, 1, 2, 3])
def test_a_fixed_setting_is_kept(drafts: int) -> None:
    gate = DraftController(drafts)  # type: ignore[arg-type]
    assert set(run(gate, 200, cost=5.0, acceptance=0.1)) == {drafts}


def test_steps_with_prefill_teach_acceptance_but_no_times() -> None:
    gate = DraftController("auto")
    for _ in range(200):
        gate.observe(1, gate.choose(1), 1, None)
    assert gate.gain(1) is None
    assert gate.acceptance > 0.8
