"""Clients take turns: in admission, in prefill, and when something must give way."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from engines import Run, assert_at_rest, request, tiny_engine, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from glmd.engine.scheduler import scheduler
from glmd.engine.scheduler.fairness import VirtualTokenCounter
from glmd.ipc import SequenceOutput

WORDS = np.random.default_rng(1).integers(0, 500, 4000).tolist()


class Crowd(Run):
    """A run that notes who was admitted, in order."""

    def __init__(self, **config: Any) -> None:
        super().__init__(tiny_engine(**config))
        self.admitted: list[str] = []
        self.number = 0

    def ask(self, client: str, length: int = 20, **fields: Any) -> str:
        """Submit a request of `client`, with a prompt that no other shares."""
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
    assert crowd.admitted[before] == single, "another's request was let in before it"
    assert sum((id, 0) in crowd.answers for id in flood) < 10
    crowd.finish()
    assert_at_rest(crowd.engine)


def test_clients_take_turns_whatever_the_length_of_their_queues() -> None:
    crowd = Crowd(max_running=1)
    for _ in range(30):
        crowd.ask("a", 30)
    for client in "bcd":
        for _ in range(3):
            crowd.ask(client, 30)
    while len(crowd.admitted) < 12:
        crowd.step()
    turns = Counter(id[0] for id in crowd.admitted)
    assert turns == {"a": 3, "b": 3, "c": 3, "d": 3}


def test_a_short_prompt_of_another_client_passes_prompts_that_are_being_computed() -> None:
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


def test_nobody_passes_another_client_by_calling_itself_urgent() -> None:
    crowd = Crowd(max_running=1)
    crowd.ask("now")
    crowd.step()
    for _ in range(5):
        crowd.ask("pushy", priority=1000)
    polite = crowd.ask("polite", 300)
    crowd.step_until_admitted(polite)
    assert len([id for id in crowd.admitted if id.startswith("pushy")]) <= 1


def test_a_priority_orders_a_clients_own_requests_and_below_zero_gives_way_to_all() -> None:
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


def test_the_client_that_runs_most_gives_way_when_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The single one came last; by age alone it would be the one to be sent back."""
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
    assert steps[-1] - steps[0] < 220, "it had to wait in between"
    assert_at_rest(crowd.engine)


@st.composite
def traffic(draw: st.DrawFn) -> list[list[tuple[int, int, int]]]:
    """For each step, the requests that arrive: (client, prompt length, priority from 0 on)."""
    arrival = st.tuples(st.integers(0, 3), st.integers(1, 60), st.integers(0, 2))
    return draw(st.lists(st.lists(arrival, max_size=4), min_size=20, max_size=40))


@settings(max_examples=12)
@given(traffic(), st.integers(1, 3), st.integers(0, 15), st.integers(1, 100))
def test_a_clients_first_request_is_passed_by_each_other_client_once_at_most(
    arrivals: list[list[tuple[int, int, int]]], places: int, at: int, length: int
) -> None:
    """And whoever comes is served in the end, though others keep coming."""
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
    assert_at_rest(crowd.engine)


def test_new_clients_without_end_do_not_starve_one_that_waits() -> None:
    crowd = Crowd(max_running=1, max_step_tokens=64)
    crowd.ask("now")
    crowd.step()
    waiting = crowd.ask("patient", 60)
    for number in range(300):
        crowd.ask(f"new{number}", 3, max_tokens=1)
        crowd.step()
        if waiting in crowd.admitted:
            break
    assert waiting in crowd.admitted
    crowd.finish()


def test_a_client_that_comes_back_has_saved_nothing_up_and_is_forgiven_nothing() -> None:
    shares = VirtualTokenCounter()
    for client in ("busy", "light"):
        shares.enter(client)
    shares.charge("busy", 100)
    shares.charge("light", 10)
    shares.leave("light")
    shares.enter("light")
    assert shares.served("light") == 100
    shares.charge("light", 50)
    shares.leave("light")
    shares.enter("light")
    assert shares.served("light") == 150


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=200))
def test_clients_that_are_gone_and_owe_nothing_are_forgotten(calls: list[tuple[int, int]]) -> None:
    shares = VirtualTokenCounter()
    shares.enter("always")
    for number, tokens in calls:
        shares.enter(f"{number}")
        shares.charge(f"{number}", tokens)
        shares.leave(f"{number}")
    shares.charge("always", 10_000)
    shares.enter("last")
    shares.leave("last")
    assert len(shares) == 1
    shares.leave("always")
    assert len(shares) == 0


def test_who_asks_and_how_urgently_changes_no_token() -> None:
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
    assert tiny_model() is crowd.engine._model
