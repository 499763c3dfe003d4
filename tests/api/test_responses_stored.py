"""`/v1/responses`: streams in the background that are taken up again, and lists of input items."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import sse
from chat_apis import fold_response
from live import LiveServer, live_server

from glmd.api.responses.store import EventLog
from glmd.utils.fair_limiter import FairLimiter

Event = dict[str, Any]

SCRIPT = "I look.</think>One moment.<tool_call>f</tool_call>"
TOOLS = [{"type": "function", "name": "f", "parameters": {}}]


def ask(script: str, **fields: Any) -> dict[str, Any]:
    return {"input": f"⟦{script}⟧", "tools": TOOLS, **fields}


def stream_of(http: httpx.Client, script: str = SCRIPT) -> list[Event]:
    body = ask(script, background=True, stream=True)
    return events_of(http.post("/v1/responses", json=body))


def events_of(response: httpx.Response) -> list[Event]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return sse.read_named(response.content) if response.content else []


def take_up(http: httpx.Client, id: str, **params: Any) -> httpx.Response:
    return http.get(f"/v1/responses/{id}", params={"stream": "true", **params})


def arriving(response: httpx.Response) -> Iterator[Event]:
    """Events of a stream that goes on; comments are left out."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


# -- streams in the background ------------------------------------------------------------


def test_a_background_stream_begins_queued_and_adds_up_to_the_response(http: httpx.Client) -> None:
    events = stream_of(http)
    first, _, *rest = events
    assert [event["type"] for event in events[:3]] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    statuses = [event["response"]["status"] for event in events[:3]]
    assert statuses == ["queued", "queued", "in_progress"]
    made = fold_response(
        [event | {"sequence_number": index} for index, event in enumerate([first, *rest])]
    )
    assert made["status"] == "completed"
    assert made["background"] is True
    assert http.get(f"/v1/responses/{made['id']}").json() == made
    follow = ask("</think>Yes.", previous_response_id=made["id"])
    assert http.post("/v1/responses", json=follow).json()["status"] == "completed"


def test_a_stream_is_taken_up_after_any_event(http: httpx.Client) -> None:
    events = stream_of(http)
    id = events[0]["response"]["id"]
    assert events_of(take_up(http, id)) == events
    for last in range(len(events)):
        rest = events_of(take_up(http, id, starting_after=last))
        assert rest == events[last + 1 :]


def test_a_lost_stream_goes_on_and_a_cancelled_one_ends(
    scripted: LiveServer, http: httpx.Client
) -> None:
    body = ask("Let me see.{wait}", background=True, stream=True)
    seen: list[Event] = []
    with http.stream("POST", "/v1/responses", json=body) as response:
        for event in arriving(response):
            if event["type"] == "response.reasoning_text.delta":
                break
            seen.append(event)
    id = seen[0]["response"]["id"]
    assert http.get(f"/v1/responses/{id}").json()["status"] == "in_progress"
    params: dict[str, Any] = {"stream": True, "starting_after": seen[-1]["sequence_number"]}
    with (
        scripted.client() as other,
        http.stream("GET", f"/v1/responses/{id}", params=params) as response,
    ):
        more = arriving(response)
        seen.append(next(more))
        cancelled = other.post(f"/v1/responses/{id}/cancel").json()
        seen += more
    assert [event["sequence_number"] for event in seen] == list(range(len(seen)))
    assert cancelled["status"] == "cancelled"
    assert seen[-1]["type"] == "response.incomplete"
    assert seen[-1]["response"] == cancelled
    assert [item["status"] for item in cancelled["output"]] == ["incomplete"]
    assert events_of(take_up(http, id)) == seen
    scripted.wait_until_idle()


def test_a_failure_ends_a_background_stream(http: httpx.Client) -> None:
    events = stream_of(http, "{refuse}")
    assert [event["type"] for event in events] == [
        "response.created",
        "response.queued",
        "response.failed",
    ]
    assert events[-1]["response"]["error"]["message"] == "As you wish."


def test_only_background_streams_are_taken_up(http: httpx.Client) -> None:
    whole = http.post("/v1/responses", json=ask(SCRIPT)).json()
    silent = http.post("/v1/responses", json=ask(SCRIPT, background=True)).json()
    for made in (whole, silent):
        refused = take_up(http, made["id"])
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "stream"
    refused = http.get(f"/v1/responses/{whole['id']}", params={"starting_after": 1})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "starting_after"
    assert take_up(http, "resp_x", starting_after=1).status_code == 404


def test_events_go_with_their_response_and_never_keep_it_out() -> None:
    with live_server(response_store="22KiB") as live, live.client() as http:
        short = stream_of(http, "</think>Yes.")[0]["response"]["id"]
        assert take_up(http, short).status_code == 200
        long = stream_of(http, f"</think>{'Again. ' * 60}")[0]["response"]["id"]
        assert http.get(f"/v1/responses/{long}").json()["status"] == "completed"
        deadline = time.monotonic() + 10
        while (refused := take_up(http, long)).status_code == 200:  # not weighed yet
            assert time.monotonic() < deadline
        assert refused.json()["error"]["param"] == "stream"
        for _ in range(8):
            stream_of(http, "</think>Yes.")
        assert take_up(http, short).status_code == 404


def test_a_log_without_room_ends_with_an_error_event() -> None:
    async def run() -> list[Event]:
        memory = FairLimiter(1000)
        with memory.share("me") as reservation:
            log = EventLog(reservation)
            frame = b"event: x\ndata: " + json.dumps({"type": "x"}).encode() + b"\n\n"
            log.add(frame)
            reader = log.follow(0)
            first = await anext(reader)
            waiting = asyncio.ensure_future(anext(reader))
            await asyncio.sleep(0)
            while memory.fits("me", 100):
                log.add(frame)
            log.add(frame)
            log.end()
            seen = [first, await waiting]
            async for piece in reader:
                seen.append(piece)
        assert memory.used == 0
        return sse.read_named(b"".join(seen))

    *events, last = asyncio.run(run())
    assert {event["type"] for event in events} == {"x"}
    assert (last["type"], last["code"], last["sequence_number"]) == (
        "error",
        "events_lost",
        len(events),
    )


# -- input items --------------------------------------------------------------------------


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
ITEMS: list[dict[str, Any]] = [
    {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Hm."}]},
    user("Hi"),
    {"type": "reasoning", "id": "rs_mine", "summary": [], "encrypted_content": None},
    {"role": "assistant", "content": "Wait."},
    CALL,
    {"type": "function_call_output", "call_id": "a", "output": "30"},
    {"type": "custom_tool_call", "call_id": "b", "name": "g", "input": "x"},
    {"type": "custom_tool_call_output", "call_id": "b", "output": "y"},
    {"type": "tool_search_call", "call_id": "c", "arguments": {}},
    {"type": "tool_search_output", "call_id": "c", "tools": []},
    {"role": "assistant", "content": [{"type": "output_text", "text": "So."}]},
    user("⟦</think>Yes.⟧"),
]


def listed(http: httpx.Client, id: str, **params: Any) -> dict[str, Any]:
    response = http.get(f"/v1/responses/{id}/input_items", params=params)
    assert response.status_code == 200, response.text
    page: dict[str, Any] = response.json()
    return page


def test_input_items_are_listed_in_openais_form(http: httpx.Client) -> None:
    id = http.post("/v1/responses", json={"input": ITEMS}).json()["id"]
    page = listed(http, id, order="asc", include=["message.output_text.logprobs"])
    assert page["object"] == "list"
    assert [item["type"] for item in page["data"]] == [
        item.get("type", "message") for item in ITEMS
    ]
    ids = [item["id"] for item in page["data"]]
    assert len(set(ids)) == len(ids)
    assert ids[2] == "rs_mine"
    assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[0], ids[-1], False)
    texts = [item["content"] for item in page["data"] if item["type"] == "message"]
    assert texts[1] == [{"type": "input_text", "text": "Hi"}]
    assert texts[2] == [{"type": "output_text", "text": "Wait.", "annotations": [], "logprobs": []}]
    assert [item["id"] for item in listed(http, id)["data"]] == ids[::-1]


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_of_input_items_follow_one_another(http: httpx.Client, order: str) -> None:
    first = http.post("/v1/responses", json={"input": [*ITEMS[:3], ITEMS[-1]]}).json()
    body = {"input": "⟦</think>Bye.⟧", "previous_response_id": first["id"]}
    id = http.post("/v1/responses", json=body).json()["id"]
    whole = listed(http, id, order=order)
    ids = [item["id"] for item in whole["data"]]
    assert len(ids) == 4 + len(first["output"]) + 1  # those of the response that it continues too
    assert {item["id"] for item in first["output"]} < set(ids)
    seen: list[str] = []
    after: dict[str, str] = {}
    for number in itertools.count(1):
        page = listed(http, id, order=order, limit=2, **after)
        seen += [item["id"] for item in page["data"]]
        after = {"after": page["last_id"]}
        assert page["has_more"] == (number * 2 < len(ids))
        if not page["has_more"]:
            break
    assert seen == ids
    assert listed(http, id, order=order, after=ids[-1])["data"] == []


def test_an_input_item_is_referred_to_by_its_listed_id(http: httpx.Client) -> None:
    made = http.post("/v1/responses", json={"input": [user("Hi"), user("⟦</think>A.⟧")]}).json()
    ids = [item["id"] for item in listed(http, made["id"], order="asc")["data"]]
    references = [{"type": "item_reference", "id": id} for id in ids]
    again = http.post("/v1/responses", json={"input": references}).json()
    assert again["usage"]["input_tokens"] == made["usage"]["input_tokens"]
    assert again["output"][-1]["content"][0]["text"] == "A."


@pytest.mark.parametrize(
    ("params", "param"),
    [({"limit": 0}, "limit"), ({"limit": 101}, "limit"), ({"order": "up"}, "order"),
     ({"after": "msg_x"}, "after")],
)  # fmt: skip
def test_a_malformed_page_is_400(http: httpx.Client, params: dict[str, Any], param: str) -> None:
    id = http.post("/v1/responses", json=ask("</think>Yes.")).json()["id"]
    response = http.get(f"/v1/responses/{id}/input_items", params=params)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert http.get("/v1/responses/resp_x/input_items").status_code == 404
