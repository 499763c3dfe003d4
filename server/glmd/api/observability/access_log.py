"""What the log says of each request: one line when it is over, and one more if it was slow.

Neither has any text of prompts or answers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from glmd.api.observability.exchange import HttpExchange
from glmd.api.observability.request_stats import RequestStats
from glmd.api.state import AppState
from glmd.ipc import CacheMatch

log = logging.getLogger("glmd.access")

POLLED = frozenset({"/livez", "/health", "/metrics", "/glmd/status"})
"""Asked every few seconds by those who watch; their lines are for DEBUG."""

REASONS = {
    "whole": "all of the prompt was stored",
    "new": "nothing is stored behind that",
    "differs": "what is stored there goes on differently, for {beyond} tokens",
    "evicted": "what was stored behind that was evicted",
    "salt": "more of it is stored, but with another cache_salt",
    "off": "the prefix cache is off",
}
"""Why no more of a prompt was found in the cache."""


class AccessLog:
    """Writes the lines.

    Args:
        service: whose setting `slow_request` says what is slow.
    """

    def __init__(self, service: AppState) -> None:
        self._service = service

    def exchange_ended(self, exchange: HttpExchange) -> None:
        """Log an HTTP request that is over."""
        level = logging.DEBUG if exchange.path in POLLED else logging.INFO
        if log.isEnabledFor(level):
            fields = fields_of(exchange)
            log.log(level, "%s", spell(fields), extra={"fields": fields})
        for record in exchange.records:
            self._record_ended(record)

    def record_ended(self, record: RequestStats) -> None:
        """Log a request that was in the background: its HTTP request is over already."""
        if record.exchange.ended is None:
            return
        fields = {"request_id": record.exchange.id, "background": record.id}
        fields |= fields_of_records([record])
        log.info("%s", spell(fields), extra={"fields": fields})
        self._record_ended(record)

    def _record_ended(self, record: RequestStats) -> None:
        limit = self._service.settings.slow_request
        if record.ended is None or not limit or slowest_wait(record) <= limit:
            return
        fields = {
            "request_id": record.exchange.id,
            "slow": record.id,
            **fields_of_records([record]),
            "longest_gap": round(record.longest_gap, 3),
        }
        log.warning("%s", explain(record), extra={"fields": fields})


def fields_of(exchange: HttpExchange) -> dict[str, Any]:
    """What there is to say of an HTTP request, without what does not apply to it."""
    assert exchange.ended is not None
    fields: dict[str, Any] = {
        "client": exchange.client,
        "key": exchange.key,
        "method": exchange.method,
        "path": exchange.path,
        "status": exchange.status,
        "seconds": round(exchange.ended - exchange.began, 3),
        "request_id": exchange.id,
        "stream": exchange.stream or None,
    }
    # A request in the background has not ended, and gets a line of its own when it does.
    fields |= fields_of_records([each for each in exchange.records if each.ended is not None])
    return {name: value for name, value in fields.items() if value is not None}


def fields_of_records(records: Sequence[RequestStats]) -> dict[str, Any]:
    """What there is to say of what a request had the engine do; with several prompts, in all."""
    if not records:
        return {}
    ttfts = [record.ttft for record in records if record.ttft is not None]
    waits = [record.queue_seconds for record in records if record.queue_seconds is not None]
    fields: dict[str, Any] = {
        "queued": round(min(waits), 3) if waits else None,
        "ttft": round(min(ttfts), 3) if ttfts else None,
        "prompt": sum(record.prompt_tokens for record in records),
        "cached": sum(record.cached_tokens for record in records),
        "generated": sum(record.generated_tokens for record in records),
        "finish": ",".join(dict.fromkeys(str(record.finish) for record in records)),
    }
    match = records[0].match
    if len(records) == 1 and match is not None:
        fields |= {"matched": match.tokens, "cache": match.reason}
    return {name: value for name, value in fields.items() if value is not None}


def spell(fields: dict[str, Any]) -> str:
    """Fields on one line: first what everybody looks for, then `name=value`."""
    named = dict(fields)
    first = [str(named.pop(name)) for name in ("method", "path", "status") if name in named]
    return " ".join([*first, *(f"{name}={value}" for name, value in named.items())])


def slowest_wait(record: RequestStats) -> float:
    """The longest that a request's client saw nothing, in seconds."""
    return max(record.seconds if record.ttft is None else record.ttft, record.longest_gap)


def explain(record: RequestStats) -> str:
    """Where the time of a request went, in a sentence."""
    if record.queue_seconds is None:
        return f"Slow: {record.id} waited {record.seconds:.1f} s, and its turn never came."
    parts = [f"waited {record.queue_seconds:.1f} s for its turn"]
    if record.ttft is None:
        parts.append(f"ended {record.seconds - record.queue_seconds:.1f} s later without a token")
    else:
        parts.append(f"had its first token {record.ttft - record.queue_seconds:.1f} s later")
        parts.append(f"paused for {record.longest_gap:.1f} s at most")
    sentence = f"Slow: {record.id} {', '.join(parts)}."
    if record.match is not None:
        sentence += f" {explain_match(record.match, record.prompt_tokens)}"
    return sentence


def explain_match(match: CacheMatch, prompt_tokens: int) -> str:
    """How much of a prompt was in the cache, and why not more."""
    reason = REASONS[match.reason].format(beyond=match.diverging_tokens)
    return f"Of its {prompt_tokens} prompt tokens {match.tokens} were stored: {reason}."
