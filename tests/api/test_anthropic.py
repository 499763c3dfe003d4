"""`/v1/messages`: streams, whole answers, prompts and refusals."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import sse
from chat_apis import fold_message
from live import LiveServer, live_server

TOOL = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
THINK = {"type": "enabled", "budget_tokens": 2000}

CALLS = (
    "I look.</think>One moment.<tool_call>get_weather<arg_key>city</arg_key>"
    "<arg_value> São\n Paulo </arg_value></tool_call>"
    "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Rome</arg_value></tool_call>"
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def body_of(script: str, **parameters: Any) -> dict[str, Any]:
    return {"messages": [user(f"⟦{script}⟧")], "max_tokens": 1000, **parameters}


def ask(http: httpx.Client, script: str, **parameters: Any) -> dict[str, Any]:
    """The whole answer to a request whose answer is `script`."""
    response = http.post("/v1/messages", json=body_of(script, **parameters))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ask_streaming(http: httpx.Client, script: str, **parameters: Any) -> list[dict[str, Any]]:
    body = body_of(script, **parameters) | {"stream": True}
    with http.stream("POST", "/v1/messages", json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return sse.read_named(response.read())


def request_of(answer: dict[str, Any]) -> dict[str, Any]:
    """The engine request, from an answer to `{request}`."""
    request: dict[str, Any] = json.loads(answer["content"][-1]["text"])
    return request


def check_prompt(http: httpx.Client, body: dict[str, Any], as_chat: dict[str, Any]) -> None:
    """Check that a body makes the same prompt as a chat completions body."""
    counted = http.post("/v1/messages/count_tokens", json=body)
    assert counted.status_code == 200, counted.text
    expected = http.post("/tokenize", json=as_chat).json()
    assert counted.json() == {"input_tokens": expected["count"]}


# -- answers ------------------------------------------------------------------------------


def test_a_whole_message_has_blocks_for_thinking_text_and_calls(http: httpx.Client) -> None:
    message = ask(http, CALLS, tools=[TOOL], thinking=THINK, model="tiny")
    thinking, text, first, second = message["content"]
    assert thinking["type"] == "thinking"
    assert thinking["thinking"] == "I look."
    assert thinking["signature"]
    assert text == {"type": "text", "text": "One moment."}
    assert first["type"] == second["type"] == "tool_use"
    assert (first["name"], first["input"]) == ("get_weather", {"city": " São\n Paulo "})
    assert second["input"] == {"city": "Rome"}
    assert first["id"] != second["id"]
    assert message["stop_reason"] == "tool_use"
    assert message["stop_sequence"] is None
    assert (message["type"], message["role"], message["model"]) == (
        "message",
        "assistant",
        "test/tiny",
    )
    assert message["id"].startswith("msg_")
    usage = message["usage"]
    assert 0 < usage["output_tokens_details"]["thinking_tokens"] < usage["output_tokens"]


def test_a_whole_message_is_the_fold_of_its_stream(http: httpx.Client) -> None:
    parameters = {"tools": [TOOL], "thinking": THINK}
    whole = ask(http, CALLS, **parameters)
    events = ask_streaming(http, CALLS, **parameters)
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    streamed = fold_message(events)
    for message in (whole, streamed):
        del message["id"]
        for block in message["content"]:
            block.pop("id", None)
        usage = message["usage"]
        # The second request finds the first one's prefix; together it is the same prompt.
        usage["prompt"] = usage.pop("input_tokens") + usage.pop("cache_read_input_tokens")
    assert streamed == whole


def test_thinking_is_off_by_default(http: httpx.Client) -> None:
    assert [block["type"] for block in ask(http, "Hello.")["content"]] == ["text"]
    disabled = ask(http, "Hello.", thinking={"type": "disabled"})
    assert disabled["content"] == [{"type": "text", "text": "Hello."}]


@pytest.mark.parametrize(
    ("parameters", "budget"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1234}}, 1234),
        ({"thinking": {"type": "enabled"}}, None),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": {"type": "adaptive", "budget_tokens": 0}}, None),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, 1024),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, None),
        ({"thinking": THINK, "output_config": {"effort": "low"}}, 2000),
    ],
)
def test_the_thinking_budget_reaches_the_engine(
    http: httpx.Client, parameters: dict[str, Any], budget: int | None
) -> None:
    request = request_of(ask(http, "</think>{request}", **parameters))
    assert request["thinking_budget"] == budget


def test_omitted_thinking_comes_as_a_signed_empty_block(http: httpx.Client) -> None:
    parameters = {"thinking": {"type": "adaptive", "display": "omitted"}}
    whole = ask(http, "Hm.</think>Yes.", **parameters)
    thinking, text = whole["content"]
    assert thinking["thinking"] == ""
    assert thinking["signature"]
    assert text["text"] == "Yes."
    assert fold_message(ask_streaming(http, "Hm.</think>Yes.", **parameters))["content"] == [
        thinking,
        text,
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_reasons(http: httpx.Client, stream: bool) -> None:
    def message(script: str, **parameters: Any) -> dict[str, Any]:
        if stream:
            return fold_message(ask_streaming(http, script, **parameters))
        return ask(http, script, **parameters)

    assert message("Yes.")["stop_reason"] == "end_turn"
    assert message("one two three four", max_tokens=2)["stop_reason"] == "max_tokens"
    stopped = message("one, two, three{wait}", stop_sequences=[", th", "zzz"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", ", th")
    assert stopped["content"][0]["text"] == "one, two"
    call = message("<tool_call>get_weather</tool_call>", tools=[TOOL])
    assert call["stop_reason"] == "tool_use"
    assert call["content"][0]["input"] == {}


def test_a_truncated_call_keeps_its_complete_arguments(http: httpx.Client) -> None:
    tool = {"name": "f", "input_schema": {"properties": {"a": {}, "b": {"type": "string"}}}}
    script = (
        "<tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>b</arg_key><arg_value>"
    )
    cut = http.post("/tokenize", json={"prompt": script}).json()["count"] + 1
    message = ask(http, f"{script}two</arg_value></tool_call>", tools=[tool], max_tokens=cut)
    assert message["stop_reason"] == "max_tokens"
    assert message["content"][0]["input"] == {"a": 1}


def test_a_last_message_of_the_assistant_is_continued(http: httpx.Client) -> None:
    messages = [user("⟦ 4, isn't it?⟧"), {"role": "assistant", "content": "It is"}]
    message = ask(http, "", messages=messages)
    assert message["content"] == [{"type": "text", "text": " 4, isn't it?"}]


# -- the prompt ---------------------------------------------------------------------------


def test_a_tool_loop_makes_the_same_prompt_as_in_chat(http: httpx.Client) -> None:
    schema = TOOL["input_schema"]
    body = {
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.9; cch=00000;"},
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "Be kind."},
        ],
        "tools": [TOOL | {"cache_control": {"type": "ephemeral", "ttl": "1h"}, "strict": True}],
        "thinking": {"type": "adaptive"},
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hot?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Two cities.", "signature": "x"},
                    {"type": "redacted_thinking", "data": "eA=="},
                    {"type": "text", "text": "One moment."},
                    {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "A"}},
                    {"type": "tool_use", "id": "b", "name": "get_weather", "input": {"city": "B"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "b", "content": "20"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "a",
                        "content": [{"type": "text", "text": "30"}, {"type": "text", "text": "°C"}],
                    },
                    {"type": "text", "text": "Well?", "cache_control": {"type": "ephemeral"}},
                    {"type": "text", "text": "Quick!"},
                ],
            },
            {"role": "system", "content": "Hurry up."},
        ],
    }
    calls = [
        {"id": id, "function": {"name": "get_weather", "arguments": {"city": id.upper()}}}
        for id in ("a", "b")
    ]
    as_chat = {
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "get_weather",
                    "description": TOOL["description"],
                    "parameters": schema,
                },
            }
        ],
        "messages": [
            {"role": "system", "content": "Be brief.\n\nBe kind."},
            user("Hot?"),
            {
                "role": "assistant",
                "content": "One moment.",
                "reasoning_content": "Two cities.",
                "tool_calls": calls,
            },
            {"role": "tool", "tool_call_id": "a", "content": "30\n\n°C"},
            {"role": "tool", "tool_call_id": "b", "content": "20"},
            user("Well?\n\nQuick!"),
            {"role": "system", "content": "Hurry up."},
        ],
    }
    check_prompt(http, body, as_chat)


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "Error"), ("It broke.", "Error: It broke."), ("error: no", "error: no")],
)
def test_a_failed_tool_result_is_marked_as_an_error(
    http: httpx.Client, content: str | None, text: str
) -> None:
    call = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "is_error": True}
    if content is not None:
        result["content"] = content
    body = {
        "messages": [
            user("Go."),
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [result]},
        ]
    }
    as_chat = {
        "enable_thinking": False,
        "messages": [
            user("Go."),
            {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]},
            {"role": "tool", "content": text},
        ],
    }
    check_prompt(http, body, as_chat)


@pytest.mark.parametrize("thinking", [None, THINK])
def test_tokens_are_counted_as_a_message_would_count_them(
    http: httpx.Client, thinking: dict[str, Any] | None
) -> None:
    body = {
        "max_tokens": 100,
        "stream": False,
        "system": [{"type": "text", "text": "Be brief."}],
        "tools": [TOOL],
        "thinking": thinking,
        "messages": [
            user("What now?"),
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                    {
                        "type": "tool_use",
                        "id": "a",
                        "name": TOOL["name"],
                        "input": {"city": "Oslo"},
                    },
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "a", "content": "⟦Yes.⟧"}],
            },
        ],
    }
    counted = http.post("/v1/messages/count_tokens?beta=true", json=body)
    usage = http.post("/v1/messages?beta=true", json=body).json()["usage"]
    size = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert counted.json() == {"input_tokens": size}


def test_claude_codes_billing_line_does_not_split_the_cache(http: httpx.Client) -> None:
    def cached(number: int) -> int:
        line = f"x-anthropic-billing-header: cc_version=2.1.{number}; cch={number:05x};"
        system = [{"type": "text", "text": text} for text in (line, "You help with code. " * 20)]
        answer = ask(http, "Yes.", system=system)
        count: int = answer["usage"]["cache_read_input_tokens"]
        return count

    cached(1)
    assert cached(2) > 40


@pytest.mark.parametrize("returned", ["whole", "without thinking"])
def test_a_returning_turn_is_cached(
    scripted: LiveServer, http: httpx.Client, returned: str
) -> None:
    """The scripted engine caches prompts only, so a turn's ids are found two turns later."""
    messages = [user(f"⟦A {returned} thought.</think>First  answer ⟧")]
    sizes: list[int] = []
    for number in range(3):
        answer = ask(http, "", messages=messages, thinking=THINK)
        usage = answer["usage"]
        assert usage["cache_read_input_tokens"] >= (sizes[-1] if sizes else 0)
        sizes.append(usage["cache_read_input_tokens"] + usage["input_tokens"])
        content = answer["content"]
        if returned == "without thinking":
            content = [block for block in content if block["type"] != "thinking"]
        messages.append({"role": "assistant", "content": content})
        messages.append(user(f"⟦Thought {number}.</think>Answer {number}⟧"))


# -- Claude Code --------------------------------------------------------------------------


def test_a_request_of_claude_code_is_accepted(http: httpx.Client) -> None:
    body = {
        "model": "tiny",
        "max_tokens": 32000,
        "stream": True,
        "temperature": 1,
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": "user_0_account__session_0"},
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=0;"},
            {
                "type": "text",
                "text": "You are an agent.",
                "cache_control": {"type": "ephemeral", "scope": "global", "ttl": "1h"},
            },
        ],
        "tools": [
            {
                "name": "Read",
                "description": "Reads a file.",
                "input_schema": {
                    "$schema": "https://json-schema.org/draft/2020-12/schema",
                    "type": "object",
                    "properties": {"file_path": {"type": "string"}},
                    "required": ["file_path"],
                    "additionalProperties": False,
                },
                "eager_input_streaming": True,
            },
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        ],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>Hi</system-reminder>"},
                    {
                        "type": "text",
                        "text": "⟦Hm.</think>Yes.⟧",
                        "cache_control": {"type": "ephemeral"},
                    },
                ],
            }
        ],
    }
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
        "anthropic-dangerous-direct-browser-access": "true",
        "x-app": "cli",
        "x-stainless-helper-method": "stream",
        "x-claude-code-session-id": "0",
        "x-api-key": "any",
    }
    response = http.post("/v1/messages?beta=true", json=body, headers=headers)
    assert response.status_code == 200, response.text
    message = fold_message(sse.read_named(response.content))
    assert [block["type"] for block in message["content"]] == ["thinking", "text"]
    # A search that only Anthropic's servers could run is not offered to the model, and not hidden.
    assert response.headers["x-glmd-ignored-parameters"] == "tools[1].type=web_search_20250305"
    for key in ("max_tokens", "stream", "temperature", "metadata"):
        del body[key]
    counted = http.post("/v1/messages/count_tokens?beta=true", json=body, headers=headers)
    usage = message["usage"]
    assert counted.json() == {
        "input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]
    }


# -- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [7]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]},
            "messages[0].content[0].text",
        ),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        (
            {"tools": [{"name": "f", "input_schema": []}], "tool_choice": {"type": "any"}},
            "tools[0].input_schema",
        ),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice.name"),
        ({"tool_choice": {"type": "tool", "name": "none"}, "tools": [TOOL]}, "tool_choice"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"thread": {"type": "create"}}, "thread"),
        ({"container": "c"}, "container"),
    ],
)
def test_an_invalid_field_is_400_in_anthropics_shape(
    http: httpx.Client, body: dict[str, Any], named: str
) -> None:
    response = http.post("/v1/messages", json=body_of("Yes.") | body)
    assert response.status_code == 400, response.text
    answer = response.json()
    assert set(answer) == {"type", "error", "request_id"}
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "invalid_request_error"
    assert named in answer["error"]["message"]
    assert answer["request_id"] == response.headers["request-id"]


def test_other_errors_have_anthropics_types(http: httpx.Client) -> None:
    def error_of(response: httpx.Response) -> tuple[int, str]:
        assert response.json()["type"] == "error"
        return response.status_code, response.json()["error"]["type"]

    unknown = http.post("/v1/messages", json=body_of("Yes.", model="claude-x"))
    assert error_of(unknown) == (404, "not_found_error")
    assert error_of(http.get("/v1/messages/batches")) == (404, "not_found_error")
    assert error_of(http.get("/v1/messages")) == (405, "invalid_request_error")
    assert error_of(http.post("/v1/messages", content=b"{}")) == (415, "invalid_request_error")
    busy = http.post("/v1/messages", json=body_of("{busy}"))
    assert error_of(busy) == (529, "overloaded_error")
    assert busy.headers["retry-after"] == "1"
    refused = http.post("/v1/messages", json=body_of("{refuse}", stream=True))
    assert error_of(refused) == (400, "invalid_request_error")


def test_the_key_may_be_in_anthropics_header() -> None:
    with live_server(api_key="s3cret") as live, live.client() as http:
        for headers in ({"x-api-key": "s3cret"}, {"authorization": "Bearer s3cret"}):
            assert http.post("/v1/messages", json=body_of("Yes."), headers=headers).is_success
        for headers in ({"x-api-key": "wrong"}, {}):
            response = http.post("/v1/messages", json=body_of("Yes."), headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"


# -- time ---------------------------------------------------------------------------------


def read_until(http: httpx.Client, body: dict[str, Any], mark: bytes, count: int) -> bytes:
    with http.stream("POST", "/v1/messages", json=body | {"stream": True}) as response:
        received = b""
        for piece in response.iter_raw():
            received += piece
            if received.count(mark) >= count and received.endswith(b"\n\n"):
                break
    return received


@pytest.mark.parametrize("script", ["{wait}", "Wait…{wait}"])
def test_pings_keep_a_silent_stream_open(
    scripted: LiveServer, http: httpx.Client, script: str
) -> None:
    events = sse.read_named(read_until(http, body_of(script), b"event: ping", 4))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds[-2:] == ["ping", "ping"]
    scripted.wait_until_idle()


def test_an_engine_that_dies_mid_stream_is_an_error_event() -> None:
    with live_server() as live, live.client() as http, live.client() as other:
        body = body_of("I wait{wait}", stream=True)
        with http.stream("POST", "/v1/messages", json=body) as response:
            pieces = response.iter_raw()
            received = next(pieces)
            died = other.post("/v1/messages", json=body_of("{die}"))
            received += b"".join(pieces)
    assert died.json()["error"]["type"] == "api_error"
    last = sse.read_named(received)[-1]
    assert last["type"] == "error"
    assert last["error"]["type"] == "api_error"
    assert last["request_id"]
