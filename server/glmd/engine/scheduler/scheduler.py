"""Who runs in the next step, and with how many rows.

Decoding sequences always run. What a step may take beyond them goes to prefill: a part to the
prompt that came first, so that none starves, the rest to the shortest, so that none waits behind
a long one.

Before any of that come the clients: who was served least goes first
(`glmd.engine.scheduler.fairness`), so a client with a hundred requests takes turns with one that
has a single one. A request can step back behind everybody's, by a priority below 0, but forward
only among its own client's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from glmd.engine.config import MAX_WIDTH, EngineConfig
from glmd.engine.scheduler.fairness import OUTPUT_WEIGHT, VirtualTokenCounter
from glmd.engine.scheduler.prefill_budget import SMALLEST_CHUNK, PrefillBudget
from glmd.engine.sequence import NO_SLOT, Sequence
from glmd.ipc import CacheMatch
from glmd.kv_cache.prefix_tree import PrefixTree
from glmd.kv_cache.segment import Segment
from glmd.kv_cache.tail_pool import TAIL_TOKENS, TailPool

ADMISSION_RESERVE = 256
"""Output tokens that admission counts on, beside the prompt, unless `max_tokens` is smaller.
More would leave memory idle, fewer would preempt sooner."""

SHORT_PROMPT = 512
"""Tokens left to compute, up to which a prompt is of the crowd for which streams wait longer. That
is over soon; several long prompts would slow them for minutes, and hardly come sooner for it."""

ELDEST_SHARE = 4
"""The prompt that came first gets one part in this many of a step's prefill rows at least."""


@dataclass(slots=True)
class SchedulerOutput:
    """The rows of one step: one for each of `decode`, and `chunks` of (sequence, rows).

    Attributes:
        admitted: sequences that have left the queue for the first time.
    """

    decode: list[Sequence] = field(default_factory=list)
    chunks: list[tuple[Sequence, int]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decode or self.chunks)


class Scheduler:
    """Owns the queues, the tree and the tails, and keeps them within the memory budget.

    Attributes:
        waiting: sequences that hold nothing yet (or nothing any more: preempted ones).
        running: sequences that hold a lease, in order of admission.
        kv_budget: bytes for the tree and the tails.
        max_running: sequences that may run at once.
        preemptions: number of times a running sequence was sent back to wait.
    """

    def __init__(
        self,
        config: EngineConfig,
        tree: PrefixTree[Segment],
        tails: TailPool,
        *,
        kv_budget: int,
        kv_bytes_per_token: int,
        chunk_limit: Callable[[int, int], int],
    ) -> None:
        """
        Args:
            chunk_limit: from (context tokens, rows wanted) to the rows that one chunk may
                have for its transients to stay bounded.
        """
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.kv_budget = kv_budget
        self.max_running = config.max_running
        self.preemptions = 0
        self.prefill_budget = PrefillBudget(config.max_slowdown, config.max_step_tokens)
        self._config = config
        self._tree = tree
        self._tails = tails
        self._token_bytes = kv_bytes_per_token
        self._chunk_limit = chunk_limit
        self._prefilled = 0
        """Prefill tokens served so far: the clock by which waiting sequences age."""
        self._arrivals = 0
        self._shares = VirtualTokenCounter()

    # -- coming and going -----------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        sequence.arrival_prefill_clock = self._prefilled
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._shares.enter(sequence.request.client)
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out for good; what it computed is sealed and stays shared."""
        if sequence.lease is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._free(sequence)
        self._shares.leave(sequence.request.client)
        if not self._config.prefix_cache and not self.running:
            self._tree.clear()

    def flush_tail(self, sequence: Sequence) -> None:
        """Move a sequence's tail into the tree; the slot stays its own."""
        assert sequence.lease is not None
        stop = sequence.num_cacheable_tokens
        count = stop - sequence.num_cached_tokens
        if count > 0:
            tail = self._tails.copy_out(sequence.slot, count)
            self._tree.insert(
                sequence.lease, sequence.cache_keys(sequence.num_cached_tokens, stop), tail
            )
            sequence.num_cached_tokens = stop
            if rest := sequence.max_tail_tokens:
                self._tails.shift(sequence.slot, count, rest)

    def _free(self, sequence: Sequence) -> None:
        assert sequence.lease is not None
        self.flush_tail(sequence)
        if sequence.slot != NO_SLOT:
            self._tails.release(sequence.slot)
            sequence.slot = NO_SLOT
        self._tree.release(sequence.lease)
        sequence.lease = None
        self._ensure_free(0)  # The tail has been copied, and the pool may be no smaller.

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to wait; its prefix stays cached as long as it can."""
        self.running.remove(sequence)
        self._free(sequence)
        sequence.num_cached_tokens = sequence.num_computed_tokens = 0
        self.waiting.append(sequence)
        self.preemptions += 1

    def reset_kv(self) -> list[Sequence]:
        """Forget all KV; what ran waits, to be computed anew. Returns what ran."""
        dropped, self.running = self.running, []
        for sequence in dropped:
            sequence.lease, sequence.slot, sequence.history = None, NO_SLOT, None
            sequence.num_cached_tokens = sequence.num_computed_tokens = 0
        self._tree.reset()
        self._tails.reset()
        self.waiting += dropped
        return dropped

    def _least_urgent(self) -> Sequence:
        """The running sequence that gives way to the others.

        It is one that steps back, else one of the client that runs most of them; of those that
        could, the youngest, but for what its client put before it. The eldest gives way only to
        requests more urgent than itself, so something always gets on.
        """
        counts = self._running_counts()

        def yields(s: Sequence) -> tuple[int, int]:
            return priority_demotion(s), counts[s.request.client]

        youngest = max(self.running, key=lambda s: (*yields(s), s.arrival))
        client = youngest.request.client
        candidates = [
            s for s in self.running if s.request.client == client and yields(s) == yields(youngest)
        ]
        return max(candidates, key=lambda s: (-s.request.priority, s.arrival))

    # -- planning -------------------------------------------------------------------------

    @property
    def requires_sync(self) -> bool:
        """Whether a running sequence's next row depends on tokens that are still in flight."""
        return any(s.requires_sync and s.num_inflight_tokens for s in self.running)

    def schedule(self) -> SchedulerOutput:
        """Choose the rows of the next step and make room for them."""
        preempted = self.preemptions
        decode = self._schedule_decode()
        for sequence in decode:
            self._shares.charge(sequence.request.client, OUTPUT_WEIGHT)
        admitted = self._admit() if self.preemptions == preempted else []
        needs = [
            sequence.num_uncomputed_tokens
            for sequence in self.running
            if sequence.num_uncomputed_tokens > 1
        ]
        if not needs:
            return SchedulerOutput(decode, [], admitted)
        crowd = sum(rows <= SHORT_PROMPT for rows in needs)
        rows = self.prefill_budget.prefill_budget(len(decode), max(crowd, 1))
        return SchedulerOutput(decode, self._schedule_prefill(rows), admitted)

    def _schedule_decode(self) -> list[Sequence]:
        """All running sequences that need one row; the youngest make room if they must."""
        while True:
            ready = [
                s for s in self.running if s.num_uncomputed_tokens == 1 and not s.at_length_limit
            ]
            for sequence in ready:
                if sequence.num_cacheable_tokens - sequence.num_cached_tokens >= TAIL_TOKENS:
                    self.flush_tail(sequence)
            room = max((s.max_tail_tokens for s in self.running), default=0) + 2 * MAX_WIDTH
            if not ready or self._ensure_free(self._tail_growth(ready, room)):
                break
            if len(self.running) == 1:
                break  # Alone, it always fits: `limit` is bounded by the budget.
            self._preempt(self._least_urgent())
        for sequence in ready:
            self.allocate_slot(sequence)
        if ready:
            self._tails.reserve(room)
        return ready

    def allocate_slot(self, sequence: Sequence) -> None:
        """Make sure that a sequence has a tail to write to."""
        if sequence.slot == NO_SLOT:
            sequence.slot = self._tails.allocate()

    def _tail_growth(self, ready: list[Sequence], tokens: int) -> int:
        """Bytes by which the pool would grow to give all of `ready` room for `tokens` tokens."""
        new = sum(s.slot == NO_SLOT for s in ready)
        return self._tails.growth(new, tokens) * self._token_bytes

    def _admit(self) -> list[Sequence]:
        """Give leases to waiting sequences, best first, while there is room for them.

        Returns those that had none before.
        """
        counts = self._running_counts()
        # Prefill that has been let in but not served: what is admitted next must know of it.
        due: Counter[str] = Counter()
        for s in self.running:
            due[s.request.client] += s.num_uncomputed_tokens
        new: list[Sequence] = []

        def rank(s: Sequence) -> tuple[int, int, int, int, int]:
            client = s.request.client
            return (
                priority_demotion(s),
                self._shares.served(client) + due[client],
                counts[client],
                -s.request.priority,
                s.num_uncomputed_tokens - (self._prefilled - s.arrival_prefill_clock),
            )

        while self.waiting and len(self.running) < self.max_running:
            sequence = min(self.waiting, key=rank)
            if sequence.num_inflight_tokens:
                break  # Preempted a moment ago: its last tokens are not known yet.
            lease = self._tree.acquire(sequence.request.cache_salt)
            sequence.lease = lease
            self._extend_match(sequence)
            expected = min(sequence.max_length - sequence.length, ADMISSION_RESERVE)
            need = (sequence.num_uncomputed_tokens + expected) * self._token_bytes
            if self.running and need > self._available() - self._reserved_bytes():
                self._tree.release(lease)
                sequence.lease = None
                sequence.num_cached_tokens = sequence.num_computed_tokens = 0
                break
            self.waiting.remove(sequence)
            self.running.append(sequence)
            counts[sequence.request.client] += 1
            due[sequence.request.client] += sequence.num_uncomputed_tokens
            if not sequence.admitted:
                sequence.admitted = True
                sequence.cache_match = self._explain_match(sequence)
                new.append(sequence)
        return new

    def _running_counts(self) -> Counter[str]:
        """Running sequences by client."""
        return Counter(s.request.client for s in self.running)

    def _reserved_bytes(self) -> int:
        """Bytes that running sequences are expected to need still."""
        tokens = 0
        for s in self.running:
            tokens += s.num_uncomputed_tokens + max(
                0, min(s.max_length - s.length, ADMISSION_RESERVE - (s.length - s.prompt_length))
            )
        return tokens * self._token_bytes

    def _schedule_prefill(self, budget: int) -> list[tuple[Sequence, int]]:
        """Divide `budget` rows among the sequences in prefill."""
        for sequence in self.running:
            if sequence.num_uncomputed_tokens > 1:
                self._extend_match(sequence)
        # One that needs a single row by now is for the next step's decode rows.
        prefilling = [s for s in self.running if s.num_uncomputed_tokens > 1]
        if not prefilling or budget <= 0:
            return []
        eldest = min(prefilling, key=lambda s: (priority_demotion(s), s.arrival))
        others = [s for s in prefilling if s is not eldest]
        others.sort(
            key=lambda s: (
                priority_demotion(s),
                self._shares.served(s.request.client),
                -s.request.priority,
                s.num_uncomputed_tokens,
            )
        )
        kept = max(1, budget // ELDEST_SHARE)

        chunks: list[tuple[Sequence, int]] = []
        planned = ending = 0
        # Another chunk of this step may be about to compute the very same tokens: wait for it,
        # the next step finds them sealed.
        starts = {self._start(eldest)} if self._config.prefix_cache else set()
        for sequence in [*others, eldest]:
            left = budget - planned - (0 if sequence is eldest else kept)
            if left <= 0 or (sequence is not eldest and self._start(sequence) in starts):
                continue
            rows = self._chunk_limit(
                sequence.num_computed_tokens, min(sequence.num_uncomputed_tokens, left)
            )
            ends = rows == sequence.num_uncomputed_tokens
            # A prompt's last row may begin a tail (`ModelRunner._book`).
            capacity = max(self._tails.capacity, MAX_WIDTH)
            tails = self._tails.growth(ending + ends, capacity)
            rows = self._max_rows_that_fit(planned + tails, rows)
            if not rows:
                continue
            ending += rows == sequence.num_uncomputed_tokens
            if self._config.prefix_cache:
                starts.add(self._start(sequence))
            chunks.append((sequence, rows))
            planned += rows
            self._shares.charge(sequence.request.client, rows)
        self._prefilled += planned
        if not chunks and len(prefilling) == len(self.running) > 1:
            # Together they hold all of the memory and none can go on.
            self._preempt(self._least_urgent())
        return chunks

    @staticmethod
    def _start(sequence: Sequence) -> tuple[int, int, int]:
        """Where in the tree the first token to compute would hang, and its key."""
        assert sequence.lease is not None
        key = sequence.cache_keys(sequence.num_computed_tokens, sequence.num_computed_tokens + 1)[0]
        return id(sequence.lease.node), sequence.lease.length, int(key)

    def _extend_match(self, sequence: Sequence) -> None:
        """Advance over tokens that are in the tree by now, leaving at least one to compute."""
        assert sequence.lease is not None
        if not self._config.prefix_cache:
            return
        known = sequence.cache_keys(sequence.num_computed_tokens, sequence.length - 1)
        found = self._tree.match_prefix(sequence.lease, known)
        sequence.num_cached_tokens += found
        sequence.num_computed_tokens += found

    def _explain_match(self, sequence: Sequence) -> CacheMatch:
        """How much of a prompt was stored, and why not more."""
        assert sequence.lease is not None
        if not self._config.prefix_cache:
            return CacheMatch(tokens=0, reason="off")
        found, last = sequence.num_computed_tokens, sequence.prompt_length - 1
        if found >= last:
            return CacheMatch(tokens=found, reason="whole")
        prompt = sequence.cache_keys(0, last)
        beyond = self._tree.divergence(sequence.lease, int(prompt[found]))
        if beyond.evicted:
            return CacheMatch(tokens=found, reason="evicted")
        if self._tree.stored_elsewhere(sequence.request.cache_salt, prompt) > found:
            return CacheMatch(tokens=found, reason="salt")
        if beyond.tokens:
            return CacheMatch(tokens=found, reason="differs", diverging_tokens=beyond.tokens)
        return CacheMatch(tokens=found, reason="new")

    # -- memory ---------------------------------------------------------------------------

    @property
    def kv_bytes(self) -> int:
        """Bytes held by the tree and the tails."""
        return self._tree.nbytes + self._tails.nbytes

    def _max_rows_that_fit(self, planned: int, rows: int) -> int:
        """Of `rows` rows beyond those planned, as many as there is room for; 0: hardly any."""
        if self._ensure_free((planned + rows) * self._token_bytes):
            return rows
        room = (self.kv_budget - self.kv_bytes) // self._token_bytes - planned
        return room if room >= SMALLEST_CHUNK else 0

    def _available(self) -> int:
        """Bytes that could be used now, counting what can be evicted."""
        return self.kv_budget - self.kv_bytes + self._tree.evictable_tokens * self._token_bytes

    def _ensure_free(self, nbytes: int) -> bool:
        """Evict until `nbytes` more fit; False if they do not fit even so."""
        over = self.kv_bytes + nbytes - self.kv_budget
        if over <= 0:
            return True
        return self._tree.evict(over) >= over


def priority_demotion(sequence: Sequence) -> int:
    """How far a request lets everybody go ahead; 0: not at all."""
    return max(0, -sequence.request.priority)
