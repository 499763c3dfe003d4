"""Stored responses that a request names and another replica stores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import sse
from live import LiveServer, live_server

from glmd.config import Settings
from glmd.errors import SettingsError

KEY = {"authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def replicas() -> Iterator[list[LiveServer]]:
    """Two servers that know each other, themselves and one that is off."""
    with live_server(api_key="secret") as first, live_server(api_key="secret") as second:
        urls = (first.url, "http://127.0.0.1:9", second.url)
        for each in (first, second):
            each.service.settings = each.service.settings.model_copy(update={"peers": urls})
        yield [first, second]


@pytest.fixture
def first(replicas: list[LiveServer]) -> Iterator[httpx.Client]:
    with replicas[0].client(headers=KEY) as client:
        yield client


@pytest.fixture
def second(replicas: list[LiveServer]) -> Iterator[httpx.Client]:
    with replicas[1].client(headers=KEY) as client:
        yield client


def ask(script: str, **fields: Any) -> dict[str, Any]:
    return {"input": f"⟦{script}⟧", **fields}


def created(http: httpx.Client, script: str, **fields: Any) -> dict[str, Any]:
    response = http.post("/v1/responses", json=ask(script, **fields))
    assert response.status_code == 200, response.text
    made: dict[str, Any] = response.json()
    return made


def test_a_response_of_another_replica_is_continued(
    first: httpx.Client, second: httpx.Client
) -> None:
    one = created(first, "</think>One.", instructions="Count.")
    two = created(second, "</think>Two.", previous_response_id=one["id"])
    three = created(first, "</think>Three.", previous_response_id=two["id"])
    here = second.get(f"/v1/responses/{two['id']}/input_items?order=asc").json()
    texts = [item["content"][0]["text"] for item in here["data"]]
    assert texts == ["⟦</think>One.⟧", "One.", "⟦</think>Two.⟧"]
    # The same tokens as where the whole conversation is stored.
    count = ask("</think>Four.", previous_response_id=three["id"])
    counts = [
        http.post("/v1/responses/input_tokens", json=count).json()["input_tokens"]
        for http in (first, second)
    ]
    assert counts[0] == counts[1] > three["usage"]["input_tokens"]


def test_items_of_another_replica_are_referred_to(
    first: httpx.Client, second: httpx.Client
) -> None:
    one = created(first, "</think>One.")
    reference = {"type": "item_reference", "id": one["output"][0]["id"]}
    body = ask("</think>Two.") | {
        "input": [reference, {"role": "user", "content": "⟦</think>Two.⟧"}]
    }
    assert second.post("/v1/responses", json=body).json()["status"] == "completed"


def test_a_response_of_another_replica_is_shown_listed_and_deleted(
    first: httpx.Client, second: httpx.Client
) -> None:
    one = created(first, "</think>One.")
    path = f"/v1/responses/{one['id']}"
    assert second.get(path).json() == first.get(path).json() == one
    assert second.get(f"{path}/input_items").json() == first.get(f"{path}/input_items").json()
    assert second.get(f"{path}/input_items?limit=0").status_code == 400
    assert second.delete(path).json() == {
        "id": one["id"],
        "object": "response",
        "deleted": True,
    }
    for http in (first, second):
        assert http.get(path).status_code == 404


def test_a_background_response_of_another_replica_is_followed_and_cancelled(
    replicas: list[LiveServer], first: httpx.Client, second: httpx.Client
) -> None:
    one = created(first, "Let me see.{wait}", background=True)
    path = f"/v1/responses/{one['id']}"
    refused = second.post("/v1/responses", json=ask("Two.", previous_response_id=one["id"]))
    assert "is queued" in refused.text or "is in_progress" in refused.text
    assert second.post(f"{path}/cancel").json()["status"] == "cancelled"
    replicas[0].wait_until_idle()

    body = ask("</think>One.", background=True, stream=True)
    events = sse.read_named(first.post("/v1/responses", json=body).content)
    path = f"/v1/responses/{events[0]['response']['id']}"
    followed = second.get(path, params={"stream": "true"})
    assert followed.headers["content-type"].startswith("text/event-stream")
    assert sse.read_named(followed.content) == events
    assert second.get(path, params={"starting_after": 1}).status_code == 400


@pytest.mark.parametrize("id", ["resp_unknown", "..", "a/b", "a?stream=true#b", "é"])
def test_what_no_replica_stores_is_not_found(second: httpx.Client, id: str) -> None:
    refused = second.post("/v1/responses", json=ask("Two.", previous_response_id=id))
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "previous_response_not_found"
    shown = second.get("/v1/responses/resp_unknown")
    assert shown.status_code == 404
    assert "is not stored" in shown.json()["error"]["message"]


def test_another_client_sees_nothing_on_another_replica(replicas: list[LiveServer]) -> None:
    with live_server(peers=(replicas[0].url,), api_key="other") as third:
        with replicas[0].client(headers=KEY) as first:
            one = created(first, "</think>One.")
        with third.client(headers={"authorization": "Bearer other"}) as http:
            assert http.get(f"/v1/responses/{one['id']}").status_code == 404
            refused = http.post("/v1/responses", json=ask("", previous_response_id=one["id"]))
            assert refused.json()["error"]["code"] == "previous_response_not_found"


@pytest.mark.parametrize(
    "url", ["mac-2.local:8000", "ftp://mac-2", "http://mac-2/v1", "http://u:p@mac-2", "http://"]
)
def test_peers_are_base_urls(url: str) -> None:
    with pytest.raises((SettingsError, ValueError), match="write"):
        Settings(peers=(url,))


def test_a_slash_at_the_end_is_no_path() -> None:
    assert Settings(peers=("http://mac-2:8000/",)).peers == ("http://mac-2:8000",)
