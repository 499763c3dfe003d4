"""What may wait before the engine, and for how long."""

from __future__ import annotations

import contextlib
import json
import socket
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import anthropic
import httpx
import openai
import pytest
import sse
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from live import LiveServer, live_server
from requests_by_path import PATHS, body_of, error_of, wait_until

from glmd.engine_client.admission import AdmissionQueue, Ticket
from glmd.errors import Overloaded

# -- the count ----------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class QueueMachine(RuleBasedStateMachine):
    """Any order of arrivals, admissions and departures keeps the bounds and the books."""

    MAX_ANSWERS, MAX_TOKENS = 12, 300

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.queue = AdmissionQueue(self.MAX_ANSWERS, self.MAX_TOKENS, self.clock)
        self.places: list[Ticket] = []

    @rule(client=st.sampled_from("abc"), answers=st.integers(1, 4), tokens=st.integers(1, 80))
    def arrive(self, client: str, answers: int, tokens: int) -> None:
        waiting = self.queue.sequences
        own = Counter[str]()
        for place in self.places:
            own[place.client] += place.sequences
        try:
            self.places.append(self.queue.admit_or_reject(client, answers, tokens))
        except Overloaded:
            assert waiting
            assert self.queue.retry_after() >= 0
        else:
            assert not waiting or own[client] + answers <= self.MAX_ANSWERS - waiting

    @rule(number=st.integers(0, 20), seconds=st.floats(0, 5))
    def admit(self, number: int, seconds: float) -> None:
        self.clock.now += seconds
        if self.places:
            self.queue.mark_admitted(self.places[number % len(self.places)])

    @rule(number=st.integers(0, 20))
    def give_up(self, number: int) -> None:
        if self.places:
            self.queue.release(self.places.pop(number % len(self.places)))

    @invariant()
    def books_are_right(self) -> None:
        assert self.queue.sequences == sum(place.sequences for place in self.places)
        assert self.queue.tokens == sum(place.tokens for place in self.places)
        assert self.queue.sequences <= self.MAX_ANSWERS
        assert self.queue.tokens <= self.MAX_TOKENS


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=40, stateful_step_count=30)


def fill(queue: AdmissionQueue, client: str) -> None:
    while True:
        try:
            queue.admit_or_reject(client, 1, 10)
        except Overloaded:
            return


def test_a_client_alone_gets_half_and_there_is_always_room_for_another() -> None:
    queue = AdmissionQueue(100)
    for client in "abcd":
        fill(queue, client)
    queue.admit_or_reject("newcomer", 1, 10)
    assert queue.sequences < 100


def test_when_nothing_waits_even_the_largest_request_is_let_in() -> None:
    queue = AdmissionQueue(4, 100)
    place = queue.admit_or_reject("a", 128, 5000)
    with pytest.raises(Overloaded, match="128 sequences are waiting"):
        queue.admit_or_reject("b", 1, 1)
    queue.release(place)
    queue.admit_or_reject("b", 1, 1)


def test_too_many_prompt_tokens_are_refused_as_such() -> None:
    queue = AdmissionQueue(100, 1000)
    queue.admit_or_reject("a", 1, 400)
    with pytest.raises(Overloaded, match="400 prompt tokens are waiting"):
        queue.admit_or_reject("a", 1, 400)
    queue.admit_or_reject("a", 1, 200)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=20), st.integers(1, 6))
def test_retry_after_follows_the_admissions_and_spreads_those_who_are_told(
    pauses: list[float], refused: int
) -> None:
    clock = Clock()
    queue = AdmissionQueue(60, clock=clock)
    places = [queue.admit_or_reject("a", 1, 1) for _ in range(30)]
    for place, pause in zip(places, pauses, strict=False):
        clock.now += pause
        queue.mark_admitted(place)
    told = [queue.retry_after() for _ in range(refused)]
    assert told == sorted(told)
    assert min(pauses) - 1e-6 <= told[0] <= max(pauses) + 1e-6
    for earlier, later in pairwise(told):
        assert later - earlier == pytest.approx(told[0])
    clock.now += 1000.0
    assert queue.retry_after() > 999, "nobody has been let in for so long"


# -- over HTTP ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow() -> Iterator[LiveServer]:
    """Four may wait. The engine lets in what has a first token, so `{wait}` waits its turn."""
    with live_server(max_queue=4) as live:
        yield live


@contextlib.contextmanager
def waiting(live: LiveServer, key: str, count: int) -> Iterator[None]:
    """So many requests of a client wait for their turn meanwhile."""
    queue = live.service.engine.queue
    body = json.dumps(body_of("/v1/chat/completions", "{wait}")).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"Authorization: Bearer {key}\r\n\r\n"
    )
    address = live.url.removeprefix("http://").split(":")
    before = queue.sequences
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            opened = socket.create_connection((address[0], int(address[1])))
            stack.enter_context(opened)
            opened.sendall(head.encode() + body)
        wait_until(lambda: queue.sequences == before + count)
        yield
    wait_until(lambda: queue.sequences <= before)


@pytest.mark.parametrize("path", PATHS)
def test_a_full_queue_refuses_in_each_apis_shape_and_says_when_to_come_back(
    narrow: LiveServer, path: str
) -> None:
    with waiting(narrow, "a", 2), narrow.client() as http:
        mine = http.post(
            path, json=body_of(path, "</think>Hi"), headers={"authorization": "Bearer a"}
        )
        assert error_of(path, mine) == (529 if path == "/v1/messages" else 503, "overloaded_error")
        assert int(mine.headers["retry-after"]) >= 1
        assert "2 sequences are waiting, 2 of them from this client" in mine.text
        other = http.post(path, json=body_of(path, "</think>Hi"))
        assert other.status_code == 200, "another client finds room"


def test_a_background_response_is_refused_at_once(narrow: LiveServer) -> None:
    with waiting(narrow, "b", 2), narrow.client(headers={"authorization": "Bearer b"}) as http:
        body = body_of("/v1/responses", "</think>Hi", background=True)
        assert http.post("/v1/responses", json=body).status_code == 503


def test_the_official_clients_try_again_and_get_their_answer(narrow: LiveServer) -> None:
    with contextlib.ExitStack() as full:
        full.enter_context(waiting(narrow, "sdk", 2))
        refusals = []

        def make_room(response: httpx.Response) -> None:
            if response.status_code == 503:
                refusals.append(response.headers["retry-after"])
                full.close()

        client = openai.OpenAI(
            base_url=f"{narrow.url}/v1",
            api_key="sdk",
            http_client=openai.DefaultHttpxClient(event_hooks={"response": [make_room]}),
        )
        completion = client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": "⟦</think>Here⟧"}]
        )
        assert completion.choices[0].message.content == "Here"
        assert len(refusals) == 1
    with waiting(narrow, "key", 2):
        claude = anthropic.Anthropic(base_url=narrow.url, auth_token="key", max_retries=0)
        with pytest.raises(anthropic.APIStatusError) as caught:
            claude.messages.create(
                model="default", max_tokens=9, messages=[{"role": "user", "content": "Hi"}]
            )
        assert caught.value.status_code == 529
        assert caught.value.type == "overloaded_error"


# -- deadlines ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_request_whose_turn_does_not_come_in_time_is_told_to_come_back(
    scripted: LiveServer, path: str, stream: bool
) -> None:
    with scripted.client(headers={"x-glmd-queue-timeout": "0.1"}) as http:
        response = http.post(path, json=body_of(path, "{wait}", stream=stream))
    assert error_of(path, response) == (529 if path == "/v1/messages" else 503, "overloaded_error")
    assert "Queue timeout (0.1 s) exceeded" in response.text
    assert int(response.headers["retry-after"]) >= 1
    scripted.wait_until_idle()


@pytest.mark.parametrize("header", ["x-glmd-first-token-timeout", "x-glmd-timeout"])
@pytest.mark.parametrize("path", PATHS)
def test_a_request_that_takes_too_long_is_504_and_its_row_is_free(
    scripted: LiveServer, path: str, header: str
) -> None:
    with scripted.client(headers={header: "0.1"}) as http:
        response = http.post(path, json=body_of(path, "{wait}"))
    assert error_of(path, response) == (504, "timeout_error")
    assert "timeout (0.1 s) exceeded" in response.text
    final = response.headers.get("x-should-retry")
    assert final == ("false" if header == "x-glmd-timeout" else None)
    scripted.wait_until_idle()


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_that_takes_too_long_ends_with_an_error_event(
    scripted: LiveServer, path: str
) -> None:
    headers = {
        "x-glmd-timeout": "0.4",
        # These two are kept, and must not go off later.
        "x-glmd-queue-timeout": "0.3",
        "x-glmd-first-token-timeout": "0.3",
    }
    with scripted.client(headers=headers) as http:
        body = body_of(path, "</think>So far{wait}", stream=True)
        response = http.post(path, json=body)
    assert response.status_code == 200
    if path in ("/v1/chat/completions", "/v1/completions"):
        events = sse.read(response.content)
        assert not events.done
        assert events.chunks[-1]["error"]["type"] == "timeout_error"
        assert "So" in json.dumps(events.chunks)
    else:
        last = sse.read_named(response.content)[-1]
        kind = "error" if path == "/v1/messages" else "response.failed"
        assert last["type"] == kind
        assert "Request timeout (0.4 s) exceeded" in json.dumps(last)
    scripted.wait_until_idle()


def test_a_client_can_be_less_patient_than_the_server_not_more() -> None:
    with live_server(request_timeout=0.2) as live, live.client() as http:
        for header, limit in (("60", "0.2"), ("0.1", "0.1")):
            response = http.post(
                "/v1/chat/completions",
                json=body_of("/v1/chat/completions", "{wait}"),
                headers={"x-glmd-timeout": header},
            )
            assert response.status_code == 504
            assert f"timeout ({limit} s) exceeded" in response.text


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf"])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(http: httpx.Client, value: str) -> None:
    response = http.post(
        "/v1/chat/completions",
        json=body_of("/v1/chat/completions", "</think>Hi"),
        headers={"x-glmd-timeout": value},
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-glmd-timeout"
