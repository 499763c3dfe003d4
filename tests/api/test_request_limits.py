"""Every request has a largest size in every direction, and is told which one it exceeds."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from live import LiveServer

from glmd.chat.request_limits import MAX_MESSAGES, MAX_NAME, MAX_PATTERN, MAX_STOP_LENGTH, MAX_TOOLS

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
USER = {"role": "user", "content": "Hi"}


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
def test_too_much_of_anything_is_400_with_its_name(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert param in error["message"]
    assert len(error["message"]) < 1100
    if path != MESSAGES:
        assert error["param"].startswith(param)


def test_a_body_that_is_nested_without_end_is_400(http: httpx.Client) -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        body = opening * 100_000 + "1" + closing * 100_000
        headers = {"content-type": "application/json"}
        response = http.post(CHAT, content=body.encode(), headers=headers)
        assert response.status_code == 400


def test_an_error_repeats_no_more_than_the_beginning_of_what_was_sent(http: httpx.Client) -> None:
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


def test_names_that_point_elsewhere_are_names_of_nothing(
    http: httpx.Client, scripted: LiveServer
) -> None:
    """No name that a client sends is ever a path."""
    for name in ("../../etc/passwd", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "C:\\x", "\0", "."):
        assert http.post(CHAT, json={"messages": [USER], "model": name}).status_code == 404
        follow = {"input": "a", "previous_response_id": name}
        assert http.post(RESPONSES, json=follow).status_code in (400, 404)
    for path in ("/v1/models/", "/v1/responses/", "/page/", "/api/v0/models/"):
        for name in ("..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "%00", "....//x"):
            response = httpx.get(httpx.URL(scripted.url).join(path + name))
            assert response.status_code == 404, (path, name)
            assert list(json.loads(response.content)) == ["error"]
