"""An idle engine is unloaded; the next request through HTTP starts it and is answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from live import live_server
from openai import OpenAI


def test_a_request_to_an_unloaded_engine_is_answered_streamed_and_whole() -> None:
    with live_server(idle_unload=0.005) as live, live.client() as http:
        for stream in (False, True):
            live.wait_for("unloaded")
            health = http.get("/health")
            assert (health.status_code, health.json()["status"]) == (200, "unloaded")
            assert http.get("/glmd/status").json()["engine"]["state"] == "unloaded"
            client = OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
            answer: Any = client.chat.completions.create(
                model="default",
                messages=[{"role": "user", "content": "Hi"}],
                stream=stream,
                max_tokens=4,
            )
            last = [chunk for chunk in answer if chunk.choices][-1] if stream else answer
            assert last.choices[0].finish_reason


def test_the_restarted_engine_is_no_failure() -> None:
    with live_server(idle_unload=0.005) as live, live.client() as http:
        live.wait_for("unloaded")
        assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).is_success
        health = http.get("/health").json()
        assert (health["restarts"], health["failure"]) == (0, None)


def test_the_restarted_engine_finds_the_conversation_on_disk(tmp_path: Path) -> None:
    config = {"disk_cache": 1 << 26, "disk_cache_folder": str(tmp_path), "kv_bits": 8}
    with (
        live_server(engine="glmd.engine.core", config=config, idle_unload=0.005) as live,
        live.client() as http,
    ):
        body = {"prompt": "A conversation of many words. " * 20, "max_tokens": 20, "temperature": 0}
        answers = []
        for _ in range(2):
            answers.append(http.post("/v1/completions", json=body).json())
            live.wait_for("unloaded")
        first, second = answers
        assert first["choices"][0]["text"] == second["choices"][0]["text"]
        usage = second["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
        assert http.get("/v1/models").json()["data"][0]["kv_bits"] == 8
        assert http.get("/glmd/status").json()["model"]["kv_bits"] == 8
        assert http.get("/health").json()["kv_bits"] == 8
