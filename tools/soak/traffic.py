"""Random client requests of every kind, valid and malformed."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

WORDS = """
    river lamp seven quiet apple train window paper cloud garden number silver often hello where
    small green story between answer yellow count winter
""".split()

TOOL = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}

CANARY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me a story about a river."}],
    "seed": 7,
    "temperature": 1.0,
    "max_tokens": 24,
    "ignore_eos": True,
}

MALFORMED: tuple[bytes, ...] = (
    b"",
    b"{",
    b"\xff\xfe\x00",
    b"[" * 5000,
    b"[]",
    b'{"messages": NaN}',
    b'{"messages": "hello"}',
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": "many"}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
    b'{"messages": [{"role": "nobody", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "top_p": 7}',
    b'{"messages": [{"role": "user", "content": "%s"}]}' % (b"long " * 6000),
)
"""Invalid bodies of chat completions. The last one exceeds the context."""


HOSTILE: tuple[tuple[str, bytes], ...] = (
    ("/v1/chat/completions", b'{"messages": [%s1]}' % (b"1," * 500_000)),
    ("/v1/chat/completions", b'{"messages": %s}' % (b"[" * 100_000)),
    ("/v1/completions", b'{"prompt": [%s-1]}' % (b"-1," * 300_000)),
    ("/detokenize", b'{"tokens": [%s-1]}' % (b"2000000000," * 100_000)),
    ("/tokenize", b'{"prompt": "%s"}' % (b"\\ud800" * 100_000)),
    ("/v1/messages", b'{"max_tokens": %s, "messages": []}' % (b"9" * 4000)),
    (
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": "%s"}]}' % (b"a" * 5_000_000),
    ),
    (
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"%s": 1}}'
        % (b"9" * 5000),
    ),
    (
        "/v1/chat/completions",
        b'{"messages": [{"role": "user", "content": "x"}], "guided_json":'
        b' {"type": "integer", "allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}}',
    ),
)
"""Bodies that are made to take time or memory, by path."""


@dataclass(frozen=True)
class ClientRequest:
    """A request.

    Attributes:
        kind: row in the report's table.
        stream: the answer is streamed.
    """

    kind: str
    path: str
    body: dict[str, Any]
    stream: bool = False


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def plain(rng: random.Random) -> ClientRequest:
    """Return a request for measuring throughput: not cached, with a fixed length."""
    body = {
        "messages": [{"role": "user", "content": text(rng, 20)}],
        "seed": rng.randrange(1000),
        "max_tokens": 32,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return ClientRequest("plain", "/v1/chat/completions", body, stream=True)


def mixed(rng: random.Random) -> ClientRequest:
    """Return a request of any API, short or long, streamed or not."""
    words = rng.choice([3, 10, 10, 60, 60, 500])
    content = text(rng, words)
    if rng.random() < 0.4:  # a prefix shared with other requests
        content = "Once upon a time. " * rng.choice([5, 40, 100]) + content
    messages = [{"role": "user", "content": content}]
    stream = rng.random() < 0.6
    common: dict[str, Any] = {"stream": True} if stream else {}
    limit = rng.choice([1, 8, 8, 30, 100])
    kind = rng.choice(["chat", "chat", "form", "tools", "completions", "responses", "messages"])
    match kind:
        case "chat":
            extra: dict[str, Any] = rng.choice(
                [
                    {},
                    {"n": 3},
                    {"logprobs": True, "top_logprobs": 3},
                    {"temperature": 0},
                    {"frequency_penalty": 0.5, "enable_thinking": False},
                    {"thinking_budget": 5, "ignore_eos": True},
                    {"stop": ["e"]},
                ]
            )
            body = {"messages": messages, "max_tokens": limit, **extra}
        case "form":
            form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
            body = {"messages": messages, "max_tokens": 60, "response_format": form}
        case "tools":
            tools = [{"type": "function", "function": TOOL}]
            choice = rng.choice(["auto", "required"])
            body = {"messages": messages, "max_tokens": 60, "tools": tools, "tool_choice": choice}
        case "completions":
            body = {"prompt": content, "max_tokens": limit, "n": rng.choice([1, 2])}
        case "responses":
            body = {"input": content, "max_output_tokens": 16 + limit, "store": rng.random() < 0.3}
        case _:
            body = {"messages": messages, "max_tokens": limit}
    paths = {
        "completions": "/v1/completions",
        "responses": "/v1/responses",
        "messages": "/v1/messages",
    }
    return ClientRequest(kind, paths.get(kind, "/v1/chat/completions"), {**body, **common}, stream)


def quick(rng: random.Random) -> ClientRequest:
    """Return a request that needs no engine."""
    content = text(rng, 20)
    if rng.random() < 0.5:
        return ClientRequest("quick", "/tokenize", {"prompt": content})
    messages = [{"role": "user", "content": content}]
    body = {"model": "default", "messages": messages}
    return ClientRequest("quick", "/v1/messages/count_tokens", body)


def encode(request: ClientRequest) -> bytes:
    return json.dumps(request.body).encode()
