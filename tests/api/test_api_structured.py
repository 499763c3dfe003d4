"""Structured output over the real engine, with random weights and drafts."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import anthropic
import httpx
import openai
import pytest
import sse
from chat_apis import CLOSING
from grammars import CONTROLS, validate
from live import LiveServer, live_server
from pydantic import BaseModel, Field
from schemas import INTEGER, SHORT, obj

MESSAGES: list[Any] = [{"role": "user", "content": "Say something in form."}]

SCHEMA = obj({"name": SHORT, "size": INTEGER, "parts": {"type": "array", "items": SHORT}})

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "search", "parameters": obj({"query": SHORT, "limit": INTEGER})},
}


def is_valid(text: str) -> bool:
    validate(text, SCHEMA)
    return True


def is_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)


FORMS: dict[str, tuple[dict[str, Any], Callable[[str], object]]] = {
    "json_object": (
        {"response_format": {"type": "json_object"}, "logit_bias": CLOSING | {"125": 12}},
        is_object,
    ),
    "json_schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
            }
        },
        is_valid,
    ),
    "json_schema, not strict": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": SCHEMA | {"not": {}}},
            }
        },
        is_valid,
    ),
    "guided_json": ({"guided_json": SCHEMA}, is_valid),
    "guided_regex": ({"guided_regex": "[ab]{7}"}, re.compile("[ab]{7}").fullmatch),
    "guided_choice": ({"guided_choice": ["left", "right"]}, ["left", "right"].__contains__),
    "guided_grammar": ({"guided_grammar": 'root ::= "x" "y"'}, ["xy"].__contains__),
    "structured_outputs.json": ({"structured_outputs": {"json": SCHEMA}}, is_valid),
    "structured_outputs.regex": (
        {"structured_outputs": {"regex": "[ab]{7}"}},
        re.compile("[ab]{7}").fullmatch,
    ),
    "structured_outputs.choice": (
        {"structured_outputs": {"choice": ["left", "right"]}},
        ["left", "right"].__contains__,
    ),
    "structured_outputs.grammar": (
        {"structured_outputs": {"grammar": 'start: "x" "y"'}},
        ["xy"].__contains__,
    ),
}
"""Fields that require a format, and a check of the format."""


class Part(BaseModel):
    label: str = Field(max_length=9)
    weight: float | None


class Machine(BaseModel):
    kind: Literal["lathe", "mill"]
    year: int = Field(ge=1900, le=2100)
    parts: list[Part] = Field(max_length=2)


class Plain(BaseModel):
    kind: Literal["lathe", "mill"]
    year: int
    spare: bool | None


@pytest.fixture(scope="module")
def real(random_checkpoint: Path) -> Iterator[LiveServer]:
    config = {"mtp": 1}
    with live_server(folder=random_checkpoint, engine="glmd.engine.core", config=config) as live:
        yield live


@pytest.fixture
def http(real: LiveServer) -> Iterator[httpx.Client]:
    with real.client() as client:
        yield client


@pytest.fixture
def client(real: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(http: httpx.Client, path: str = "/v1/chat/completions", **fields: Any) -> dict[str, Any]:
    body = {"messages": MESSAGES, "max_tokens": 1000, "logit_bias": CLOSING, "temperature": 1}
    if path == "/v1/chat/completions":
        body["enable_thinking"] = False
    response = http.post(path, json=body | fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(http: httpx.Client, **fields: Any) -> tuple[str, str]:
    """Content and finish reason of a streamed answer."""
    body = {"messages": MESSAGES, "max_tokens": 1000, "logit_bias": CLOSING, "temperature": 1}
    body |= {"stream": True} | fields
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        choices = [c for chunk in sse.read(response.read()).chunks for c in chunk["choices"]]
    assert choices[-1]["finish_reason"] is not None
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return text, choices[-1]["finish_reason"]


def content_of(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    content: str = choice["message"]["content"]
    return content


def test_text_completions_are_constrained(http: httpx.Client) -> None:
    answer = ask(http, "/v1/completions", prompt="Say it: ", guided_regex="[0-9]{4}")
    assert answer["choices"][0]["text"].isdecimal()
    assert len(answer["choices"][0]["text"]) == 4


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_follows_its_format_streamed_or_not(http: httpx.Client, form: str) -> None:
    """After reasoning, which a budget ends, and with drafts."""
    fields, right = FORMS[form]
    asked = fields | {"seed": 3, "enable_thinking": True, "thinking_budget": 20}
    text, reason = stream(http, **asked)
    assert reason == "stop"
    assert right(text), text
    assert content_of(ask(http, **asked)) == text


@pytest.mark.parametrize("streamed", [False, True])
def test_a_truncated_answer_ends_with_length_in_every_api(
    http: httpx.Client, streamed: bool
) -> None:
    schema = obj({"text": {"type": "string", "minLength": 500}})
    body = {"messages": MESSAGES, "max_tokens": 40, "stream": streamed}
    form = {"type": "json_schema", "schema": schema}

    def told(path: str, **fields: Any) -> str:
        response = http.post(path, json=body | fields)
        assert response.status_code == 200, response.text
        return response.text

    chat = told("/v1/chat/completions", guided_json=schema, enable_thinking=False)
    assert '"finish_reason":"length"' in chat
    raw = told("/v1/completions", guided_json=schema, prompt="x", messages=None)
    assert '"finish_reason":"length"' in raw
    responses = told(
        "/v1/responses", text={"format": {**form, "name": "n"}}, input="x",
        messages=None, max_tokens=None, max_output_tokens=40,
    )  # fmt: skip
    assert '"incomplete_details":{"reason":"max_output_tokens"}' in responses
    assert '"stop_reason":"max_tokens"' in told("/v1/messages", output_config={"format": form})


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "search"}}]
)
@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_are_made_and_valid(http: httpx.Client, choice: Any, parallel: bool) -> None:
    answer = ask(http, tools=[TOOL], tool_choice=choice, parallel_tool_calls=parallel)
    message = answer["choices"][0]["message"]
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert not message["content"]
    assert parallel or len(message["tool_calls"]) == 1
    for call in message["tool_calls"]:
        assert call["function"]["name"] == "search"
        validate(call["function"]["arguments"], TOOL["function"]["parameters"])


def test_the_openai_client_parses_pydantic_models_streamed_or_not(client: openai.OpenAI) -> None:
    options: Any = {
        "model": "default",
        "messages": MESSAGES,
        "response_format": Machine,
        "logit_bias": CLOSING,
    }
    parsed = client.chat.completions.parse(**options).choices[0].message.parsed
    assert isinstance(parsed, Machine)
    with client.chat.completions.stream(**options) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(final, Machine)


def test_the_responses_api_parses_pydantic_models(client: openai.OpenAI) -> None:
    response = client.responses.parse(
        model="default",
        input="Name a machine.",
        text_format=Machine,
        extra_body={"logit_bias": CLOSING, "temperature": 1},
    )
    assert isinstance(response.output_parsed, Machine)
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == "json_schema"
    with client.responses.stream(
        model="default",
        input="Name a machine.",
        text_format=Machine,
        extra_body={"logit_bias": CLOSING, "temperature": 1},
    ) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_response().output_parsed, Machine)


def test_the_anthropic_client_parses_pydantic_models_streamed_or_not(real: LiveServer) -> None:
    client = anthropic.Anthropic(base_url=real.url, api_key="none", max_retries=0)
    options: Any = {
        "model": "default",
        "max_tokens": 1000,
        "messages": MESSAGES,
        "output_format": Plain,  # the SDK itself takes bounds and lengths out of schemas
        "extra_body": {"logit_bias": CLOSING, "temperature": 1},
    }
    assert isinstance(client.messages.parse(**options).parsed_output, Plain)
    with client.beta.messages.stream(**options) as stream:
        assert isinstance(stream.get_final_message().parsed_output, Plain)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": obj({"a": {"not": {}}})}, "guided_json.properties.a.not"),
        ({"guided_regex": "(?=x)y"}, "guided_regex"),
        ({"guided_grammar": "start: nope"}, "guided_grammar"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"uniqueItems": True}, "strict": True},
                }
            },
            "response_format.json_schema.schema.uniqueItems",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "strict": True,
                            "parameters": {"if": {}, "then": {}},
                        },
                    }
                ]
            },
            "tools[0].function.parameters.if",
        ),
        (
            {
                "messages": [*MESSAGES, {"role": "assistant", "content": "{"}],
                "continue_final_message": True,
                "guided_json": SCHEMA,
            },
            "messages",
        ),
    ],
)
def test_a_keyword_that_cannot_be_enforced_is_400_and_named(
    http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    body = {"messages": MESSAGES, **fields}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_other_schemas_are_enforced_as_far_as_possible(http: httpx.Client) -> None:
    schema = obj({"tags": {"type": "array", "items": SHORT, "maxItems": 2, "uniqueItems": True}})
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    del (relaxed := json.loads(json.dumps(schema)))["properties"]["tags"]["uniqueItems"]
    validate(content_of(ask(http, response_format=form)), relaxed)


PATHOLOGICAL: list[tuple[dict[str, Any], str]] = [
    (
        {"guided_json": {"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]}},
        "to compile",
    ),
    ({"guided_json": {"enum": list(range(20_000))}}, "more than 10000 values"),
    ({"guided_json": obj({f"p{i}": {} for i in range(2000)})}, "more than 1000 properties"),
    ({"guided_json": json.loads('{"items":' * 70 + "{}" + "}" * 70)}, "more than 64 deep"),
    ({"guided_choice": ["a" * 2_000_000]}, "larger than 1 MiB"),
]
"""Formats beyond a limit, and words of their refusals."""


def test_formats_beyond_the_limits_are_400_and_stall_no_stream(
    real: LiveServer, http: httpx.Client
) -> None:
    """A concurrent stream gives the same answer as alone."""
    silent = {str(id): -100 for id in CONTROLS.values()}
    sampling = {"temperature": 1, "seed": 1, "logit_bias": silent}
    body: dict[str, Any] = {"messages": MESSAGES, **sampling}
    singing, stop = threading.Event(), threading.Event()
    heard: list[str] = []

    def listen() -> None:
        request = body | {"stream": True, "max_tokens": 3500}
        with real.client() as own, own.stream("POST", "/v1/chat/completions", json=request) as sung:
            for line in sung.iter_lines():
                if stop.is_set():
                    return
                if line.startswith("data: {"):
                    delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
                    heard.append(delta.get("reasoning_content") or "")
                    singing.set()

    with ThreadPoolExecutor(1) as pool:
        listening = pool.submit(listen)
        try:
            assert singing.wait(30)
            for number, (fields, words) in enumerate(PATHOLOGICAL):
                before = len(heard)
                response = http.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})
                assert response.status_code == 400, str(fields)[:99]
                error = response.json()["error"]
                assert words in error["message"]
                assert error["param"].startswith(next(iter(fields)))
                if number == 0:  # the only one that takes its time
                    assert len(heard) > before, "the canary waited"
        finally:
            stop.set()
        listening.result()
    alone = ask(http, **body, max_tokens=300, enable_thinking=True)
    expected = alone["choices"][0]["message"]["reasoning_content"][:-4]  # may end within a letter
    common = min(len(expected), len("".join(heard)))
    assert common > 50
    assert "".join(heard)[:common] == expected[:common]
