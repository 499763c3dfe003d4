"""`/metrics`: what the server counts, for Prometheus. Names are vLLM's, with `glmd_` before them.

Nothing is kept here: a collector reads the records' totals and the engine's stats when it is
asked. What the engine counts begins anew when it is started again, as counters may.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import get_args

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    StateSetMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from glmd import __version__
from glmd.api.observability.exchange import HttpExchange
from glmd.api.observability.histogram import Histogram
from glmd.api.state import AppState
from glmd.engine_client.client import EngineState
from glmd.utils.memory import process_memory_bytes

router = APIRouter(tags=["Monitoring"])


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """Everything, in Prometheus's text format or in OpenMetrics, as asked."""
    registry: CollectorRegistry = request.app.state.metrics.registry
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), media_type=content_type)


class Metrics(Collector):
    """The metrics of one server.

    Attributes:
        registry: has this collector alone.
    """

    def __init__(self, service: AppState) -> None:
        self._service = service
        self._started = time.time()
        self._responses: Counter[tuple[str, str, int]] = Counter()
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def count(self, exchange: HttpExchange) -> None:
        """Count an HTTP response."""
        assert exchange.status is not None
        # Paths that no route has are the clients' to choose, and would make endless series.
        self._responses[exchange.method, exchange.route or "none", exchange.status] += 1

    def collect(self) -> Iterator[Metric]:
        """Every metric with its present value."""
        yield from self._server()
        yield from self._requests()
        yield from self._engine()
        yield from self._memory()
        yield from self._drafts()

    def _server(self) -> Iterator[Metric]:
        engine = self._service.engine
        yield InfoMetricFamily("glmd_build", "The version that runs.", {"version": __version__})
        model = {"model": self._service.model.id}
        if engine.info is not None:
            model |= {
                "device": engine.info.device,
                "has_mtp": str(engine.info.has_mtp).lower(),
                "bits_per_weight": f"{engine.info.bits_per_weight:.3f}",
                "max_context": str(engine.info.max_context),
            }
        yield InfoMetricFamily("glmd_model", "What is served.", model)
        yield gauge(
            "glmd_start_time_seconds", "When the server began, in Unix time.", self._started
        )
        states = {state: state == engine.state for state in get_args(EngineState)}
        yield StateSetMetricFamily("glmd_engine_state", "Where the engine process stands.", states)
        yield counter(
            "glmd_engine_restarts", "How often the engine was started again.", engine.restarts
        )
        responses = CounterMetricFamily(
            "glmd_http_responses",
            "HTTP responses; 499: the client left before there was one.",
            labels=["method", "route", "status"],
        )
        for (method, route, status), count in sorted(self._responses.items()):
            responses.add_metric([method, route, str(status)], count)
        yield responses

    def _requests(self) -> Iterator[Metric]:
        requests, queue = self._service.requests, self._service.engine.queue
        totals = requests.totals
        waiting = sum(record.state == "queued" for record in requests.running.values())
        yield gauge(
            "glmd_num_requests_running",
            "Requests in prefill or decoding.",
            len(requests.running) - waiting,
        )
        yield gauge("glmd_num_requests_waiting", "Requests whose turn has not come.", waiting)
        yield gauge("glmd_queue_tokens", "Prompt tokens of what waits.", queue.tokens)
        yield counter(
            "glmd_answers_refused", "Answers for which there was no room to wait.", queue.refused
        )
        finished = CounterMetricFamily(
            "glmd_requests",
            "Requests to the engine that have ended, by API and by how.",
            labels=["api", "finished_reason"],
        )
        for (api, reason), count in sorted(totals.finished.items()):
            finished.add_metric([api, reason], count)
        yield finished
        yield counter(
            "glmd_prompt_tokens", "Prompt tokens, cached ones included.", totals.prompt_tokens
        )
        yield counter(
            "glmd_prompt_tokens_cached",
            "Prompt tokens that were not computed again.",
            totals.cached_tokens,
        )
        yield counter("glmd_generation_tokens", "Tokens generated.", totals.generated_tokens)
        for name, meaning, values in (
            ("time_to_first_token", "From a request's arrival to its first token.", totals.ttft),
            ("inter_token_latency", "Between two tokens of an answer.", totals.gaps),
            ("request_queue_time", "From a request's arrival until its turn came.", totals.queue),
            ("request_prefill_time", "From its turn to its first token.", totals.prefill),
            ("e2e_request_latency", "From a request's arrival to its end.", totals.seconds),
        ):
            yield histogram(f"glmd_{name}_seconds", meaning, values)

    def _engine(self) -> Iterator[Metric]:
        stats = self._service.engine.stats
        yield gauge("glmd_num_sequences_running", "Sequences in the engine.", stats.running)
        yield gauge("glmd_num_sequences_waiting", "Sequences that wait in it.", stats.waiting)
        yield counter("glmd_engine_steps", "Steps.", stats.steps)
        yield counter("glmd_engine_step_rows", "Token rows of all steps.", stats.rows)
        yield counter("glmd_engine_step_seconds", "Seconds of all steps.", stats.step_seconds_total)
        yield counter(
            "glmd_prompt_tokens_computed",
            "Prompt tokens whose KV was computed.",
            stats.prompt_tokens_computed,
        )
        yield counter(
            "glmd_num_preemptions", "Running sequences sent back to wait.", stats.preemptions
        )

    def _memory(self) -> Iterator[Metric]:
        stats = self._service.engine.stats
        budget = stats.kv_budget_bytes
        usage = stats.kv_bytes / budget if budget else 0.0
        yield gauge("glmd_kv_cache_usage_perc", "KV in use, 1 being all of its budget.", usage)
        yield gauge("glmd_kv_cache_bytes", "Bytes of KV.", stats.kv_bytes)
        yield gauge("glmd_kv_cache_budget_bytes", "Bytes that KV may grow to.", budget)
        yield gauge("glmd_kv_cache_tokens", "Tokens in the prefix tree.", stats.kv_tokens)
        yield gauge(
            "glmd_kv_cache_evictable_tokens",
            "Of them, those that no request holds.",
            stats.kv_idle_tokens,
        )
        yield gauge("glmd_kv_cache_nodes", "Sealed runs of tokens in the tree.", stats.kv_segments)
        yield gauge(
            "glmd_kv_cache_leaves", "Stored prefixes that no other continues.", stats.kv_branches
        )
        yield counter(
            "glmd_kv_cache_evicted_tokens", "Tokens evicted for room.", stats.evicted_tokens
        )
        yield counter(
            "glmd_out_of_memory", "Steps that the device had no memory for.", stats.out_of_memory
        )
        kinds = GaugeMetricFamily(
            "glmd_memory_bytes",
            "The engine's arrays: weights, KV, all alive, and kept for reuse by the allocator.",
            labels=["kind"],
        )
        for kind in ("weight", "kv", "active", "cache"):
            kinds.add_metric([kind], getattr(stats, f"{kind}_bytes"))
        yield kinds
        yield gauge(
            "glmd_memory_budget_bytes",
            "What weights, KV and working memory may take together.",
            stats.memory_budget_bytes,
        )
        processes = GaugeMetricFamily(
            "glmd_process_footprint_bytes", "What a process occupies.", labels=["process"]
        )
        processes.add_metric(["api"], process_memory_bytes())
        processes.add_metric(["engine"], stats.footprint_bytes)
        yield processes

    def _drafts(self) -> Iterator[Metric]:
        stats = self._service.engine.stats
        yield counter("glmd_spec_decode_num_drafts", "Times drafts were verified.", stats.verified)
        yield counter(
            "glmd_spec_decode_num_draft_tokens", "MTP drafts that were verified.", stats.drafted
        )
        yield counter(
            "glmd_spec_decode_num_accepted_tokens", "Drafts that were accepted.", stats.accepted
        )
        yield gauge(
            "glmd_spec_decode_mean_acceptance_length",
            "Tokens per verification, its own one included.",
            1 + stats.accepted / stats.verified if stats.verified else 1.0,
        )
        yield gauge(
            "glmd_spec_decode_acceptance_rate", "Share of drafts accepted lately.", stats.acceptance
        )
        yield gauge(
            "glmd_spec_decode_drafts_per_step",
            "Drafts per sequence and step that the gate has chosen; 0: drafting is off.",
            stats.drafts,
        )


def gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(name, meaning, value)


def counter(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(name, meaning, value)


def histogram(name: str, meaning: str, values: Histogram) -> Metric:
    buckets: Iterable[tuple[str, float]] = values.cumulated()
    return HistogramMetricFamily(name, meaning, buckets=list(buckets), sum_value=values.sum)
