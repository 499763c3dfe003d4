"""Every answer and every event is valid by the official SDKs' types."""

from __future__ import annotations

from typing import Any

import anthropic.types
import httpx
import openai.types.chat
import openai.types.responses
import pytest
import sse
from pydantic import TypeAdapter

ANSWER = (
    "I look.</think>One moment: ä😀.<tool_call>get_weather<arg_key>city</arg_key>"
    "<arg_value>São Paulo</arg_value></tool_call><tool_call>get_weather</tool_call>"
)
PATCH = (
    "</think><tool_call>patch<arg_key>input</arg_key><arg_value>*** a\n  b</arg_value></tool_call>"
)
SCRIPTS = [
    ANSWER,
    PATCH,
    "Hm.</think>Yes.",
    "</think>",
    "Cut in its reasoning",
    "</think>one two three",
]
FUNCTION = {
    "name": "get_weather",
    "description": "The weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def post(http: httpx.Client, path: str, body: dict[str, Any]) -> bytes:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.content


def limited(script: str, key: str) -> dict[str, int]:
    """A limit, which truncates some of the answers."""
    return {key: 4} if script.startswith(("Cut", "</think>one")) else {key: 500}


def validate(kind: Any, value: Any) -> None:
    TypeAdapter(kind).validate_python(value)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("logprobs", [False, True])
def test_chat_completions(http: httpx.Client, script: str, logprobs: bool) -> None:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"⟦{script}⟧"}],
        "tools": [{"type": "function", "function": FUNCTION}],
        "logprobs": logprobs,
        "top_logprobs": 2 if logprobs else None,
        **limited(script, "max_tokens"),
    }
    whole = post(http, "/v1/chat/completions", body)
    openai.types.chat.ChatCompletion.model_validate_json(whole)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in sse.read(post(http, "/v1/chat/completions", body)).chunks:
        validate(openai.types.chat.ChatCompletionChunk, chunk)


@pytest.mark.parametrize("script", SCRIPTS)
def test_completions(http: httpx.Client, script: str) -> None:
    body = {"prompt": f"⟦{script}⟧", "logprobs": 2, **limited(script, "max_tokens")}
    openai.types.Completion.model_validate_json(post(http, "/v1/completions", body))
    chunks = sse.read(post(http, "/v1/completions", body | {"stream": True})).chunks
    for chunk in chunks:
        # Their type knows no chunk that does not finish; their client reads those all the same.
        for choice in chunk["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        validate(openai.types.Completion, chunk)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("summary", [None, "auto"])
def test_responses(http: httpx.Client, script: str, summary: str | None) -> None:
    body = {
        "input": f"⟦{script}⟧",
        "tools": [{"type": "function", **FUNCTION}, {"type": "custom", "name": "patch"}],
        "reasoning": {"summary": summary, "effort": "high"},
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        **limited(script, "max_output_tokens"),
    }
    openai.types.responses.Response.model_validate_json(post(http, "/v1/responses", body))
    for event in sse.read_named(post(http, "/v1/responses", body | {"stream": True})):
        validate(openai.types.responses.ResponseStreamEvent, event)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("display", ["summarized", "omitted"])
def test_messages(http: httpx.Client, script: str, display: str) -> None:
    tool = {"name": FUNCTION["name"], "input_schema": FUNCTION["parameters"]}
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"⟦{script}⟧"}],
        "tools": [tool],
        "thinking": {"type": "adaptive", "display": display},
        **limited(script, "max_tokens"),
    }
    anthropic.types.Message.model_validate_json(post(http, "/v1/messages", body))
    events = sse.read_named(post(http, "/v1/messages", body | {"stream": True}))
    for event in events:
        if event["type"] != "ping":  # which their client drops before it looks for a type
            validate(anthropic.types.RawMessageStreamEvent, event)
    counted = {key: body[key] for key in ("messages", "tools", "thinking")}
    count = post(http, "/v1/messages/count_tokens", counted)
    anthropic.types.MessageTokensCount.model_validate_json(count)


def test_models(http: httpx.Client) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    validate(openai.types.Model, model)
    validate(anthropic.types.ModelInfo, model)
