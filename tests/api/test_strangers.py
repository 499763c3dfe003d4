"""Clients with different keys are strangers: what belongs to one is invisible to the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from live import LiveServer, live_server

from glmd.api.auth import create_key
from glmd.api.serving import bind_salt

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
WAIT = {"messages": [{"role": "user", "content": "⟦</think>One{wait}⟧"}]}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, httpx.Client]]:
    """A server's clients: `alice` and `bob`, and `boss`, an admin."""
    store = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = {
        name: create_key(store, name, admin=name == "boss") for name in ("alice", "bob", "boss")
    }
    with live_server(keys=store) as server:
        clients = {
            name: server.client(headers={"authorization": f"Bearer {key}"})
            for name, key in keys.items()
        }
        yield clients
        for client in clients.values():
            client.close()


def respond(http: httpx.Client, text: str, **fields: Any) -> httpx.Response:
    return http.post(RESPONSES, json={"input": f"⟦Hm.</think>{text}⟧", **fields})


@contextmanager
def waiting(http: httpx.Client, id: str) -> Iterator[list[httpx.Response]]:
    """A request with the id `id` that waits during the block, and its response after it."""
    answers: list[httpx.Response] = []
    headers = {"x-request-id": id}
    thread = threading.Thread(
        target=lambda: answers.append(http.post(CHAT, json=WAIT, headers=headers))
    )
    thread.start()
    deadline = time.monotonic() + 20
    while not [row for row in rows(http, "running") if row["request_id"] == id]:
        assert time.monotonic() < deadline
    yield answers
    thread.join(20)


def rows(http: httpx.Client, where: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = http.get("/glmd/status").json()[where]
    return found


def test_a_stored_response_is_its_keys_own(live: dict[str, httpx.Client]) -> None:
    alice, bob, boss = live["alice"], live["bob"], live["boss"]
    stored = respond(alice, "Mine.").json()
    path, item = f"{RESPONSES}/{stored['id']}", stored["output"][-1]["id"]
    reference = [{"type": "item_reference", "id": item}, {"role": "user", "content": "⟦x⟧"}]
    unknown = bob.get(f"{RESPONSES}/resp_0")
    assert unknown.status_code == 404
    for refused in (
        bob.get(path),
        bob.get(path, params={"stream": "true"}),
        bob.get(f"{path}/input_items"),
        bob.delete(path),
        bob.post(f"{path}/cancel"),
    ):
        assert refused.status_code == 404
        message = refused.json()["error"]["message"]
        assert message == unknown.json()["error"]["message"].replace("resp_0", stored["id"])
    for stranger in (bob, boss):  # An admin sees all, and continues its own.
        assert respond(stranger, "x", previous_response_id=stored["id"]).status_code == 400
        # Like any item that is not stored: refused as the newest, left out of history.
        newest = stranger.post(RESPONSES, json={"input": reference[:1]})
        assert newest.status_code == 400
        history = stranger.post(RESPONSES, json={"input": reference})
        assert history.headers["x-glmd-omitted"] == "input[0]=item_reference"
    assert respond(alice, "x", previous_response_id=stored["id"]).status_code == 200
    own = alice.post(RESPONSES, json={"input": reference})
    assert own.status_code == 200
    assert "x-glmd-omitted" not in own.headers
    assert alice.get(path).json() == boss.get(path).json() == stored
    assert boss.delete(path).status_code == 200
    assert alice.get(path).status_code == 404


def test_a_response_in_the_background_is_its_keys_own(live: dict[str, httpx.Client]) -> None:
    alice, bob = live["alice"], live["bob"]
    path = f"{RESPONSES}/{respond(alice, 'One{wait}', background=True).json()['id']}"
    for refused in (bob.get(path), bob.post(f"{path}/cancel"), bob.delete(path)):
        assert refused.status_code == 404
    assert alice.get(path).json()["status"] in ("queued", "in_progress")
    assert alice.post(f"{path}/cancel").json()["status"] == "cancelled"


def test_a_request_in_flight_is_seen_and_cancelled_by_its_key_and_by_admins(
    live: dict[str, httpx.Client],
) -> None:
    alice, bob, boss = live["alice"], live["bob"], live["boss"]
    for canceller in (alice, boss):
        with waiting(alice, "private") as answers:
            (row,) = rows(alice, "running")
            assert rows(boss, "running")[0]["id"] == row["id"]
            assert not rows(bob, "running")
            for id in ("private", row["id"]):
                assert bob.post(f"/glmd/requests/{id}/cancel").status_code == 404
            done = canceller.post("/glmd/requests/private/cancel")
            assert done.json() == {"cancelled": [row["id"]]}
        assert answers[0].status_code == 499
    assert row["id"] in [ended["id"] for ended in rows(boss, "recent")]
    assert row["id"] not in [ended["id"] for ended in rows(bob, "recent")]


def test_totals_and_reasons_about_the_requests_of_others_are_an_admins(
    live: dict[str, httpx.Client],
) -> None:
    bob, boss = live["bob"], live["boss"]
    assert respond(bob, "Yes.").status_code == 200
    status = bob.get("/glmd/status").json()
    assert status["engine"]["stats"] == {}
    assert status["speed"] is None
    assert all(row["cache_reason"] in (None, "whole", "off") for row in status["recent"])
    assert bob.get("/metrics").status_code == 403
    status = boss.get("/glmd/status").json()
    assert "steps" in status["engine"]["stats"]
    assert status["speed"] is not None
    assert "glmd_prompt_tokens_total" in boss.get("/metrics").text


def test_a_salt_is_its_keys_own(live: dict[str, httpx.Client]) -> None:
    def salt(http: httpx.Client, salt: str | None) -> str:
        content = [{"role": "user", "content": "⟦</think>{request}⟧"}]
        answer = http.post(CHAT, json={"messages": content, "cache_salt": salt}).json()
        text: str = answer["choices"][0]["message"]["content"]
        return text.partition('"cache_salt":"')[2].partition('"')[0]

    own = salt(live["alice"], "secret")
    assert own == salt(live["alice"], "secret") != salt(live["bob"], "secret")
    assert "secret" not in own
    assert len(own) == len(salt(live["alice"], "x" * 60_000)) == len(bind_salt("", "y"))
    assert salt(live["alice"], None) == salt(live["bob"], "") == ""


def test_without_keys_all_is_visible_to_all(scripted: LiveServer) -> None:
    with scripted.client() as http, scripted.client(headers={"x-api-key": "made up"}) as other:
        stored = respond(http, "Ours.").json()
        assert other.get(f"{RESPONSES}/{stored['id']}").json() == stored
        with waiting(http, "open") as answers:
            assert [row["request_id"] for row in rows(other, "running")] == ["open"]
            assert other.post("/glmd/requests/open/cancel").status_code == 200
        assert answers[0].status_code == 499
        assert other.get("/metrics").status_code == 200
