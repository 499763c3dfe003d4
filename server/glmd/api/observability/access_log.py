"""Access log: one line per request, and a second line for a slow request.

The lines contain no text of prompts or answers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from glmd.api.observability.request_stats import HttpExchange, RequestStats
from glmd.ipc import CacheMatch

log = logging.getLogger("glmd.access")

POLLED_PATHS = frozenset({"/livez", "/health", "/metrics", "/glmd/status"})
"""Requested every few seconds by monitors; logged at DEBUG, as are the files of the web page."""

PAGE_FILES = "/page/"

MISS_REASONS = {
    "whole": "the whole prompt was cached",
    "new": "nothing is cached beyond that prefix",
    "differs": "the cache continues differently there, for {diverging} tokens",
    "evicted": "the rest was evicted",
    "off": "the prefix cache is off",
}


class AccessLog:
    """Logs finished requests.

    Args:
        slow_request: Returns the setting of this name in seconds, which may change while running.
    """

    def __init__(self, slow_request: Callable[[], float]) -> None:
        self._slow_request = slow_request

    def exchange_ended(self, exchange: HttpExchange) -> None:
        """Log a finished HTTP request."""
        minor = exchange.path in POLLED_PATHS or exchange.path.startswith(PAGE_FILES)
        level = logging.DEBUG if minor else logging.INFO
        if log.isEnabledFor(level):
            fields = exchange_fields(exchange)
            log.log(level, "%s", format_fields(fields), extra={"fields": fields})
        for stats in exchange.stats:
            self._log_if_slow(stats)

    def request_ended(self, stats: RequestStats) -> None:
        """Log a background request, whose HTTP request has finished before."""
        if stats.exchange.ended is None:
            return
        fields = {"request_id": stats.exchange.id, "background": stats.id}
        fields |= stats_fields([stats])
        log.info("%s", format_fields(fields), extra={"fields": fields})
        self._log_if_slow(stats)

    def _log_if_slow(self, stats: RequestStats) -> None:
        limit = self._slow_request()
        if stats.ended is None or not limit or longest_wait(stats) <= limit:
            return
        fields = {
            "request_id": stats.exchange.id,
            "slow": stats.id,
            **stats_fields([stats]),
            "longest_gap": round(stats.longest_gap, 3),
        }
        log.warning("%s", explain(stats), extra={"fields": fields})


def exchange_fields(exchange: HttpExchange) -> dict[str, Any]:
    """Return the log fields of an HTTP request that apply."""
    assert exchange.ended is not None
    fields: dict[str, Any] = {
        "client": exchange.client,
        "key": exchange.key,
        "method": exchange.method,
        "path": exchange.path,
        "status": exchange.status,
        "seconds": round(exchange.ended - exchange.started, 3),
        "request_id": exchange.id,
        "stream": exchange.stream or None,
        "retry": exchange.is_retry or None,
    }
    # A background request is logged when it ends.
    fields |= stats_fields([stats for stats in exchange.stats if stats.ended is not None])
    return {name: value for name, value in fields.items() if value is not None}


def stats_fields(requests: Sequence[RequestStats]) -> dict[str, Any]:
    """Return the log fields of the requests to the engine that apply, as totals."""
    if not requests:
        return {}
    ttfts = [stats.ttft for stats in requests if stats.ttft is not None]
    waits = [stats.queue_seconds for stats in requests if stats.queue_seconds is not None]
    fields: dict[str, Any] = {
        "queued": round(min(waits), 3) if waits else None,
        "ttft": round(min(ttfts), 3) if ttfts else None,
        "prompt": sum(stats.prompt_tokens for stats in requests),
        "cached": sum(stats.cached_tokens for stats in requests),
        "generated": sum(stats.generated_tokens for stats in requests),
        "finish": ",".join(dict.fromkeys(str(stats.finish) for stats in requests)),
    }
    match = requests[0].match
    if len(requests) == 1 and match is not None:
        fields |= {"matched": match.tokens, "cache": match.reason}
    return {name: value for name, value in fields.items() if value is not None}


def format_fields(fields: dict[str, Any]) -> str:
    """Format fields as `METHOD PATH STATUS name=value …`."""
    named = dict(fields)
    first = [str(named.pop(name)) for name in ("method", "path", "status") if name in named]
    return " ".join([*first, *(f"{name}={value}" for name, value in named.items())])


def longest_wait(stats: RequestStats) -> float:
    """Return the longest time without a token for the client, in seconds."""
    return max(stats.seconds if stats.ttft is None else stats.ttft, stats.longest_gap)


def explain(stats: RequestStats) -> str:
    """Explain where the time of a slow request went."""
    if stats.queue_seconds is None:
        return f"Slow request {stats.id}: queued for {stats.seconds:.1f} s, never admitted."
    parts = [f"queued for {stats.queue_seconds:.1f} s"]
    if stats.ttft is None:
        parts.append(f"ended {stats.seconds - stats.queue_seconds:.1f} s later without a token")
    else:
        parts.append(f"first token {stats.ttft - stats.queue_seconds:.1f} s later")
        parts.append(f"longest gap {stats.longest_gap:.1f} s")
    text = f"Slow request {stats.id}: {', '.join(parts)}."
    if stats.match is not None:
        text += f" {explain_match(stats.match, stats.prompt_tokens)}"
    return text


def explain_match(match: CacheMatch, prompt_tokens: int) -> str:
    """Explain how much of a prompt was cached, and why no more."""
    reason = MISS_REASONS[match.reason].format(diverging=match.diverging_tokens)
    return f"{match.tokens} of {prompt_tokens} prompt tokens cached: {reason}."
