"""Promises of all three chat APIs: thinking, tools, streams, structure and several answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
from chat_apis import CHAT_APIS, CLOSING, Answer, Ask, Finish
from grammars import validate
from live import LiveServer, live_server
from schemas import INTEGER, SHORT, obj

WEATHER = {
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>{}</arg_value></tool_call>"
CALLS = CALL.format(" São\n Paulo ") + CALL.format("Rome")
CITIES = [("get_weather", {"city": " São\n Paulo "}), ("get_weather", {"city": "Rome"})]
CHOICES = (None, "auto", "none", "required", "named")
"""Tool choices. None: no tools."""

MATRIX = [
    (api, thinking, choice, structured, n)
    for api, thinking, choice, structured, n in product(
        CHAT_APIS, (False, True), CHOICES, (False, True), (1, 3)
    )
    if n == 1 or api == "chat"
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("api", "thinking", "choice", "structured", "n"), MATRIX)
def test_every_combination_of_features_is_answered_alike(
    http: httpx.Client,
    api: str,
    thinking: bool,
    choice: Any,
    structured: bool,
    n: int,
    stream: bool,
) -> None:
    """The scripted engine writes the request that reached it, then two calls if there are tools."""
    reasoning = "I look: ä€😀." if thinking else ""
    script = f"{reasoning}</think>" if thinking else ""
    script += "{request}" + (CALLS if choice else "")
    ask = Ask(
        f"⟦{script}⟧",
        thinking=thinking,
        function=WEATHER if choice else None,
        choice=choice or "auto",
        schema=obj({"name": SHORT}) if structured else None,
        n=n,
    )
    answers = CHAT_APIS[api].ask(http, ask, stream=stream)
    calls = CITIES if choice in ("auto", "required", "named") else []
    assert len(answers) == n
    for answer in answers:
        finish: Finish = "tool_calls" if calls else "stop"
        assert answer == Answer(reasoning, answers[0].content, calls, finish)
    request = json.loads(answers[0].content)
    assert request["n"] == n
    assert request["max_tokens"] == ask.max_tokens
    assert request["thinking_budget"] is None
    is_constrained = structured or choice in ("required", "named")
    assert (request["grammar"] is not None) == is_constrained


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", CHAT_APIS)
def test_without_parallel_calls_the_answer_ends_after_the_first_call(
    scripted: LiveServer, http: httpx.Client, api: str, stream: bool
) -> None:
    text = f"⟦I look.</think>One moment.{CALLS}{{wait}}⟧"
    ask = Ask(text, thinking=True, function=WEATHER, parallel=False)
    (answer,) = CHAT_APIS[api].ask(http, ask, stream=stream)
    assert answer == Answer("I look.", "One moment.", CITIES[:1], "tool_calls")
    scripted.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", CHAT_APIS)
def test_an_answer_ends_at_its_limit_even_in_its_reasoning(
    http: httpx.Client, api: str, stream: bool
) -> None:
    ask = Ask("⟦Let me see, let me see.⟧", thinking=True, max_tokens=4)
    (answer,) = CHAT_APIS[api].ask(http, ask, stream=stream)
    assert answer.finish == "length"
    assert answer.content == ""
    assert answer.reasoning
    assert "Let me see, let me see.".startswith(answer.reasoning)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", CHAT_APIS)
def test_refusals_of_the_engine_keep_their_status(
    http: httpx.Client, api: str, stream: bool
) -> None:
    spelling = CHAT_APIS[api]
    body = spelling.body(Ask("⟦{refuse}⟧")) | {"stream": stream}
    assert http.post(spelling.path, json=body).status_code == 400
    body = spelling.body(Ask("⟦{busy}⟧")) | {"stream": stream}
    response = http.post(spelling.path, json=body)
    assert response.status_code == spelling.overloaded
    assert response.json()["error"]["type"] == "overloaded_error"
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", CHAT_APIS)
def test_a_prompt_over_the_context_is_400_with_both_numbers(
    http: httpx.Client, api: str, stream: bool
) -> None:
    """Claude Code shortens its conversation when it reads these words, other clients by code."""
    spelling = CHAT_APIS[api]
    response = http.post(spelling.path, json=spelling.body(Ask("1 " * 5000)) | {"stream": stream})
    assert response.status_code == 400
    error = response.json()["error"]
    assert "prompt is too long" in error["message"]
    assert "> 4096 maximum" in error["message"]
    code = error["details"]["error_code"] if api == "messages" else error["code"]
    assert code == "context_length_exceeded"


# -- the same over the real engine, with random weights -----------------------------------

SEARCH: dict[str, Any] = {"name": "search", "parameters": obj({"query": SHORT, "limit": INTEGER})}
SCHEMA = obj({"name": SHORT, "size": INTEGER})


@pytest.fixture(scope="module")
def real(random_checkpoint: Path) -> Iterator[LiveServer]:
    config = {"mtp": 1}
    with live_server(folder=random_checkpoint, engine="glmd.engine.core", config=config) as live:
        yield live


@pytest.mark.parametrize(
    ("choice", "structured"), [("required", False), ("named", True), (None, True)]
)
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("api", CHAT_APIS)
def test_structure_and_calls_are_valid_streamed_or_not(
    real: LiveServer, api: str, thinking: bool, choice: Any, structured: bool
) -> None:
    ask = Ask(
        "Say something in form.",
        thinking=thinking,
        function=SEARCH if choice else None,
        choice=choice or "auto",
        schema=SCHEMA if structured else None,
        n=2 if api == "chat" else 1,
        fields={"logit_bias": CLOSING, "temperature": 1, "seed": 3},
    )
    with real.client() as http:
        whole, streamed = (CHAT_APIS[api].ask(http, ask, stream=stream) for stream in (False, True))
    assert streamed == whole
    assert len(whole) == ask.n
    for answer in whole:
        if choice:
            assert answer.finish == "tool_calls"
            assert not answer.content
            for name, arguments in answer.calls:
                assert name == "search"
                validate(json.dumps(arguments), SEARCH["parameters"])
        else:
            assert answer.finish == "stop"
            assert not answer.calls
            validate(answer.content, SCHEMA)
        assert thinking or not answer.reasoning
