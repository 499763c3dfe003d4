"""What is recorded of one run of a workload, and what is read from the record."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import numpy as np

from glmd.bench.workloads import ENDLESS, Request, unique_tokens


@dataclass(slots=True)
class Life:
    """One request, from its arrival to its end. Times in seconds of one monotonic clock."""

    request: Request
    arrived: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each token was there."""
    cached: int = 0
    """Prompt tokens that were not computed for this request."""
    prefilled: int = 0
    """Prompt tokens that are in the KV so far."""
    ended: float | None = None

    @property
    def endless(self) -> bool:
        return self.request.max_tokens == ENDLESS

    def has_given(self, tokens: int | None) -> bool:
        """Whether it gave that many tokens or ended; None: whether it ended."""
        return self.ended is not None or (tokens is not None and len(self.tokens) >= tokens)


@dataclass(slots=True)
class Trace:
    """One run.

    Attributes:
        waves: the requests' lives, in the workload's order.
        kv_bytes: of the whole KV store, after the last step in which all of the last wave decoded.
        given_then: how many tokens each life had given at that moment.
        computed: prompt tokens that were run through the model.
        resting_bytes: arrays alive when all has ended, beyond those alive before the run.
        resting_kv_bytes: of these, what is kept on purpose for later requests.
        resting_arrays: how many arrays that is.
    """

    waves: list[list[Life]] = field(default_factory=list)
    kv_bytes: int = 0
    given_then: list[int] = field(default_factory=list)
    computed: int = 0
    resting_bytes: int = 0
    resting_kv_bytes: int = 0
    resting_arrays: int = 0

    @property
    def lives(self) -> list[Life]:
        return [life for wave in self.waves for life in wave]

    def all_decoding(self) -> bool:
        """Whether every request of the last wave has started, and none has ended."""
        return all(life.times and life.ended is None for life in self.waves[-1])

    def least_kv_tokens(self) -> int:
        """Tokens that a KV store had to hold when `kv_bytes` was read: every common prefix once.

        The last token of each output had not been through the model yet.
        """
        return unique_tokens(
            np.concatenate([life.request.prompt, np.array(life.tokens[: given - 1], np.int32)])
            for life, given in zip(self.lives, self.given_then, strict=True)
        )

    def decode_rate(self) -> float:
        """Tokens per second of the last wave, from the moment when all of it decodes until one
        of it ends."""
        start = max(life.times[0] for life in self.waves[-1])
        stop = min(life.times[-1] for life in self.waves[-1])
        given = sum(start < time <= stop for life in self.waves[-1] for time in life.times)
        return given / (stop - start)

    def overall_rate(self) -> float:
        """Tokens per second of all requests, from the first arrival to the last token."""
        start = min(life.arrived for life in self.lives)
        stop = max(life.times[-1] for life in self.lives)
        return sum(len(life.tokens) for life in self.lives) / (stop - start)

    def first_token_seconds(self) -> float:
        """From the last wave's arrival to its first token."""
        return min(life.times[0] - life.arrived for life in self.waves[-1])

    def _steps_before(self) -> list[float]:
        """Seconds between tokens of the first wave's streams, before the last wave arrives."""
        arrival = self.waves[-1][0].arrived
        started = max(life.times[0] for life in self.waves[0])
        return [
            after - before
            for life in self.waves[0]
            for before, after in pairwise(life.times)
            if started <= before and after <= arrival
        ]

    def median_step(self) -> float:
        """Seconds between tokens of the first wave before the last one arrives."""
        return median(self._steps_before())

    def longest_step(self) -> float:
        """The longest of those: what happens on this machine without the last wave."""
        return max(self._steps_before())

    def longest_gap(self) -> float:
        """The longest wait for a token, in seconds, of any first-wave stream from the last wave's
        arrival to its first token."""
        arrival, answered = self.waves[-1][0].arrived, self.waves[-1][0].times[0]
        return max(
            after - before
            for life in self.waves[0]
            for before, after in pairwise([t for t in life.times if t < answered] + [answered])
            if after > arrival
        )

    def cached_share(self) -> float:
        """Of the last request's prompt."""
        life = self.waves[-1][-1]
        return life.cached / len(life.request.prompt)
