"""Smaller routes: models in every API's shape, and unsupported routes."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from live import LiveServer, live_server


def test_lm_studios_model_list_has_state_and_context(http: httpx.Client) -> None:
    (model,) = http.get("/api/v0/models").json()["data"]
    assert model["id"] == "test/tiny"
    assert model["type"] == "llm"
    assert model["arch"] == "glm4_moe_lite"
    assert model["state"] == "loaded"
    assert model["max_context_length"] == model["loaded_context_length"] == 4096
    assert model["quantization"] == "5.5bit"
    assert http.get("/api/v0/models/tiny").json() == model
    assert http.get("/api/v0/models/other").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_lm_studios_completion_paths(http: httpx.Client, stream: bool) -> None:
    """Zed's LM Studio provider uses them, and some clients send `max_tokens: -1`."""
    chat = {"messages": [{"role": "user", "content": "⟦</think>Yes.⟧"}], "max_tokens": -1}
    for path, body in (("chat/completions", chat), ("completions", {"prompt": "⟦Yes.⟧"})):
        response = http.post(f"/api/v0/{path}", json=body | {"stream": stream})
        assert response.status_code == 200, response.text
        assert '"choices"' in response.text


def test_claude_codes_connection_check_needs_no_key() -> None:
    with live_server(api_key="secret", ready=False) as live, live.client() as http:
        assert http.head("/api/hello").status_code == 200
        assert http.get("/api/hello").status_code == 200


def test_while_loading_the_model_is_not_loaded(tmp_path: Path) -> None:
    with live_server(engine="fake_engine", config={"on_load": "wait"}, ready=False) as live:
        live.wait_for("loading")
        with live.client() as http:
            (model,) = http.get("/api/v0/models").json()["data"]
    assert model["state"] == "not-loaded"
    assert model["max_context_length"] is None


def test_models_have_the_fields_of_openai_and_anthropic(http: httpx.Client) -> None:
    models = http.get("/v1/models").json()
    assert models["object"] == "list"
    assert models["has_more"] is False
    assert models["first_id"] == models["last_id"] == "test/tiny"
    (model,) = models["data"]
    assert model["object"] == model["type"] == "model"
    assert model["display_name"] == "tiny"
    assert model["created_at"].endswith("Z")


def test_an_alias_may_stand_for_many_names() -> None:
    with live_server(aliases=("claude-*",)) as live, live.client() as http:
        for name, status in (("claude-sonnet-4-5", 200), ("claude", 404), ("my-claude-x", 404)):
            body = {"model": name, "prompt": "⟦Yes.⟧"}
            assert http.post("/v1/completions", json=body).status_code == status


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/v1/embeddings", "no embeddings"),
        ("/v1/audio/speech", "text only"),
        ("/v1/images/generations", "text only"),
        ("/v1/files", "no files"),
        ("/v1/threads/thread_1/runs", "Responses API"),
        ("/api/chat", "under /v1"),
        ("/api/show", "under /v1"),
        ("/api/v1/chat", "/api/v0"),
        ("/messages", "use /v1/messages"),
        ("/embeddings", "computes no embeddings"),
        ("/v1/v1/messages", "base URL"),
        ("/v1/nothing", "Path /v1/nothing not found."),
    ],
)
def test_unsupported_routes_are_404_with_a_reason(
    scripted: LiveServer, http: httpx.Client, path: str, reason: str
) -> None:
    response = http.post(path, json={})
    assert response.status_code == 404
    message = response.json()["error"]["message"]
    assert path in message
    assert reason in message
