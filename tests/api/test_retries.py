"""A request that is sent again with its x-request-id is generated once."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from chat_apis import CHAT_APIS, Ask
from live import LiveServer, live_server

from glmd.api import retries

SLOW = {"step_seconds": 0.03}


@pytest.fixture(scope="module")
def slow() -> Iterator[LiveServer]:
    """A server that needs a second for an answer."""
    with live_server(config=SLOW) as live:
        yield live


def ended(http: httpx.Client) -> dict[str, float]:
    """Requests to the engine that have ended, by reason."""
    found: dict[str, float] = {}
    for reason, count in re.findall(
        r'glmd_requests_total\{.*?finished_reason="(\w+)"\} ([\d.]+)', http.get("/metrics").text
    ):
        found[reason] = found.get(reason, 0) + float(count)
    return found


def headers(id: str) -> dict[str, str]:
    return {"x-request-id": id}


def body(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "enable_thinking": False, **fields}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("api", CHAT_APIS)
def test_a_retry_gets_the_answer(api: str, stream: bool, http: httpx.Client) -> None:
    chat, id = CHAT_APIS[api], f"once-{api}-{stream}"
    sent = chat.body(Ask("⟦The answer.⟧")) | {"stream": stream}
    first = http.post(chat.path, json=sent, headers=headers(id))
    before = ended(http)
    again = http.post(chat.path, json=sent, headers=headers(id))
    assert ended(http) == before
    assert again.status_code == first.status_code == 200
    assert again.content == first.content
    assert again.headers["content-type"] == first.headers["content-type"]
    assert again.headers["x-request-id"] == id


def test_other_requests_get_their_own_answer(http: httpx.Client) -> None:
    path, sent = "/v1/chat/completions", body("⟦One.⟧")
    ids = [
        http.post(path, json=each, headers=by).json()["id"]
        for each, by in [
            (sent, headers("mine")),
            (sent, headers("other")),
            (sent, {}),
            (sent, {}),
            (sent | {"seed": 1}, headers("mine")),  # Some clients send one id for all requests.
        ]
    ]
    assert len(set(ids)) == 5


def test_a_retry_joins_the_request_that_runs(slow: LiveServer) -> None:
    sent = body("⟦" + "word " * 20 + "⟧", stream=True)
    with slow.client() as http, ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(
                lambda _: (
                    http.post(
                        "/v1/chat/completions", json=sent, headers=headers("together")
                    ).content
                ),
                range(4),
            )
        )
        assert len(set(answers)) == 1
        assert b"[DONE]" in answers[0]
        assert sum(ended(http).values()) == 1


def test_the_first_client_may_leave(slow: LiveServer) -> None:
    sent = body("⟦" + "word " * 20 + "⟧", stream=True)
    by = headers("left")
    with slow.client() as http:
        before = ended(http)
        following = threading.Event()
        again: list[bytes] = []

        def follow() -> None:
            with http.stream("POST", "/v1/chat/completions", json=sent, headers=by) as answer:
                for chunk in answer.iter_bytes():
                    again.append(chunk)
                    following.set()

        thread = threading.Thread(target=follow)
        with http.stream("POST", "/v1/chat/completions", json=sent, headers=by) as answer:
            chunks = answer.iter_bytes()
            next(chunks)
            thread.start()
            following.wait(10)
        thread.join(20)
        assert b"[DONE]" in b"".join(again)
        assert b"".join(again).count(b"word") == 20
        after = ended(http)
        assert after["stop"] == before.get("stop", 0) + 1
        assert after.get("cancelled", 0) == before.get("cancelled", 0)


def test_a_cancelled_answer_is_generated_again(slow: LiveServer) -> None:
    sent = body("⟦" + "word " * 20 + "⟧", stream=True)
    by = headers("cancelled")
    with slow.client() as http:
        with http.stream("POST", "/v1/chat/completions", json=sent, headers=by) as answer:
            next(answer.iter_bytes())
        slow.wait_until_idle()
        assert b"[DONE]" in http.post("/v1/chat/completions", json=sent, headers=by).content


@pytest.mark.parametrize("script", ["{busy}", "{refuse}"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_failure_is_forgotten(script: str, stream: bool, http: httpx.Client) -> None:
    sent, by = body(f"⟦{script}⟧", stream=stream), headers(f"failed-{script[1:-1]}-{stream}")
    before = ended(http).get("error", 0)
    for count in (1, 2):
        assert "error" in http.post("/v1/chat/completions", json=sent, headers=by).text
        assert ended(http)["error"] == before + count


def test_answers_are_dropped_by_age_and_size(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sent = "/v1/chat/completions", body("⟦One.⟧")

    def ids(id: str) -> set[str]:
        return {http.post(path, json=sent, headers=headers(id)).json()["id"] for _ in range(2)}

    assert len(ids("kept")) == 1
    for name in ("KEEP_SECONDS", "KEEP_BYTES", "MAX_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(retries, name, 0)
            assert len(ids(name)) == 2
    assert len(ids("kept-again")) == 1
