"""The FastAPI application: its routes, its middleware, and the engine's life within its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware import Middleware

from glmd import __version__
from glmd.api import errors
from glmd.api import webui as page
from glmd.api.access import access_rules
from glmd.api.anthropic import routes as messages
from glmd.api.middleware import (
    BodyLimitMiddleware,
    HeadAsGetMiddleware,
    HeaderLimitMiddleware,
    RequestIdMiddleware,
)
from glmd.api.observability.access_log import AccessLog
from glmd.api.openai import chat, completions
from glmd.api.openapi import document
from glmd.api.responses import routes as responses
from glmd.api.responses.store import ResponseStore
from glmd.api.routes import health, lmstudio, metrics, models, status
from glmd.api.routes import tokenize as tokens
from glmd.api.state import AppState
from glmd.errors import SettingsError

if TYPE_CHECKING:
    from glmd.api.observability.tracing import Tracing


def create_app(service: AppState) -> FastAPI:
    """The app around `service`; its lifespan starts and ends the engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await app.state.responses.close()
            await service.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    settings = service.settings
    meter = metrics.Metrics(service)
    request_log = AccessLog(service)
    tracing = start_tracing(service)
    watchers = [meter.count, request_log.exchange_ended]
    service.requests.watchers.append(request_log.record_ended)
    if tracing is not None:
        watchers.append(tracing.exchange_ended)
        service.requests.watchers.append(tracing.record_ended)
    middleware = [
        Middleware(RequestIdMiddleware, watchers=watchers),
        Middleware(HeaderLimitMiddleware),
        *access_rules(settings, service.keys),
        Middleware(BodyLimitMiddleware, limit=settings.max_body, seconds=settings.body_timeout),
        Middleware(HeadAsGetMiddleware),
    ]
    app = FastAPI(
        title="glmd",
        version=__version__,
        description=f"Serves {service.model.id} through the OpenAI and Anthropic APIs.",
        lifespan=lifespan,
        middleware=middleware,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.state.metrics = meter
    app.state.responses = ResponseStore(settings.response_store)
    errors.install(app)
    routers = (
        page, health, models, lmstudio, chat, completions, responses, messages, tokens, status,
        metrics,
    )  # fmt: skip
    for module in routers:
        app.include_router(module.router)
    app.openapi = partial(document, app)  # type: ignore[method-assign]
    return app


def start_tracing(service: AppState) -> Tracing | None:
    """What sends spans, if the settings ask for it.

    Raises:
        SettingsError: the extra is not installed, or the environment asks for what is not there.
    """
    if not service.settings.tracing:
        return None
    try:
        # Only here, because few want it, and not all have it installed.
        from glmd.api.observability.tracing import Tracing  # noqa: PLC0415
    except ImportError as error:
        raise SettingsError(
            "tracing: OpenTelemetry is not installed; get it with `pip install 'glmd[otel]'`."
        ) from error
    return Tracing(service.model.id)
