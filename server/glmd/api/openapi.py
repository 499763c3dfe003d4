"""The OpenAPI document, completed by what FastAPI cannot know: streams, and our errors."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from glmd.api.anthropic import errors as anthropic
from glmd.api.anthropic.protocol import MessageEvent
from glmd.api.openai.protocol import ChatCompletionChunk, Completion
from glmd.api.responses.protocol import ResponseStreamEvent

REFERENCE = "#/components/schemas/{model}"

STREAMS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionChunk,
    "/v1/completions": Completion,
    "/v1/responses": ResponseStreamEvent,
    "/v1/messages": MessageEvent,
}
"""What the events of a route's stream hold."""


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error, but for the Messages API's: `glmd.api.errors.Problem` as JSON."""

    error: ErrorDetails


class AnthropicErrorCode(BaseModel):
    error_code: str


class AnthropicErrorDetails(BaseModel):
    type: str
    message: str
    details: AnthropicErrorCode | None = None


class AnthropicErrorBody(BaseModel):
    """Every error of the Messages API."""

    type: Literal["error"]
    error: AnthropicErrorDetails
    request_id: str


def document(app: FastAPI) -> dict[str, Any]:
    """The document of `app`, made once."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        schemas = made["components"]["schemas"]
        models = [
            (model, "serialization") for model in (*STREAMS.values(), ErrorBody, AnthropicErrorBody)
        ]
        _, definitions = models_json_schema(models, ref_template=REFERENCE)  # type: ignore[arg-type]
        schemas.update(definitions["$defs"])
        for path, item in made["paths"].items():
            for operation in item.values():
                responses = operation["responses"]
                # FastAPI's own form of a validation error; ours is a 400 like any other.
                responses.pop("422", None)
                error = AnthropicErrorBody if anthropic.is_path(path) else ErrorBody
                responses["default"] = {
                    "description": "An error",
                    "content": {"application/json": {"schema": reference(error)}},
                }
                if path in STREAMS:
                    responses["200"]["content"]["text/event-stream"] = {
                        "schema": reference(STREAMS[path])
                    }
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        app.openapi_schema = made
    return app.openapi_schema


def reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REFERENCE.format(model=model.__name__)}
