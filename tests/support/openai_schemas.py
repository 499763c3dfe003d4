"""Answers of an app, checked against the schemas that OpenAI publishes (tests/fixtures/openai)."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema_rs
from jsonschema import Draft202012Validator, ValidationError, validators
from paths import TESTS
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Schema = dict[str, Any]

DEFS: dict[str, Schema] = json.loads((TESTS / "fixtures/openai/schemas.json").read_text())["$defs"]

OBJECTS = {
    "chat.completion": "CreateChatCompletionResponse",
    "chat.completion.chunk": "CreateChatCompletionStreamResponse",
    "response": "Response",
    "list": "ResponseItemList",
}
"""Schema of each answer by its `object`."""

CHECKED = re.compile(r"(/v1)?/(chat/completions|responses(/resp_[^/]+(/cancel|/input_items)?)?)")

checked: Counter[str] = Counter()
"""Answers and events that were checked since the start, by schema."""


def _tag(schema: Schema) -> str | None:
    """Type of the objects that a schema describes; None: it fixes none."""
    if "$ref" in schema:
        return _tag(DEFS[schema["$ref"].rpartition("/")[2]])
    tags = schema.get("properties", {}).get("type", {}).get("enum", ())
    if len(tags) == 1:
        return str(tags[0])
    return next(filter(None, map(_tag, schema.get("allOf", ()))), None)


def _modern(value: Any) -> Any:
    """A schema of the 2020-12 draft, from one with words of OpenAPI 3.0 and of the draft before."""
    if isinstance(value, list):
        return [_modern(each) for each in value]
    if not isinstance(value, dict):
        return value
    # Of filters alone, which no answer has.
    recursive = ("$recursiveAnchor", "$recursiveRef")
    schema = {key: _modern(each) for key, each in value.items() if key not in recursive}
    if schema.pop("nullable", None) is True:
        return {"anyOf": [schema, {"type": "null"}]}
    return schema


def _by_type(value: Any) -> Any:
    """A schema in which unions of tagged objects become `byType`.

    So errors name the field of the right member, and only that member is checked.
    """
    if isinstance(value, list):
        return [_by_type(each) for each in value]
    if not isinstance(value, dict):
        return value
    schema = {key: _by_type(each) for key, each in value.items()}
    for key in ("oneOf", "anyOf"):
        members = schema.get(key)
        if isinstance(members, list) and members and all(_tag(each) for each in members):
            groups: dict[str, list[Schema]] = {}
            for each in members:
                groups.setdefault(str(_tag(each)), []).append(each)
            schema["byType"] = groups
            del schema[key]
    return schema


def _check_by_type(
    validator: Any, groups: dict[str, list[Schema]], instance: Any, _: Schema
) -> Iterator[ValidationError]:
    tag = instance.get("type") if isinstance(instance, dict) else None
    members = groups.get(tag, []) if isinstance(tag, str) else []
    if not members:
        yield ValidationError(f"{instance!r} is of no type in {sorted(groups)}")
    elif not any(validator.evolve(schema=each).is_valid(instance) for each in members):
        yield from validator.descend(instance, members[0])


_Validator: Any = validators.extend(Draft202012Validator, {"byType": _check_by_type})
_MODERN_DEFS: dict[str, Schema] = _modern(DEFS)
_DEFS: dict[str, Schema] = _by_type(_MODERN_DEFS)


@cache
def _validator(name: str) -> Any:
    """A validator keeps the references that it has resolved."""
    return _Validator({"$ref": f"#/$defs/{name}", "$defs": _DEFS})


@cache
def _fast_validator(name: str) -> jsonschema_rs.Draft202012Validator:
    """A validator that is fifty times as fast, and says little about what is invalid."""
    return jsonschema_rs.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": _MODERN_DEFS})


def problems(name: str, instance: Any) -> list[str]:
    """What a schema has to say against an instance."""
    checked[name] += 1
    if _fast_validator(name).is_valid(instance):
        return []
    return [
        f"{error.json_path}: {error.message[:300]}"
        for error in _validator(name).iter_errors(instance)
    ]


def check_answer(answer: Any) -> list[str]:
    return problems(OBJECTS[answer["object"]], answer)


def check_event(event: Any) -> list[str]:
    """Check an event or a chunk of a stream. Errors within streams are of no published type."""
    if "error" in event:
        return []
    if "object" in event:
        return check_answer(event)
    return problems("ResponseStreamEvent", event)


class CheckedApp:
    """An app whose successful answers are checked.

    Attributes:
        invalid: what is wrong, with the path.
        loop: event loop that runs the app, once it has started.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.invalid: list[str] = []
        self.loop: asyncio.AbstractEventLoop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.loop = asyncio.get_running_loop()
        if scope["type"] != "http" or not CHECKED.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        body = bytearray()
        start: Message = {}

        async def record(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            elif message["type"] == "http.response.body":
                body.extend(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, record)
        finally:
            if start.get("status") == 200 and scope["method"] in ("GET", "POST"):
                headers = dict(start["headers"])
                if headers[b"content-type"].startswith(b"text/event-stream"):
                    found = list(self._stream(body))
                else:
                    found = check_answer(json.loads(body)) if body else []
                self.invalid += [f"{scope['path']}: {problem}" for problem in found]

    @staticmethod
    def _stream(body: bytearray) -> Iterator[str]:
        whole, _, _ = body.rpartition(b"\n\n")  # The client may have gone.
        for frame in whole.split(b"\n\n"):
            for line in frame.split(b"\n"):
                if line.startswith(b"data: ") and line != b"data: [DONE]":
                    yield from check_event(json.loads(line.removeprefix(b"data: ")))
