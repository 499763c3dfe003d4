"""No body causes a 500, a malformed response or a change of another answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
import sse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import LiveServer, live_server

from glmd.api.anthropic.protocol import MessagesRequest
from glmd.api.openai.protocol import ChatCompletionRequest, CompletionRequest
from glmd.api.responses.protocol import ResponsesRequest
from glmd.api.routes.tokenize import TokenizeChat, TokenizeText

EXAMPLES, BESIDE = 100, 20
"""Examples per route, and beside the canary: about 10 seconds in all."""

JSON = {"content-type": "application/json"}
LAST = {"response.completed", "response.incomplete", "response.failed", "message_stop", "error"}
"""Events that end a stream of named events."""

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "none", "text", "enabled", "user", "tool", "</think>", "𝕏"])
)
keys = st.text(max_size=6) | st.sampled_from(
    ["role", "content", "type", "function", "name", "parameters", "text", "tool_calls", "id"]
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"])},
        optional={
            "content": st.text(max_size=20) | values,
            "reasoning_content": st.text(max_size=20) | scalars,
            "tool_calls": values,
            "tool_call_id": scalars,
        },
    ),
    max_size=4,
)
text = st.text(max_size=20)
plain = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": text}), min_size=1)
few = st.just(8)


def bodies(model: type[Any], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Bodies with some of a request's fields, most of them invalid."""
    names = st.sampled_from([*model.model_fields, "surprise"])
    return st.builds(
        lambda some, given: {**some, **given},
        st.dictionaries(names, values, max_size=3),
        st.fixed_dictionaries({}, optional={"stream": st.booleans(), **fields}),
    )


def mutated(model: type[Any], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Valid bodies, some with one invalid field."""
    names = st.sampled_from([*model.model_fields, "surprise"])
    return st.builds(
        lambda given, some: {**given, **some},
        st.fixed_dictionaries({"stream": st.booleans(), **fields}),
        st.dictionaries(names, values, max_size=1),
    )


ROUTES: dict[str, st.SearchStrategy[Any]] = {
    "/v1/chat/completions": values
    | bodies(ChatCompletionRequest, messages=messages, n=st.integers(1, 3))
    | mutated(ChatCompletionRequest, messages=plain, max_tokens=few),
    "/v1/completions": values
    | bodies(
        CompletionRequest,
        prompt=text | st.lists(st.integers(0, 300), max_size=5),
        n=st.integers(1, 3),
    )
    | mutated(CompletionRequest, prompt=text, max_tokens=few),
    "/v1/responses": values
    | bodies(ResponsesRequest, input=messages | text)
    | mutated(ResponsesRequest, input=plain | text, max_output_tokens=few),
    "/v1/messages": values
    | bodies(MessagesRequest, messages=messages, max_tokens=st.integers(1, 9))
    | mutated(MessagesRequest, messages=plain, max_tokens=few),
    "/tokenize": values
    | bodies(TokenizeChat, messages=messages)
    | mutated(TokenizeText, prompt=text),
}
"""Bodies by route."""


def check_refusal(path: str, response: httpx.Response) -> None:
    """Check that a refusal is one sentence in the shape of the route's API."""
    assert response.status_code in (400, 404, 413), (response.status_code, response.text)
    body = response.json()
    if path == "/v1/messages":
        assert body["type"] == "error"
        assert body["request_id"]
        assert body["error"].keys() <= {"type", "message", "details"}
    else:
        assert list(body) == ["error"]
        assert list(body["error"]) == ["message", "type", "param", "code"]
    sentence = body["error"]["message"]
    assert len(sentence) > 10
    assert "\n" not in sentence


def check(http: httpx.Client, path: str, content: bytes) -> None:
    response = http.post(path, content=content, headers=JSON)
    if response.status_code != 200:
        check_refusal(path, response)
    elif not response.headers["content-type"].startswith("text/event-stream"):
        answer = response.json()
        assert answer.keys() & {"choices", "output", "content", "tokens"}
    elif "completions" in path:
        assert sse.read(response.content).done
    else:
        assert sse.read_named(response.content)[-1]["type"] in LAST


def as_json(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def restarts(scripted: LiveServer) -> int:
    """Restarts of the engine before these tests, caused by tests of other files."""
    return scripted.service.engine.restarts


@pytest.fixture(scope="module")
def http(scripted: LiveServer, restarts: int) -> Iterator[httpx.Client]:
    with scripted.client() as client:
        yield client


@pytest.mark.parametrize("path", ROUTES)
def test_arbitrary_bodies_are_answered_or_refused_in_the_apis_shape(
    http: httpx.Client, path: str
) -> None:
    @settings(max_examples=EXAMPLES)
    @given(body=ROUTES[path])
    def run(body: Any) -> None:
        check(http, path, as_json(body))

    run()


@settings(max_examples=EXAMPLES)
@given(path=st.sampled_from(list(ROUTES)), content=st.binary(max_size=200))
def test_bytes_that_are_not_json_are_refused(http: httpx.Client, path: str, content: bytes) -> None:
    check(http, path, content)


def test_afterwards_the_engine_has_not_restarted(
    scripted: LiveServer, http: httpx.Client, restarts: int
) -> None:
    body = {"messages": [{"role": "user", "content": "⟦Hm.</think>Tweet.⟧"}]}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.json()["choices"][0]["message"]["content"] == "Tweet."
    assert scripted.service.engine.restarts == restarts


def test_arbitrary_requests_do_not_change_a_concurrent_conversation(
    random_checkpoint: Path,
) -> None:
    """On the real engine, requests share steps, KV and the prefix tree."""
    config = {"dtype": "float32", "max_context": 128}
    with (
        live_server(folder=random_checkpoint, engine="glmd.engine.core", config=config) as real,
        real.client() as http,
        real.client() as other,
        ThreadPoolExecutor(1) as pool,
    ):
        enough = Event()
        first = canary(other)

        def sing() -> int:
            songs = 0
            while not enough.is_set():
                assert canary(other) == first
                songs += 1
            return songs

        singing = pool.submit(sing)

        @settings(max_examples=BESIDE, suppress_health_check=list(HealthCheck))
        @given(
            st.sampled_from(list(ROUTES)).flatmap(
                lambda path: st.tuples(st.just(path), ROUTES[path].map(as_json))
            )
        )
        def run(sent: tuple[str, bytes]) -> None:
            check(http, *sent)

        try:
            run()
        finally:
            enough.set()
        assert singing.result(60) > 0
        assert canary(http) == first
        assert real.service.engine.restarts == 0


def canary(http: httpx.Client) -> list[list[int]]:
    """The tokens of a conversation's two answers, sampled with a fixed seed."""
    talk: list[dict[str, Any]] = [{"role": "user", "content": "Sing."}]
    fixed = {"seed": 7, "temperature": 1.0, "max_tokens": 12, "return_token_ids": True}
    said = []
    for _ in range(2):
        response = http.post("/v1/chat/completions", json={"messages": talk, **fixed})
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        said.append(choice["token_ids"])
        talk += [choice["message"], {"role": "user", "content": "Again."}]
    return said
