"""OpenTelemetry spans of generating requests, and of queue, prefill and decode.

Needs the extra `glmd[otel]`; imported only with the setting `tracing`. Spans are created from the
request statistics at the end of a request, so tokens cost nothing extra. Attributes follow the
GenAI conventions (https://opentelemetry.io/docs/specs/semconv/gen-ai/), without text of prompts or
answers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from glmd import __version__
from glmd.api.observability.request_stats import HttpExchange, RequestStats
from glmd.errors import SettingsError

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/api/v0/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/api/v0/completions": "text_completion",
}
"""`gen_ai.operation.name` by route."""


class Tracing:
    """Creates and exports the spans of one server.

    Args:
        model: id of the served model.
        exporter: None: as the OTEL_… environment variables say.

    Raises:
        SettingsError: the variables name an unknown exporter or protocol.
    """

    def __init__(self, model: str, exporter: SpanExporter | None = None) -> None:
        self._model = model
        self._provider = TracerProvider(resource=service_resource())
        exporter = exporter or exporter_from_environment()
        if exporter is not None:
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("glmd", __version__)

    def close(self) -> None:
        """Export the remaining spans; takes up to the exporter's timeout."""
        self._provider.shutdown()

    def exchange_ended(self, exchange: HttpExchange) -> None:
        """Create the span of an HTTP request, unless its background work still runs."""
        if exchange.method == "POST" and exchange.route in OPERATIONS:
            self._create_span_if_ended(exchange)

    def request_ended(self, stats: RequestStats) -> None:
        """Create the span of an HTTP request whose background request has ended."""
        if stats.exchange.ended is not None:
            self._create_span_if_ended(stats.exchange)

    def _create_span_if_ended(self, exchange: HttpExchange) -> None:
        # After the exchange, only a background request can still be sent to the engine.
        if any(
            stats.ended is None and (stats.sent or exchange.background) for stats in exchange.stats
        ):
            return
        operation = OPERATIONS[exchange.route or ""]
        ends = [exchange.ended, *(stats.ended for stats in exchange.stats)]
        span = self._tracer.start_span(
            f"{operation} {exchange.model or self._model}",
            context=parent_context(exchange),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "glmd",
                "gen_ai.request.model": exchange.model or self._model,
                "gen_ai.response.model": self._model,
                **http_attributes(exchange),
                **generation_attributes(exchange.stats),
            },
            start_time=unix_nanoseconds(exchange, exchange.started),
        )
        errors = [stats.error for stats in exchange.stats if stats.finish == "error"]
        if errors or exchange.status is None or exchange.status >= 500:
            span.set_attribute("error.type", str(exchange.status))
            span.set_status(Status(StatusCode.ERROR, errors[0] if errors else None))
        context = trace.set_span_in_context(span)
        for stats in exchange.stats:
            self._create_phase_spans(stats, context)
        span.end(unix_nanoseconds(exchange, max(end for end in ends if end is not None)))

    def _create_phase_spans(self, stats: RequestStats, context: Context) -> None:
        if stats.ended is None:
            return
        exchange, match = stats.exchange, stats.match
        queue_seconds = stats.queue_seconds
        admitted = stats.ended if queue_seconds is None else exchange.started + queue_seconds
        first_token = stats.ended if stats.first_token is None else stats.first_token
        phases: list[tuple[str, float, float, dict[str, Any]]] = [
            ("queue", exchange.started, admitted, {})
        ]
        if queue_seconds is not None:
            prefill: dict[str, Any] = {
                "gen_ai.usage.input_tokens": stats.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": stats.cached_tokens,
            }
            if match is not None:
                prefill["glmd.cache.matched_tokens"] = match.tokens
                prefill["glmd.cache.reason"] = match.reason
            phases.append(("prefill", admitted, first_token, prefill))
        if stats.first_token is not None:
            decode = {
                "gen_ai.usage.output_tokens": stats.generated_tokens,
                "glmd.drafted_tokens": stats.drafted,
                "glmd.accepted_tokens": stats.accepted,
            }
            phases.append(("decode", first_token, stats.ended, decode))
        for name, start, end, attributes in phases:
            self._tracer.start_span(
                name,
                context=context,
                attributes={"gen_ai.response.id": stats.id, **attributes},
                start_time=unix_nanoseconds(exchange, start),
            ).end(unix_nanoseconds(exchange, end))


def http_attributes(exchange: HttpExchange) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "http.request.method": exchange.method,
        "http.route": exchange.route or "",
        "url.path": exchange.path,
        "client.address": exchange.client,
        "gen_ai.request.stream": exchange.stream,
        "glmd.request_id": exchange.id,
    }
    if exchange.status is not None:
        attributes["http.response.status_code"] = exchange.status
    return attributes


def generation_attributes(requests: Sequence[RequestStats]) -> dict[str, Any]:
    """Return the attributes of the requests to the engine, as totals."""
    if not requests:
        return {}
    first = requests[0]
    sampling = first.sampling
    attributes: dict[str, Any] = {
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.choice.count": first.sequences,
        "gen_ai.response.id": first.id,
        "gen_ai.response.finish_reasons": [str(stats.finish) for stats in requests],
        "gen_ai.usage.input_tokens": sum(stats.prompt_tokens for stats in requests),
        "gen_ai.usage.output_tokens": sum(stats.generated_tokens for stats in requests),
        "gen_ai.usage.cache_read.input_tokens": sum(stats.cached_tokens for stats in requests),
    }
    if sampling.seed is not None:
        attributes["gen_ai.request.seed"] = sampling.seed
    if first.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = first.max_tokens
    ttfts = [stats.ttft for stats in requests if stats.ttft is not None]
    if ttfts:
        attributes["gen_ai.response.time_to_first_chunk"] = min(ttfts)
    return attributes


def parent_context(exchange: HttpExchange) -> Context:
    """Return the client's span (https://www.w3.org/TR/trace-context/), if sent."""
    return TraceContextTextMapPropagator().extract(exchange.trace, context=Context())


def unix_nanoseconds(exchange: HttpExchange, moment: float) -> int:
    """Convert a moment of `time.monotonic()` to Unix time."""
    return round((exchange.started_at + moment - exchange.started) * 1e9)


def service_resource() -> Resource:
    """Return the resource that the OTEL_… variables describe.

    The default name is glmd.
    """
    resource = Resource.create({"service.version": __version__})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "glmd"}))
    return resource


def exporter_from_environment() -> SpanExporter | None:
    """Create the exporter that OTEL_TRACES_EXPORTER names; None: export nothing.

    Raises:
        SettingsError: unknown exporter or protocol.
    """
    match os.environ.get("OTEL_TRACES_EXPORTER") or "otlp":
        case "none":
            return None
        case "console":
            return ConsoleSpanExporter()
        case "otlp":
            pass
        case name:
            raise SettingsError(f"OTEL_TRACES_EXPORTER: must be otlp, console or none, not {name}.")
    for variable in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = os.environ.get(variable) or "http/protobuf"
        if protocol != "http/protobuf":
            raise SettingsError(f"{variable}: must be http/protobuf, not {protocol}.")
    return OTLPSpanExporter()
