"""FastAPI application: routes, middleware, engine lifespan, OpenAPI document."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.middleware import Middleware

from glmd import __version__
from glmd.api import power, webui
from glmd.api.anthropic import routes as messages
from glmd.api.anthropic.protocol import PATH as MESSAGES_PATH
from glmd.api.anthropic.protocol import MessageEvent
from glmd.api.body_encoding import BodyEncodingMiddleware
from glmd.api.errors import add_exception_handlers, is_below
from glmd.api.middleware import (
    HeadAsGetMiddleware,
    HeaderLimitMiddleware,
    NormalizePathMiddleware,
    RequestIdMiddleware,
    access_middleware,
)
from glmd.api.observability.access_log import AccessLog
from glmd.api.openai import chat, completions
from glmd.api.openai.protocol import ChatCompletionChunk, TextCompletion
from glmd.api.request_body import BodyLimitMiddleware
from glmd.api.responses import routes as responses
from glmd.api.responses.objects import ResponseStreamEvent
from glmd.api.responses.peers import Peers
from glmd.api.responses.store import ResponseStore
from glmd.api.retries import RetryMiddleware
from glmd.api.routes import clients, health, metrics, models, status, tokenize
from glmd.api.state import AppState
from glmd.errors import SettingsError

if TYPE_CHECKING:
    from glmd.api.observability.tracing import Tracing

ROUTERS = (
    webui, health, models, chat, completions, responses, messages, tokenize, status, clients,
    metrics,
)  # fmt: skip

STREAM_EVENTS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionChunk,
    "/v1/completions": TextCompletion,
    "/v1/responses": ResponseStreamEvent,
    "/v1/responses/{id}": ResponseStreamEvent,
    "/v1/messages": MessageEvent,
}
"""Event models of the routes that stream."""

REF_TEMPLATE = "#/components/schemas/{model}"


def create_app(state: AppState) -> FastAPI:
    """Create the app; its lifespan starts and stops the engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await state.start()
        try:
            yield
        finally:
            await app.state.responses.close()
            await app.state.peers.close()
            await state.close()
            await sleep_blocker.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    settings = state.settings
    meter = metrics.Metrics(state)
    access_log = AccessLog(lambda: state.settings.slow_request)
    tracing = _create_tracing(state)
    sleep_blocker = power.IdleSleepBlocker(
        state.registry,
        lambda: state.settings.prevent_sleep,
        program=power.PROGRAM,
        grace=power.GRACE_SECONDS,
    )
    on_exchange_end = [meter.count, access_log.exchange_ended]
    state.registry.on_end.append(access_log.request_ended)
    if tracing is not None:
        on_exchange_end.append(tracing.exchange_ended)
        state.registry.on_end.append(tracing.request_ended)
    app = FastAPI(
        title="glmd",
        version=__version__,
        description=f"Serves {state.model.id} through the OpenAI and Anthropic APIs.",
        lifespan=lifespan,
        middleware=[
            Middleware(NormalizePathMiddleware),
            Middleware(RequestIdMiddleware, on_end=on_exchange_end),
            Middleware(HeaderLimitMiddleware),
            *access_middleware(settings, state.keys),
            Middleware(BodyEncodingMiddleware, limit=settings.max_body),
            Middleware(BodyLimitMiddleware, limit=settings.max_body, timeout=settings.body_timeout),
            Middleware(RetryMiddleware),
            Middleware(HeadAsGetMiddleware),
        ],
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.glmd = state
    app.state.metrics = meter
    app.state.responses = ResponseStore(settings.response_store, state.disk_file)
    app.state.peers = Peers(lambda: state.settings.peers)
    add_exception_handlers(app)
    for module in ROUTERS:
        app.include_router(module.router)
    app.openapi = partial(openapi_document, app)  # type: ignore[method-assign]
    return app


def _create_tracing(state: AppState) -> Tracing | None:
    """Create the tracing that the settings ask for.

    Raises:
        SettingsError: OpenTelemetry is not installed, or the OTEL_… variables are invalid.
    """
    if not state.settings.tracing:
        return None
    try:
        # An optional dependency.
        from glmd.api.observability.tracing import Tracing  # noqa: PLC0415
    except ImportError as error:
        raise SettingsError(
            "tracing: OpenTelemetry is not installed. Run: pip install 'glmd[otel]'"
        ) from error
    return Tracing(state.model.id)


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Error of every API but the Messages API."""

    error: ErrorDetails


class AnthropicErrorCode(BaseModel):
    error_code: str


class AnthropicErrorDetails(BaseModel):
    type: str
    message: str
    details: AnthropicErrorCode | None = None


class AnthropicErrorBody(BaseModel):
    """Error of the Messages API."""

    type: Literal["error"]
    error: AnthropicErrorDetails
    request_id: str


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """Return FastAPI's document, with the events of streams and glmd's errors."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        schemas = document["components"]["schemas"]
        models = [
            (model, "serialization")
            for model in (*STREAM_EVENTS.values(), ErrorBody, AnthropicErrorBody)
        ]
        _, definitions = models_json_schema(models, ref_template=REF_TEMPLATE)  # type: ignore[arg-type]
        schemas.update(definitions["$defs"])
        for path, item in document["paths"].items():
            error = AnthropicErrorBody if is_below(path, MESSAGES_PATH) else ErrorBody
            for method, operation in item.items():
                by_status = operation["responses"]
                by_status.pop("422", None)  # Validation errors have status 400 here.
                by_status["default"] = {
                    "description": "An error",
                    "content": {"application/json": {"schema": _reference(error)}},
                }
                if path in STREAM_EVENTS and method != "delete":
                    by_status["200"]["content"]["text/event-stream"] = {
                        "schema": _reference(STREAM_EVENTS[path])
                    }
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REF_TEMPLATE.format(model=model.__name__)}
