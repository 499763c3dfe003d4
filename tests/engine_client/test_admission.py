"""Admission control, timeouts, and their responses over HTTP."""

from __future__ import annotations

import contextlib
import json
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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

# -- counting ----------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class QueueMachine(RuleBasedStateMachine):
    """Bounds and counters hold for any order of arrivals, admissions and departures."""

    MAX_SEQUENCES, MAX_TOKENS = 12, 300

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.queue = AdmissionQueue(self.MAX_SEQUENCES, self.MAX_TOKENS, self.clock)
        self.tickets: list[Ticket] = []

    @rule(client=st.sampled_from("abc"), sequences=st.integers(1, 4), tokens=st.integers(1, 80))
    def arrive(self, client: str, sequences: int, tokens: int) -> None:
        waiting = self.queue.sequences
        own = Counter[str]()
        for ticket in self.tickets:
            own[ticket.client] += ticket.sequences
        try:
            self.tickets.append(self.queue.admit_or_reject(client, sequences, tokens))
        except Overloaded:
            assert waiting
            assert self.queue.retry_after() >= 0
        else:
            assert not waiting or own[client] + sequences <= self.MAX_SEQUENCES - waiting

    @rule(number=st.integers(0, 20), seconds=st.floats(0, 5))
    def admit(self, number: int, seconds: float) -> None:
        self.clock.now += seconds
        if self.tickets:
            self.queue.mark_admitted(self.tickets[number % len(self.tickets)])

    @rule(number=st.integers(0, 20))
    def release(self, number: int) -> None:
        if self.tickets:
            self.queue.release(self.tickets.pop(number % len(self.tickets)))

    @invariant()
    def counters_match_the_tickets(self) -> None:
        assert self.queue.sequences == sum(ticket.sequences for ticket in self.tickets)
        assert self.queue.tokens == sum(ticket.tokens for ticket in self.tickets)
        assert self.queue.sequences <= self.MAX_SEQUENCES
        assert self.queue.tokens <= self.MAX_TOKENS


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=40, stateful_step_count=30)


def fill(queue: AdmissionQueue, client: str) -> None:
    while True:
        try:
            queue.admit_or_reject(client, 1, 10)
        except Overloaded:
            return


def test_greedy_clients_always_leave_room_for_another() -> None:
    queue = AdmissionQueue(100)
    for client in "abcd":
        fill(queue, client)
    queue.admit_or_reject("newcomer", 1, 10)
    assert queue.sequences < 100


def test_an_empty_queue_accepts_a_request_of_any_size() -> None:
    queue = AdmissionQueue(4, 100)
    ticket = queue.admit_or_reject("a", 128, 5000)
    with pytest.raises(Overloaded, match="128 sequences are waiting"):
        queue.admit_or_reject("b", 1, 1)
    queue.release(ticket)
    queue.admit_or_reject("b", 1, 1)


def test_too_many_prompt_tokens_are_rejected_with_that_reason() -> None:
    queue = AdmissionQueue(100, 1000)
    queue.admit_or_reject("a", 1, 400)
    with pytest.raises(Overloaded, match="400 prompt tokens are waiting"):
        queue.admit_or_reject("a", 1, 400)
    queue.admit_or_reject("a", 1, 200)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=20), st.integers(1, 6))
def test_retry_after_follows_the_admissions_and_spreads_retries(
    pauses: list[float], refused: int
) -> None:
    clock = Clock()
    queue = AdmissionQueue(60, clock=clock)
    tickets = [queue.admit_or_reject("a", 1, 1) for _ in range(30)]
    for ticket, pause in zip(tickets, pauses, strict=False):
        clock.now += pause
        queue.mark_admitted(ticket)
    suggested = [queue.retry_after() for _ in range(refused)]
    assert suggested == sorted(suggested)
    assert min(pauses) - 1e-6 <= suggested[0] <= max(pauses) + 1e-6
    for earlier, later in pairwise(suggested):
        assert later - earlier == pytest.approx(suggested[0])
    clock.now += 1000.0
    assert queue.retry_after() > 999, "no admission for 1000 s"


# -- over HTTP ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with a queue of four and several keys. The engine admits a sequence with its first
    token, so `{wait}` stays in the queue."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.touch(0o600)
    keys.write_text("a\nb\nsdk\nkey\nother\n")
    with live_server(max_queue=4, api_key_file=keys) as live:
        yield live


@contextlib.contextmanager
def waiting(live: LiveServer, key: str, count: int) -> Iterator[None]:
    """Keep `count` requests of a client in the queue during the block."""
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
def test_a_full_queue_rejects_in_each_apis_shape_with_retry_after(
    narrow: LiveServer, path: str
) -> None:
    with waiting(narrow, "a", 2), narrow.client() as http:
        mine = http.post(
            path, json=body_of(path, "</think>Hi"), headers={"authorization": "Bearer a"}
        )
        assert error_of(path, mine) == (529 if path == "/v1/messages" else 503, "overloaded_error")
        assert int(mine.headers["retry-after"]) >= 1
        assert "2 sequences are waiting, 2 of them from this client" in mine.text
        other = http.post(
            path, json=body_of(path, "</think>Hi"), headers={"authorization": "Bearer other"}
        )
        assert other.status_code == 200, "another client finds room"


def test_a_background_response_is_rejected_at_once(narrow: LiveServer) -> None:
    with waiting(narrow, "b", 2), narrow.client(headers={"authorization": "Bearer b"}) as http:
        body = body_of("/v1/responses", "</think>Hi", background=True)
        assert http.post("/v1/responses", json=body).status_code == 503


def test_the_official_clients_retry_and_get_their_answer(narrow: LiveServer) -> None:
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


# -- timeouts ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_queue_timeout_is_overloaded_with_retry_after(
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
def test_a_first_token_or_total_timeout_is_504_and_frees_the_row(
    scripted: LiveServer, path: str, header: str
) -> None:
    with scripted.client(headers={header: "0.1"}) as http:
        response = http.post(path, json=body_of(path, "{wait}"))
    assert error_of(path, response) == (504, "timeout_error")
    assert "timeout (0.1 s) exceeded" in response.text
    final = response.headers.get("x-should-retry")
    assert final == ("false" if header == "x-glmd-timeout" else None)
    scripted.wait_until_idle()


def test_a_stream_that_exceeds_the_total_timeout_ends_with_an_error_event(
    scripted: LiveServer,
) -> None:
    with ThreadPoolExecutor(len(PATHS)) as pool:
        list(pool.map(lambda path: assert_stream_times_out(scripted, path), PATHS))
    scripted.wait_until_idle()


def assert_stream_times_out(scripted: LiveServer, path: str) -> None:
    """A stream whose text came in time ends by the total timeout, not by those that were met."""
    for seconds in (2, 8, 32):
        headers = {
            "x-glmd-timeout": str(seconds),
            "x-glmd-queue-timeout": str(seconds * 3 / 4),
            "x-glmd-first-token-timeout": str(seconds * 3 / 4),
        }
        with scripted.client(headers=headers) as http:
            response = http.post(path, json=body_of(path, "</think>So far{wait}", stream=True))
        if "So" in response.text:
            break
    assert response.status_code == 200
    if path in ("/v1/chat/completions", "/v1/completions"):
        events = sse.read(response.content)
        assert not events.done
        last = events.chunks[-1]
        assert last["error"]["type"] == "timeout_error"
        assert "So" in json.dumps(events.chunks)
    else:
        last = sse.read_named(response.content)[-1]
        assert last["type"] == ("error" if path == "/v1/messages" else "response.failed")
    assert f"Request timeout ({seconds} s) exceeded" in json.dumps(last)


def test_a_client_can_shorten_the_servers_timeout_but_not_extend_it() -> None:
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
def test_a_malformed_timeout_header_is_rejected(http: httpx.Client, value: str) -> None:
    response = http.post(
        "/v1/chat/completions",
        json=body_of("/v1/chat/completions", "</think>Hi"),
        headers={"x-glmd-timeout": value},
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-glmd-timeout"
