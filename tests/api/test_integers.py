"""An integer that no machine word holds is a 400, in every integer field of every request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import httpx
import pytest
from fastapi.routing import APIRoute
from live import live_server
from pydantic import BaseModel, RootModel

from glmd.api.app import ROUTERS

MESSAGES = [{"role": "user", "content": "⟦</think>Hi⟧"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "⟦Hi⟧"},
    "/v1/responses": {"input": "⟦</think>Hi⟧"},
    "/v1/responses/input_tokens": {"input": "Hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/tokenize": {"messages": MESSAGES},
    "/apply-template": {"messages": MESSAGES},
    "/detokenize": {},
}
VALUES = (2**63, 2**64, 2**70, -(2**70), 10**400, 1e30)


def integer_fields(annotation: Any, wrap: Any = lambda value: value) -> Iterator[Any]:
    """Functions that put a value into each integer field below a type."""
    if annotation is int:
        yield wrap
    elif isinstance(annotation, type) and issubclass(annotation, RootModel):
        yield from integer_fields(annotation.model_fields["root"].annotation, wrap)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields
        kinds = {
            name: get_args(field.annotation)[0]
            for name, field in fields.items()
            if get_origin(field.annotation) is Literal and field.is_required()
        }
        for name, field in fields.items():

            def wrap_field(value: Any, name: str = name) -> Any:
                return wrap({**kinds, name: value})

            yield from integer_fields(field.annotation, wrap_field)
    elif get_origin(annotation) is list:
        yield from integer_fields(get_args(annotation)[0], lambda value: wrap([value]))
    elif get_origin(annotation) is not Literal:
        for part in get_args(annotation):
            yield from integer_fields(part, wrap)


def bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    for module in ROUTERS:
        for route in module.router.routes:
            if isinstance(route, APIRoute) and route.body_field is not None:
                for put in integer_fields(route.body_field.field_info.annotation):
                    for value in VALUES:
                        yield route.path, put(value)


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with live_server() as live, live.client() as http:
        yield http


def send(http: httpx.Client, path: str, fields: dict[str, Any], **headers: str) -> httpx.Response:
    content = json.dumps({**BODIES[path.replace("/api/v0", "/v1")], **fields})
    return http.post(path, content=content, headers={"content-type": "application/json"} | headers)


def test_every_integer_field_refuses_what_no_word_holds(http: httpx.Client) -> None:
    fields = set()
    for path, body in bodies():
        answer = send(http, path, body)
        assert answer.status_code == 400, (path, body, answer.text)
        fields |= {(path, name) for name in body}
    named = {name for _, name in fields}
    assert {"max_tokens", "top_k", "seed", "n", "thinking", "prompt", "tokens"} <= named
    assert {path for path, _ in fields} >= {*BODIES} - {
        "/v1/messages/count_tokens",
        "/v1/responses/input_tokens",
    }


@pytest.mark.parametrize("key", ["9" * 5000, str(2**64), "0" * 5000, "-1", "٣"])
def test_keys_of_logit_bias_are_token_ids(http: httpx.Client, key: str) -> None:
    answer = send(http, "/v1/chat/completions", {"logit_bias": {key: 1}})
    assert answer.status_code == 400
    assert "logit_bias" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "keyword", ["maxLength", "minItems", "maximum", "multipleOf", "minProperties", "const"]
)
def test_numbers_in_schemas_may_have_any_size(http: httpx.Client, keyword: str) -> None:
    for value in (2**70, 10**400, -(10**400)):
        schema = {"type": ["string", "array", "object", "integer"], keyword: value}
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        answer = send(http, "/v1/chat/completions", {"response_format": form, "max_tokens": 1})
        assert answer.status_code in (200, 400), (value, answer.text)


@pytest.mark.parametrize("value", ["1e18", "1e300", "9" * 400])
def test_timeouts_of_any_length_are_none_or_refused(http: httpx.Client, value: str) -> None:
    answer = send(http, "/v1/chat/completions", {"max_tokens": 1}, **{"x-glmd-timeout": value})
    assert answer.status_code in (200, 400), answer.text
