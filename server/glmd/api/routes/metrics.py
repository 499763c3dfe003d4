"""Route `/metrics` for Prometheus. Names are vLLM's, with the prefix `glmd_`.

The collector reads the request statistics and the engine's statistics when it is scraped. Counters
of the engine restart at 0 when the engine restarts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import get_args

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    StateSetMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from glmd import __version__
from glmd.api.observability.request_stats import HttpExchange
from glmd.api.state import AppState
from glmd.engine_client.client import EngineState
from glmd.utils.memory import process_memory_bytes

router = APIRouter(tags=["Monitoring"])


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """All metrics, in Prometheus's text format or OpenMetrics by the Accept header."""
    registry: CollectorRegistry = request.app.state.metrics.registry
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), media_type=content_type)


class Metrics(Collector):
    """The metrics of one server.

    Attributes:
        registry: contains this collector only.
    """

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._started_at = time.time()
        self._responses: Counter[tuple[str, str, int]] = Counter()
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def count(self, exchange: HttpExchange) -> None:
        """Count an HTTP response."""
        assert exchange.status is not None
        # Clients choose paths without a route, so such paths must not become labels.
        self._responses[exchange.method, exchange.route or "none", exchange.status] += 1

    def collect(self) -> Iterator[Metric]:
        yield from self._server()
        yield from self._requests()
        yield from self._engine()
        yield from self._memory()
        yield from self._drafts()

    def _server(self) -> Iterator[Metric]:
        engine = self._state.engine
        yield InfoMetricFamily("glmd_build", "Version of glmd.", {"version": __version__})
        model = {"model": self._state.model.id}
        if engine.info is not None:
            model |= {
                "device": engine.info.device,
                "has_mtp": str(engine.info.has_mtp).lower(),
                "bits_per_weight": f"{engine.info.bits_per_weight:.3f}",
                "max_context": str(engine.info.max_context),
            }
        yield InfoMetricFamily("glmd_model", "The served model.", model)
        yield gauge("glmd_start_time_seconds", "Unix time of the server's start.", self._started_at)
        states = {state: state == engine.state for state in get_args(EngineState)}
        yield StateSetMetricFamily("glmd_engine_state", "State of the engine process.", states)
        yield counter("glmd_engine_restarts", "Engine restarts.", engine.restarts)
        responses = CounterMetricFamily(
            "glmd_http_responses",
            "HTTP responses; status 499: the client disconnected before the response.",
            labels=["method", "route", "status"],
        )
        for (method, route, status), count in sorted(self._responses.items()):
            responses.add_metric([method, route, str(status)], count)
        yield responses

    def _requests(self) -> Iterator[Metric]:
        registry, queue = self._state.registry, self._state.engine.queue
        totals = registry.totals
        waiting = sum(stats.state == "queued" for stats in registry.running.values())
        running = len(registry.running) - waiting
        yield gauge("glmd_num_requests_running", "Requests in prefill or decoding.", running)
        yield gauge("glmd_num_requests_waiting", "Requests in the queue.", waiting)
        yield gauge("glmd_queue_tokens", "Prompt tokens in the queue.", queue.tokens)
        yield counter(
            "glmd_answers_refused", "Answers refused because the queue was full.", queue.refused
        )
        finished = CounterMetricFamily(
            "glmd_requests",
            "Finished requests to the engine, by API and finish reason.",
            labels=["api", "finished_reason"],
        )
        for (api, reason), count in sorted(totals.finished.items()):
            finished.add_metric([api, reason], count)
        yield finished
        yield counter(
            "glmd_prompt_tokens", "Prompt tokens, including cached tokens.", totals.prompt_tokens
        )
        yield counter(
            "glmd_prompt_tokens_cached", "Prompt tokens found in the cache.", totals.cached_tokens
        )
        yield counter("glmd_generation_tokens", "Generated tokens.", totals.generated_tokens)
        for histogram in totals.histograms:
            yield from histogram.collect()

    def _engine(self) -> Iterator[Metric]:
        stats = self._state.engine.stats
        yield gauge("glmd_num_sequences_running", "Running sequences.", stats.running)
        yield gauge("glmd_num_sequences_waiting", "Sequences waiting in the engine.", stats.waiting)
        yield counter("glmd_engine_steps", "Engine steps.", stats.steps)
        yield counter("glmd_engine_step_rows", "Token rows of all steps.", stats.rows)
        yield counter("glmd_engine_step_seconds", "Time of all steps.", stats.step_seconds_total)
        yield counter(
            "glmd_prompt_tokens_computed",
            "Prompt tokens whose KV was computed.",
            stats.prompt_tokens_computed,
        )
        yield counter(
            "glmd_num_preemptions", "Running sequences moved back to the queue.", stats.preemptions
        )

    def _memory(self) -> Iterator[Metric]:
        stats = self._state.engine.stats
        budget = stats.kv_budget_bytes
        usage = stats.kv_bytes / budget if budget else 0.0
        yield gauge("glmd_kv_cache_usage_perc", "Used share of the KV budget, 0 to 1.", usage)
        yield gauge("glmd_kv_cache_bytes", "Size of KV.", stats.kv_bytes)
        yield gauge("glmd_kv_cache_budget_bytes", "Maximum size of KV.", budget)
        yield gauge("glmd_kv_cache_tokens", "Tokens in the prefix tree.", stats.kv_tokens)
        yield gauge(
            "glmd_kv_cache_evictable_tokens",
            "Tokens in the prefix tree that no request uses.",
            stats.kv_idle_tokens,
        )
        yield gauge("glmd_kv_cache_nodes", "Segments in the prefix tree.", stats.kv_segments)
        yield gauge("glmd_kv_cache_leaves", "Leaves of the prefix tree.", stats.kv_branches)
        yield counter("glmd_kv_cache_evicted_tokens", "Evicted tokens.", stats.evicted_tokens)
        yield counter(
            "glmd_out_of_memory", "Steps that ran out of device memory.", stats.out_of_memory
        )
        kinds = GaugeMetricFamily(
            "glmd_memory_bytes",
            "Memory of the engine's arrays: weight, kv, active (all arrays), cache (kept by the"
            " allocator for reuse).",
            labels=["kind"],
        )
        for kind in ("weight", "kv", "active", "cache"):
            kinds.add_metric([kind], getattr(stats, f"{kind}_bytes"))
        yield kinds
        yield gauge(
            "glmd_memory_budget_bytes",
            "Maximum memory of weights, KV and activations.",
            stats.memory_budget_bytes,
        )
        processes = GaugeMetricFamily(
            "glmd_process_footprint_bytes", "Memory footprint of a process.", labels=["process"]
        )
        processes.add_metric(["api"], process_memory_bytes())
        processes.add_metric(["engine"], stats.footprint_bytes)
        yield processes

    def _drafts(self) -> Iterator[Metric]:
        stats = self._state.engine.stats
        yield counter("glmd_spec_decode_num_drafts", "Verifications of drafts.", stats.verified)
        yield counter("glmd_spec_decode_num_draft_tokens", "Verified draft tokens.", stats.drafted)
        yield counter(
            "glmd_spec_decode_num_accepted_tokens", "Accepted draft tokens.", stats.accepted
        )
        yield gauge(
            "glmd_spec_decode_mean_acceptance_length",
            "Tokens per verification, including the token that is not drafted.",
            1 + stats.accepted / stats.verified if stats.verified else 1.0,
        )
        yield gauge(
            "glmd_spec_decode_acceptance_rate", "Recent share of accepted drafts.", stats.acceptance
        )
        yield gauge(
            "glmd_spec_decode_drafts_per_step",
            "Current number of drafts per sequence and step; 0: drafting is off.",
            stats.drafts,
        )


def gauge(name: str, description: str, value: float) -> Metric:
    return GaugeMetricFamily(name, description, value)


def counter(name: str, description: str, value: float) -> Metric:
    return CounterMetricFamily(name, description, value)
