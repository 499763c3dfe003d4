"""The draft controller drafts where drafts make generation faster, and costs little elsewhere."""

from __future__ import annotations

from random import Random

import pytest

from glmd.engine.spec_decode.controller import (
    FIRST_TRIAL,
    HOLD_STEPS,
    PROBED,
    SCREEN_SHARE,
    DraftController,
    DraftPlan,
    VerifiedDrafts,
)


def run(
    controller: DraftController,
    steps: int,
    *,
    cost: float,
    acceptance: float,
    sequences: int = 1,
    prefill: bool = False,
    seed: int = 0,
) -> list[DraftPlan]:
    """Simulate steps in which drafts multiply the duration by `cost`; returns their plans."""
    random = Random(seed)
    plans: list[DraftPlan] = []
    before = DraftPlan(0)
    for _ in range(steps):
        plan = controller.choose(sequences)
        # Drafts of one step are verified in the next.
        verified = min(sequences, before.sequences or sequences) * before.drafts
        made = min(sequences, plan.sequences or sequences) * plan.drafts
        share = acceptance / 2 if before.with_gaps else acceptance
        accepted = sum(random.random() < share for _ in range(verified))
        seconds = (1 + (cost - 1) * verified / sequences) * random.uniform(0.8, 1.3)
        kind = verified // sequences if made == verified in (0, sequences) else None
        drafts = VerifiedDrafts()
        drafts.add(verified, accepted, with_gaps=before.with_gaps)
        controller.observe(sequences, kind, drafts, None if prefill else seconds)
        plans.append(plan)
        before = plan
    return plans


def settle(controller: DraftController, *, steps: int = FIRST_TRIAL + 100, **load: float) -> None:
    """Run until drafts have been tried once."""
    run(controller, steps, **load)  # type: ignore[arg-type]


def kinds(plans: list[DraftPlan]) -> set[int]:
    return {plan.drafts for plan in plans}


@pytest.mark.parametrize("sequences", [1, 4, 16])
def test_drafts_where_accepted_tokens_outweigh_longer_steps(sequences: int) -> None:
    controller = DraftController("auto")
    settle(controller, cost=1.35, acceptance=0.85, sequences=sequences)
    assert kinds(run(controller, 300, cost=1.35, acceptance=0.85, sequences=sequences)) == {1}
    assert controller.gain(sequences) == pytest.approx(1.85 / 1.35, rel=0.25)


def test_does_not_draft_where_steps_become_too_long() -> None:
    controller = DraftController("auto")
    settle(controller, cost=2.2, acceptance=0.8)
    assert kinds(run(controller, 300, cost=2.2, acceptance=0.8)) == {0}


def test_no_draft_is_made_before_the_first_trial_is_worth_its_time() -> None:
    controller = DraftController("auto")
    assert kinds(run(controller, FIRST_TRIAL - 1, cost=1.1, acceptance=0.9)) == {0}


@pytest.mark.parametrize("sequences", [1, 8, 32])
def test_refused_drafts_cost_two_percent_of_the_steps_time(sequences: int) -> None:
    controller = DraftController("auto")
    plans = run(controller, 6000, cost=2.0, acceptance=0.02, sequences=sequences)
    drafted = sum(min(sequences, plan.sequences or sequences) * plan.drafts for plan in plans)
    assert 0 < drafted < 0.02 * 6000 * sequences


def test_a_probe_of_a_large_batch_is_made_by_few_sequences() -> None:
    controller = DraftController("auto")
    plans = run(controller, FIRST_TRIAL + 100, cost=2.0, acceptance=0.02, sequences=32)
    assert {plan.sequences for plan in plans if plan.drafts} == {PROBED}


@pytest.mark.parametrize("sequences", [1, 8])
def test_deferred_kv_is_computed_only_where_drafts_without_it_are_accepted(sequences: int) -> None:
    controller = DraftController("auto")
    plans = run(controller, FIRST_TRIAL + 100, cost=2.0, acceptance=0.0, sequences=sequences)
    drafting = [plan for plan in plans if plan.drafts]
    assert all(plan.with_gaps for plan in drafting)
    # A step launched before the last draft was verified may draft once more.
    screened = sum(min(sequences, plan.sequences or sequences) for plan in drafting)
    assert screened < 1 / SCREEN_SHARE + 2 * PROBED
    plans = run(controller, 2 * HOLD_STEPS, cost=1.2, acceptance=0.9, sequences=sequences)
    assert any(plan.drafts and not plan.with_gaps for plan in plans)


def test_deferred_kv_is_not_computed_where_even_accepted_drafts_would_not_pay() -> None:
    controller = DraftController("auto")
    plans = run(controller, FIRST_TRIAL + 100, cost=3.0, acceptance=1.0, sequences=8)
    assert all(plan.with_gaps for plan in plans if plan.drafts)


def test_accepted_drafts_that_do_not_pay_are_tried_more_and_more_rarely() -> None:
    controller = DraftController("auto")
    plans = run(controller, 12_000, cost=2.2, acceptance=0.9, sequences=8)
    first, last = plans[:4000], plans[-4000:]
    assert 0 < sum(plan.drafts for plan in last) < sum(plan.drafts for plan in first)
    assert sum(plan.drafts for plan in plans) < 0.02 * len(plans)


def test_decides_again_when_conditions_change() -> None:
    controller = DraftController("auto")
    settle(controller, cost=2.5, acceptance=0.9)
    assert controller.plan.drafts == 0
    settle(controller, steps=8 * HOLD_STEPS + 200, cost=1.2, acceptance=0.9)
    assert controller.plan.drafts == 1


def test_stops_soon_after_drafts_are_no_longer_accepted() -> None:
    controller = DraftController("auto")
    settle(controller, cost=1.4, acceptance=0.9)
    assert kinds(run(controller, 50, cost=1.4, acceptance=0.9)) == {1}
    run(controller, 100, cost=1.4, acceptance=0.1)
    assert kinds(run(controller, 200, cost=1.4, acceptance=0.1)) == {0}


def test_drafts_again_once_they_are_accepted() -> None:
    controller = DraftController("auto")
    settle(controller, cost=1.2, acceptance=0.0)
    assert controller.plan.drafts == 0
    settle(controller, steps=3 * HOLD_STEPS, cost=1.2, acceptance=0.9)
    assert controller.plan.drafts == 1


def test_decides_for_each_batch_size() -> None:
    controller = DraftController("auto")
    settle(controller, cost=1.2, acceptance=0.8, sequences=1)
    for _ in range(10):
        run(controller, 20, cost=1.2, acceptance=0.8, sequences=1)
        run(controller, 20, cost=3.0, acceptance=0.8, sequences=32)
    assert kinds(run(controller, 20, cost=1.2, acceptance=0.8, sequences=1)[-10:]) == {1}
    assert kinds(run(controller, 20, cost=3.0, acceptance=0.8, sequences=32)[-10:]) == {0}


def test_a_short_change_of_the_batch_size_changes_nothing() -> None:
    controller = DraftController("auto")
    settle(controller, cost=1.2, acceptance=0.8, sequences=1)
    run(controller, 100, cost=3.0, acceptance=0.8, sequences=32)
    run(controller, 100, cost=1.2, acceptance=0.8, sequences=1)
    assert kinds(run(controller, 5, cost=3.0, acceptance=0.8, sequences=32)) == {1}


@pytest.mark.parametrize("drafts", [0, 1, 2, 3])
def test_a_fixed_setting_is_kept(drafts: int) -> None:
    controller = DraftController(drafts)  # type: ignore[arg-type]
    for _ in range(200):
        assert controller.choose(1) == DraftPlan(drafts)
        controller.observe(1, drafts, VerifiedDrafts(drafts), 1.0)


def test_steps_with_prefill_count_for_acceptance_but_not_for_durations() -> None:
    controller = DraftController("auto")
    run(controller, 2 * FIRST_TRIAL, cost=1.2, acceptance=1.0, prefill=True)
    assert controller.gain(1) is None
    assert controller.acceptance > 0.8
