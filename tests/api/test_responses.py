"""`/v1/responses`: events, whole responses, the store and refusals."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import sse
from chat_apis import fold_response
from live import LiveServer, live_server
from openai_schemas import check_answer, checked

TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
CHAT_TOOL = {
    "type": "function",
    "function": {key: TOOL[key] for key in ("name", "description", "parameters")},
}
CALLS = (
    "I look.</think>One moment.<tool_call>get_weather<arg_key>city</arg_key>"
    "<arg_value> São\n Paulo </arg_value></tool_call>"
    "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Rome</arg_value></tool_call>"
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def post(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ask(http: httpx.Client, script: str, **parameters: Any) -> dict[str, Any]:
    """The whole answer to a request whose answer is `script`."""
    return post(http, input=f"⟦{script}⟧", **parameters)


def ask_streaming(http: httpx.Client, script: str, **parameters: Any) -> list[dict[str, Any]]:
    body = {"input": f"⟦{script}⟧", "stream": True, **parameters}
    with http.stream("POST", "/v1/responses", json=body) as response:
        assert response.status_code == 200, response.read()
        return sse.read_named(response.read())


def text_of(response: dict[str, Any]) -> str:
    (message,) = [item for item in response["output"] if item["type"] == "message"]
    text: str = message["content"][0]["text"]
    return text


def request_of(response: dict[str, Any]) -> dict[str, Any]:
    """The engine request, from an answer to `</think>{request}`."""
    request: dict[str, Any] = json.loads(text_of(response))
    return request


def check_prompt(http: httpx.Client, as_chat: dict[str, Any], **body: Any) -> None:
    """Check that a body makes the same prompt as a chat completions body."""
    usage = post(http, **body)["usage"]
    expected = http.post("/tokenize", json=as_chat).json()
    assert usage["input_tokens"] == expected["count"]


# -- answers ------------------------------------------------------------------------------


def test_a_whole_response_has_items_for_reasoning_text_and_calls(http: httpx.Client) -> None:
    response = ask(http, CALLS, tools=[TOOL], model="tiny")
    reasoning, message, first, second = response["output"]
    assert reasoning["type"] == "reasoning"
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "I look."}]
    assert reasoning["summary"] == []
    assert message["type"] == "message"
    assert message["content"][0] == {
        "type": "output_text",
        "text": "One moment.",
        "annotations": [],
        "logprobs": [],
    }
    assert (first["type"], first["name"]) == ("function_call", "get_weather")
    assert json.loads(first["arguments"]) == {"city": " São\n Paulo "}
    assert json.loads(second["arguments"]) == {"city": "Rome"}
    assert len({item["id"] for item in response["output"]}) == 4
    assert {item["status"] for item in response["output"]} == {"completed"}
    assert response["status"] == "completed"
    assert response["object"] == "response"
    assert response["model"] == "test/tiny"
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]


def test_a_response_shows_the_request_and_leaves_out_what_openais_schema_does_not_let_be_null(
    http: httpx.Client,
) -> None:
    bare = {"type": "function", "name": "f"}
    custom = {"type": "custom", "name": "patch", "format": None}
    space = {"type": "namespace", "name": "mcp__files", "tools": [bare, custom]}
    response = ask(
        http,
        "Hm.</think><tool_call>f</tool_call>",
        tools=[TOOL | {"strict": True}, bare, custom, space],
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        safety_identifier="s" * 64,
        prompt_cache_key="k",
        user=None,
    )
    shown = bare | {"description": None, "parameters": None, "strict": False}
    assert response["tools"] == [
        TOOL | {"strict": True},
        shown,
        {"type": "custom", "name": "patch"},
        space | {"description": "", "tools": [shown, {"type": "custom", "name": "patch"}]},
    ]
    assert (response["presence_penalty"], response["frequency_penalty"]) == (0.5, -0.5)
    assert (response["safety_identifier"], response["prompt_cache_key"]) == ("s" * 64, "k")
    assert "user" not in response
    reasoning, call = response["output"]
    assert "encrypted_content" not in reasoning
    assert "namespace" not in call
    created = ask_streaming(http, "</think>Yes.", user="me")[0]["response"]
    assert "usage" not in created
    assert (created["user"], created["safety_identifier"]) == ("me", None)
    schema = {"type": "json_schema", "schema": {"type": "integer"}, "name": "n"}
    response = ask(http, "</think>1", text={"format": schema})
    assert response["text"]["format"] == schema | {"strict": False}


def test_answers_are_checked_against_openais_schemas(http: httpx.Client) -> None:
    before = checked["Response"]
    response = ask(http, "</think>Yes.")
    deadline = time.monotonic() + 10
    while checked["Response"] == before:  # The server checks what it has sent.
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert check_answer(response) == []
    assert check_answer(response | {"user": None}) == ["$.user: None is not of type 'string'"]
    (problem,) = check_answer(response | {"output": [response["output"][0] | {"content": 1}]})
    assert problem.startswith("$.output[0].content")


@pytest.mark.parametrize("parameters", [{}, {"reasoning": {"summary": "auto"}}])
def test_a_whole_response_is_the_fold_of_its_stream(
    http: httpx.Client, parameters: dict[str, Any]
) -> None:
    whole = ask(http, CALLS, tools=[TOOL], **parameters)
    streamed = fold_response(ask_streaming(http, CALLS, tools=[TOOL], **parameters))
    for response in (whole, streamed):
        for key in ("id", "created_at", "completed_at"):
            del response[key]
        # The second request finds the first one's prefix.
        del response["usage"]["input_tokens_details"]
        for item in response["output"]:
            del item["id"]
            item.pop("call_id", None)
    assert streamed == whole


def test_a_summary_is_the_whole_reasoning_and_replaces_its_content(http: httpx.Client) -> None:
    reasoning = ask(http, "I look.</think>Yes.", reasoning={"summary": "auto"})["output"][0]
    assert reasoning["summary"] == [{"type": "summary_text", "text": "I look."}]
    assert reasoning["content"] == []


def test_the_last_item_of_an_answer_at_its_limit_is_incomplete(http: httpx.Client) -> None:
    (reasoning,) = ask(http, "Let me see, let me see.", max_output_tokens=4)["output"]
    assert reasoning["status"] == "incomplete"
    script = "</think><tool_call>get_weather<arg_key>city</arg_key><arg_value>"
    limit = http.post("/tokenize", json={"prompt": script}).json()["count"] + 1
    script += "Rome and Oslo</arg_value></tool_call>"
    call = ask(http, script, tools=[TOOL], max_output_tokens=limit)["output"][-1]
    assert call["status"] == "incomplete"
    with pytest.raises(json.JSONDecodeError):
        json.loads(call["arguments"])


def test_logprobs_come_if_they_are_included(http: httpx.Client) -> None:
    include = ["message.output_text.logprobs", "reasoning.encrypted_content"]
    response = ask(http, "Hm.</think>Yes: ä€", include=include, top_logprobs=2)
    tokens = response["output"][-1]["content"][0]["logprobs"]
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == "Yes: ä€"
    assert {len(token["top_logprobs"]) for token in tokens} == {2}
    streamed = fold_response(
        ask_streaming(http, "Hm.</think>Yes: ä€", include=include, top_logprobs=2)
    )
    assert streamed["output"][-1]["content"][0]["logprobs"] == tokens
    assert ask(http, "</think>Yes.")["output"][-1]["content"][0]["logprobs"] == []


def test_functions_in_a_namespace_are_called_in_it(http: httpx.Client) -> None:
    read = {"type": "function", "name": "read", "parameters": {"type": "object"}}
    space = {"type": "namespace", "name": "files", "description": "Files.", "tools": [read]}
    script = "</think><tool_call>files__read</tool_call><tool_call>get_weather</tool_call>"
    first, second = ask(http, script, tools=[space, TOOL])["output"]
    assert (first["namespace"], first["name"]) == ("files", "read")
    assert ("namespace" in second, second["name"]) == (False, "get_weather")
    as_chat = {
        "tools": [
            {
                "type": "function",
                "function": {"name": "files__read", "parameters": {"type": "object"}},
            },
            CHAT_TOOL,
        ],
        "messages": [
            user("Go."),
            {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "files__read"}}]},
            {"role": "tool", "content": "Text."},
        ],
    }
    call = {"type": "function_call", "namespace": "files", "name": "read", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "a", "output": "Text."}
    items = [user("Go."), call | {"call_id": "a"}, output]
    check_prompt(http, as_chat, input=items, tools=[space, TOOL])


PATCH = (
    "*** Begin Patch\n*** Update File: a.py\n-  x = '</arg_value>'\n+    x = \"é\"\n*** End Patch\n"
)
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch" LF'}
APPLY = {"type": "custom", "name": "apply_patch", "description": "Edits.", "format": GRAMMAR}
AS_FUNCTION = {
    "type": "function",
    "function": {
        "name": "apply_patch",
        "description": f"Edits.\n\nThe input follows this lark grammar:\n{GRAMMAR['definition']}",
        "parameters": {
            "type": "object",
            "properties": {"input": {"type": "string"}},
            "required": ["input"],
        },
    },
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_custom_tool_is_called_with_raw_text(http: httpx.Client, stream: bool) -> None:
    script = (
        f"</think><tool_call>apply_patch<arg_key>input</arg_key><arg_value>{PATCH}</arg_value>"
        "</tool_call>"
    )
    if stream:
        response = fold_response(ask_streaming(http, script, tools=[APPLY]))
    else:
        response = ask(http, script, tools=[APPLY])
    assert response["tools"] == [APPLY]
    (call,) = response["output"]
    assert (call["type"], call["name"], call["status"]) == (
        "custom_tool_call",
        "apply_patch",
        "completed",
    )
    assert call["input"] == PATCH
    output = {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "Done."}
    function = {"name": "apply_patch", "arguments": json.dumps({"input": PATCH})}
    as_chat = {
        "tools": [AS_FUNCTION],
        "messages": [
            user("Go."),
            {"role": "assistant", "tool_calls": [{"id": "a", "function": function}]},
            {"role": "tool", "content": "Done."},
        ],
    }
    check_prompt(http, as_chat, input=[user("Go."), call, output], tools=[APPLY])


def test_a_truncated_custom_call_keeps_its_input(http: httpx.Client) -> None:
    script = f"</think><tool_call>apply_patch<arg_key>input</arg_key><arg_value>{PATCH}"
    response = ask(http, script, tools=[APPLY], max_output_tokens=50)
    assert response["status"] == "incomplete"
    (call,) = response["output"]
    assert call["status"] == "incomplete"
    assert call["input"]
    assert PATCH.startswith(call["input"])


def test_a_custom_tool_can_be_required_and_its_turn_returns(http: httpx.Client) -> None:
    """The scripted engine caches prompts only, so a turn's ids are found two turns later."""
    script = (
        "A thought of its own.</think>"
        "<tool_call>apply_patch<arg_key>input</arg_key><arg_value>*** x</arg_value></tool_call>"
    )
    choice = {"type": "custom", "name": "apply_patch"}
    items: list[dict[str, Any]] = [user(f"⟦{script}⟧")]
    size = 0
    for number in range(3):
        response = post(
            http, input=items, tools=[APPLY], tool_choice=choice if not number else None
        )
        assert response["usage"]["input_tokens_details"]["cached_tokens"] >= size
        size = response["usage"]["input_tokens"]
        calls = [item for item in response["output"] if item["type"] == "custom_tool_call"]
        items += [item for item in response["output"] if item["type"] != "reasoning"]
        items += [
            {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "ok"}
            for call in calls
        ]
        items.append(user(f"⟦Another thought.</think>Answer {number}⟧"))


# -- parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"max_output_tokens": 900}, {"max_tokens": 900}),
        ({"reasoning": {"effort": "low"}}, {"thinking_budget": 1024}),
        ({"reasoning": {"effort": "max"}}, {"thinking_budget": None}),
        ({}, {"thinking_budget": None, "max_tokens": None}),
    ],
)
def test_limits_reach_the_engine(
    http: httpx.Client, parameters: dict[str, Any], expected: dict[str, Any]
) -> None:
    request = request_of(ask(http, "</think>{request}", **parameters))
    assert {name: request[name] for name in expected} == expected


def test_sampling_reaches_the_engine_and_comes_back(http: httpx.Client) -> None:
    response = ask(http, "</think>{request}", temperature=0.5, top_p=0.8, seed=4)
    sampling = request_of(response)["sampling"]
    assert (sampling["temperature"], sampling["top_p"], sampling["seed"]) == (0.5, 0.8, 4)
    assert (response["temperature"], response["top_p"]) == (0.5, 0.8)


def test_effort_switches_thinking_and_context_earlier_thinking(
    http: httpx.Client,
) -> None:
    assert ask(http, "Yes.", reasoning={"effort": "none"})["output"][0]["type"] == "message"
    items = [
        user("Hi"),
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "A greeting."}]},
        {"role": "assistant", "content": "Hello."},
        user("Bye"),
    ]
    kept, cleared = (
        post(http, input=items, reasoning={"context": context})["usage"]["input_tokens"]
        for context in ("all_turns", "current_turn")
    )
    assert kept > cleared


def test_a_configuration_update_holds_until_the_next(http: httpx.Client) -> None:
    def update(**fields: Any) -> dict[str, Any]:
        return {"type": "configuration_update", **fields}

    schema = {"type": "json_schema", "name": "n", "schema": {"const": "Yes"}}
    script = user("⟦</think>{request}⟧")
    low, high = (update(reasoning={"effort": effort}) for effort in ("low", "high"))
    body = {"input": [low, update(reasoning={"effort": "huge"}), script]}
    response = http.post("/v1/responses", json=body | {"reasoning": {"effort": "high"}})
    assert response.headers["x-glmd-omitted"] == "input[1]=configuration_update"
    first = response.json()
    assert request_of(first)["thinking_budget"] == 1024
    assert first["reasoning"]["effort"] == "low"
    previous = first["id"]
    second = post(http, input=[script], previous_response_id=previous)
    assert request_of(second)["thinking_budget"] == 1024
    third = post(http, input=[high, script], previous_response_id=previous)
    assert request_of(third)["thinking_budget"] == 24576
    items = [update(text={"format": schema}), user("⟦</think>Yes⟧")]
    formed = post(http, input=items, previous_response_id=previous)
    assert formed["text"]["format"] == schema | {"strict": False}
    text = {"format": {"type": "text"}}
    freed = post(http, input=[update(text=text), script], previous_response_id=formed["id"])
    assert freed["text"]["format"] == {"type": "text"}
    off = update(reasoning={"effort": "none"})
    assert ask(http, "Yes.")["output"][0]["type"] == "reasoning"
    assert post(http, input=[off, user("⟦Yes.⟧")])["output"][0]["type"] == "message"


def test_metadata_and_settings_come_back(http: httpx.Client) -> None:
    response = ask(
        http,
        "</think>Yes.",
        metadata={"a": "b"},
        instructions="Be brief.",
        reasoning={"effort": "high", "summary": "auto"},
        max_output_tokens=50,
    )
    assert response["metadata"] == {"a": "b"}
    assert response["instructions"] == "Be brief."
    assert response["reasoning"] == {"effort": "high", "summary": "auto"}
    assert response["max_output_tokens"] == 50


# -- the prompt ---------------------------------------------------------------------------


def test_items_make_the_same_prompt_as_messages_in_chat(http: httpx.Client) -> None:
    def call(id: str, city: str) -> dict[str, Any]:
        arguments = json.dumps({"city": city})
        return {
            "type": "function_call",
            "call_id": id,
            "name": "get_weather",
            "arguments": arguments,
            "status": "completed",
        }

    items = [
        {"type": "message", "role": "developer", "content": [input_text("Be kind.")]},
        user("Hot?"),
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Two cities."}],
            "encrypted_content": None,
        },
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "One moment.", "annotations": []}],
        },
        call("a", "A"),
        call("b", "B"),
        {"type": "function_call_output", "call_id": "b", "output": [input_text("20")]},
        {"type": "function_call_output", "call_id": "a", "output": "30"},
        {"type": "reasoning", "summary": [], "encrypted_content": "xyz"},
        {"type": "message", "role": "assistant", "content": "A is hot."},
        {"type": "message", "role": "assistant", "content": "B is not."},
        user("Thanks."),
    ]
    calls = [
        {"id": id, "function": {"name": "get_weather", "arguments": {"city": id.upper()}}}
        for id in ("a", "b")
    ]
    as_chat = {
        "tools": [CHAT_TOOL],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "system", "content": "Be kind."},
            user("Hot?"),
            {
                "role": "assistant",
                "content": "One moment.",
                "reasoning_content": "Two cities.",
                "tool_calls": calls,
            },
            {"role": "tool", "tool_call_id": "a", "content": "30"},
            {"role": "tool", "tool_call_id": "b", "content": "20"},
            {"role": "assistant", "content": "A is hot."},
            {"role": "assistant", "content": "B is not."},
            user("Thanks."),
        ],
    }
    check_prompt(http, as_chat, input=items, tools=[TOOL], instructions="Be brief.")


def input_text(text: str) -> dict[str, str]:
    return {"type": "input_text", "text": text}


@pytest.mark.parametrize("returned", ["by id", "whole", "without reasoning", "by reference"])
def test_a_returning_turn_is_cached(http: httpx.Client, returned: str) -> None:
    """The scripted engine caches prompts only, so a turn's ids are found two turns later."""
    new = [user(f"⟦{returned}: a thought.</think>First  answer <tool_call>f</tool_call>⟧")]
    items: list[dict[str, Any]] = []
    previous, size = None, 0
    tools = [{"type": "function", "name": "f", "parameters": {}}]
    for number in range(3):
        if returned == "by id":
            response = post(http, input=new, previous_response_id=previous, tools=tools)
        else:
            response = post(http, input=[*items, *new], tools=tools)
        usage = response["usage"]
        assert usage["input_tokens_details"]["cached_tokens"] >= size
        size = usage["input_tokens"]
        output = response["output"]
        if returned == "without reasoning":
            output = [item for item in output if item["type"] != "reasoning"]
        if returned == "by reference":
            output = [{"type": "item_reference", "id": item["id"]} for item in output]
        items += [*new, *output]
        previous = response["id"]
        new = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "ok"}
            for item in response["output"]
            if item["type"] == "function_call"
        ]
        new.append(user(f"⟦Thought {number}.</think>Answer {number}⟧"))


# -- what is kept -------------------------------------------------------------------------


def test_a_response_continues_a_stored_response_without_its_instructions(
    http: httpx.Client,
) -> None:
    first = ask(http, "Hm.</think>Hello.", instructions="Speak up.")
    second = post(http, input="⟦</think>Bye.⟧", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    as_chat = {
        "messages": [
            user("⟦Hm.</think>Hello.⟧"),
            {"role": "assistant", "content": "Hello.", "reasoning_content": "Hm."},
            user("⟦</think>Bye.⟧"),
        ]
    }
    expected = http.post("/tokenize", json=as_chat).json()["count"]
    assert second["usage"]["input_tokens"] == expected
    # What went on from it does not need it any more.
    assert http.delete(f"/v1/responses/{first['id']}").json()["deleted"] is True
    third = post(http, input="⟦</think>So long.⟧", previous_response_id=second["id"])
    assert third["usage"]["input_tokens"] > expected


def test_tokens_are_counted_as_a_response_would_count_them(http: httpx.Client) -> None:
    first = ask(http, "Hm.</think>Hello.", instructions="Speak up.")
    body: dict[str, Any] = {
        "input": "⟦</think>Yes.⟧",
        "instructions": "Be brief.",
        "previous_response_id": first["id"],
        "tools": [TOOL, APPLY],
    }
    counted = http.post("/v1/responses/input_tokens", json=body).json()
    assert counted["input_tokens"] == post(http, **body)["usage"]["input_tokens"]


def test_a_response_is_retrieved_until_it_is_deleted(http: httpx.Client) -> None:
    for made in (
        ask(http, "Hm.</think>Hello."),
        fold_response(ask_streaming(http, "Hm.</think>Hello.")),
    ):
        path = f"/v1/responses/{made['id']}"
        assert http.get(path).json() == made
        assert http.delete(path).json() == {"id": made["id"], "object": "response", "deleted": True}
        for response in (http.get(path), http.delete(path)):
            assert response.status_code == 404
            assert made["id"] in response.json()["error"]["message"]
        gone = http.post("/v1/responses", json={"input": "Hi", "previous_response_id": made["id"]})
        assert gone.status_code == 400
        assert gone.json()["error"]["code"] == "previous_response_not_found"


def test_store_false_stores_nothing(http: httpx.Client) -> None:
    made = ask(http, "Hm.</think>Hello.", store=False)
    assert made["store"] is False
    assert http.get(f"/v1/responses/{made['id']}").status_code == 404


def test_stored_responses_survive_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "kv" / "file"
    with live_server(disk_file=file) as live, live.client() as http:
        first = ask(http, CALLS, tools=[TOOL], metadata={"a": "b"}, instructions="Speak up.")
        second = post(http, input="⟦Ah.</think>Bye.⟧", previous_response_id=first["id"])
        private = ask(http, "Hm.</think>Hello.", store=False)
        deleted = ask(http, "Hm.</think>Hello.")
        http.delete(f"/v1/responses/{deleted['id']}")
        background = ask(http, "Hm.</think>Later.", background=True)
        while http.get(f"/v1/responses/{background['id']}").json()["status"] != "completed":
            time.sleep(0.01)
        third = post(http, input="⟦</think>So long.⟧", previous_response_id=second["id"])
    assert {entry.stat().st_mode & 0o777 for entry in file.parent.iterdir()} == {0o600}
    content = b"".join(entry.read_bytes() for entry in file.parent.iterdir())
    assert private["id"].encode() not in content
    with live_server(disk_file=file) as live, live.client() as http:
        assert http.get(f"/v1/responses/{first['id']}").json() == first
        assert http.get(f"/v1/responses/{second['id']}").json() == second
        assert http.get(f"/v1/responses/{background['id']}").json()["status"] == "completed"
        for gone in (private, deleted):
            assert http.get(f"/v1/responses/{gone['id']}").status_code == 404
        again = post(http, input="⟦</think>So long.⟧", previous_response_id=second["id"])
        assert again["usage"]["input_tokens"] == third["usage"]["input_tokens"]
        assert http.delete(f"/v1/responses/{first['id']}").json()["deleted"] is True
        assert http.get(f"/v1/responses/{first['id']}").status_code == 404
    with live_server() as live, live.client() as http:
        assert http.get(f"/v1/responses/{second['id']}").status_code == 404


def test_the_store_evicts_the_least_recently_used() -> None:
    with live_server(response_store="40KiB") as live, live.client() as http:
        ids = [ask(http, f"</think>Number {number}.")["id"] for number in range(8)]
        found = [http.get(f"/v1/responses/{id}").status_code == 200 for id in ids]
        assert found == sorted(found)
        assert 0 < sum(found) < 8


def test_a_response_is_continued_without_input(http: httpx.Client) -> None:
    first = ask(http, "</think>One.")
    follow = post(http, previous_response_id=first["id"], instructions="⟦</think>Two.⟧")
    assert text_of(follow) == "One."  # the script of the stored input, which is the last
    assert follow["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    refused = http.post("/v1/responses", json={"input": None})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "input"


def test_a_background_response_is_retrieved_when_it_is_done(http: httpx.Client) -> None:
    made = ask(http, "Hm.</think>Hello.", background=True)
    assert made["status"] == "queued"
    deadline = time.monotonic() + 20
    running = ("queued", "in_progress")
    while (now := http.get(f"/v1/responses/{made['id']}").json())["status"] in running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert now["status"] == "completed"
    assert text_of(now) == "Hello."
    go_on = post(http, input="⟦</think>Yes.⟧", previous_response_id=made["id"])
    assert text_of(go_on) == "Yes."


def test_a_background_response_can_be_cancelled(scripted: LiveServer, http: httpx.Client) -> None:
    made = ask(http, "Hm{wait}", background=True)
    path = f"/v1/responses/{made['id']}"
    too_early = http.post("/v1/responses", json={"input": "Hi", "previous_response_id": made["id"]})
    message = too_early.json()["error"]["message"]
    assert "queued" in message or "in_progress" in message
    assert http.post(f"{path}/cancel").json()["status"] == "cancelled"
    assert http.get(path).json()["status"] == "cancelled"
    scripted.wait_until_idle()
    assert http.post(f"{path}/cancel").status_code == 400
    assert http.post("/v1/responses/resp_x/cancel").status_code == 404


def test_a_failure_in_the_background_is_in_the_response(http: httpx.Client) -> None:
    made = ask(http, "{refuse}", background=True)
    deadline = time.monotonic() + 20
    while (now := http.get(f"/v1/responses/{made['id']}").json())["status"] in (
        "queued",
        "in_progress",
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert now["status"] == "failed"
    assert now["error"] == {"code": "invalid_prompt", "message": "As you wish."}


# -- Codex --------------------------------------------------------------------------------


def test_a_request_of_codex_is_accepted(http: httpx.Client) -> None:
    shell = {
        "type": "function",
        "name": "exec_command",
        "description": "Runs a command.",
        "strict": False,
        "parameters": {
            "type": "object",
            "properties": {"cmd": {"type": "string"}, "yield_time_ms": {"type": "number"}},
            "required": ["cmd"],
            "additionalProperties": False,
        },
    }
    agents = {
        "type": "namespace",
        "name": "multi_agent_v1",
        "description": "Agents.",
        "tools": [shell | {"name": "spawn_agent"}],
    }
    script = (
        "Hm.</think><tool_call>exec_command<arg_key>cmd</arg_key><arg_value>ls</arg_value>"
        "</tool_call>"
    )
    body: dict[str, Any] = {
        "model": "tiny",
        "instructions": "You are a coding agent.",
        "input": [
            {"type": "message", "role": "developer", "content": [input_text("Permissions.")]},
            {"type": "message", "role": "user", "content": [input_text(f"⟦{script}⟧")]},
        ],
        "tools": [shell, agents, {"type": "web_search", "external_web_access": False}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0",
        "client_metadata": {"x-codex-installation-id": "0"},
    }
    response = http.post("/v1/responses", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["x-glmd-ignored-parameters"] == "tools[2].type=web_search"
    reasoning, call = fold_response(sse.read_named(response.content))["output"]
    assert reasoning["summary"][0]["text"] == "Hm."
    # It sends the summary back, never the content.
    body["input"] += [
        {"type": "reasoning", "summary": reasoning["summary"], "encrypted_content": None},
        {key: call[key] for key in ("type", "name", "arguments", "call_id")},
        {"type": "function_call_output", "call_id": call["call_id"], "output": "⟦</think>Done.⟧"},
    ]
    response = http.post("/v1/responses", json=body)
    assert text_of(fold_response(sse.read_named(response.content))) == "Done."


def test_an_empty_prompt_warms_the_model_up(http: httpx.Client) -> None:
    """`codex --oss` sends it, and front ends made for LM Studio."""
    assert post(http, input="", max_output_tokens=1)["status"] in ("completed", "incomplete")


# -- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 7}, "input"),
        ({"input": [{"role": "robot", "content": "Hi"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": 7}]}, "input[0].content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "riddle"}]}, "input[0].type"),
        ({"input": [user("Hi"), {"type": "compaction_trigger"}]}, "input[1].type"),
        ({"input": [{"type": "compaction_trigger"}]}, "input[0].type"),
        (
            {"input": [user("Hi"), {"type": "configuration_update", "reasoning": {"effort": "x"}}]},
            "input[1].reasoning.effort",
        ),
        ({"input": [{"type": "item_reference", "id": "msg_0_0"}]}, "input[0].id"),
        ({"previous_response_id": "resp_0"}, "previous_response_id"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 9}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"reasoning": {"effort": "heroic"}}, "reasoning.effort"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        (
            {
                "tools": [{"type": "function", "name": "f", "parameters": []}],
                "tool_choice": "required",
            },
            "tools[0].parameters",
        ),
        ({"tools": [APPLY | {"format": {"type": "regex"}}]}, "tools[0].format.type"),
        (
            {"tools": [APPLY | {"format": {"type": "grammar"}}]},
            "tools[0].format.definition",
        ),
        ({"tools": [{"type": "local_shell"}]}, "tools[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "namespace", "tools": []}]}, "tools[0].name"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [7]}]}, "tools[0].tools[0]"),
        ({"background": True, "store": False}, "background"),
        ({"conversation": "conv_0"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"messages": [user("Hi")]}, "messages"),
        ({"n": 2}, "n"),
    ],
)
def test_an_invalid_field_is_400_and_named(
    http: httpx.Client, body: dict[str, Any], param: str
) -> None:
    response = http.post("/v1/responses", json={"input": "⟦</think>Yes.⟧"} | body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.partition(".")[0] in error["message"]


# -- time ---------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["{wait}", "Wait…{wait}"])
def test_in_progress_events_keep_a_silent_stream_open(
    scripted: LiveServer, http: httpx.Client, script: str
) -> None:
    mark = b"event: response.in_progress"
    with http.stream(
        "POST", "/v1/responses", json={"input": f"⟦{script}⟧", "stream": True}
    ) as response:
        received = b""
        for piece in response.iter_raw():
            received += piece
            if received.count(mark) >= 4 and received.endswith(b"\n\n"):
                break
    events = sse.read_named(received)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == "response.in_progress"
    scripted.wait_until_idle()


def test_an_engine_that_dies_mid_stream_is_a_failed_response() -> None:
    with live_server() as live, live.client() as http, live.client() as other:
        background = ask(other, "I wait{wait}", background=True)
        body = {"input": "⟦I wait{wait}⟧", "stream": True}
        with http.stream("POST", "/v1/responses", json=body) as response:
            pieces = response.iter_raw()
            received = next(pieces)
            assert other.post("/v1/responses", json={"input": "⟦{die}⟧"}).status_code == 503
            received += b"".join(pieces)
        last = sse.read_named(received)[-1]
        assert last["type"] == "response.failed"
        assert last["response"]["status"] == "failed"
        assert last["response"]["error"]["code"] == "server_error"
        live.wait_for("ready")
        kept = http.get(f"/v1/responses/{background['id']}").json()
        assert kept["status"] == "failed"


def test_background_responses_end_with_the_server() -> None:
    with live_server(drain_timeout=0.2) as live, live.client() as http:
        ask(http, "On and on{wait}", background=True)
