"""Agreement of docs/parameters.md with the request models."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from paths import ROOT

from glmd.api.anthropic.protocol import MessagesRequest
from glmd.api.generation_request import NO_OP
from glmd.api.openai.protocol import ChatCompletionRequest, CompletionRequest
from glmd.api.responses.protocol import ResponsesRequest

PAGE = ROOT / "docs" / "parameters.md"
HEADER = "| Field | C | T | R | M | Meaning |"

APIS: dict[str, Any] = {
    "C": ChatCompletionRequest,
    "T": CompletionRequest,
    "R": ResponsesRequest,
    "M": MessagesRequest,
}


def marks_in_code(api: str) -> dict[str, str]:
    """Return the mark of each field: ✓ supported, ○ without effect, ✗ refused."""
    model = APIS[api]
    marks = dict.fromkeys(model.refused, "✗")
    for name, field in model.model_fields.items():
        text = field.description or ""
        marks[name] = "○" if text.startswith(NO_OP) else "✗" if text.startswith("Refused") else "✓"
    return marks


def marks_on_page(api: str) -> dict[str, str]:
    marks: dict[str, str] = {}
    in_table = False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        in_table = line.startswith("|") and (in_table or line == HEADER)
        if not in_table or line.startswith(("|---", HEADER)):
            continue
        fields, *cells, _ = [cell.strip() for cell in line.strip("|").split("|")]
        mark = dict(zip("CTRM", cells, strict=True))[api]
        for name in re.findall(r"`(\w+)`", fields) if mark else ():
            assert name not in marks, f"{name} is listed twice"
            marks[name] = mark
    return marks


MINIMAL: dict[str, tuple[str, dict[str, Any]]] = {
    "C": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "⟦</think>Yes.⟧"}]}),
    "T": ("/v1/completions", {"prompt": "⟦Yes.⟧"}),
    "R": ("/v1/responses", {"input": "⟦</think>Yes.⟧"}),
    "M": ("/v1/messages", {"messages": [{"role": "user", "content": "⟦Yes.⟧"}], "max_tokens": 9}),
}


@pytest.mark.parametrize("api", APIS)
def test_null_is_the_same_as_an_absent_field(http: httpx.Client, api: str) -> None:
    model = APIS[api]
    path, body = MINIMAL[api]
    response = http.post(path, json=dict.fromkeys([*model.model_fields, *model.refused]) | body)
    assert response.status_code == 200, response.text
    assert "x-glmd-ignored-parameters" not in response.headers


@pytest.mark.parametrize("api", APIS)
def test_marks_match_the_request_models(api: str) -> None:
    assert marks_on_page(api) == marks_in_code(api)
