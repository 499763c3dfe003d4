"""Launching a step: from a plan to arrays on their way.

The tokens that a step in flight will yield are known to the device only, and with drafts so is
their number. A step behind it therefore takes its first tokens, its drafts and its positions
from the flight's arrays, so that the host never has to wait before it launches.
"""

from __future__ import annotations

import time

import mlx.core as mx
import numpy as np

from glmd.engine.attention_metadata import AttentionMetadataBuilder, build_levels
from glmd.engine.config import MAX_WIDTH
from glmd.engine.decode_group import RunnerGroup
from glmd.engine.scheduler.scheduler import Scheduler, SchedulerOutput
from glmd.engine.sequence import Sequence
from glmd.engine.spec_decode.proposer import MTPProposer
from glmd.engine.step import PendingStep
from glmd.engine.structured_output import MaskRequest, StructuredOutputManager
from glmd.kv_cache.prefix_tree import PrefixTree
from glmd.kv_cache.segment import Segment
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch, PrefillChunk
from glmd.model.loader import LoadedModel
from glmd.model.mla import select_form
from glmd.model.sampler import History, SamplerOutput, SamplingRow, TokenMasks, sample


class ModelRunner:
    """Turns plans into flights.

    Attributes:
        prompt_rows: prompt tokens computed so far.
    """

    def __init__(
        self,
        model: LoadedModel,
        scheduler: Scheduler,
        tree: PrefixTree[Segment],
        tails: TailPool,
        constraints: StructuredOutputManager,
    ) -> None:
        self._constraints = constraints
        self._model = model
        self._scheduler = scheduler
        self._tree = tree
        self._tails = tails
        self._layouts = AttentionMetadataBuilder(tree, tails, model.shape, model.dtype)
        self._drafter: MTPProposer | None = None
        if model.mtp is not None:
            self._drafter = MTPProposer(
                model.mtp, model.shape.heads, scheduler, tails, self._layouts
            )
        self.prompt_rows = 0

    def reset(self) -> None:
        """Let go of what is kept from step to step, as there is no next one."""
        self._layouts.clear()

    def execute(
        self, plan: SchedulerOutput, before: PendingStep | None, drafts: int
    ) -> PendingStep:
        """Start a step.

        Args:
            before: the step in flight, if there is one.
            drafts: tokens to draft per sequence for the step after this one.
        """
        groups = self._decode_groups(plan.decode, before)
        batch = self._prepare_batch(groups, plan)
        hidden, caches = self._model.forward(batch, self._tails)
        flight = self._sample(plan, groups, batch, hidden, before)
        if self._drafter is not None:
            caches.append(self._drafter.compute_kv(plan, groups, flight, hidden, batch))
        self._commit_kv(plan, groups, caches)
        if self._drafter is not None and drafts and flight.sequences:
            flight.drafts = self._drafter.draft(plan, groups, flight, hidden, drafts)
        self._layouts.next_step()
        outcome = [flight.tokens, flight.counts, flight.last, flight.drafts]
        arrays = [array for array in outcome if array is not None]
        arrays += [array for entry in flight.logprobs.values() for array in entry]
        # What later steps build on must not keep this step's graph alive.
        kept = [a for s in flight.sequences if s.history is not None for a in s.history.arrays()]
        mx.async_eval(*(arrays or [caches[-1]]), *kept, *self._tails.arrays())
        flight.dispatched = time.monotonic()
        flight.ready = arrays[0] if arrays else caches[-1]
        for sequence, width in zip(flight.sequences, flight.widths, strict=True):
            sequence.num_inflight_tokens += width
        return flight

    # -- rows -----------------------------------------------------------------------------

    def _decode_groups(
        self, decode: list[Sequence], before: PendingStep | None
    ) -> list[RunnerGroup]:
        """Sequences with drafts in one group, those without in another."""
        place = before.index_by_id if before is not None and before.drafts is not None else {}
        drafted: list[Sequence] = []
        plain: list[Sequence] = []
        for sequence in decode:
            ready = id(sequence) in place and sequence.num_inflight_tokens
            (drafted if ready and sequence.can_draft else plain).append(sequence)
        groups = []
        if drafted:
            assert before is not None
            assert before.drafts is not None
            groups.append(self._decode_group(drafted, 1 + before.drafts.shape[1], before))
        if plain:
            groups.append(self._decode_group(plain, 1, before))
        return groups

    def _decode_group(
        self, sequences: list[Sequence], width: int, before: PendingStep | None
    ) -> RunnerGroup:
        layout = self._layouts.build(sequences, width)
        sequences = [sequences[i] for i in layout.order]
        positions = mx.array([s.length - 1 for s in sequences], mx.int32)
        drafts = None
        if before is not None and before.sequences == sequences and before.all_in_flight:
            # The usual case: the same again.
            assert before.last is not None
            assert before.counts is not None
            tokens, drafts = before.last, before.drafts
            positions = positions + before.counts
        else:
            known = [s.tokens(s.length - 1, s.length)[0] for s in sequences]
            tokens = mx.array(np.array(known, np.int32))
            if before is not None and any(s.num_inflight_tokens for s in sequences):
                assert before.last is not None
                assert before.counts is not None
                place = before.index_by_id
                source = mx.array(
                    [place.get(id(s), 0) if s.num_inflight_tokens else 0 for s in sequences]
                )
                flying = mx.array([s.num_inflight_tokens > 0 for s in sequences])
                tokens = mx.where(flying, before.last[source], tokens)
                positions = positions + mx.where(flying, before.counts[source], 0)
                drafts = before.drafts[source] if before.drafts is not None else None
        tokens, positions = tokens[:, None], positions[:, None]
        if width > 1:
            assert drafts is not None
            tokens = mx.concatenate([tokens, drafts], axis=1)
            positions = positions + mx.arange(width)
        return RunnerGroup(sequences, width, tokens, positions, layout)

    def _prepare_batch(self, groups: list[RunnerGroup], plan: SchedulerOutput) -> ForwardBatch:
        tokens = [group.tokens.flatten() for group in groups]
        positions = [group.positions.flatten() for group in groups]
        decode = []
        first = 0
        for group in groups:
            decode.append(group.to_decode_group(first, self._tails, self._model.shape.heads))
            first += group.rows
        chunks = []
        for sequence, count in plan.chunks:
            start = sequence.num_computed_tokens
            tokens.append(mx.array(sequence.tokens(start, start + count)))
            positions.append(mx.arange(start, start + count, dtype=mx.int32))
            assert sequence.lease is not None
            path = self._tree.path(sequence.lease)
            spans = [span for level in build_levels([path], count) for span in level]
            _, expanded = select_form(self._model.shape, start, count, self._model.dtype.size)
            wanted = (
                count if self._drafter is not None else int(count == sequence.num_uncomputed_tokens)
            )
            chunks.append(PrefillChunk(first, first + count, spans, expanded, wanted))
            first += count
        return ForwardBatch(mx.concatenate(tokens), mx.concatenate(positions), decode, chunks)

    # -- sampling -------------------------------------------------------------------------

    def _sample(
        self,
        plan: SchedulerOutput,
        groups: list[RunnerGroup],
        batch: ForwardBatch,
        hidden: mx.array,
        before: PendingStep | None,
    ) -> PendingStep:
        """Sample behind every decode row and behind the last row of every finished prompt."""
        sequences: list[Sequence] = []
        widths: list[int] = []
        places: list[int] = []
        rows: list[SamplingRow] = []
        first = 0
        for group in groups:
            for i, sequence in enumerate(group.sequences):
                widths.append(group.width)
                sequences.append(sequence)
                places += range(first + i * group.width, first + (i + 1) * group.width)
                rows += self._rows_to_sample(sequence, group.tokens[i])
            first += group.rows
        for sequence, count in plan.chunks:
            first += count
            if count == sequence.num_uncomputed_tokens:
                widths.append(1)
                sequences.append(sequence)
                places.append(first - 1)
                rows += self._rows_to_sample(sequence, batch.tokens[:1])
        flight = PendingStep(
            sequences=sequences,
            widths=widths,
            tokens=None,
            counts=None,
            last=None,
            drafts=None,
            logprobs={},
            ready=hidden,
            num_decoding=len(plan.decode),
            prefill_rows=sum(count for _, count in plan.chunks),
            launched=time.monotonic(),
        )
        if sequences:
            at = batch.positions
            if len(places) < at.shape[0]:
                chosen = mx.array(places)
                at = at[chosen]
                # Without an MTP layer no others' hidden states were asked for.
                if len(places) < hidden.shape[0]:
                    hidden = hidden[chosen]
            logits = self._model.logits(hidden)
            masks = self._masks(flight, rows, logits, before)
            sampled = sample(logits, rows, at + 1, masks)
            self._verify_drafts(flight, groups, sampled)
        return flight

    def _rows_to_sample(self, sequence: Sequence, tokens: mx.array) -> list[SamplingRow]:
        """One Row behind each of a sequence's tokens, with the history that it sees."""
        history = self._history(sequence)
        generated = sequence.num_generated_tokens + sequence.num_inflight_tokens
        rows = [SamplingRow(sequence.sampling, generated, history, sequence.forced)]
        for draft in range(1, tokens.shape[0]):
            if history is not None:
                history = history.with_token(tokens[draft])
            rows.append(SamplingRow(sequence.sampling, rows[-1].generated + 1, history))
        return rows

    def _masks(
        self,
        flight: PendingStep,
        rows: list[SamplingRow],
        logits: mx.array,
        before: PendingStep | None,
    ) -> TokenMasks | None:
        """Masks of the rows whose sequences follow a grammar.

        They depend on the tokens of the step in flight: while the host waits for these and
        computes the masks, the device goes on with this step's forward pass.
        """
        if not any(sequence.grammar is not None for sequence in flight.sequences):
            return None
        drafts: list[list[int]] = []
        place: dict[int, int] = {}
        if before is not None:
            mx.async_eval(logits, *self._tails.arrays())
            before.wait()
            if before.drafts is not None:
                drafts, place = np.array(before.drafts).tolist(), before.index_by_id
        asks: list[MaskRequest] = []
        asked: list[int] = []
        first = 0
        for sequence, width in zip(flight.sequences, flight.widths, strict=True):
            row = rows[first]
            if sequence.grammar is not None and row.forced is None:
                behind = drafts[place[id(sequence)]][: width - 1] if width > 1 else ()
                asks.append(MaskRequest(sequence.grammar, behind, row.banned))
                asked += range(first, first + width)
            first += width
        masked, words = self._constraints.masks(asks)
        return TokenMasks([asked[i] for i in masked], mx.array(words))

    def _history(self, sequence: Sequence) -> History | None:
        if sequence.sampling.penalised and sequence.history is None:
            at = sequence.prompt_length
            sequence.history = History(
                self._model.args.vocab_size,
                sequence.tokens(0, at),
                sequence.tokens(at, sequence.length),
            )
        return sequence.history

    def _verify_drafts(
        self, flight: PendingStep, groups: list[RunnerGroup], sampled: SamplerOutput
    ) -> None:
        """Fill in which of the sampled tokens count.

        A row's token is drawn from the model's distribution behind that row, with noise that
        depends on the position alone. It stands if all drafts before it were what the model
        chose, so the output is distributed (and with the same seed, equal) as without drafts.
        """
        if max(flight.widths) > 1:
            tokens, counts = self._count_accepted(flight.widths, groups, sampled.tokens)
            last = mx.take_along_axis(tokens, counts[:, None] - 1, axis=1)[:, 0]
        else:
            tokens, last = sampled.tokens[:, None], sampled.tokens
            counts = mx.ones(len(flight.widths), mx.int32)
        flight.tokens, flight.counts, flight.last = tokens, counts, last
        row = 0
        for i, (sequence, width) in enumerate(zip(flight.sequences, flight.widths, strict=True)):
            for column in range(width):
                if row in sampled.logprobs:
                    flight.logprobs[i, column] = sampled.logprobs[row]
                if sequence.history is not None:
                    counted = (counts[i] > column).astype(mx.float32)
                    sequence.history = sequence.history.with_token(tokens[i, column], counted)
                row += 1

    @staticmethod
    def _count_accepted(
        widths: list[int], groups: list[RunnerGroup], sampled: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The sampled tokens by sequence, [S, W], and how many of them count, [S]."""
        widest = max(widths)
        tokens, counts = [], []
        first = 0
        for group in groups:
            n, width = len(group.sequences), group.width
            chosen = sampled[first : first + n * width].reshape(n, width)
            count = mx.ones(n, mx.int32)
            if width > 1:
                agreed = (chosen[:, :-1] == group.tokens[:, 1:]).astype(mx.int32)
                count = count + mx.cumprod(agreed, axis=1).sum(axis=1).astype(mx.int32)
            counts.append(count)
            tokens.append(mx.pad(chosen, [(0, 0), (0, widest - width)]))
            first += n * width
        rest = sampled[first:, None]
        if rest.shape[0]:
            counts.append(mx.ones(rest.shape[0], mx.int32))
            tokens.append(mx.pad(rest, [(0, 0), (0, widest - 1)]))
        return mx.concatenate(tokens), mx.concatenate(counts)

    # -- booking --------------------------------------------------------------------------

    def _commit_kv(
        self, plan: SchedulerOutput, groups: list[RunnerGroup], caches: list[mx.array]
    ) -> None:
        """Note what the step computes; chunks are sealed at once.

        Where a token's key takes the one that follows it, a prompt's last row begins the tail.
        """
        first = 0
        begun: list[tuple[Sequence, int]] = []
        for group in groups:
            first += group.rows
            for sequence in group.sequences:
                if not sequence.num_inflight_tokens:
                    self.prompt_rows += sequence.mark_computed(
                        sequence.num_computed_tokens, sequence.num_computed_tokens + 1
                    )
        for sequence, count in plan.chunks:
            start = sequence.num_computed_tokens
            sequence.num_computed_tokens = start + count
            sequence.num_cached_tokens = sequence.num_cacheable_tokens
            self.prompt_rows += sequence.mark_computed(start, start + count)
            kv = Segment.copy_of(caches, first, first + sequence.num_cached_tokens - start)
            assert sequence.lease is not None
            self._tree.insert(
                sequence.lease, sequence.cache_keys(start, sequence.num_cached_tokens), kv
            )
            first += count
            if sequence.num_cached_tokens < sequence.num_computed_tokens:
                begun.append((sequence, first - 1))
        if begun:
            self._begin_tails([s for s, _ in begun], mx.array([row for _, row in begun]), caches)

    def _begin_tails(
        self, sequences: list[Sequence], rows: mx.array, caches: list[mx.array]
    ) -> None:
        """Put a row of each sequence first into its tail."""
        for sequence in sequences:
            self._scheduler.allocate_slot(sequence)
        self._tails.ensure(MAX_WIDTH)
        slots = mx.array([sequence.slot for sequence in sequences])
        for layer, kv in enumerate(caches):
            self._tails.write(layer, slots, mx.zeros_like(slots), kv[rows])
