"""`/v1/completions`, `/tokenize`, `/detokenize` and `/apply-template`."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import sse
from live import LiveServer


def complete(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json={"max_tokens": 100} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_text_is_continued_without_a_template(http: httpx.Client) -> None:
    answer = complete(http, prompt="Say ⟦on and on⟧")
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": "on and on", "logprobs": None, "finish_reason": "stop"}
    prompt = http.post("/tokenize", json={"prompt": "Say ⟦on and on⟧"}).json()
    assert answer["usage"]["prompt_tokens"] == prompt["count"]


def test_tags_in_a_raw_prompt_are_tags_and_in_a_raw_answer_text(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"prompt": "<|user|>⟦a</think>b⟧"}).json()["tokens"]
    assert http.post("/tokenize", json={"prompt": "<|user|>"}).json()["tokens"] == tokens[:1]
    assert complete(http, prompt=tokens)["choices"][0]["text"] == "a</think>b"


def test_max_tokens_defaults_to_16(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": f"⟦{'1' * 50}⟧"}).json()
    assert response["usage"]["completion_tokens"] == 16
    assert response["choices"][0]["finish_reason"] == "length"


def test_several_prompts_with_several_answers_come_in_order(http: httpx.Client) -> None:
    body = {"prompt": ["⟦one⟧", "⟦two⟧", "⟦three⟧"], "n": 2}
    answer = complete(http, **body)
    texts = ["one", "one", "two", "two", "three", "three"]
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        events = sse.read(response.read())
    streamed = [""] * 6
    finishes: list[str | None] = [None] * 6
    for chunk in events.chunks:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
            finishes[choice["index"]] = choice["finish_reason"]
    assert streamed == texts
    assert finishes == ["stop"] * 6
    assert events.done


def test_echo_begins_the_answer_with_the_prompt(http: httpx.Client) -> None:
    assert complete(http, prompt="Say ⟦on⟧", echo=True)["choices"][0]["text"] == "Say ⟦on⟧on"


def test_a_stop_string_is_cut_off(scripted: LiveServer, http: httpx.Client) -> None:
    choice = complete(http, prompt="⟦one, two, three{wait}⟧", stop=", th")["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one, two", "stop")
    scripted.wait_until_idle()


def test_logprobs_have_the_completions_shape(http: httpx.Client) -> None:
    choice = complete(http, prompt="⟦Yes: 12⟧", logprobs=2)["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"] == "Yes: 12"
    assert set(logprobs["token_logprobs"]) == {-0.25}
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert top[token] == -0.25  # that of the chosen one, likely or not
        assert len(top) <= 3
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    body = {"prompt": "⟦Yes: 12⟧", "logprobs": 2, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        chunks = sse.read(response.read()).chunks
    streamed = [
        offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]
    ]
    assert streamed == logprobs["text_offset"]


@pytest.mark.parametrize("stop", [None, "!!"])
def test_logprobs_have_the_offset_of_each_token(http: httpx.Client, stop: str | None) -> None:
    """Also within a character, and where text is held back for a stop string."""
    body = {"prompt": "⟦a€!b! !!c⟧", "logprobs": 0, "stop": stop}
    choice = complete(http, **body)["choices"][0]
    logprobs = choice["logprobs"]
    euro = logprobs["tokens"][1:4]
    assert euro == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert logprobs["text_offset"][:5] == [0, 1, 1, 1, 2]
    for token, offset in zip(logprobs["tokens"][4:], logprobs["text_offset"][4:], strict=True):
        assert choice["text"][offset:].startswith(token)


def test_token_ids_on_request(http: httpx.Client) -> None:
    prompts = [[5, 6, 7], [5, 6]]
    answer = complete(http, prompt=prompts, return_token_ids=True)
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == prompts
    ids = [choice["token_ids"] for choice in answer["choices"]]
    body = {"prompt": prompts, "return_token_ids": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        chunks = sse.read(response.read()).chunks
    streamed: list[list[int]] = [[], []]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["token_ids"]
    assert streamed == ids


def test_the_usage_of_a_stream_on_request(http: httpx.Client) -> None:
    body = {
        "prompt": ["⟦one⟧", "⟦two⟧"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with http.stream("POST", "/v1/completions", json=body) as response:
        *others, last = sse.read(response.read()).chunks
    assert all(chunk["usage"] is None for chunk in others)
    assert last["choices"] == []
    assert (
        last["usage"]["completion_tokens"]
        == complete(http, prompt=body["prompt"])["usage"]["completion_tokens"]
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, -1]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ],
)
def test_an_invalid_field_is_400_and_named(
    http: httpx.Client, body: dict[str, Any], param: str
) -> None:
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_an_error_of_one_prompt_ends_the_others(scripted: LiveServer, http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": ["⟦a{wait}⟧", "⟦{busy}⟧"]})
    assert response.status_code == 503
    scripted.wait_until_idle()


TEXTS = ["Hello there", "ä€😀 <|user|> x</think>", "\n\t  {}"]


@pytest.mark.parametrize("text", TEXTS)
def test_detokenize_undoes_tokenize(http: httpx.Client, text: str) -> None:
    body = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == 4096
    assert http.post("/tokenize", json={"content": text}).json()["tokens"] == body["tokens"]
    undone = http.post("/detokenize", json={"tokens": body["tokens"]}).json()
    assert undone == {"prompt": text, "content": text}


def test_a_conversation_is_tokenised_as_the_model_reads_it(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Hi <|user|>"}]}
    rendered = http.post("/apply-template", json=body).json()
    assert rendered["prompt"] == "[gMASK]<sop><|user|>Hi <|user|><|assistant|><think>"
    tokens = http.post("/tokenize", json=body).json()["tokens"]
    assert tokens == rendered["tokens"]
    retokenised = http.post("/tokenize", json={"prompt": rendered["prompt"]}).json()["tokens"]
    assert retokenised != tokens  # The user's text is text, whatever it spells.


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"messages": "Hi"}, "messages"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {"tokens": [1, "a"]}, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/apply-template", {"prompt": "Hi"}, "messages"),
    ],
)
def test_an_invalid_field_of_a_tokenizer_route_is_named(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "Hi"}),
        ("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/detokenize", {"tokens": [5]}),
        ("/apply-template", {"messages": [{"role": "user", "content": "Hi"}]}),
    ],
)
def test_unknown_parameters_of_tokenizer_routes_are_named(
    http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    """For example llama.cpp's and vLLM's switches."""
    response = http.post(path, json=body | {"add_special": False, "with_pieces": None})
    assert response.status_code == 200, response.text
    assert response.headers["x-glmd-ignored-parameters"] == "add_special"
    assert "x-glmd-ignored-parameters" not in http.post(path, json=body).headers


def test_every_route_is_in_the_openapi_document(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert set(document["paths"]) >= {
        "/livez",
        "/health",
        "/v1/models",
        "/v1/models/{id}",
        "/v1/chat/completions",
        "/v1/completions",
        "/tokenize",
        "/detokenize",
        "/apply-template",
        "/v1/responses",
        "/v1/responses/{id}",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/api/v0/models",
    }
    for reference in set(_references(document)):
        place = document
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]
    json.dumps(document, allow_nan=False)


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [each for child in value.values() for each in _references(child)]
    if isinstance(value, list):
        return [each for child in value for each in _references(child)]
    return []
