"""Workloads of the engine benchmark: token ids, lengths and arrival order.

Both backends get identical workloads. Lengths in names are those at scale 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from glmd.ipc import TokenArray

SEED = 20_260_119

ENDLESS = 1 << 20
"""`max_tokens` of a stream that is cancelled at the end of the workload."""

EARLY_TOKENS = 1024
"""Tokens that a stream may generate before all streams of its workload decode."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt, continued greedily for exactly `max_tokens` tokens.

    Attributes:
        cancel_at: share of the prompt after whose prefill the request is cancelled. None: never.
    """

    prompt: TokenArray
    max_tokens: int
    cancel_at: float | None = None


@dataclass(frozen=True, slots=True)
class Wave:
    """Requests that arrive at the same time.

    Attributes:
        after: the wave arrives once each earlier request has this many tokens or has ended. None:
            once each earlier request has ended.
    """

    requests: tuple[Request, ...]
    after: int | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """Waves of requests.

    Requests that still run at the end of the workload are cancelled.

    Attributes:
        window: the workload is over once each request of the last wave has got this many tokens
            while all of them decode, or one has ended. None: once all but the endless requests have
            ended.
    """

    name: str
    waves: tuple[Wave, ...]
    window: int | None = None

    @property
    def longest(self) -> int:
        """Largest context of a request, in tokens of prompt and output."""
        return max(
            len(r.prompt) + (r.max_tokens if r.max_tokens < ENDLESS else 0)
            for wave in self.waves
            for r in wave.requests
        )


class Prompts:
    """Random prompts of scaled lengths, drawn from the whole vocabulary.

    Args:
        scale: factor on the length of each prompt.
    """

    def __init__(self, vocab_size: int, scale: float) -> None:
        self._vocab_size = vocab_size
        self._scale = scale
        self._rng = np.random.default_rng(SEED)

    def draw(self, tokens: int) -> TokenArray:
        """Return `tokens` random ids, scaled, at least 8."""
        length = max(8, round(tokens * self._scale))
        return self._rng.integers(0, self._vocab_size, length, dtype=np.int32)

    def integer(self, low: int, high: int) -> int:
        """Return a random integer in [low, high)."""
        return int(self._rng.integers(low, high))


def _streams(prompts: Iterable[TokenArray], window: int) -> Wave:
    """Return streams that all still run when the last has got `window` tokens."""
    return Wave(tuple(Request(prompt, EARLY_TOKENS + window) for prompt in prompts))


def decode(prompts: Prompts, rows: int, *, window: int) -> Workload:
    """Streams of equal length."""
    streams = _streams((prompts.draw(128) for _ in range(rows)), window)
    return Workload(f"decode, batch {rows}", (streams,), window)


def ragged(prompts: Prompts, *, window: int = 48) -> Workload:
    """One long context among seven short ones, which arrive once the long one decodes."""
    long = Request(prompts.draw(4096), ENDLESS)
    short = replace(_streams((prompts.draw(100) for _ in range(7)), window), after=1)
    return Workload("ragged: one 4k context and seven of 100", (Wave((long,)), short), window)


def shared_prefix(prompts: Prompts, *, rows: int = 16, window: int = 48) -> Workload:
    """Streams with a long common prefix that is cached when they arrive."""
    prefix = prompts.draw(2048)
    own = (np.concatenate([prefix, prompts.draw(100)]) for _ in range(rows))
    waves = (Wave((Request(prefix, 1),)), _streams(own, window))
    return Workload("16 rows on a shared 2k prefix, 100 own", waves, window)


def long_context(prompts: Prompts, *, window: int = 48) -> Workload:
    """One stream with a context of 8k tokens."""
    return Workload("one row at 8k context", (_streams([prompts.draw(8192)], window),), window)


def returning(prompts: Prompts) -> Workload:
    """A conversation continued with 100 new tokens."""
    first = prompts.draw(8192)
    second = np.concatenate([first, prompts.draw(100)])
    waves = (Wave((Request(first, 1),)), Wave((Request(second, 1),)))
    return Workload("100 new tokens on a cached 8k context", waves)


def interrupted(prompts: Prompts) -> Workload:
    """A long prompt that arrives while eight streams decode.

    192 tokens before the arrival show the step time and its outliers without the prompt.
    """
    running = tuple(Request(prompts.draw(100), ENDLESS) for _ in range(8))
    waves = (Wave(running), Wave((Request(prompts.draw(8192), 1),), after=192))
    return Workload("an 8k prompt arrives among 8 running streams", waves)


def joining(prompts: Prompts) -> Workload:
    """Fifteen prompts that arrive while one stream decodes, as they do through HTTP."""
    first, *others = (Request(prompts.draw(256), 64) for _ in range(16))
    waves = (Wave((first,)), Wave(tuple(others), after=1))
    return Workload("15 prompts of 256 join one stream", waves)


def together(prompts: Prompts) -> Workload:
    """Requests with one long common prefix that arrive at the same time."""
    prompt = prompts.draw(2048)
    requests = tuple(Request(np.concatenate([prompt, prompts.draw(16)]), 4) for _ in range(8))
    return Workload("8 requests with one 2k prompt, at once", (Wave(requests),))


def cancelled(prompts: Prompts) -> Workload:
    """A prompt cancelled late in its prefill and sent again.

    Both backends compute prompts in chunks of 2,048 and report 75 %, then the whole prompt.
    """
    prompt = prompts.draw(8192)
    waves = (Wave((Request(prompt, 1, cancel_at=0.75),)), Wave((Request(prompt, 1),)))
    return Workload("cancelled at 75 % of an 8k prefill, sent again", waves)


def mixed(prompts: Prompts) -> Workload:
    """Short and long prompts in overlapping groups, some shared, some cancelled."""
    count, group_size = 200, 20
    prefix = prompts.draw(256)
    requests = []
    for _ in range(count):
        prompt = prompts.draw(prompts.integer(8, 512))
        if prompts.integer(0, 2):
            prompt = np.concatenate([prefix, prompt])
        cancel_at = 0.5 if prompts.integer(0, 8) == 0 else None
        requests.append(Request(prompt, prompts.integer(4, 24), cancel_at))
    groups = [tuple(requests[i : i + group_size]) for i in range(0, count, group_size)]
    return Workload(f"{count} mixed requests", tuple(Wave(group, after=4) for group in groups))


def unique_tokens(sequences: Iterable[TokenArray]) -> int:
    """Count tokens with each common prefix once, the minimum of a KV cache."""
    rows = sorted(sequences, key=lambda row: row.tolist())
    total, before = 0, np.empty(0, np.int32)
    for row in rows:
        limit = min(len(row), len(before))
        differs = row[:limit] != before[:limit]
        total += len(row) - (int(differs.argmax()) if differs.any() else limit)
        before = row
    return total
