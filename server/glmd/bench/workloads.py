"""What the engine benchmark asks for, as data: token ids, lengths, and who arrives when.

Both sides are given exactly the same. A length in the name is what it is at scale 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from glmd.ipc import TokenArray

SEED = 20_260_119

ENDLESS = 1 << 20
"""`max_tokens` of a stream that is cancelled when the workload is over."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt, continued greedily for `max_tokens` tokens whatever they are.

    Attributes:
        cancel_at: the share of the prompt after whose prefill the client goes away.
    """

    prompt: TokenArray
    max_tokens: int
    cancel_at: float | None = None


@dataclass(frozen=True, slots=True)
class Wave:
    """Requests that arrive together.

    Attributes:
        after: tokens that each earlier request has given, or it has ended, when the wave arrives.
            None: each earlier request has ended.
    """

    requests: tuple[Request, ...]
    after: int | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """Waves of requests. It is over when all but the endless ones have ended."""

    name: str
    waves: tuple[Wave, ...]

    @property
    def longest(self) -> int:
        """Tokens of context, prompt and output, that a side must be able to hold."""
        return max(
            len(r.prompt) + (r.max_tokens if r.max_tokens < ENDLESS else 0)
            for wave in self.waves
            for r in wave.requests
        )


class Prompts:
    """Draws token ids, and scales lengths.

    Args:
        vocab_size: ids are drawn from the whole vocabulary.
        scale: factor on every length of a prompt.
    """

    def __init__(self, vocab_size: int, scale: float) -> None:
        self._vocab_size = vocab_size
        self._scale = scale
        self._rng = np.random.default_rng(SEED)

    def length(self, tokens: int) -> int:
        """`tokens`, scaled; at least 8."""
        return max(8, round(tokens * self._scale))

    def draw(self, tokens: int) -> TokenArray:
        """A prompt of `length(tokens)` random ids."""
        return self._rng.integers(0, self._vocab_size, self.length(tokens), dtype=np.int32)

    def integer(self, low: int, high: int) -> int:
        """A random integer in [low, high)."""
        return int(self._rng.integers(low, high))


def decode(prompts: Prompts, rows: int, *, context: int = 128, new: int = 48) -> Workload:
    """`rows` streams of equal length."""
    requests = tuple(Request(prompts.draw(context), new) for _ in range(rows))
    return Workload(f"decode, batch {rows}", (Wave(requests),))


def ragged(prompts: Prompts, *, new: int = 48) -> Workload:
    """One stream with a long context among seven with a short one, which come when it decodes:
    together they would have ended while its prompt was still being computed."""
    long = Request(prompts.draw(4096), ENDLESS)
    short = tuple(Request(prompts.draw(100), new) for _ in range(7))
    return Workload(
        "ragged: one 4k context and seven of 100", (Wave((long,)), Wave(short, after=1))
    )


def shared_prefix(prompts: Prompts, *, rows: int = 16, new: int = 48) -> Workload:
    """Streams that begin with one long prefix, which is known when they arrive."""
    prefix = prompts.draw(2048)
    requests = tuple(Request(np.concatenate([prefix, prompts.draw(100)]), new) for _ in range(rows))
    waves = (Wave((Request(prefix, 1),)), Wave(requests))
    return Workload("16 rows on a shared 2k prefix, 100 own", waves)


def long_context(prompts: Prompts, *, new: int = 48) -> Workload:
    """One stream with 8k tokens behind it."""
    return Workload("one row at 8k context", (Wave((Request(prompts.draw(8192), new),)),))


def returning(prompts: Prompts) -> Workload:
    """A conversation comes back with 100 new tokens."""
    first = prompts.draw(8192)
    second = np.concatenate([first, prompts.draw(100)])
    waves = (Wave((Request(first, 1),)), Wave((Request(second, 1),)))
    return Workload("100 new tokens on a cached 8k context", waves)


def interrupted(prompts: Prompts, *, streams: int = 8) -> Workload:
    """A long prompt arrives while others are being answered, for long enough to know what their
    steps take, and how long the longest are, with nothing but the machine's own work beside."""
    running = tuple(Request(prompts.draw(100), ENDLESS) for _ in range(streams))
    waves = (Wave(running), Wave((Request(prompts.draw(8192), 1),), after=192))
    return Workload("an 8k prompt arrives among 8 running streams", waves)


def joining(prompts: Prompts, *, streams: int = 16, new: int = 64) -> Workload:
    """Streams that arrive while one is decoding already, as they do through HTTP."""
    first, *others = (Request(prompts.draw(256), new) for _ in range(streams))
    waves = (Wave((first,)), Wave(tuple(others), after=1))
    return Workload(f"{streams - 1} prompts of 256 join one stream", waves)


def together(prompts: Prompts, *, rows: int = 8) -> Workload:
    """Requests with one long prompt and a few own tokens arrive at the same moment."""
    prompt = prompts.draw(2048)
    requests = tuple(Request(np.concatenate([prompt, prompts.draw(16)]), 4) for _ in range(rows))
    return Workload("8 requests with one 2k prompt, at once", (Wave(requests),))


def cancelled(prompts: Prompts) -> Workload:
    """A client goes away late in the prefill, and sends the same again."""
    prompt = prompts.draw(8192)
    waves = (Wave((Request(prompt, 1, cancel_at=0.8),)), Wave((Request(prompt, 1),)))
    return Workload("cancelled at 80 % of an 8k prefill, sent again", waves)


def mixed(prompts: Prompts, *, count: int = 200, at_once: int = 20) -> Workload:
    """Short and long, some on a common prefix, some cancelled, in groups that overlap."""
    prefix = prompts.draw(256)
    requests = []
    for _ in range(count):
        prompt = prompts.draw(prompts.integer(8, 512))
        if prompts.integer(0, 2):
            prompt = np.concatenate([prefix, prompt])
        cancel_at = 0.5 if prompts.integer(0, 8) == 0 else None
        requests.append(Request(prompt, prompts.integer(4, 24), cancel_at))
    groups = [tuple(requests[i : i + at_once]) for i in range(0, count, at_once)]
    return Workload(f"{count} mixed requests", tuple(Wave(group, after=4) for group in groups))


def unique_tokens(sequences: Iterable[TokenArray]) -> int:
    """Tokens left when every common prefix is counted once: the least a KV store can hold."""
    rows = sorted(sequences, key=lambda row: row.tolist())
    total, before = 0, np.empty(0, np.int32)
    for row in rows:
        limit = min(len(row), len(before))
        differs = row[:limit] != before[:limit]
        total += len(row) - (int(differs.argmax()) if differs.any() else limit)
        before = row
    return total
