"""`/v1/chat/completions`: streams, whole answers, parameters and refusals."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import sse
from live import LiveServer, live_server

from glmd.api.openai.protocol import ChatCompletionRequest
from glmd.api.serving import bind_salt

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def ask(http: httpx.Client, script: str, **parameters: Any) -> dict[str, Any]:
    """The whole answer to a request whose answer is `script`."""
    body = {"messages": [user(f"⟦{script}⟧")], **parameters}
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ask_streaming(http: httpx.Client, script: str, **parameters: Any) -> sse.Events:
    body = {"messages": [user(f"⟦{script}⟧")], "stream": True, **parameters}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return sse.read(response.read())


def request_of(answer: dict[str, Any]) -> dict[str, Any]:
    """The engine request, from an answer to `</think>{request}`."""
    request: dict[str, Any] = json.loads(answer["choices"][0]["message"]["content"])
    return request


def text_of(events: sse.Events, field: str = "content", index: int = 0) -> str:
    return "".join(
        choice["delta"].get(field) or ""
        for chunk in events.chunks
        for choice in chunk.get("choices", ())
        if choice["index"] == index
    )


# -- answers ------------------------------------------------------------------------------


def test_a_whole_answer_keeps_reasoning_apart_and_counts_its_tokens(http: httpx.Client) -> None:
    answer = ask(http, "Let me see.</think>It is 4.", model="tiny")
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "It is 4.",
        "refusal": None,
        "reasoning_content": "Let me see.",
    }
    assert choice["finish_reason"] == "stop"
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "test/tiny"
    assert answer["id"].startswith("chatcmpl-")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    details = usage["completion_tokens_details"]
    assert 0 < details["reasoning_tokens"] < usage["completion_tokens"]
    drafted = details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"]
    assert drafted == usage["completion_tokens"]


def test_the_usage_chunk_comes_last_with_no_choices_and_the_others_say_null(
    http: httpx.Client,
) -> None:
    script = "Hm.</think>Yes."
    events = ask_streaming(http, script, stream_options={"include_usage": True})
    *others, last = events.chunks
    assert [chunk["usage"] for chunk in others] == [None] * len(others)
    assert last["choices"] == []
    whole = ask(http, script)["usage"]
    for usage in (whole, last["usage"]):
        del usage["prompt_tokens_details"]  # The second request finds the first one's prefix.
    assert last["usage"] == whole


def test_the_usage_counts_the_prompt_once_and_all_answers(http: httpx.Client) -> None:
    one = ask(http, "</think>Yes.")["usage"]
    three = ask(http, "</think>Yes.", n=3)["usage"]
    assert three["prompt_tokens"] == one["prompt_tokens"]
    assert three["completion_tokens"] == 3 * one["completion_tokens"]


def test_content_beside_nothing_but_calls_is_null(http: httpx.Client) -> None:
    message = ask(http, "</think><tool_call>get_weather</tool_call>", tools=[TOOL])["choices"][0][
        "message"
    ]
    assert message["content"] is None
    assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": "{}"}
    assert message["reasoning_content"] is None


def test_reasoning_content_is_in_every_message_and_delta(http: httpx.Client) -> None:
    script = "Hm.</think>Look.<tool_call>get_weather</tool_call>"
    events = ask_streaming(http, script, tools=[TOOL], return_token_ids=True)
    deltas = [choice["delta"] for chunk in events.chunks for choice in chunk["choices"]]
    assert all("reasoning_content" in delta and "reasoning" not in delta for delta in deltas)
    assert text_of(events, "reasoning_content") == "Hm."
    assert "reasoning" not in ask(http, script)["choices"][0]["message"]


def test_a_setting_adds_the_reasoning_under_its_newer_name() -> None:
    with live_server(reasoning_alias=True) as live, live.client() as http:
        for script, reasoning in (("Hm.</think>Yes.", "Hm."), ("</think>Yes.", None)):
            message = ask(http, script)["choices"][0]["message"]
            assert message["reasoning"] == message["reasoning_content"] == reasoning
            events = ask_streaming(http, script)
            for chunk in events.chunks:
                delta = chunk["choices"][0]["delta"]
                assert delta["reasoning"] == delta["reasoning_content"]
            assert (text_of(events, "reasoning") or None) == reasoning


@pytest.mark.parametrize("off", [{"include_reasoning": False}, {"reasoning": {"exclude": True}}])
def test_the_reasoning_is_left_out_on_request(http: httpx.Client, off: dict[str, Any]) -> None:
    answer = ask(http, "Hm.</think>Yes.", logprobs=True, **off)
    (choice,) = answer["choices"]
    assert (choice["message"]["content"], choice["message"]["reasoning_content"]) == ("Yes.", None)
    assert "reasoning_content" not in choice["logprobs"]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    events = ask_streaming(http, "Hm.</think>Yes.", **off)
    assert (text_of(events), text_of(events, "reasoning_content")) == ("Yes.", "")


def test_a_stop_string_ends_the_answer_and_frees_the_row(
    scripted: LiveServer, http: httpx.Client
) -> None:
    choice = ask(http, "</think>one, two, three{wait}", stop=[", th", "zzz"])["choices"][0]
    assert choice["message"]["content"] == "one, two"
    assert choice["finish_reason"] == "stop"
    scripted.wait_until_idle()


def test_logprobs_have_openais_shape_and_cover_every_token_of_the_content(
    http: httpx.Client,
) -> None:
    choice = ask(http, "Hm.</think>Yes: ä€", logprobs=True, top_logprobs=2)["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == "Yes: ä€"
    for token in tokens:
        assert list(token) == ["token", "bytes", "logprob", "top_logprobs"] or set(token) == {
            "token",
            "bytes",
            "logprob",
            "top_logprobs",
        }
        assert len(token["top_logprobs"]) == 2
        assert set(token["top_logprobs"][0]) == {"token", "bytes", "logprob"}
    assert choice["logprobs"]["refusal"] is None
    assert choice["logprobs"]["reasoning_content"]
    events = ask_streaming(http, "Hm.</think>Yes: ä€", logprobs=True, top_logprobs=2)
    streamed = [
        token
        for chunk in events.chunks
        for token in (chunk["choices"][0]["logprobs"] or {}).get("content") or ()
    ]
    assert streamed == tokens


def test_token_ids_on_request(http: httpx.Client) -> None:
    script = "Hm.</think>Yes."
    answer = ask(http, script, return_token_ids=True)
    prompt = http.post("/apply-template", json={"messages": [user(f"⟦{script}⟧")]}).json()
    assert answer["prompt_token_ids"] == prompt["tokens"]
    ids = answer["choices"][0]["token_ids"]
    assert len(ids) == answer["usage"]["completion_tokens"]
    text = http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert text == script + "<|user|>"
    first, *chunks = ask_streaming(http, script, return_token_ids=True).chunks
    assert first["prompt_token_ids"] == prompt["tokens"]
    streamed = [id for chunk in chunks for id in chunk["choices"][0].get("token_ids", ())]
    assert streamed == ids


def test_progress_on_request(http: httpx.Client) -> None:
    events = ask_streaming(http, "</think>Yes.", return_progress=True)
    progress = [chunk["prompt_progress"] for chunk in events.chunks if "prompt_progress" in chunk]
    assert progress[-1]["processed"] == progress[-1]["total"]


# -- parameters ---------------------------------------------------------------------------


def test_every_sampling_parameter_reaches_the_engine(http: httpx.Client) -> None:
    sampling = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.8,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.5,
        "seed": 42,
    }
    limits = {
        "max_tokens": 900,
        "min_tokens": 3,
        "stop_token_ids": [5],
        "priority": 2,
        "cache_salt": "s",
    }
    answer = ask(http, "</think>{request}", logit_bias={"17": -100}, **sampling, **limits)
    request = request_of(answer)
    assert request["sampling"] == sampling | {"logit_bias": {"17": -100.0}}
    limits["cache_salt"] = bind_salt("", "s")
    assert {name: request[name] for name in limits} == limits


def test_absent_and_null_parameters_are_the_checkpoints(http: httpx.Client) -> None:
    nulls = dict.fromkeys(set(ChatCompletionRequest.model_fields) - {"messages"})
    expected = {"temperature": 0.2, "top_k": 50, "top_p": 0.95, "min_p": 0.01}
    assert request_of(ask(http, "</think>{request}"))["sampling"] == expected
    assert request_of(ask(http, "</think>{request}", **nulls))["sampling"] == expected


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_no_limit_may_be_written_as_minus_one(http: httpx.Client, name: str) -> None:
    assert request_of(ask(http, "</think>{request}", **{name: -1}))["max_tokens"] is None


def test_requests_override_settings() -> None:
    with live_server(temperature=0.9, max_tokens=500) as live, live.client() as http:
        request = request_of(ask(http, "</think>{request}", top_k=-1))
        assert request["sampling"]["temperature"] == 0.9
        assert "top_k" not in request["sampling"]  # 0, which is off, is the message's default.
        assert request["max_tokens"] == 500
        request = request_of(ask(http, "</think>{request}", temperature=0, max_tokens=400))
        assert request["sampling"]["temperature"] == 0
        assert request["max_tokens"] == 400


@pytest.mark.parametrize(
    ("parameters", "thinks"),
    [
        ({}, True),
        ({"enable_thinking": False}, False),
        ({"enable_thinking": None, "thinking": None}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {"enable_thinking": None}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}, "enable_thinking": True}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high"}, True),
    ],
)
def test_every_spelling_of_the_thinking_switch(
    http: httpx.Client, parameters: dict[str, Any], thinks: bool
) -> None:
    body = {"messages": [user("Hi")], **parameters}
    prompt = http.post("/apply-template", json=body).json()["prompt"]
    assert prompt.endswith("<|assistant|><think>" if thinks else "<|assistant|></think>")


@pytest.mark.parametrize(
    "parameters",
    [
        {"clear_thinking": True},
        {"thinking": {"clear_thinking": True}},
        {"chat_template_kwargs": {"clear_thinking": True}},
    ],
)
def test_clear_thinking_drops_earlier_reasoning(
    http: httpx.Client, parameters: dict[str, Any]
) -> None:
    messages = [
        user("Hi"),
        {"role": "assistant", "content": "Hello.", "reasoning_content": "A greeting."},
        user("Bye"),
    ]
    kept = http.post("/apply-template", json={"messages": messages}).json()["prompt"]
    cleared = http.post("/apply-template", json={"messages": messages} | parameters)
    assert "A greeting." in kept
    assert "A greeting." not in cleared.json()["prompt"]


@pytest.mark.parametrize(
    ("parameters", "budget"),
    [
        ({}, None),
        ({"thinking_budget": 7}, 7),
        ({"thinking": {"type": "enabled", "budget_tokens": 8}}, 8),
        ({"reasoning_effort": "minimal"}, 512),
        ({"reasoning_effort": "low"}, 1024),
        ({"reasoning_effort": "medium"}, 8192),
        ({"reasoning_effort": "high"}, 24576),
        ({"reasoning_effort": "low", "thinking_budget": 9}, 9),
        ({"reasoning_effort": "max"}, None),
        ({"enable_thinking": False, "reasoning_effort": "low"}, None),
    ],
)
def test_the_thinking_budget_reaches_the_engine(
    http: httpx.Client, parameters: dict[str, Any], budget: int | None
) -> None:
    close = "" if parameters.get("enable_thinking") is False else "</think>"
    request = request_of(ask(http, close + "{request}", **parameters))
    assert request["thinking_budget"] == budget


def test_thinking_and_its_budgets_are_settings() -> None:
    budgets = {"low": 2048, "max": 9}
    with live_server(enable_thinking=False, effort_budgets=budgets) as live, live.client() as http:
        for effort, budget in (("low", 2048), ("medium", 8192), ("max", 9), ("xhigh", None)):
            request = request_of(ask(http, "</think>{request}", reasoning_effort=effort))
            assert request["thinking_budget"] == budget
        body: dict[str, Any] = {"messages": [user("Hi")]}
        assert http.post("/apply-template", json=body).json()["prompt"].endswith("</think>")
        body = body | {"enable_thinking": True}
        assert http.post("/apply-template", json=body).json()["prompt"].endswith("<think>")


def test_unknown_parameters_are_named_in_a_header(http: httpx.Client) -> None:
    body = {
        "messages": [user("⟦</think>Yes.⟧")],
        "tempratur": 1,
        "né\r\nx": 2,
        "": 3,
        "unset": None,
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "flex",
    }
    for stream in (False, True):
        response = http.post("/v1/chat/completions", json=body | {"stream": stream})
        assert response.headers["x-glmd-ignored-parameters"] == 'tempratur, n%C3%A9%0D%0Ax, ""'
    assert (
        "x-glmd-ignored-parameters"
        not in http.post(
            "/v1/chat/completions", json={"messages": [user("⟦</think>Yes.⟧")], "user": "me"}
        ).headers
    )


def test_unsupported_parameters_may_be_empty_or_false(http: httpx.Client) -> None:
    """Some front ends send every parameter that they know."""
    off = {
        "use_beam_search": False,
        "logits_processors": [],
        "grammar": "",
        "functions": [],
        "prompt_logprobs": False,
        "logit_bias": [],
        "stop": [],
        "tools": [],
        "stream_options": {},
        "chat_template_kwargs": {},
    }
    response = http.post("/v1/chat/completions", json={"messages": [user("⟦</think>Yes.⟧")]} | off)
    assert response.status_code == 200, response.text
    assert "x-glmd-ignored-parameters" not in response.headers


# -- refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [user("Hi"), {"role": "user", "content": 7}]}, "messages[1].content"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
                ]
            },
            "messages[0].content[0]",
        ),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 1e999}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": "two"}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"17": 101}}, "logit_bias.17"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": "all"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
            "tool_choice",
        ),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy"}}, "audio"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"guided_json": 3}, "guided_json"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"reasoning_effort": "heroic"}, "reasoning_effort"),
        ({"enable_thinking": "true"}, "enable_thinking"),
        ({"chat_template_kwargs": {"enable_thinking": 1}}, "chat_template_kwargs.enable_thinking"),
        ({"enable_thinking": True, "thinking": {"type": "disabled"}}, "thinking.type"),
        ({"enable_thinking": True, "reasoning_effort": "none"}, "reasoning_effort"),
        (
            {"clear_thinking": True, "chat_template_kwargs": {"clear_thinking": False}},
            "chat_template_kwargs.clear_thinking",
        ),
        ({"thinking": {"type": "auto"}}, "thinking.type"),
        ({"enable_thinking": True, "think": False}, "think"),
        ({"enable_thinking": True, "reasoning": {"enabled": False}}, "reasoning.enabled"),
        ({"enable_thinking": True, "reasoning": {"effort": "none"}}, "reasoning_effort"),
        ({"include_reasoning": True, "reasoning": {"exclude": True}}, "reasoning.exclude"),
        ({"reasoning_effort": "low", "think": "high"}, "think"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repeat_penalty"),
        ({"thinking_budget": 5, "thinking_token_budget": 6}, "thinking_token_budget"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [{"name": "f"}]}}},
            "tool_choice",
        ),
        ({"thinking_budget": -1}, "thinking_budget"),
        ({"thinking_budget": 5, "thinking": {"budget_tokens": 6}}, "thinking.budget_tokens"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
    ],
)
def test_an_invalid_field_is_400_and_named(
    http: httpx.Client, body: dict[str, Any], param: str
) -> None:
    text = json.dumps({"messages": [user("Hi")]} | body).replace("Infinity", "1e999")
    response = http.post(
        "/v1/chat/completions", content=text, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.rpartition(".")[2].rpartition("[")[0] in error["message"]


def test_infinite_numbers_do_not_reach_the_prompt(http: httpx.Client) -> None:
    function = {"name": "f", "parameters": {"properties": {"x": {"maximum": 1e999}}}}
    json_type = {"content-type": "application/json"}
    tools = {"messages": [user("Hi")], "tools": [{"type": "function", "function": function}]}
    text = json.dumps(tools).replace("Infinity", "1e999")
    refused = http.post("/v1/chat/completions", content=text, headers=json_type)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == "messages"
    for arguments in ('{"x": 1e999}', {"x": 1e999}):
        call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
        told = {"messages": [user("Hi"), {"role": "assistant", "tool_calls": [call]}, user("?")]}
        text = json.dumps(told).replace("Infinity", "1e999")
        shown = http.post("/apply-template", content=text, headers=json_type)
        assert shown.status_code == 200, shown.text
        assert "<tool_call>f<arg_key>arguments</arg_key>" in shown.json()["prompt"]


def test_an_unknown_model_is_404(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json={"model": "gpt-5", "messages": [user("Hi")]})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


# -- the client's and the engine's absence --------------------------------------------------


def test_comments_keep_a_silent_stream_open(http: httpx.Client) -> None:
    body = {"messages": [user("⟦</think>Wait…{wait}⟧")], "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        received = b""
        for piece in response.iter_raw():
            received += piece
            if received.count(b": keep-alive\n\n") == 2:
                break
    events = sse.read(received)
    assert text_of(events) == "Wait…"


@pytest.mark.parametrize("script", ["{wait}", "Hm{wait}", "</think>Yes{wait}"])
def test_disconnecting_from_a_stream_frees_its_row(
    scripted: LiveServer, http: httpx.Client, script: str
) -> None:
    scripted.wait_until_idle()
    body = {"messages": [user(f"⟦{script}⟧")], "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        pieces = response.iter_raw()
        next(pieces)
        assert scripted.service.engine.in_flight == 1
    scripted.wait_until_idle()


def test_disconnecting_from_a_whole_answer_frees_its_row(
    scripted: LiveServer, http: httpx.Client
) -> None:
    body = {"messages": [user("⟦Hm{wait}⟧")]}
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json=body, timeout=0.5)
    scripted.wait_until_idle()


def test_an_engine_that_fails_mid_stream_is_an_error_event_and_the_next_request_works() -> None:
    with live_server() as live, live.client() as http, ThreadPoolExecutor() as pool:
        waiting = pool.submit(ask_streaming, http, "</think>I wait{wait}")
        whole = pool.submit(
            http.post, "/v1/chat/completions", json={"messages": [user("⟦Hm{wait}⟧")]}
        )
        while live.service.engine.in_flight < 2:
            time.sleep(0.01)
        failed = ask_streaming(http, "</think>So far{raise}")
        for events, text in ((failed, "So far"), (waiting.result(), "I wait")):
            *chunks, last = events.chunks
            assert not events.done
            assert last["error"]["type"] == "server_error"
            assert last["error"]["code"] == "engine_unavailable"
            assert text.startswith(text_of(sse.Events(chunks)))
        assert text_of(failed) == "So far"
        assert whole.result().status_code == 503
        live.wait_for("ready")
        answer = ask(http, "</think>Back.")
        assert answer["choices"][0]["message"]["content"] == "Back."
        assert http.get("/health").json()["restarts"] == 1


def test_at_shutdown_streams_get_the_drain_timeout_and_then_an_error_event() -> None:
    with ThreadPoolExecutor() as pool, httpx.Client(timeout=30) as http:
        with live_server(drain_timeout=1.5) as live:
            http.base_url = live.url
            stream = pool.submit(ask_streaming, http, "</think>On and on{wait}")
            while not live.service.engine.in_flight:
                time.sleep(0.01)
        events = stream.result()
    assert events.chunks[-1]["error"]["message"] == "The server is shutting down."
