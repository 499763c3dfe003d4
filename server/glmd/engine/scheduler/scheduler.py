"""Scheduler: chooses the sequences of the next step and their rows.

Decoding sequences always run. The remaining rows of a step go to prefill: a share to the prompt
that arrived first, so that it is never starved, the rest to the shortest prompts, so that they need
not wait behind a long one.

Clients come before all of that: the client that was served least goes first
(`glmd.engine.scheduler.prefill_budget`). A negative priority moves a request behind those of all
clients; a positive one moves it forward among its own client's only.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from glmd.engine.config import MAX_WIDTH, EngineConfig
from glmd.engine.scheduler.disk_tier import DiskTier
from glmd.engine.scheduler.prefill_budget import (
    OUTPUT_WEIGHT,
    SMALLEST_CHUNK,
    PrefillBudget,
    VirtualTokenCounter,
)
from glmd.engine.sequence import NO_SLOT, Sequence, SequenceStatus
from glmd.ipc import CacheMatch, SequenceOutput
from glmd.kv_cache.prefix_tree import PrefixTree
from glmd.kv_cache.segment import Segment
from glmd.kv_cache.tail_pool import TAIL_TOKENS, TailPool

ADMISSION_RESERVE = 256
"""Output tokens for which admission reserves memory, unless `max_tokens` is smaller. More would
leave memory idle, fewer would preempt sooner."""

SHORT_PROMPT = 512
"""Uncomputed tokens up to which a prompt counts as short. Streams wait longer for several short
prompts; for several long ones they would be slow for minutes."""

OLDEST_SHARE = 4
"""The prompt that arrived first gets at least a step's prefill rows divided by this."""


@dataclass(slots=True)
class SchedulerOutput:
    """The rows of one step.

    Attributes:
        decode: sequences with one row, or one and their drafts.
        chunks: prefill chunks, (sequence, rows).
        admitted: sequences that have left the queue for the first time.
    """

    decode: list[Sequence] = field(default_factory=list)
    chunks: list[tuple[Sequence, int]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decode or self.chunks)

    def progress(self) -> list[SequenceOutput]:
        """Outputs that report admissions and, where requested, the progress of prompts."""
        admitted = [s.output(admitted=True, cache_match=s.cache_match) for s in self.admitted]
        return admitted + [
            s.output(computed_tokens=min(s.num_computed_tokens, s.prompt_length))
            for s, _ in self.chunks
            if s.request.prompt_progress and s.status is not SequenceStatus.FINISHED
        ]


class Scheduler:
    """Holds the queues, the prefix tree and the tails, and keeps KV within the memory budget.

    Attributes:
        waiting: sequences without KV: new ones and preempted ones.
        running: sequences with a lease, in order of admission.
        tree: cached KV.
        tails: KV of running sequences that is not in the tree yet.
        kv_budget: bytes for the tree and the tails.
        max_running: most sequences that may run at once.
        preemptions: number of times a running sequence was sent back to wait.
        disk: KV on disk; None: there is none.
    """

    def __init__(
        self,
        config: EngineConfig,
        tree: PrefixTree[Segment],
        tails: TailPool,
        *,
        kv_budget: int,
        kv_bytes_per_token: int,
        disk: DiskTier | None = None,
    ) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.tree = tree
        self.tails = tails
        self.kv_budget = kv_budget
        self.max_running = config.max_running
        self.preemptions = 0
        self.disk = disk
        self.prefill_budget = PrefillBudget(config)
        self._prefix_cache = config.prefix_cache
        self._token_bytes = kv_bytes_per_token
        self._prefill_clock = 0
        """Prefill tokens served so far. Waiting sequences age by this clock."""
        self._arrivals = 0
        self._fairness = VirtualTokenCounter()

    # -- queues -------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.status = SequenceStatus.WAITING
        sequence.arrival_prefill_clock = self._prefill_clock
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._fairness.enter(sequence.request.client)
        self.waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence for good. Its KV stays in the tree."""
        running = sequence.status is SequenceStatus.RUNNING
        (self.running if running else self.waiting).remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        self._fairness.leave(sequence.request.client)
        if running:
            self._free(sequence)  # Last, as MLX may raise.
        if not self._prefix_cache and not self.running:
            self.tree.clear()

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to wait. Its KV stays in the tree until evicted."""
        self._free(sequence)  # First, as MLX may raise.
        self.running.remove(sequence)
        self._requeue(sequence)
        self.preemptions += 1

    def reset_kv(self) -> list[Sequence]:
        """Drop all KV and send the running sequences back to wait; returns those.

        Also right after an error of MLX, wherever it was raised.
        """
        dropped, self.running = self.running, []
        for sequence in dropped:
            if self.disk is not None:
                self.disk.cancel(sequence)
            self._requeue(sequence)
        for sequence in self.waiting:
            sequence.lease, sequence.slot, sequence.history = None, NO_SLOT, None
            sequence.num_cached_tokens = sequence.num_computed_tokens = 0
        self.tree.reset()
        self.tails.reset()
        return dropped

    def _requeue(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.PREEMPTED
        sequence.num_cached_tokens = sequence.num_computed_tokens = 0
        self.waiting.append(sequence)

    def _free(self, sequence: Sequence) -> None:
        """Move the tail into the tree, and release the slot and the lease."""
        assert sequence.lease is not None
        if self.disk is not None:
            self.disk.cancel(sequence)
        self.flush_tail(sequence, defer_merge=True)
        if sequence.slot != NO_SLOT:
            self.tails.release(sequence.slot)
            sequence.slot = NO_SLOT
        self.tree.release(sequence.lease)
        sequence.lease = None
        self._ensure_free(0)  # The tail was copied, and the pool may be as large as before.

    def flush_tail(self, sequence: Sequence, *, defer_merge: bool = False) -> None:
        """Move a sequence's tail into the tree. The sequence keeps its slot.

        Args:
            defer_merge: see `PrefixTree.insert`.
        """
        assert sequence.lease is not None
        start, end = sequence.num_cached_tokens, sequence.num_cacheable_tokens
        if end <= start:
            return
        kv = self.tails.copy_out(sequence.slot, end - start)
        keys = sequence.cache_keys(start, end)
        self.tree.insert(sequence.lease, keys, kv, defer=defer_merge)
        sequence.num_cached_tokens = end
        if rest := sequence.max_tail_tokens:
            self.tails.shift(sequence.slot, end - start, rest)

    def set_deferred(self, deferred: bool, *, screening: bool) -> None:
        """Change whether new KV is deferred (see `TailPool`). No step may be in flight."""
        if not self.tails.screening:
            for sequence in self.running:
                self.flush_tail(sequence)
        self.tails.set_deferred(deferred, screening=screening)

    def allocate_slot(self, sequence: Sequence) -> None:
        """Give a sequence a tail unless it has one."""
        if sequence.slot == NO_SLOT:
            sequence.slot = self.tails.allocate()

    def _pack_tails(self) -> bool:
        """Move tails to the lowest slots; returns whether the pool has become smaller.

        The pool reaches up to the highest slot in use, which may be that of the last of many
        sequences: as much memory as all of them had.
        """
        before = self.tails.slots
        for sequence in sorted(self.running, key=lambda s: -s.slot):
            if sequence.slot != NO_SLOT:
                sequence.slot = self.tails.move_down(sequence.slot)
        return self.tails.slots < before

    def _least_urgent(self) -> Sequence:
        """The running sequence to preempt.

        Sequences of negative priority go first, then those of the client that runs most; of these
        the youngest, except for what its client prefers. The oldest sequence yields only to more
        urgent requests, so one always progresses.
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

    def _running_counts(self) -> Counter[str]:
        """Running sequences by client."""
        return Counter(s.request.client for s in self.running)

    # -- schedule -----------------------------------------------------------------------------

    @property
    def num_decoding(self) -> int:
        """Running sequences that need one row."""
        return sum(s.num_uncomputed_tokens == 1 for s in self.running)

    @property
    def requires_sync(self) -> bool:
        """Whether a running sequence's next row depends on tokens that are still in flight."""
        return any(s.requires_sync and s.num_inflight_tokens for s in self.running)

    def schedule(self) -> SchedulerOutput:
        """Choose the rows of the next step and free memory for them."""
        preemptions = self.preemptions
        decode = self._schedule_decode()
        for sequence in decode:
            self._fairness.charge(sequence.request.client, OUTPUT_WEIGHT)
        admitted = self._admit() if self.preemptions == preemptions else []
        if self.disk is not None:
            self.disk.advance(self._extend_match, self._ensure_free, streams=bool(decode))
        uncomputed = [s.num_uncomputed_tokens for s in self._prefilling()]
        if not uncomputed:
            return SchedulerOutput(decode, [], admitted)
        num_short_prompts = sum(tokens <= SHORT_PROMPT for tokens in uncomputed)
        rows = self.prefill_budget.prefill_budget(len(decode), max(num_short_prompts, 1))
        return SchedulerOutput(decode, self._schedule_prefill(rows), admitted)

    def _schedule_decode(self) -> list[Sequence]:
        """All running sequences that need one row, after preempting others if memory is short."""
        while True:
            ready = [
                s for s in self.running if s.num_uncomputed_tokens == 1 and not s.at_length_limit
            ]
            for sequence in ready:
                if sequence.num_cacheable_tokens - sequence.num_cached_tokens >= TAIL_TOKENS:
                    self.flush_tail(sequence)
            capacity = max((s.max_tail_tokens for s in self.running), default=0) + 2 * MAX_WIDTH
            new_slots = sum(s.slot == NO_SLOT for s in ready)
            growth = self.tails.growth(new_slots, capacity) * self._token_bytes
            if not ready or self._ensure_free(growth):
                break
            if self._pack_tails():
                continue
            if len(self.running) == 1:
                break  # A single sequence always fits: `max_length` is bounded by the budget.
            self.preempt(self._least_urgent())
        for sequence in ready:
            self.allocate_slot(sequence)
        if ready:
            self.tails.reserve(capacity)
        return ready

    def _admit(self) -> list[Sequence]:
        """Give leases to waiting sequences, most urgent first, while memory lasts.

        Returns:
            those that had never run.
        """
        counts = self._running_counts()
        # Prefill that was admitted but not served yet counts for what is admitted next.
        pending_prefill: Counter[str] = Counter()
        for s in self.running:
            pending_prefill[s.request.client] += s.num_uncomputed_tokens
        new: list[Sequence] = []

        def rank(s: Sequence) -> tuple[int, int, int, int, int]:
            client = s.request.client
            return (
                priority_demotion(s),
                self._fairness.served(client) + pending_prefill[client],
                counts[client],
                -s.request.priority,
                s.num_uncomputed_tokens - (self._prefill_clock - s.arrival_prefill_clock),
            )

        while self.waiting and len(self.running) < self.max_running:
            sequence = min(self.waiting, key=rank)
            if sequence.num_inflight_tokens:
                break  # Preempted in this step: its last tokens are not known yet.
            lease = sequence.lease = self.tree.acquire(sequence.request.cache_salt)
            self._extend_match(sequence)
            output = min(sequence.max_length - sequence.length, ADMISSION_RESERVE)
            needed = (sequence.num_uncomputed_tokens + output) * self._token_bytes
            available = self.kv_budget - self.kv_bytes - self._reserved_bytes()
            available += self.tree.evictable_tokens * self._token_bytes
            if self.running and needed > available:
                self.tree.release(lease)
                sequence.lease = None
                sequence.num_cached_tokens = sequence.num_computed_tokens = 0
                break
            self.waiting.remove(sequence)
            self.running.append(sequence)
            counts[sequence.request.client] += 1
            pending_prefill[sequence.request.client] += sequence.num_uncomputed_tokens
            restored = 0
            if self.disk is not None and self._prefix_cache and not sequence.scores_prompt:
                restored = self.disk.begin(sequence)
            if sequence.status is SequenceStatus.WAITING:
                sequence.cache_match = self._explain_match(sequence, restored)
                new.append(sequence)
            sequence.status = SequenceStatus.RUNNING
        return new

    def _prefilling(self) -> list[Sequence]:
        """Sequences with prompt tokens to compute, except where these are being restored."""
        disk = self.disk
        return [
            s
            for s in self.running
            if s.num_uncomputed_tokens > 1 and (disk is None or not disk.is_restoring(s))
        ]

    def _schedule_prefill(self, budget: int) -> list[tuple[Sequence, int]]:
        """Divide `budget` rows among the sequences in prefill."""
        for sequence in self._prefilling():
            self._extend_match(sequence)
        # A sequence that needs a single row by now decodes in the next step.
        prefilling = self._prefilling()
        if not prefilling or budget <= 0:
            return []
        oldest = min(prefilling, key=lambda s: (priority_demotion(s), s.arrival))
        others = [s for s in prefilling if s is not oldest]
        others.sort(
            key=lambda s: (
                priority_demotion(s),
                self._fairness.served(s.request.client),
                -s.request.priority,
                s.num_uncomputed_tokens,
            )
        )
        kept = max(1, budget // OLDEST_SHARE)

        chunks: list[tuple[Sequence, int]] = []
        planned = ending = 0
        # A sequence whose next tokens another chunk of this step computes waits for that chunk: the
        # next step finds them in the tree.
        starts = {self._start(oldest)} if self._prefix_cache else set()
        for sequence in [*others, oldest]:
            left = budget - planned - (0 if sequence is oldest else kept)
            waits = sequence is not oldest and not sequence.scores_prompt
            if left <= 0 or (waits and self._start(sequence) in starts):
                continue
            rows = min(sequence.num_uncomputed_tokens, left)
            ends = rows == sequence.num_uncomputed_tokens
            # A prompt's last row may begin a tail (`ModelRunner._commit_kv`).
            capacity = max(self.tails.capacity, MAX_WIDTH)
            tails = self.tails.growth(ending + ends, capacity)
            rows = self._max_rows_that_fit(planned + tails, rows)
            if not rows:
                continue
            ending += rows == sequence.num_uncomputed_tokens
            if self._prefix_cache:
                starts.add(self._start(sequence))
            chunks.append((sequence, rows))
            planned += rows
            self._fairness.charge(sequence.request.client, rows)
        self._prefill_clock += planned
        if not chunks and len(prefilling) == len(self.running) > 1:
            # Together they hold all memory, and none can go on.
            self.preempt(self._least_urgent())
        return chunks

    # -- prefix cache -------------------------------------------------------------------------

    @staticmethod
    def _start(sequence: Sequence) -> tuple[int, int, int]:
        """Place in the tree and key of the first token to compute."""
        assert sequence.lease is not None
        key = sequence.cache_keys(sequence.num_computed_tokens, sequence.num_computed_tokens + 1)[0]
        return id(sequence.lease.node), sequence.lease.length, int(key)

    def _extend_match(self, sequence: Sequence) -> None:
        """Skip tokens that are in the tree by now, leaving at least one to compute."""
        assert sequence.lease is not None
        if not self._prefix_cache or sequence.scores_prompt:
            return
        keys = sequence.cache_keys(sequence.num_computed_tokens, sequence.length - 1)
        found = self.tree.match_prefix(sequence.lease, keys)
        sequence.num_cached_tokens += found
        sequence.num_computed_tokens += found

    def _explain_match(self, sequence: Sequence, restored: int) -> CacheMatch:
        """Cached part of a prompt, and the reason why it is not longer.

        Args:
            restored: tokens that follow from disk.
        """
        assert sequence.lease is not None
        if not self._prefix_cache or sequence.scores_prompt:
            return CacheMatch(tokens=0, reason="off")
        found, most = sequence.num_computed_tokens + restored, sequence.prompt_length - 1
        if found >= most:
            return CacheMatch(tokens=most, reason="whole")
        if restored:
            return CacheMatch(tokens=found, reason="new")
        (key,) = sequence.cache_keys(found, found + 1)
        divergence = self.tree.divergence(sequence.lease, int(key))
        reason: Literal["new", "differs", "evicted"] = "new"
        if divergence.evicted:
            reason = "evicted"
        elif divergence.tokens:
            return CacheMatch(tokens=found, reason="differs", diverging_tokens=divergence.tokens)
        return CacheMatch(tokens=found, reason=reason)

    # -- memory -------------------------------------------------------------------------------

    @property
    def kv_bytes(self) -> int:
        """Bytes held by the tree and the tails, and on the way to and from the disk."""
        held = 0 if self.disk is None else self.disk.held_bytes
        return self.tree.nbytes + self.tails.nbytes + held

    def _reserved_bytes(self) -> int:
        """Bytes that running sequences are expected to need further."""
        tokens = 0
        for s in self.running:
            output = min(s.max_length - s.length, ADMISSION_RESERVE - s.num_generated_tokens)
            tokens += s.num_uncomputed_tokens + max(0, output)
        return tokens * self._token_bytes

    def _max_rows_that_fit(self, planned: int, rows: int) -> int:
        """The most of `rows` rows that fit beside `planned` ones; 0 if too few for a chunk do."""
        if self._ensure_free((planned + rows) * self._token_bytes):
            return rows
        room = (self.kv_budget - self.kv_bytes) // self._token_bytes - planned
        return room if room >= SMALLEST_CHUNK else 0

    def _ensure_free(self, nbytes: int) -> bool:
        """Evict until `nbytes` are free; returns whether they are."""
        while (over := self.kv_bytes + nbytes - self.kv_budget) > 0:
            if not self.tree.evict(over):
                break
        if over > 0 and self.disk is not None:
            self.disk.drop_held()
            over = self.kv_bytes + nbytes - self.kv_budget
        return over <= 0


def priority_demotion(sequence: Sequence) -> int:
    """Places by which a request moves behind those of all clients; 0: none."""
    return max(0, -sequence.request.priority)
