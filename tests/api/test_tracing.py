"""Spans of requests that generate, with phases, in the client's trace."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from live import CHECKPOINT, LiveServer, live_server
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from glmd.api.app import create_app
from glmd.api.observability import tracing
from glmd.api.observability.tracing import exporter_from_environment, service_resource
from glmd.api.state import AppState, ServedModel
from glmd.config import Settings
from glmd.engine_client.process import EngineProcessConfig
from glmd.errors import SettingsError

TRACE, PARENT = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7
HEADERS = {"traceparent": f"00-{TRACE:032x}-{PARENT:016x}-01", "tracestate": "vendor=1"}


class Spans(InMemorySpanExporter):
    """Exported spans, by trace."""

    def __init__(self) -> None:
        super().__init__()
        self._news = threading.Condition()

    def export(self, spans: Sequence[ReadableSpan]) -> Any:
        with self._news:
            result = super().export(spans)
            self._news.notify_all()
        return result

    def of(self, response: httpx.Response) -> list[ReadableSpan]:
        """All spans of a request: its own first, then its parts in order."""
        id = response.headers["x-request-id"]

        def found() -> list[ReadableSpan]:
            every = self.get_finished_spans()
            own = [s for s in every if (s.attributes or {}).get("glmd.request_id") == id]
            if not own:
                return []
            (mine,) = own
            parts = [s for s in every if s.parent and s.parent.span_id == mine.context.span_id]
            return [mine, *sorted(parts, key=lambda span: span.start_time or 0)]

        with self._news:
            assert self._news.wait_for(found, 20)
            return found()


@pytest.fixture(scope="module")
def spans() -> Iterator[Spans]:
    with pytest.MonkeyPatch.context() as patch:
        exporter = Spans()
        patch.setattr(tracing, "exporter_from_environment", lambda: exporter)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield exporter


@pytest.fixture(scope="module")
def live(spans: Spans) -> Iterator[LiveServer]:
    with live_server(tracing=True, keep_alive=0.2) as server:
        yield server


@pytest.fixture
def http(live: LiveServer) -> Iterator[httpx.Client]:
    with live.client() as client:
        yield client


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


SCRIPT = "⟦Hm.</think>One two.⟧"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat(SCRIPT),
    "/v1/completions": {"prompt": SCRIPT},
    "/v1/responses": {"input": SCRIPT},
    "/v1/messages": chat(SCRIPT, max_tokens=50),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_a_request_is_a_span_with_phases_in_the_clients_trace(
    http: httpx.Client, spans: Spans, path: str, stream: bool
) -> None:
    response = http.post(
        path, json={**BODIES[path], "model": "tiny", "stream": stream}, headers=HEADERS
    )
    assert response.status_code == 200
    span, *parts = spans.of(response)
    attributes = dict(span.attributes or {})
    operation = "text_completion" if path == "/v1/completions" else "chat"
    assert span.name == f"{operation} tiny"
    assert span.kind is SpanKind.SERVER
    assert span.context.trace_id == TRACE
    assert span.parent
    assert span.parent.span_id == PARENT
    assert span.context.trace_state.get("vendor") == "1"
    assert attributes["gen_ai.operation.name"] == operation
    assert attributes["gen_ai.request.model"] == "tiny"
    assert attributes["gen_ai.response.model"] == "test/tiny"
    assert attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert attributes["http.response.status_code"] == 200
    assert attributes["http.route"] == path
    assert attributes["gen_ai.request.stream"] is stream
    record = next(
        r for r in http.get("/glmd/status").json()["recent"]
        if r["request_id"] == attributes["glmd.request_id"]
    )  # fmt: skip
    assert attributes["gen_ai.response.id"] == record["id"]
    assert attributes["gen_ai.usage.input_tokens"] == record["prompt_tokens"]
    assert attributes["gen_ai.usage.output_tokens"] == record["generated_tokens"]
    assert attributes["gen_ai.usage.cache_read.input_tokens"] == record["cached_tokens"]
    assert [part.name for part in parts] == ["queue", "prefill", "decode"]
    assert parts[0].start_time == span.start_time
    assert [part.end_time for part in parts[:2]] == [part.start_time for part in parts[1:]]
    assert (parts[-1].end_time or 0) <= (span.end_time or 0)
    assert abs((span.end_time or 0) / 1e9 - time.time()) < 60
    assert "One" not in span.to_json()


def test_a_request_without_a_trace_starts_a_trace(http: httpx.Client, spans: Spans) -> None:
    span, *_ = spans.of(http.post("/v1/completions", json={"prompt": "⟦a⟧"}))
    assert span.parent is None


def test_each_prompt_of_a_completion_has_its_own_phases(http: httpx.Client, spans: Spans) -> None:
    response = http.post("/v1/completions", json={"prompt": ["⟦a⟧", "⟦b⟧"]})
    span, *parts = spans.of(response)
    assert len(parts) == 6
    assert (span.attributes or {})["gen_ai.response.finish_reasons"] == ("stop", "stop")


def test_a_background_request_is_a_span_when_finished(http: httpx.Client, spans: Spans) -> None:
    response = http.post("/v1/responses", json={"input": SCRIPT, "background": True})
    span, *parts = spans.of(response)
    assert (span.attributes or {})["gen_ai.response.finish_reasons"] == ("stop",)
    assert len(parts) == 3


def test_server_errors_set_the_error_status_and_client_errors_do_not(
    http: httpx.Client, spans: Spans
) -> None:
    path = "/v1/chat/completions"
    busy, *_ = spans.of(http.post(path, json=chat("⟦{busy}⟧")))
    assert busy.status.status_code is StatusCode.ERROR
    mistake, *parts = spans.of(http.post(path, json=chat("⟦x⟧", temperature=-1)))
    assert mistake.status.status_code is StatusCode.UNSET
    assert (mistake.attributes or {})["http.response.status_code"] == 400
    assert parts == []


def test_polled_routes_have_no_span(http: httpx.Client, spans: Spans) -> None:
    http.get("/health")
    spans.of(http.post("/v1/completions", json={"prompt": "⟦a⟧"}))
    routes = {(s.attributes or {}).get("http.route") for s in spans.get_finished_spans()}
    assert "/health" not in routes


def service(**settings: Any) -> AppState:
    model = ServedModel.of("test/tiny", CHECKPOINT)
    return AppState(Settings(**settings), model, EngineProcessConfig(CHECKPOINT, {}))


def test_tracing_without_the_extra_is_a_settings_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "glmd.api.observability.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=r"^tracing: .* Run: pip install 'glmd\[otel\]'$"):
        create_app(service(tracing=True))


def test_the_sdk_is_imported_only_for_tracing() -> None:
    script = (
        "import sys, glmd.cli, glmd.api.server, glmd.api.state; "
        "sys.exit(any(name.startswith('opentelemetry.sdk') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_environment_names_the_exporter_and_the_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OTEL_TRACES_EXPORTER", raising=False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    exporter = exporter_from_environment()
    assert isinstance(exporter, OTLPSpanExporter)
    assert exporter._endpoint == "http://127.0.0.1:9/v1/traces"
    assert service_resource().attributes["service.name"] == "glmd"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    assert service_resource().attributes["service.name"] == "mine"
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert exporter_from_environment() is None
    for name, value in (
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
    ):
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
        monkeypatch.setenv(name, value)
        with pytest.raises(SettingsError, match=f"^{name}: .*{value}"):
            exporter_from_environment()
