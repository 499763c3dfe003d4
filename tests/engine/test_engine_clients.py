"""Fairness among clients in admission, prefill and preemption."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from engines import Run, assert_idle, request, tiny_engine, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from glmd.engine.scheduler import prefill_budget, scheduler
from glmd.engine.scheduler.prefill_budget import VirtualTokenCounter
from glmd.ipc import SequenceOutput

WORDS = np.random.default_rng(1).integers(0, 500, 4000).tolist()


class Crowd(Run):
    """A run that records the order of admissions."""

    def __init__(self, **config: Any) -> None:
        super().__init__(tiny_engine(**config))
        self.admitted: list[str] = []
        self.number = 0

    def ask(self, client: str, length: int = 20, **fields: Any) -> str:
        """Submit a request of `client` with a unique prompt."""
        self.number += 1
        id = f"{client}-{self.number}"
        prompt = [self.number % 500, *WORDS[self.number : self.number + length - 1]]
        fields = {"max_tokens": 2, "ignore_eos": True} | fields
        self.submit(request(id, prompt, client=client, **fields))
        return id

    def step(self) -> list[SequenceOutput]:
        outputs = super().step()
        self.admitted += [output.id for output in outputs if output.admitted]
        return outputs

    def step_until_admitted(self, id: str, limit: int = 2000) -> None:
        for _ in range(limit):
            if id in self.admitted:
                return
            self.step()
        raise AssertionError(f"{id} is starved")

    def step_until_started(self, id: str, limit: int = 2000) -> None:
        for _ in range(limit):
            if (id, 0) in self.answers and self.answer(id).tokens:
                return
            self.step()
        raise AssertionError(f"{id} is starved")


def test_a_hundred_requests_do_not_delay_another_clients_first_one() -> None:
    crowd = Crowd(max_running=2)
    flood = [crowd.ask("flood", 20 - i % 10, max_tokens=9) for i in range(100)]
    for _ in range(5):
        crowd.step()
    before = len(crowd.admitted)
    single = crowd.ask("single", 200)
    crowd.step_until_admitted(single)
    assert crowd.admitted[before] == single, "another client's request was admitted before it"
    assert sum((id, 0) in crowd.answers for id in flood) < 10
    crowd.finish()
    assert_idle(crowd.engine)


def test_clients_are_admitted_equally_often_whatever_the_length_of_their_queues() -> None:
    crowd = Crowd(max_running=1)
    for _ in range(30):
        crowd.ask("a", 30)
    for client in "bcd":
        for _ in range(3):
            crowd.ask(client, 30)
    while len(crowd.admitted) < 12:
        crowd.step()
    admissions = Counter(id[0] for id in crowd.admitted)
    assert admissions == {"a": 3, "b": 3, "c": 3, "d": 3}


def test_a_short_prompt_of_another_client_passes_prompts_in_prefill() -> None:
    crowd = Crowd(max_step_tokens=40)
    for _ in range(8):
        crowd.ask("flood", 400)
    for _ in range(3):
        crowd.step()
    before = crowd.steps
    id = crowd.ask("single", 25)
    crowd.step_until_started(id)
    assert crowd.steps - before <= 4
    assert not any(answer.tokens for (other, _), answer in crowd.answers.items() if other != id)


def test_a_high_priority_does_not_pass_other_clients() -> None:
    crowd = Crowd(max_running=1)
    crowd.ask("now")
    crowd.step()
    for _ in range(5):
        crowd.ask("urgent", priority=1000)
    polite = crowd.ask("polite", 300)
    crowd.step_until_admitted(polite)
    assert len([id for id in crowd.admitted if id.startswith("urgent")]) <= 1


def test_priorities_order_a_clients_requests_and_negative_ones_yield_to_all() -> None:
    crowd = Crowd(max_running=1)
    crowd.ask("now", max_tokens=4)
    crowd.step()
    last = crowd.ask("a", 5, priority=-1)
    usual = crowd.ask("a", 20)
    first = crowd.ask("a", 40, priority=3)
    others = [crowd.ask("b", 50) for _ in range(3)]
    crowd.finish()
    order = [id for id in crowd.admitted if not id.startswith("now")]
    assert order[-1] == last
    assert order.index(first) < order.index(usual)
    assert set(order) == {last, usual, first, *others}


def test_the_client_that_runs_most_is_preempted_when_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Although its single request is the youngest, it is not preempted."""
    monkeypatch.setattr(scheduler, "ADMISSION_RESERVE", 8)
    crowd = Crowd(model=tiny_model(max_position_embeddings=512), kv_tokens=512 + 256)
    for _ in range(4):
        crowd.ask("flood", 60, max_tokens=200)
    for _ in range(4):
        crowd.step()
    single = crowd.ask("single", 60, max_tokens=200)
    crowd.finish()
    assert crowd.engine.stats().preemptions > 0
    steps = crowd.answer(single).steps
    assert steps[-1] - steps[0] < 220, "it was preempted"
    assert_idle(crowd.engine)


@st.composite
def traffic(draw: st.DrawFn) -> list[list[tuple[int, int, int]]]:
    """Requests that arrive before each step: (client, prompt length, priority)."""
    arrival = st.tuples(st.integers(0, 3), st.integers(1, 60), st.integers(0, 2))
    return draw(st.lists(st.lists(arrival, max_size=4), min_size=20, max_size=40))


@settings(max_examples=12)
@given(traffic(), st.integers(1, 3), st.integers(0, 15), st.integers(1, 100))
def test_a_clients_first_request_is_passed_by_each_other_client_once_at_most(
    arrivals: list[list[tuple[int, int, int]]], places: int, at: int, length: int
) -> None:
    """And every request is served in the end."""
    crowd = Crowd(max_running=places, max_step_tokens=64)
    before, mine = 0, ""
    for step, arrived in enumerate(arrivals):
        for client, prompt, priority in arrived:
            crowd.ask(f"{client}", prompt, priority=priority)
        if step == at:
            before, mine = len(crowd.admitted), crowd.ask("mine", length)
        crowd.step()
    crowd.step_until_admitted(mine)
    index = crowd.admitted.index(mine)
    passed = Counter(id.split("-")[0] for id in crowd.admitted[before:index])
    assert all(count <= 1 for count in passed.values()), passed
    crowd.finish()
    assert len(crowd.admitted) == crowd.number
    assert all(answer.finish == "length" for answer in crowd.answers.values())
    assert_idle(crowd.engine)


def test_a_stream_of_new_clients_does_not_starve_a_waiting_one() -> None:
    crowd = Crowd(max_running=1, max_step_tokens=64)
    crowd.ask("now")
    crowd.step()
    waiting = crowd.ask("waiting", 60)
    for number in range(300):
        crowd.ask(f"new{number}", 3, max_tokens=1)
        crowd.step()
        if waiting in crowd.admitted:
            break
    assert waiting in crowd.admitted
    crowd.finish()


def test_a_returning_client_has_neither_gained_credit_nor_lost_debt() -> None:
    counter = VirtualTokenCounter()
    for client in ("busy", "light"):
        counter.enter(client)
    counter.charge("busy", 100)
    counter.charge("light", 10)
    counter.leave("light")
    counter.enter("light")
    assert counter.served("light") == 100
    counter.charge("light", 50)
    counter.leave("light")
    counter.enter("light")
    assert counter.served("light") == 150


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=200))
def test_idle_clients_without_debt_are_forgotten(calls: list[tuple[int, int]]) -> None:
    counter = VirtualTokenCounter()
    counter.enter("always")
    for number, tokens in calls:
        counter.enter(f"{number}")
        counter.charge(f"{number}", tokens)
        counter.leave(f"{number}")
    counter.charge("always", 10_000)
    counter.enter("last")
    counter.leave("last")
    assert len(counter) == 1
    counter.leave("always")
    assert len(counter) == 0


def test_clients_with_debt_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_budget, "MAX_CLIENTS", 5)
    counter = VirtualTokenCounter()
    counter.enter("waits")
    for number in range(20):
        counter.enter(f"{number}")
        counter.charge(f"{number}", 100)
        counter.leave(f"{number}")
    assert len(counter) == 5
    assert counter.served("19") == 100


def test_client_and_priority_change_no_token() -> None:
    alone = Crowd()
    id = alone.ask("a", 30, seed=5, temperature=0.9, max_tokens=12)
    alone.finish()
    crowd = Crowd(max_running=3)
    same = crowd.ask("a", 30, seed=5, temperature=0.9, max_tokens=12)
    for client in "bcd":
        for _ in range(3):
            crowd.ask(client, 25, priority=1)
    crowd.finish()
    assert alone.answer(id).tokens == crowd.answer(same).tokens
