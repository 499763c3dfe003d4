"""Limits of sizes and counts in requests, named in errors."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import LiveServer
from pydantic import BaseModel, ValidationError

from glmd.api import body_reader, request_body
from glmd.api.anthropic.protocol import MessagesRequest
from glmd.api.openai.protocol import ChatCompletionRequest, CompletionRequest
from glmd.api.responses.protocol import ResponsesRequest
from glmd.api.routes.tokenize import DetokenizeRequest
from glmd.chat.types import (
    MAX_BLOCKS,
    MAX_MESSAGES,
    MAX_NAME,
    MAX_PATTERN,
    MAX_STOP_LENGTH,
    MAX_TOOLS,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hi"}
BLOCKS = [{"type": "text", "text": ""}] * (MAX_BLOCKS + 1)
RESULT = {"type": "tool_result", "tool_use_id": "a"}
NUMERALS = [str(number) for number in range(10_000)]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def chat_tool(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOO_MUCH = [
    (CHAT, {"messages": [USER] * (MAX_MESSAGES + 1)}, "messages"),
    (MESSAGES, {"messages": [USER] * (MAX_MESSAGES + 1), "max_tokens": 1}, "messages"),
    (RESPONSES, {"input": [USER] * (MAX_MESSAGES + 1)}, "input"),
    *(
        (MESSAGES, {"messages": [USER, *messages], "max_tokens": 1}, f"messages[1].content{where}")
        for messages, where in (
            ([{"role": "user", "content": BLOCKS}, ANSWER, USER], ""),
            ([{"role": "assistant", "content": BLOCKS}, USER], ""),
            ([{"role": "user", "content": [{**RESULT, "content": BLOCKS}]}], "[0].content"),
        )
    ),
    (MESSAGES, {"messages": [USER], "system": BLOCKS, "max_tokens": 1}, "system"),
    (CHAT, {"messages": [{"role": "user", "content": BLOCKS}]}, "messages[0].content"),
    (CHAT, {"messages": [USER], "tools": [chat_tool("a", {})] * (MAX_TOOLS + 1)}, "tools"),
    (MESSAGES, {"messages": [USER], "max_tokens": 1, "tools": [{}] * (MAX_TOOLS + 1)}, "tools"),
    (
        CHAT,
        {"messages": [USER], "tools": [chat_tool("a", {"properties": {"x": nested(101)}})]},
        "tools[0].function.parameters",
    ),
    (COMPLETIONS, {"prompt": "a", "guided_regex": "a" * (MAX_PATTERN + 1)}, "guided_regex"),
    (
        COMPLETIONS,
        {"prompt": "a", "guided_json": '{"items":' * 450 + "{}" + "}" * 450},
        "guided_json",
    ),
    (COMPLETIONS, {"prompt": "a", "guided_choice": ["a"] * 10_001}, "guided_choice"),
    (COMPLETIONS, {"prompt": "a", "guided_grammar": "a" * (1 << 21)}, "guided_grammar"),
    (COMPLETIONS, {"prompt": "a", "stop": "a" * (MAX_STOP_LENGTH + 1)}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop": ["a"] * 17}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": [1] * 1001}, "stop_token_ids"),
    (
        COMPLETIONS,
        {"prompt": "a", "logit_bias": {str(id): 1 for id in range(4097)}},
        "logit_bias",
    ),
    (COMPLETIONS, {"prompt": "a", "model": "a" * (MAX_NAME + 1)}, "model"),
    (COMPLETIONS, {"prompt": "a", "profile": "a" * 1_000_000}, "profile"),
    (COMPLETIONS, {"prompt": "a", "n": 129}, "n"),
]


@pytest.mark.parametrize(
    ("path", "body", "param"), TOO_MUCH, ids=[f"{path} {param}" for path, _, param in TOO_MUCH]
)
def test_a_field_over_its_limit_is_400_with_its_name(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert param in error["message"]
    assert len(error["message"]) < 1100
    if path != MESSAGES:
        assert error["param"].startswith(param)


def test_a_deeply_nested_body_is_400(http: httpx.Client) -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        body = opening * 100_000 + "1" + closing * 100_000
        headers = {"content-type": "application/json"}
        response = http.post(CHAT, content=body.encode(), headers=headers)
        assert response.status_code == 400


@pytest.mark.parametrize(
    ("unit", "name"),
    [
        (b"[]", "strings, arrays and objects"),
        (b"{}", "strings, arrays and objects"),
        (b'"a"', "strings, arrays and objects"),
        (b"1", "values"),
    ],
)
def test_a_body_with_too_many_values_is_413_before_it_is_parsed(
    http: httpx.Client, unit: bytes, name: str
) -> None:
    limit = body_reader.MAX_COMMAS if name == "values" else body_reader.MAX_PARTS
    headers = {"content-type": "application/json"}
    for count, status in ((limit - 10, 400), (limit + 10, 413), (4 * limit + 10, 413)):
        body = b'{"messages":[' + b",".join([unit] * count) + b"]}"
        response = http.post(CHAT, content=body, headers=headers)
        assert response.status_code == status, response.text
    assert f"more than {limit:,} {name}" in response.text


@given(
    st.recursive(
        st.none() | st.floats(allow_nan=False) | st.text('a"\\,[{\x00\n\u00e9', max_size=9),
        lambda values: st.lists(values) | st.dictionaries(st.text('"\\,[{'), values),
    ),
    st.integers(1, 9),
)
def test_values_are_counted_as_the_parser_finds_them(value: object, block: int) -> None:
    def count(value: object) -> tuple[int, int]:
        """Strings, arrays and objects, and commas."""
        if isinstance(value, dict):
            members = [count(member) for member in value.values()]
            parts, commas = len(value) + 1, max(0, len(value) - 1)
        elif isinstance(value, list):
            members = [count(member) for member in value]
            parts, commas = 1, max(0, len(value) - 1)
        else:
            return int(isinstance(value, str)), 0
        return parts + sum(m[0] for m in members), commas + sum(m[1] for m in members)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(body_reader, "COUNT_BLOCK", block)
        for ascii in (True, False):
            body = json.dumps(value, ensure_ascii=ascii).encode()
            assert body_reader.count_values(body) == count(value)


def test_a_large_body_is_parsed_as_strictly_as_a_small_one(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_body, "INLINE_BYTES", 0)
    headers = {"content-type": "application/json"}
    for body in (b'{"messages": NaN}', b'{"messages": [}', b'"\xff"', b"[" * 300 + b"]" * 300):
        response = http.post(CHAT, content=body, headers=headers)
        assert response.status_code == 400
        assert "not valid JSON" in response.json()["error"]["message"]
    body = b'{"tokens": [1], "tokens": [2], "a": "\\ud800\\ud83d\\ude00"}'
    assert body_reader.parse_json(body) == {"tokens": [2], "a": "\ufffd\U0001f600"}


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, {"prompt": [0.5] * 10_000}),
        (CompletionRequest, {"prompt": "a", "logit_bias": dict.fromkeys(NUMERALS, "x")}),
        (ChatCompletionRequest, {"messages": [0] * 10_000}),
        (MessagesRequest, {"messages": [0] * 10_000, "max_tokens": 1}),
        (ResponsesRequest, {"input": [0] * 10_000}),
        (ResponsesRequest, {"input": "a", "metadata": dict.fromkeys(NUMERALS, 0)}),
        (DetokenizeRequest, {"tokens": ["a"] * 10_000}),
    ],
)
def test_validation_stops_at_the_first_of_many_errors(
    model: type[BaseModel], body: dict[str, Any]
) -> None:
    """Errors take longer than valid items, and the event loop waits for them."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() < 10


def test_an_error_quotes_a_bounded_part_of_the_request(http: httpx.Client) -> None:
    long = "x" * 1_000_000
    for path, body in [
        (CHAT, {"messages": [{"role": long, "content": "a"}]}),
        (CHAT, {"messages": [USER], "tools": [chat_tool(long, {}), chat_tool(long, {})]}),
        (CHAT, {"messages": [USER], "tools": [chat_tool("a", {"properties": {long: 1}})]}),
        (RESPONSES, {"input": [{"type": long}]}),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": long}]}], "max_tokens": 1}),
    ]:
        response = http.post(path, json=body)
        assert response.status_code == 400
        assert len(response.content) < 2500


def test_names_are_never_used_as_paths(http: httpx.Client, scripted: LiveServer) -> None:
    for name in ("../../etc/passwd", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "C:\\x", "\0", "."):
        assert http.post(CHAT, json={"messages": [USER], "model": name}).status_code == 404
        follow = {"input": "a", "previous_response_id": name}
        assert http.post(RESPONSES, json=follow).status_code in (400, 404)
    for path in ("/v1/models/", "/v1/responses/", "/page/", "/api/v0/models/"):
        for name in ("..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "%00", "....//x"):
            response = httpx.get(httpx.URL(scripted.url).join(path + name), timeout=60)
            assert response.status_code == 404, (path, name)
            assert list(json.loads(response.content)) == ["error"]
