"""A returning turn of the Responses and Messages APIs is found in the cache.

Over the real engine, with random weights: the generated tokens are cached, and their text would not
be tokenized to the same tokens again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import LiveServer, live_server

TURNS = 4

SLACK = 4
"""Tokens that a returning turn may compute: its last token, which has no KV, the end of the turn,
and the prompt's last token."""


@pytest.fixture(scope="module")
def real(random_checkpoint: Path) -> Iterator[LiveServer]:
    with live_server(folder=random_checkpoint, engine="glmd.engine.core") as live:
        yield live


@pytest.fixture
def http(real: LiveServer) -> Iterator[httpx.Client]:
    with real.client() as client:
        yield client


@pytest.fixture
def text_only(real: LiveServer) -> dict[str, float]:
    """Biases against tags, which the client would not see in the noise."""
    return {str(id): -100 for id in real.service.tokenizer.controls.values()}


def post(http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("dropped", [(), ("thinking",)], ids=["whole", "without thinking"])
def test_anthropic_turns(
    http: httpx.Client, text_only: dict[str, float], dropped: tuple[str, ...]
) -> None:
    messages: list[Any] = []
    whole = 0
    for turn in range(TURNS):
        messages.append({"role": "user", "content": f"{dropped} Turn {turn}."})
        body = {
            "messages": messages,
            "max_tokens": 40,
            "temperature": 1,
            "seed": turn,
            "logit_bias": text_only,
            "thinking": {"type": "enabled", "budget_tokens": 10},
        }
        answer = post(http, "/v1/messages", body)
        usage = answer["usage"]
        assert usage["cache_read_input_tokens"] >= whole - SLACK
        whole = usage["cache_read_input_tokens"] + usage["input_tokens"] + usage["output_tokens"]
        content = [block for block in answer["content"] if block["type"] not in dropped]
        messages.append({"role": "assistant", "content": content})


@pytest.mark.parametrize("returned", ["by id", "whole"])
def test_responses_turns(http: httpx.Client, text_only: dict[str, float], returned: str) -> None:
    items: list[Any] = []
    previous, whole = None, 0
    for turn in range(TURNS):
        items.append({"role": "user", "content": f"{returned}: turn {turn}."})
        body = {
            "input": items,
            "previous_response_id": previous,
            "max_output_tokens": 40,
            "temperature": 1,
            "seed": turn,
            "logit_bias": text_only,
        }
        answer = post(http, "/v1/responses", body)
        usage = answer["usage"]
        assert usage["input_tokens_details"]["cached_tokens"] >= whole - SLACK
        whole = usage["total_tokens"]
        if returned == "by id":
            items, previous = [], answer["id"]
        else:
            items += answer["output"]
