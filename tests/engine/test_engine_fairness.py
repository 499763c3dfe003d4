"""Streams and prompts progress beside each other."""

from __future__ import annotations

import numpy as np
import pytest
from engines import Run, assert_reference_tokens, request, tiny_engine, tiny_model

from glmd.engine.scheduler.prefill_budget import PrefillBudget

LONG = np.random.default_rng(0).integers(0, 500, 1200).tolist()


def _started(run: Run, id: str) -> bool:
    return (id, 0) in run.answers and bool(run.answer(id).tokens)


@pytest.mark.parametrize("max_step_tokens", [3, 64])
def test_streams_advance_in_every_step_beside_prefill(max_step_tokens: int) -> None:
    run = Run(tiny_engine(max_step_tokens=max_step_tokens))
    streams = [f"{i}" for i in range(4)]
    run.submit(*(request(id, [int(id)], max_tokens=400, ignore_eos=True) for id in streams))
    while not all(_started(run, id) for id in streams):
        run.step()
    first = run.steps
    run.submit(request("long", LONG[:600], max_tokens=2))
    while not _started(run, "long"):
        run.step()
        assert run.steps < first + 400
    for id in streams:
        steps = [step for step in run.answer(id).steps if step >= first]
        assert steps == list(range(first, run.steps + 1))


def test_a_prompt_progresses_beside_streams_that_fill_the_step() -> None:
    run = Run(tiny_engine(max_step_tokens=4, max_running=8))
    run.submit(*(request(f"{i}", [i], max_tokens=300, ignore_eos=True) for i in range(4)))
    while not _started(run, "3"):
        run.step()
    run.submit(request("prompt", LONG[:100], max_tokens=1))
    while not _started(run, "prompt"):
        run.step()
    assert run.answer("0").finish is None, "the prompt waited for a stream to end"


def test_the_budget_counts_short_prompts_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: list[int] = []
    budget = PrefillBudget.prefill_budget

    def spy(self: PrefillBudget, decoding: int, prefilling: int) -> int:
        counts.append(prefilling)
        return budget(self, decoding, prefilling)

    monkeypatch.setattr(PrefillBudget, "prefill_budget", spy)
    run = Run(tiny_engine(max_step_tokens=64))
    run.submit(request("stream", [499], max_tokens=400, ignore_eos=True))
    while not _started(run, "stream"):
        run.step()
    run.submit(*(request(f"long {i}", [i, *LONG], max_tokens=1) for i in range(3)))
    for _ in range(3):
        run.step()
    assert set(counts) == {1}
    run.submit(*(request(f"short {i}", [9 + i, *LONG[:100]], max_tokens=1) for i in range(4)))
    run.step()
    assert counts[-1] == 4


def test_a_short_prompt_overtakes_a_long_one_at_any_time() -> None:
    """Also when the long one is nearly done."""
    run = Run(tiny_engine(max_step_tokens=40))
    run.submit(request("long", LONG, max_tokens=1, prompt_progress=True))
    for number, at in enumerate([0, 700, 1000]):
        while not (("long", 0) in run.answers and run.answer("long").progress[-1] >= at):
            run.step()
        before = run.steps
        run.submit(request(f"{number}", [number, *range(30)], max_tokens=1))
        while not _started(run, f"{number}"):
            run.step()
        assert run.steps - before <= 4
        assert not _started(run, "long")
    run.finish()


def test_a_long_prompt_is_not_starved_by_short_ones() -> None:
    run = Run(tiny_engine(max_step_tokens=40))
    run.submit(request("long", LONG[:600], max_tokens=1))
    number = 0
    while not _started(run, "long"):
        # Short prompts for more than a step arrive before every step.
        for _ in range(2):
            number += 1
            run.submit(
                request(f"{number}", [number % 500, number // 500, *range(30)], max_tokens=1)
            )
        run.step()
        assert number < 400, "the long prompt is starved"
    assert _started(run, "1")
    run.finish()


def test_short_prompts_are_served_beside_a_long_one_that_has_waited() -> None:
    """While short prompts keep arriving, both kinds progress."""
    run = Run(tiny_engine(max_step_tokens=40))
    run.submit(request("long", LONG, max_tokens=1, prompt_progress=True))
    waits = []
    arrived: dict[str, int] = {}
    number = 0
    while not _started(run, "long"):
        if run.steps % 2 == 0:
            number += 1
            run.submit(request(f"{number}", [number % 500, *range(30)], max_tokens=1))
            arrived[f"{number}"] = run.steps
        for output in run.step():
            if output.tokens and output.id in arrived:
                waits.append(run.steps - arrived.pop(output.id))
        assert run.steps < 400
    assert max([*waits, *(run.steps - at for at in arrived.values())]) <= 12


def test_higher_priority_goes_first() -> None:
    run = Run(tiny_engine(max_running=1, max_step_tokens=40))
    run.submit(request("now", LONG[:100], max_tokens=3, ignore_eos=True))
    run.step()
    for id, priority in (("low", -1), ("usual", 0), ("high", 5)):
        run.submit(request(id, LONG[100 : 200 + priority], max_tokens=3, priority=priority))
    run.finish()
    first = {id: run.answer(id).steps[0] for id in ("high", "usual", "low")}
    assert list(first.values()) == sorted(first.values())


def test_requests_run_one_after_another_with_max_running_1() -> None:
    run = Run(tiny_engine(max_running=1))
    asked = [request(f"{i}", LONG[i : i + 20 + i], max_tokens=4) for i in range(5)]
    run.submit(*asked)
    while run.engine.has_work:
        run.step()
        assert run.engine.stats().running <= 1
    for one in asked:
        assert_reference_tokens(tiny_model(), one, run.answer(one.id))
