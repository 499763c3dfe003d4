"""What clients of other servers send is understood: numbers, parameters, bodies and paths."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from live import LiveServer, live_server

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def ask(http: httpx.Client, script: str = "</think>Yes.", **fields: Any) -> httpx.Response:
    return http.post(CHAT, json={"messages": [user(f"⟦{script}⟧")]} | fields)


def engine_request(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    """The engine request that a chat request becomes."""
    response = ask(http, "</think>{request}", **({"max_tokens": 4000} | fields))
    assert response.status_code == 200, response.text
    assert "x-glmd-ignored-parameters" not in response.headers
    request: dict[str, Any] = json.loads(response.json()["choices"][0]["message"]["content"])
    return request


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ({"max_tokens": 3999.0}, {"max_tokens": 3999}),
        ({"max_tokens": "3999"}, {"max_tokens": 3999}),
        ({"seed": 7.0}, {"seed": 7}),
        ({"top_k": 40.0}, {"top_k": 40}),
        ({"top_k": "40"}, {"top_k": 40}),
        ({"temperature": "0.5", "top_p": "0.25"}, {"temperature": 0.5, "top_p": 0.25}),
        ({"repeat_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"thinking_token_budget": 9}, {"thinking_budget": 9}),
        ({"reasoning": {"max_tokens": 9}}, {"thinking_budget": 9}),
        ({"reasoning": {"effort": "low"}}, {"thinking_budget": 1024}),
        ({"think": "low"}, {"thinking_budget": 1024}),
        ({"thinking": {"type": "adaptive"}}, {"thinking_budget": None}),
        ({"reasoning_effort": ""}, {"thinking_budget": None}),
        ({"reasoning_effort": "auto"}, {"thinking_budget": None}),
        ({"stop": ""}, {}),
    ],
)
def test_parameters_are_read_as_clients_spell_them(
    http: httpx.Client, fields: dict[str, Any], read: dict[str, Any]
) -> None:
    request = engine_request(http, **fields)
    assert {**request, **request["sampling"]}.items() >= read.items()


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, True),
        ({"reasoning": {"enabled": False}}, False),
        ({"reasoning": {"effort": "none"}}, False),
        ({"reasoning": {"enabled": True}}, True),
        ({"think": False}, False),
        ({"think": True}, True),
        ({"thinking": {"type": "adaptive"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
    ],
)
def test_thinking_is_switched_by_every_spelling(
    http: httpx.Client, fields: dict[str, Any], thinks: bool
) -> None:
    shown = http.post("/apply-template", json={"messages": [user("Hi")]} | fields).json()
    assert shown["prompt"].endswith("<think>" if thinks else "</think>")


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("read", "write")
]
FLAT = [{"type": "function", **tool["function"]} for tool in TOOLS]  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("choice", "calls"),
    [
        ({"type": "function", "name": "read"}, "required"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": TOOLS[:1]}}, "free"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": TOOLS[:1]}},
            "required",
        ),
    ],
)
def test_a_tool_choice_limits_calls_and_not_the_prompt(
    http: httpx.Client, choice: dict[str, Any], calls: str
) -> None:
    request = engine_request(http, tools=TOOLS, tool_choice=choice, stop=["\x00"])
    grammar = request["grammar"]
    assert "read" in grammar["grammar"]
    assert "write" not in grammar["grammar"]
    assert grammar.get("required", True) == (calls == "required")


def test_responses_take_allowed_tools_too(http: httpx.Client) -> None:
    for mode in ("auto", "required"):
        named = [{"type": "function", "name": "read"}, {"type": "web_search"}]
        choice = {"type": "allowed_tools", "mode": mode, "tools": named}
        body = {"input": "⟦</think>{request}⟧", "tools": FLAT, "tool_choice": choice}
        response = http.post("/v1/responses", json=body)
        assert response.status_code == 200, response.text
        assert response.json()["tool_choice"]["mode"] == mode
        said = json.loads(response.json()["output"][-1]["content"][0]["text"])
        assert "read" in said["grammar"]["grammar"]
        assert "write" not in said["grammar"]["grammar"]
    refused = http.post(
        "/v1/responses",
        json={
            "input": "Hi",
            "tools": FLAT,
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "burn"}]},
        },
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "tool_choice"


def test_an_empty_list_of_allowed_tools_drops_calls(http: httpx.Client) -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}
    script = "</think>Yes.<tool_call>read</tool_call>"
    answer = ask(http, script, tools=TOOLS, tool_choice=choice).json()["choices"][0]["message"]
    assert answer["content"] == "Yes."
    assert not answer.get("tool_calls")


@pytest.mark.parametrize("type", ["web_search", "mcp", "custom", "image_generation"])
def test_other_tools_are_left_out_of_chat(http: httpx.Client, type: str) -> None:
    for tools in ([*TOOLS, {"type": type}], [{"type": type}]):
        response = ask(http, tools=tools)
        assert response.status_code == 200, response.text
        where = f"tools[{len(tools) - 1}].type={type}"
        assert response.headers["x-glmd-ignored-parameters"] == where
    forced = ask(http, tools=[{"type": type}], tool_choice="required")
    assert forced.status_code == 400
    assert forced.json()["error"]["param"] == "tool_choice"


# -- bodies -------------------------------------------------------------------------------

BODY = json.dumps({"messages": [user("⟦</think>Yes.⟧")]}).encode()


def compressed(encoding: str, data: bytes) -> bytes:
    if encoding == "gzip":
        return gzip.compress(data)
    if sys.version_info >= (3, 14):
        from compression import zstd  # noqa: PLC0415
    else:
        zstd = pytest.importorskip("backports.zstd")
    made: bytes = zstd.compress(data)
    return made


def send(http: httpx.Client, body: bytes, encoding: str) -> httpx.Response:
    return http.post(CHAT, content=body, headers=JSON | {"content-encoding": encoding})


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_compressed_bodies_are_read(http: httpx.Client, encoding: str) -> None:
    whole = compressed(encoding, BODY)
    parts = compressed(encoding, BODY[:20]) + compressed(encoding, BODY[20:])
    for body in (whole, parts, compressed(encoding, b"\xef\xbb\xbf" + BODY)):
        response = send(http, body, encoding)
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_a_malformed_or_cut_body_is_400(http: httpx.Client, encoding: str) -> None:
    for body in (b"x" * 99, compressed(encoding, BODY)[:-5]):
        response = send(http, body, encoding)
        assert response.status_code == 400, response.text
        assert f"not valid {encoding}" in response.json()["error"]["message"]


def test_other_encodings_are_415(http: httpx.Client) -> None:
    response = send(http, BODY, "br")
    assert response.status_code == 415
    assert "gzip or zstd" in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def small() -> Iterator[LiveServer]:
    with live_server(max_body=100_000) as live:
        yield live


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_the_limit_holds_for_what_a_body_holds(small: LiveServer, encoding: str) -> None:
    with small.client() as http:
        padded = BODY + b" " * (100_000 - len(BODY))
        assert send(http, compressed(encoding, padded), encoding).status_code == 200
        assert send(http, compressed(encoding, padded + b" "), encoding).status_code == 413
        bomb = compressed(encoding, bytes(200_000_000))
        assert send(http, bomb, encoding).status_code == 413


def test_what_stands_for_nothing_is_limited_too(small: LiveServer) -> None:
    header, stored = gzip.compress(b"")[:10], b"\x00\x00\x00\xff\xff"  # an empty block
    with small.client() as http:
        members = gzip.compress(b"") * 1001
        assert send(http, members + gzip.compress(BODY), "gzip").status_code == 400
        assert send(http, header + stored * 30_000, "gzip").status_code == 413


def test_a_byte_order_mark_is_dropped(http: httpx.Client) -> None:
    response = http.post(CHAT, content=b"\xef\xbb\xbf" + BODY, headers=JSON)
    assert response.status_code == 200, response.text


# -- paths --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models/"),
        ("GET", "//v1/models"),
        ("GET", "/v1//models"),
        ("POST", "//v1/chat/completions"),
        ("POST", "/v1/chat/completions/"),
        ("POST", "/v1/messages/"),
        ("GET", "/health/"),
        ("GET", "//"),
    ],
)
def test_slashes_too_many_are_served(http: httpx.Client, method: str, path: str) -> None:
    content = BODY.replace(b"{", b'{"max_tokens": 9, ', 1) if method == "POST" else None
    url = f"{str(http.base_url).rstrip('/')}{path}"
    response = http.request(method, url, content=content, headers=JSON, follow_redirects=False)
    assert response.status_code == 200, response.text


def test_a_websocket_is_refused_with_the_status_on_which_codex_falls_back(
    http: httpx.Client,
) -> None:
    upgrade = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    response = http.get("/v1/responses", headers=upgrade)
    assert response.status_code == 426
    assert "POST /v1/responses" in response.json()["error"]["message"]
    assert http.get("/v1/responses").status_code == 405


def test_what_is_not_served_is_explained(http: httpx.Client) -> None:
    compact = http.post("/v1/responses/compact", json={"input": []})
    assert compact.status_code == 501
    assert "summary" in compact.json()["error"]["message"]
    version = http.get("/api/version")
    assert version.status_code == 404
    assert "Ollama" in version.json()["error"]["message"]


def test_the_context_length_is_where_clients_of_other_servers_look(
    http: httpx.Client, scripted: LiveServer
) -> None:
    info = scripted.service.engine.info
    assert info is not None
    context = info.max_context
    (model,) = http.get("/v1/models").json()["data"]
    assert model["meta"]["n_ctx"] == context
    props = http.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == context
    (described,) = http.get("/api/v1/models").json()["models"]
    assert described["max_context_length"] == context
    assert described["loaded_instances"][0]["config"]["context_length"] == context
    assert described["key"] == model["id"]


@pytest.mark.parametrize(
    ("path", "field"),
    [(CHAT, "messages"), ("/v1/completions", "prompt"), ("/v1/responses", "input")],
)
def test_options_of_a_stream_need_a_stream(http: httpx.Client, path: str, field: str) -> None:
    body = {field: [user("⟦</think>Yes.⟧")] if field != "prompt" else "⟦Yes.⟧"}
    refused = http.post(path, json=body | {"stream_options": {"include_obfuscation": False}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "stream_options"
    assert http.post(path, json=body | {"stream_options": None}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat/completions", {"messages": [user("⟦</think>Yes.⟧")]}),
        ("/completions", {"prompt": "⟦Yes.⟧"}),
        ("/responses", {"input": "⟦</think>Yes.⟧"}),
    ],
)
def test_paths_without_v1_are_served(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer, again = (http.post(each, json=body) for each in (path, f"/v1{path}"))
    assert answer.status_code == 200
    assert answer.json().keys() == again.json().keys()
    assert http.get("/models").json() == http.get("/v1/models").json()
