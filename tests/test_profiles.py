"""Profiles: selection by a request in every API, and precedence of their values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from live import live_server

pytestmark = pytest.mark.e2e

PROFILES = {
    "cold": {
        "temperature": 0.1,
        "top_k": 7,
        "presence_penalty": 0.5,
        "max_tokens": 900,
        "enable_thinking": False,
        "aliases": ["claude-haiku-*"],
    },
    "deep": {"enable_thinking": True, "clear_thinking": True},
}
ECHO = [{"role": "user", "content": "⟦</think>{request}⟧"}]


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with (
        live_server(profiles=PROFILES, profile="tools", temperature=0.9, aliases=("o:1",)) as live,
        live.client() as client,
    ):
        yield client


def chat(http: httpx.Client, **body: Any) -> dict[str, Any]:
    """Return the request that reached the engine."""
    response = http.post("/v1/chat/completions", json={"messages": ECHO, **body})
    assert response.status_code == 200, response.text
    request: dict[str, Any] = json.loads(response.json()["choices"][0]["message"]["content"])
    return request


def rendered(http: httpx.Client, **body: Any) -> str:
    messages = [{"role": "user", "content": "Hi"}]
    response = http.post("/apply-template", json={"messages": messages, **body})
    prompt: str = response.json()["prompt"]
    return prompt


@pytest.mark.parametrize(
    "body",
    [
        {"model": "default:cold"},
        {"model": "test/tiny:cold"},
        {"model": "tiny:cold"},
        {"model": "o:1:cold"},
        {"profile": "cold"},
        {"model": "tiny:cold", "profile": "cold"},
        {"model": "claude-haiku-4-5"},
    ],
)
def test_model_suffix_field_or_alias_selects_a_profile(
    http: httpx.Client, body: dict[str, str]
) -> None:
    request = chat(http, **body)
    assert request["sampling"]["temperature"] == 0.1
    assert request["sampling"]["top_k"] == 7
    assert request["sampling"]["presence_penalty"] == 0.5
    assert request["max_tokens"] == 900
    assert rendered(http, **body).endswith("</think>")


def test_the_default_profile_overrides_other_settings(http: httpx.Client) -> None:
    for body in ({}, {"model": "o:1"}):
        assert chat(http, **body)["sampling"]["temperature"] == 0.7  # of `tools`
    assert rendered(http).endswith("<think>")


def test_values_that_a_profile_leaves_out_come_from_the_settings(http: httpx.Client) -> None:
    assert chat(http, profile="deep")["sampling"]["temperature"] == 0.9
    assert chat(http, profile="deep")["max_tokens"] is None


def test_the_request_overrides_the_profile(http: httpx.Client) -> None:
    request = chat(http, profile="cold", temperature=0.3, max_tokens=800)
    assert request["sampling"]["temperature"] == 0.3
    assert request["sampling"]["top_k"] == 7
    assert request["max_tokens"] == 800
    assert rendered(http, profile="cold", enable_thinking=True).endswith("<think>")


def test_completions_responses_and_messages_use_profiles(http: httpx.Client) -> None:
    text = http.post(
        "/v1/completions",
        json={"prompt": "⟦{request}⟧", "model": "default:cold", "ignore_eos": False},
    ).json()["choices"][0]["text"]
    assert json.loads(text)["sampling"]["top_k"] == 7
    response = http.post(
        "/v1/responses", json={"input": "⟦</think>Yes⟧", "model": "default:cold"}
    ).json()
    assert response["temperature"] == 0.1
    thinking = {"role": "user", "content": "⟦Hm.</think>Yes⟧"}
    body = {"max_tokens": 900, "messages": [thinking]}
    for name, kinds in (
        ("default", ["text"]),
        ("default:deep", ["thinking", "text"]),
        ("default:cold", ["text"]),
    ):
        answer = http.post("/v1/messages", json={**body, "model": name}).json()
        assert [block["type"] for block in answer["content"]] == kinds
        counted = http.post("/v1/messages/count_tokens", json={**body, "model": name}).json()
        usage = answer["usage"]
        assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (
            {"model": "default:cald"},
            404,
            "Model 'default' has no profile 'cald'; did you mean cold?",
        ),
        ({"model": "other:cold"}, 404, "Model 'other:cold' not found"),
        ({"profile": "genral"}, 400, "profile: unknown profile 'genral'; did you mean general?"),
        ({"model": "tiny:cold", "profile": "deep"}, 400, "profile: 'deep' contradicts 'cold'"),
    ],
)
def test_an_unknown_profile_is_rejected_with_a_suggestion(
    http: httpx.Client, body: dict[str, str], status: int, message: str
) -> None:
    response = http.post("/v1/chat/completions", json={"messages": ECHO, **body})
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_models_list_all_profiles_and_configured_ones_as_models(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == [
        "test/tiny",
        "test/tiny:cold",
        "test/tiny:deep",
    ]
    assert (listed["first_id"], listed["last_id"]) == ("test/tiny", "test/tiny:deep")
    model = listed["data"][0]
    assert model["profile"] == "tools"
    assert set(model["profiles"]) == {"card", "general", "tools", "cold", "deep"}
    assert model["profiles"]["general"] == {
        "temperature": 1.0, "top_k": 0, "top_p": 0.95, "min_p": 0.0
    }  # fmt: skip
    one = http.get("/v1/models/tiny:cold").json()
    assert (one["id"], one["profile"]) == ("test/tiny:cold", "cold")
    assert one["aliases"] == ["claude-haiku-*"]
    assert http.get("/v1/models/tiny:cald").status_code == 404
