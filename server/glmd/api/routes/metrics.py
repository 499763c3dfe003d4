"""Route `/metrics` for Prometheus. Names are vLLM's, with the prefix `glmd_`.

The collector reads the request statistics and the engine's statistics when it is scraped. Counters
of the engine restart at 0 when the engine restarts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from http import HTTPStatus
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
from starlette.exceptions import HTTPException

from glmd import __version__
from glmd.api.context import AccessDep
from glmd.api.observability.request_stats import HttpExchange
from glmd.api.state import AppState
from glmd.engine_client.client import Condition
from glmd.utils.memory import process_memory_bytes

router = APIRouter(tags=["Monitoring"])

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""HTTP methods that are labels."""


def gauge(name: str, description: str, value: float) -> Metric:
    return GaugeMetricFamily(name, description, value)


def counter(name: str, description: str, value: float) -> Metric:
    return CounterMetricFamily(name, description, value)


ENGINE_METRICS: tuple[tuple[Callable[[str, str, float], Metric], str, str, str], ...] = (
    (gauge, "num_sequences_running", "running", "Running sequences."),
    (gauge, "num_sequences_waiting", "waiting", "Sequences waiting in the engine."),
    (counter, "engine_steps", "steps", "Engine steps."),
    (counter, "engine_step_rows", "rows", "Token rows of all steps."),
    (counter, "engine_step_seconds", "step_seconds_total", "Time of all steps."),
    (counter, "prompt_tokens_computed", "prompt_tokens_computed",
     "Prompt tokens whose KV was computed."),
    (counter, "num_preemptions", "preemptions", "Running sequences moved back to the queue."),
    (gauge, "kv_cache_bytes", "kv_bytes", "Size of KV."),
    (gauge, "kv_cache_budget_bytes", "kv_budget_bytes", "Maximum size of KV."),
    (gauge, "kv_cache_tokens", "kv_tokens", "Tokens in the prefix tree."),
    (gauge, "kv_cache_evictable_tokens", "kv_idle_tokens",
     "Tokens in the prefix tree that no request uses."),
    (gauge, "kv_cache_nodes", "kv_segments", "Segments in the prefix tree."),
    (gauge, "kv_cache_leaves", "kv_branches", "Leaves of the prefix tree."),
    (counter, "kv_cache_evicted_tokens", "evicted_tokens", "Evicted tokens."),
    (gauge, "disk_cache_bytes", "disk_bytes", "Size of the disk cache."),
    (gauge, "disk_cache_budget_bytes", "disk_budget_bytes",
     "Maximum size of the disk cache; 0: there is none."),
    (gauge, "disk_cache_segments", "disk_segments", "Segments in the disk cache."),
    (counter, "disk_cache_hits", "disk_hits", "Sequences with KV restored from disk."),
    (counter, "disk_cache_restored_tokens", "disk_restored_tokens", "Tokens restored from disk."),
    (counter, "disk_cache_read_bytes", "disk_read_bytes", "Bytes read from the disk cache."),
    (counter, "disk_cache_written_bytes", "disk_written_bytes",
     "Bytes written to the disk cache since its folder was created."),
    (counter, "out_of_memory", "out_of_memory", "Steps that ran out of device memory."),
    (gauge, "mla_kernel", "mla_kernel",
     "1: decode attention runs in glmd's Metal kernel; 0: in MLX's operations."),
    (gauge, "experts_kernel", "experts_kernel",
     "1: routed experts of few rows run in glmd's Metal kernels; 0: in MLX's operations."),
    (gauge, "ranks", "ranks", "Processes among which the model is divided."),
    (gauge, "rank_latency_seconds", "rank_latency",
     "Time of a small sum over the ranks, measured at the start."),
    (gauge, "rank_bandwidth_bytes_per_second", "rank_bandwidth",
     "Speed of a large sum over the ranks, measured at the start."),
    (counter, "rank_sums", "rank_sums", "Sums over the ranks."),
    (counter, "rank_sum_bytes", "rank_sum_bytes", "Bytes in these sums, of each rank."),
    (counter, "rank_sum_seconds", "rank_sum_seconds",
     "Time of these sums, estimated from latency and bandwidth."),
    (gauge, "memory_budget_bytes", "memory_budget_bytes",
     "Maximum memory of weights, KV and activations."),
    (counter, "spec_decode_num_drafts", "verified", "Verifications of drafts."),
    (counter, "spec_decode_num_draft_tokens", "drafted", "Verified draft tokens."),
    (counter, "spec_decode_num_accepted_tokens", "accepted", "Accepted draft tokens."),
    (gauge, "spec_decode_acceptance_rate", "acceptance", "Recent share of accepted drafts."),
    (gauge, "spec_decode_drafts_per_step", "drafts",
     "Current number of drafts per sequence and step; 0: drafting is off."),
)  # fmt: skip
"""Type, name, attribute of `EngineStats`, description."""


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request, access: AccessDep) -> Response:
    """All metrics, in Prometheus's text format or OpenMetrics by the Accept header.

    They count the requests of all keys.

    Raises:
        HTTPException: 403: the key is not an admin's.
    """
    if not access.sees_all:
        raise HTTPException(
            HTTPStatus.FORBIDDEN,
            "The metrics count the requests of all keys. Use an admin's key"
            " (`glmd key create NAME --admin`).",
        )
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
        # Clients choose methods and paths without a route, so those must not become labels.
        method = exchange.method if exchange.method in METHODS else "other"
        self._responses[method, exchange.route or "none", exchange.status] += 1

    def collect(self) -> Iterator[Metric]:
        yield from self._server()
        yield from self._requests()
        yield from self._engine()

    def _server(self) -> Iterator[Metric]:
        engine = self._state.engine
        yield InfoMetricFamily("glmd_build", "Version of glmd.", {"version": __version__})
        model = {"model": self._state.model.id}
        if engine.info is not None:
            model |= {
                "device": engine.info.device,
                "has_mtp": str(engine.info.has_mtp).lower(),
                "mtp_left_out": str(engine.info.mtp_left_out).lower(),
                "kv_bits": str(engine.info.kv_bits),
                "bits_per_weight": f"{engine.info.bits_per_weight:.3f}",
                "max_context": str(engine.info.max_context),
            }
        yield InfoMetricFamily("glmd_model", "The served model.", model)
        yield gauge("glmd_start_time_seconds", "Unix time of the server's start.", self._started_at)
        states = {state: state == engine.condition for state in get_args(Condition)}
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

    def _as_vllm(self, name: str, description: str, value: float) -> Metric:
        """A metric that routers read, under vLLM's own name."""
        family = GaugeMetricFamily(f"vllm:{name}", description, labels=["model_name"])
        family.add_metric([self._state.model.id], value)
        return family

    def _requests(self) -> Iterator[Metric]:
        registry, queue = self._state.registry, self._state.engine.queue
        totals = registry.totals
        waiting = sum(stats.state == "queued" for stats in registry.running.values())
        running = len(registry.running) - waiting
        yield gauge("glmd_num_requests_running", "Requests in prefill or decoding.", running)
        yield gauge("glmd_num_requests_waiting", "Requests in the queue.", waiting)
        yield self._as_vllm("num_requests_running", "glmd_num_requests_running.", running)
        yield self._as_vllm("num_requests_waiting", "glmd_num_requests_waiting.", waiting)
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
        for build, name, attribute, description in ENGINE_METRICS:
            yield build(f"glmd_{name}", description, getattr(stats, attribute))
        budget = stats.kv_budget_bytes
        usage = stats.kv_bytes / budget if budget else 0.0
        # vLLM counts blocks that no request uses as free.
        idle = stats.kv_idle_tokens / stats.kv_tokens if stats.kv_tokens else 0.0
        in_use = usage * (1 - idle)
        yield gauge("glmd_kv_cache_usage_perc", "Used share of the KV budget, 0 to 1.", usage)
        for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):  # the second until vLLM 0.10
            yield self._as_vllm(name, "KV of running requests, as a share of its budget.", in_use)
        yield gauge(
            "glmd_spec_decode_mean_acceptance_length",
            "Tokens per verification, including the token that is not drafted.",
            1 + stats.accepted / stats.verified if stats.verified else 1.0,
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
        processes = GaugeMetricFamily(
            "glmd_process_footprint_bytes", "Memory footprint of a process.", labels=["process"]
        )
        processes.add_metric(["api"], process_memory_bytes())
        processes.add_metric(["engine"], stats.footprint_bytes)
        yield processes
