"""OpenTelemetry spans: one for each request that generates, and one for each part of its way.

Imported only where the setting `tracing` asks for it; wants the extra `glmd[otel]`. Spans are made
of the records when a request is over, so that nothing is done for them on the way of a token.
Attributes are those of the conventions for generative AI
(https://opentelemetry.io/docs/specs/semconv/gen-ai/), without any text of prompts or answers.
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
from glmd.api.observability.exchange import HttpExchange
from glmd.api.observability.request_stats import RequestStats
from glmd.errors import SettingsError

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/api/v0/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/api/v0/completions": "text_completion",
}
"""The routes that generate, and what the conventions call what they do."""


class Tracing:
    """Sends the spans of one server.

    Args:
        model: what is served.
        exporter: where to; None: where the OTEL_… variables say.

    Raises:
        SettingsError: the variables ask for something that there is not.
    """

    def __init__(self, model: str, exporter: SpanExporter | None = None) -> None:
        self._model = model
        self._provider = TracerProvider(resource=resource())
        exporter = exporter or exporter_from_environment()
        if exporter is not None:
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("glmd", __version__)

    def close(self) -> None:
        """Send what is left; this may take as long as the exporter's timeout."""
        self._provider.shutdown()

    def exchange_ended(self, exchange: HttpExchange) -> None:
        """An HTTP request is over; if nothing of it goes on in the background, send its span."""
        if exchange.method == "POST" and exchange.route in OPERATIONS:
            self._send_if_over(exchange)

    def record_ended(self, record: RequestStats) -> None:
        """A request to the engine is over."""
        if record.exchange.ended is not None:
            self._send_if_over(record.exchange)

    def _send_if_over(self, exchange: HttpExchange) -> None:
        # One that has not begun never will, its client being gone, unless it is for later.
        if any(
            record.ended is None and (record.begun or exchange.background)
            for record in exchange.records
        ):
            return
        operation = OPERATIONS[exchange.route or ""]
        ends = [exchange.ended, *(record.ended for record in exchange.records)]
        span = self._tracer.start_span(
            f"{operation} {exchange.model or self._model}",
            context=parent_of(exchange),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "glmd",
                "gen_ai.request.model": exchange.model or self._model,
                "gen_ai.response.model": self._model,
                **http_attributes(exchange),
                **answer_attributes(exchange.records),
            },
            start_time=nanoseconds(exchange, exchange.began),
        )
        errors = [record.error for record in exchange.records if record.finish == "error"]
        if errors or exchange.status is None or exchange.status >= 500:
            span.set_attribute("error.type", str(exchange.status))
            span.set_status(Status(StatusCode.ERROR, errors[0] if errors else None))
        within = trace.set_span_in_context(span)
        for record in exchange.records:
            self._send_parts(record, within)
        span.end(nanoseconds(exchange, max(end for end in ends if end is not None)))

    def _send_parts(self, record: RequestStats, within: Context) -> None:
        """The spans of a request's way: until its turn, until its first token, until its end."""
        if record.ended is None:
            return
        began = record.exchange.began
        turn = record.ended if record.queue_seconds is None else began + record.queue_seconds
        first = record.ended if record.first_token is None else record.first_token
        cache = {"glmd.cache.matched_tokens": record.match.tokens} if record.match else {}
        reason = {"glmd.cache.reason": record.match.reason} if record.match else {}
        prefill = {
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
            **cache,
            **reason,
        }
        decode = {
            "gen_ai.usage.output_tokens": record.generated_tokens,
            "glmd.drafted_tokens": record.drafted,
            "glmd.accepted_tokens": record.accepted,
        }
        parts: list[tuple[str, float, float, dict[str, Any]]] = [("queue", began, turn, {})]
        if record.queue_seconds is not None:
            parts.append(("prefill", turn, first, prefill))
        if record.first_token is not None:
            parts.append(("decode", first, record.ended, decode))
        for name, start, end, attributes in parts:
            self._tracer.start_span(
                name,
                context=within,
                attributes={"gen_ai.response.id": record.id, **attributes},
                start_time=nanoseconds(record.exchange, start),
            ).end(nanoseconds(record.exchange, end))


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


def answer_attributes(records: Sequence[RequestStats]) -> dict[str, Any]:
    """What the engine was asked, and what it gave; with several prompts, in all."""
    if not records:
        return {}
    first = records[0]
    sampling = first.sampling
    attributes: dict[str, Any] = {
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.choice.count": first.sequences,
        "gen_ai.response.id": first.id,
        "gen_ai.response.finish_reasons": [str(record.finish) for record in records],
        "gen_ai.usage.input_tokens": sum(record.prompt_tokens for record in records),
        "gen_ai.usage.output_tokens": sum(record.generated_tokens for record in records),
        "gen_ai.usage.cache_read.input_tokens": sum(record.cached_tokens for record in records),
    }
    if sampling.seed is not None:
        attributes["gen_ai.request.seed"] = sampling.seed
    if first.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = first.max_tokens
    ttfts = [record.ttft for record in records if record.ttft is not None]
    if ttfts:
        attributes["gen_ai.response.time_to_first_chunk"] = min(ttfts)
    return attributes


def parent_of(exchange: HttpExchange) -> Context:
    """The client's span, if it sent one (https://www.w3.org/TR/trace-context/)."""
    return TraceContextTextMapPropagator().extract(exchange.trace, context=Context())


def nanoseconds(exchange: HttpExchange, moment: float) -> int:
    """A moment of `time.monotonic` in Unix time."""
    return round((exchange.began_at + moment - exchange.began) * 1e9)


def resource() -> Resource:
    """Who sends: the OTEL_… variables' word, else this service's name."""
    made = Resource.create({"service.version": __version__})
    if str(made.attributes[SERVICE_NAME]).startswith("unknown_service"):
        made = made.merge(Resource({SERVICE_NAME: "glmd"}))
    return made


def exporter_from_environment() -> SpanExporter | None:
    """What OTEL_TRACES_EXPORTER names; None: nothing is to be sent.

    Raises:
        SettingsError: it, or the protocol, is none that there is here.
    """
    name = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    match name:
        case "none":
            return None
        case "console":
            return ConsoleSpanExporter()
        case "otlp":
            pass
        case _:
            raise SettingsError(f"OTEL_TRACES_EXPORTER: otlp, console or none, not {name}.")
    for variable in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = os.environ.get(variable) or "http/protobuf"
        if protocol != "http/protobuf":
            raise SettingsError(f"{variable}: glmd speaks http/protobuf, not {protocol}.")
    return OTLPSpanExporter()
