"""Launching a step: from a plan to arrays on their way.

The tokens that a step in flight will yield are known to the device only, and with drafts so is
their number. A step behind it therefore takes its first tokens, its drafts and its positions
from the flight's arrays, so that the host never has to wait before it launches.
"""

from __future__ import annotations

import time

import mlx.core as mx
import numpy as np

from glmd.engine.attention_metadata import Layouts, levels
from glmd.engine.config import MAX_WIDTH
from glmd.engine.decode_group import Group
from glmd.engine.scheduler.scheduler import Plan, Scheduler
from glmd.engine.sequence import Sequence
from glmd.engine.spec_decode.proposer import Drafter
from glmd.engine.step import Flight
from glmd.engine.structured_output import Ask, Constraints
from glmd.kv_cache.prefix_tree import PrefixTree
from glmd.kv_cache.segment import Segment
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import Chunk, RowBatch
from glmd.model.glm4_moe_lite import GlmModel
from glmd.model.mla import chunk_form
from glmd.model.sampler import History, Masks, Row, Sampled, sample


class Launcher:
    """Turns plans into flights.

    Attributes:
        prompt_rows: prompt tokens computed so far.
    """

    def __init__(
        self,
        model: GlmModel,
        scheduler: Scheduler,
        tree: PrefixTree[Segment],
        tails: TailPool,
        constraints: Constraints,
    ) -> None:
        self._constraints = constraints
        self._model = model
        self._scheduler = scheduler
        self._tree = tree
        self._tails = tails
        self._layouts = Layouts(tree, tails, model.shape, model.dtype)
        self._drafter: Drafter | None = None
        if model.mtp is not None:
            self._drafter = Drafter(model.mtp, model.shape.heads, scheduler, tails, self._layouts)
        self.prompt_rows = 0

    def rest(self) -> None:
        """Let go of what is kept from step to step, as there is no next one."""
        self._layouts.clear()

    def launch(self, plan: Plan, before: Flight | None, drafts: int) -> Flight:
        """Start a step.

        Args:
            before: the step in flight, if there is one.
            drafts: tokens to draft per sequence for the step after this one.
        """
        groups = self._decode_groups(plan.decode, before)
        batch = self._lay_out(groups, plan)
        hidden, caches = self._model.hidden(batch, self._tails)
        flight = self._sample(plan, groups, batch, hidden, before)
        if self._drafter is not None:
            caches.append(self._drafter.keep(plan, groups, flight, hidden, batch))
        self._book(plan, groups, caches)
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
        flight.done = arrays[0] if arrays else caches[-1]
        for sequence, width in zip(flight.sequences, flight.widths, strict=True):
            sequence.in_flight += width
        return flight

    # -- rows -----------------------------------------------------------------------------

    def _decode_groups(self, decode: list[Sequence], before: Flight | None) -> list[Group]:
        """Sequences with drafts in one group, those without in another."""
        place = before.place if before is not None and before.drafts is not None else {}
        drafted: list[Sequence] = []
        plain: list[Sequence] = []
        for sequence in decode:
            ready = id(sequence) in place and sequence.in_flight
            (drafted if ready and sequence.free else plain).append(sequence)
        groups = []
        if drafted:
            assert before is not None
            assert before.drafts is not None
            groups.append(self._decode_group(drafted, 1 + before.drafts.shape[1], before))
        if plain:
            groups.append(self._decode_group(plain, 1, before))
        return groups

    def _decode_group(self, sequences: list[Sequence], width: int, before: Flight | None) -> Group:
        layout = self._layouts.of(sequences, width)
        sequences = [sequences[i] for i in layout.order]
        positions = mx.array([s.length - 1 for s in sequences], mx.int32)
        drafts = None
        if before is not None and before.sequences == sequences and before.flying:
            # The usual case: the same again.
            assert before.last is not None
            assert before.counts is not None
            tokens, drafts = before.last, before.drafts
            positions = positions + before.counts
        else:
            known = [s.tokens(s.length - 1, s.length)[0] for s in sequences]
            tokens = mx.array(np.array(known, np.int32))
            if before is not None and any(s.in_flight for s in sequences):
                assert before.last is not None
                assert before.counts is not None
                place = before.place
                source = mx.array([place.get(id(s), 0) if s.in_flight else 0 for s in sequences])
                flying = mx.array([s.in_flight > 0 for s in sequences])
                tokens = mx.where(flying, before.last[source], tokens)
                positions = positions + mx.where(flying, before.counts[source], 0)
                drafts = before.drafts[source] if before.drafts is not None else None
        tokens, positions = tokens[:, None], positions[:, None]
        if width > 1:
            assert drafts is not None
            tokens = mx.concatenate([tokens, drafts], axis=1)
            positions = positions + mx.arange(width)
        return Group(sequences, width, tokens, positions, layout)

    def _lay_out(self, groups: list[Group], plan: Plan) -> RowBatch:
        tokens = [group.tokens.flatten() for group in groups]
        positions = [group.positions.flatten() for group in groups]
        decode = []
        first = 0
        for group in groups:
            decode.append(group.lay_out(first, self._tails, self._model.shape.heads))
            first += group.rows
        chunks = []
        for sequence, count in plan.chunks:
            start = sequence.computed
            tokens.append(mx.array(sequence.tokens(start, start + count)))
            positions.append(mx.arange(start, start + count, dtype=mx.int32))
            assert sequence.lease is not None
            path = self._tree.path(sequence.lease)
            spans = [span for level in levels([path], count) for span in level]
            _, expanded = chunk_form(self._model.shape, start, count, self._model.dtype.size)
            wanted = count if self._drafter is not None else int(count == sequence.needs)
            chunks.append(Chunk(first, first + count, spans, expanded, wanted))
            first += count
        return RowBatch(mx.concatenate(tokens), mx.concatenate(positions), decode, chunks)

    # -- sampling -------------------------------------------------------------------------

    def _sample(
        self,
        plan: Plan,
        groups: list[Group],
        batch: RowBatch,
        hidden: mx.array,
        before: Flight | None,
    ) -> Flight:
        """Sample behind every decode row and behind the last row of every finished prompt."""
        sequences: list[Sequence] = []
        widths: list[int] = []
        places: list[int] = []
        rows: list[Row] = []
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
            if count == sequence.needs:
                widths.append(1)
                sequences.append(sequence)
                places.append(first - 1)
                rows += self._rows_to_sample(sequence, batch.tokens[:1])
        flight = Flight(
            sequences=sequences,
            widths=widths,
            tokens=None,
            counts=None,
            last=None,
            drafts=None,
            logprobs={},
            done=hidden,
            decoding=len(plan.decode),
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
            self._confirm(flight, groups, sampled)
        return flight

    def _rows_to_sample(self, sequence: Sequence, tokens: mx.array) -> list[Row]:
        """One Row behind each of a sequence's tokens, with the history that it sees."""
        history = self._history(sequence)
        generated = sequence.generated + sequence.in_flight
        rows = [Row(sequence.sampling, generated, history, sequence.forced)]
        for draft in range(1, tokens.shape[0]):
            if history is not None:
                history = history.with_token(tokens[draft])
            rows.append(Row(sequence.sampling, rows[-1].generated + 1, history))
        return rows

    def _masks(
        self, flight: Flight, rows: list[Row], logits: mx.array, before: Flight | None
    ) -> Masks | None:
        """Masks of the rows whose sequences follow a grammar.

        They depend on the tokens of the step in flight: while the host waits for these and
        computes the masks, the device goes on with this step's forward pass.
        """
        if not any(sequence.constraint is not None for sequence in flight.sequences):
            return None
        drafts: list[list[int]] = []
        place: dict[int, int] = {}
        if before is not None:
            mx.async_eval(logits, *self._tails.arrays())
            before.fetch()
            if before.drafts is not None:
                drafts, place = np.array(before.drafts).tolist(), before.place
        asks: list[Ask] = []
        asked: list[int] = []
        first = 0
        for sequence, width in zip(flight.sequences, flight.widths, strict=True):
            row = rows[first]
            if sequence.constraint is not None and row.forced is None:
                behind = drafts[place[id(sequence)]][: width - 1] if width > 1 else ()
                asks.append(Ask(sequence.constraint, behind, row.banned))
                asked += range(first, first + width)
            first += width
        masked, words = self._constraints.masks(asks)
        return Masks([asked[i] for i in masked], mx.array(words))

    def _history(self, sequence: Sequence) -> History | None:
        if sequence.sampling.penalised and sequence.history is None:
            at = sequence.prompt_length
            sequence.history = History(
                self._model.args.vocab_size,
                sequence.tokens(0, at),
                sequence.tokens(at, sequence.length),
            )
        return sequence.history

    def _confirm(self, flight: Flight, groups: list[Group], sampled: Sampled) -> None:
        """Fill in which of the sampled tokens count.

        A row's token is drawn from the model's distribution behind that row, with noise that
        depends on the position alone. It stands if all drafts before it were what the model
        chose, so the output is distributed (and with the same seed, equal) as without drafts.
        """
        if max(flight.widths) > 1:
            tokens, counts = self._counted(flight.widths, groups, sampled.tokens)
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
    def _counted(
        widths: list[int], groups: list[Group], sampled: mx.array
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

    def _book(self, plan: Plan, groups: list[Group], caches: list[mx.array]) -> None:
        """Note what the step computes; chunks are sealed at once.

        Where a token's key takes the one that follows it, a prompt's last row begins the tail.
        """
        first = 0
        begun: list[tuple[Sequence, int]] = []
        for group in groups:
            first += group.rows
            for sequence in group.sequences:
                if not sequence.in_flight:
                    self.prompt_rows += sequence.book(sequence.computed, sequence.computed + 1)
        for sequence, count in plan.chunks:
            start = sequence.computed
            sequence.computed = start + count
            sequence.sealed = sequence.sealable
            self.prompt_rows += sequence.book(start, start + count)
            kv = Segment.copy_of(caches, first, first + sequence.sealed - start)
            assert sequence.lease is not None
            self._tree.seal(sequence.lease, sequence.keys(start, sequence.sealed), kv)
            first += count
            if sequence.sealed < sequence.computed:
                begun.append((sequence, first - 1))
        if begun:
            self._begin_tails([s for s, _ in begun], mx.array([row for _, row in begun]), caches)

    def _begin_tails(
        self, sequences: list[Sequence], rows: mx.array, caches: list[mx.array]
    ) -> None:
        """Put a row of each sequence first into its tail."""
        for sequence in sequences:
            self._scheduler.give_slot(sequence)
        self._tails.ensure(MAX_WIDTH)
        slots = mx.array([sequence.slot for sequence in sequences])
        for layer, kv in enumerate(caches):
            self._tails.write(layer, slots, mx.zeros_like(slots), kv[rows])
