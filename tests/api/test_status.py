"""`/glmd/status`: running and finished requests, throughput, cancellation by id."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import sse
from live import LiveServer, live_server

from glmd.api.observability.request_stats import HttpExchange, RequestRegistry
from glmd.ipc import CacheMatch, EngineRequest, SequenceOutput, pack_tokens

BODIES: dict[str, tuple[str, Callable[[str], dict[str, Any]]]] = {
    "chat": (
        "/v1/chat/completions",
        lambda script: {"messages": [{"role": "user", "content": f"⟦{script}⟧"}]},
    ),
    "completions": ("/v1/completions", lambda script: {"prompt": f"⟦{script}⟧"}),
    "responses": ("/v1/responses", lambda script: {"input": f"⟦{script}⟧"}),
    "messages": (
        "/v1/messages",
        lambda script: {
            "max_tokens": 50,
            "messages": [{"role": "user", "content": f"⟦{script}⟧"}],
        },
    ),
}


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with live_server(keep_alive=0.2, api_key="secret") as server:
        yield server


@pytest.fixture
def http(live: LiveServer) -> Iterator[httpx.Client]:
    with live.client(headers={"authorization": "Bearer secret"}) as client:
        yield client


def status(http: httpx.Client) -> dict[str, Any]:
    response = http.get("/glmd/status")
    assert response.status_code == 200
    answer: dict[str, Any] = response.json()
    return answer


def wait_for(
    http: httpx.Client, where: str, matches: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Wait until `running` or `recent` has a matching request."""
    deadline = time.monotonic() + 20
    while True:
        shown = status(http)
        for request in shown[where]:
            if matches(request):
                found: dict[str, Any] = request
                return found
        assert time.monotonic() < deadline, shown
        time.sleep(0.02)


@contextmanager
def asked(
    http: httpx.Client, api: str, script: str, **fields: Any
) -> Iterator[list[httpx.Response]]:
    """Run a request during the block; the list has its response after the block."""
    path, body = BODIES[api]
    answers: list[httpx.Response] = []
    headers = {"x-request-id": f"test-{api}"}
    thread = threading.Thread(
        target=lambda: answers.append(
            http.post(path, json={**body(script), **fields}, headers=headers)
        )
    )
    thread.start()
    yield answers
    thread.join(20)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", BODIES)
def test_a_running_request_is_shown_and_can_be_cancelled(
    http: httpx.Client, api: str, stream: bool
) -> None:
    with asked(http, api, "</think>One{wait}", stream=stream) as answers:
        shown = wait_for(http, "running", lambda r: r["api"] == api and r["state"] == "decoding")
        assert shown["request_id"] == f"test-{api}"
        assert shown["path"] == BODIES[api][0]
        assert shown["client"] == "127.0.0.1"
        assert shown["stream"] is stream
        assert shown["computed_tokens"] == shown["prompt_tokens"] > 0
        assert shown["generated_tokens"] > 0
        assert shown["finish"] is None
        assert 0 < shown["ttft"] <= shown["seconds"]
        done = http.post(f"/glmd/requests/test-{api}/cancel")
        assert done.json() == {"cancelled": [shown["id"]]}
    (answer,) = answers
    if stream:
        assert "cancelled at the server" in answer.text
        assert "[DONE]" not in answer.text
    elif api == "responses":
        assert answer.status_code == 499
    else:
        assert answer.status_code == 499
        assert "cancelled at the server" in answer.json()["error"]["message"]
    ended = wait_for(http, "recent", lambda r: r["id"] == shown["id"])
    assert (ended["state"], ended["finish"]) == ("finished", "cancelled")
    assert not [r for r in status(http)["running"] if r["id"] == shown["id"]]


def test_a_request_of_a_disconnected_client_is_shown_as_cancelled(http: httpx.Client) -> None:
    path, body = BODIES["chat"]
    with http.stream("POST", path, json={**body("</think>One{wait}"), "stream": True}) as response:
        next(response.iter_raw())
        id = response.headers["x-request-id"]
    ended = wait_for(http, "recent", lambda r: r["request_id"] == id)
    assert ended["finish"] == "cancelled"
    assert "disconnected" in ended["error"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_finished_request_shows_its_usage(http: httpx.Client, stream: bool) -> None:
    path, body = BODIES["chat"]
    request = {**body("Hm.</think>One two three."), "stream": stream, "n": 2}
    if stream:
        request["stream_options"] = {"include_usage": True}
    response = http.post(path, json=request)
    answer = sse.read(response.content).chunks[-1] if stream else response.json()
    shown = wait_for(http, "recent", lambda r: r["id"] == answer["id"])
    usage = answer["usage"]
    assert shown["prompt_tokens"] == usage["prompt_tokens"]
    assert shown["generated_tokens"] == usage["completion_tokens"]
    assert shown["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
    details = usage["completion_tokens_details"]
    assert shown["accepted"] == details["accepted_prediction_tokens"]
    assert shown["drafted"] - shown["accepted"] == details["rejected_prediction_tokens"]
    assert (shown["finish"], shown["error"], shown["sequences"]) == ("stop", None, 2)


def test_each_prompt_of_a_completion_is_one_request(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": ["⟦a⟧", "⟦b⟧"]})
    id = answer.headers["x-request-id"]
    ids = [r["id"] for r in status(http)["recent"] if r["request_id"] == id]
    assert sorted(ids) == [f"{answer.json()['id']}-0", f"{answer.json()['id']}-1"]


def test_a_failed_request_shows_its_error(http: httpx.Client) -> None:
    path, body = BODIES["chat"]
    id = http.post(path, json=body("{refuse}")).headers["x-request-id"]
    shown = wait_for(http, "recent", lambda r: r["request_id"] == id)
    assert (shown["finish"], shown["error"]) == ("error", "As you wish.")


def test_status_has_series_of_tokens_and_first_tokens(http: httpx.Client) -> None:
    path, body = BODIES["chat"]
    before = sum(status(http)["speed"]["generated"])
    http.post(path, json=body("</think>One two three."))
    deadline = time.monotonic() + 20
    while sum((speed := status(http)["speed"])["generated"]) <= before:  # a second later
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(speed["generated"]) == len(speed["computed"]) == 120
    assert speed["generated_per_second"] > 0
    assert speed["first_tokens"][-1]["time"] <= speed["until"] + 1
    assert speed["first_tokens"][-1]["ttft"] > 0


def test_status_has_the_model_and_the_engine(http: httpx.Client) -> None:
    shown = status(http)
    assert shown["model"]["id"] == "test/tiny"
    assert shown["engine"]["state"] == "ready"
    assert shown["engine"]["pid"]
    assert shown["engine"]["stats"]["running"] >= 0
    assert shown["uptime"] > 0


def test_the_number_of_recent_requests_is_limited_by_the_query(http: httpx.Client) -> None:
    for _ in range(3):
        path, body = BODIES["chat"]
        http.post(path, json=body("</think>x"))
    last = [request["id"] for request in status(http)["recent"]]
    shown = http.get("/glmd/status", params={"recent": 2}).json()["recent"]
    assert [request["id"] for request in shown] == last[:2]
    assert http.get("/glmd/status", params={"recent": -1}).status_code == 400


def test_status_has_the_defaults_with_and_without_profiles() -> None:
    with (
        live_server(ready=False, temperature=0.6, enable_thinking=False) as server,
        server.client() as http,
    ):
        shown = status(http)
    assert (shown["defaults"]["temperature"], shown["defaults"]["enable_thinking"]) == (0.6, False)
    assert shown["profiles"]["general"]["temperature"] == 1.0
    assert shown["profiles"]["general"]["enable_thinking"] is False


def test_status_and_cancel_require_the_key_and_a_running_request(
    live: LiveServer, http: httpx.Client
) -> None:
    with live.client() as stranger:
        assert stranger.get("/glmd/status").status_code == 401
        assert stranger.post("/glmd/requests/x/cancel").status_code == 401
    gone = http.post("/glmd/requests/chatcmpl-x/cancel")
    assert gone.status_code == 404
    assert "'chatcmpl-x'" in gone.json()["error"]["message"]


def test_computed_prompt_tokens_are_counted_without_cached_tokens() -> None:
    registry = RequestRegistry()
    exchange = HttpExchange("id", "POST", "/v1/completions", "127.0.0.1")
    exchange.set_request("completions", None, stream=False)
    stats = registry.record(exchange, EngineRequest(id="a", prompt=pack_tokens(range(1000))))
    seen = []
    with registry.in_flight(stats):
        for output in (
            SequenceOutput(id="a", admitted=True, cache_match=CacheMatch(tokens=600, reason="new")),
            SequenceOutput(id="a", computed_tokens=700),
            SequenceOutput(id="a", computed_tokens=999),
            SequenceOutput(
                id="a", tokens=[1], prompt_tokens=1000, cached_tokens=600, finish_reason="length"
            ),
        ):
            registry.observe(stats, output)
            now = registry.current_second()
            seconds = {each.number: each for each in (now, *registry.last_seconds(9))}
            computed = sum(second.computed for second in seconds.values())
            seen.append((stats.state, stats.computed_tokens, computed))
    assert seen == [
        ("prefill", 600, 0),
        ("prefill", 700, 100),
        ("prefill", 999, 399),
        ("decoding", 1000, 400),
    ]
    assert registry.totals.cached_tokens == 600
