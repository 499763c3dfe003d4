"""Launching a step: from a plan to arrays on their way.

The tokens that a step in flight will yield are known to the device only, and with drafts so is
their number. A step behind it therefore takes its first tokens, its drafts and its positions
from the flight's arrays, so that the host never has to wait before it launches.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from glmd.engine.config import MAX_WIDTH
from glmd.engine.constraint import Ask, Constraints
from glmd.engine.flight import Flight
from glmd.engine.layout import Layout, Layouts, levels
from glmd.engine.scheduler import Plan, Scheduler
from glmd.engine.sequence import Sequence
from glmd.kv.segment import Segment
from glmd.kv.tails import TailPool
from glmd.kv.tree import PrefixTree
from glmd.model.glm import GlmModel
from glmd.model.mla import chunk_form
from glmd.model.rows import Chunk, DecodeGroup, RowBatch
from glmd.model.sampling import History, Masks, Row, Sampled, sample


@dataclass(slots=True)
class _Group:
    """A decode group in the making: sequences in row order, and where their rows begin."""

    sequences: list[Sequence]
    width: int
    tokens: mx.array
    """[n, width]"""
    positions: mx.array
    """[n, width]"""
    layout: Layout


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
        if self._model.mtp is not None:
            successors = self._successors(plan, groups, flight)
            caches.append(self._model.mtp.keep(successors, hidden, batch, self._tails))
        self._book(plan, groups, caches)
        if self._model.mtp is not None and drafts and flight.sequences:
            flight.drafts = self._draft(plan, groups, flight, hidden, drafts)
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

    def _decode_groups(self, decode: list[Sequence], before: Flight | None) -> list[_Group]:
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

    def _decode_group(self, sequences: list[Sequence], width: int, before: Flight | None) -> _Group:
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
        return _Group(sequences, width, tokens, positions, layout)

    def _lay_out(self, groups: list[_Group], plan: Plan) -> RowBatch:
        tokens = [group.tokens.flatten() for group in groups]
        positions = [group.positions.flatten() for group in groups]
        decode = []
        first = 0
        for group in groups:
            decode.append(self._rows_of(group, first))
            first += len(group.sequences) * group.width
        chunks = []
        for sequence, count in plan.chunks:
            start = sequence.computed
            tokens.append(mx.array(sequence.tokens(start, start + count)))
            positions.append(mx.arange(start, start + count, dtype=mx.int32))
            assert sequence.lease is not None
            path = self._tree.path(sequence.lease)
            spans = [span for level in levels([path], count) for span in level]
            _, expanded = chunk_form(self._model.shape, start, count, self._model.dtype.size)
            chunks.append(Chunk(first, first + count, spans, expanded))
            first += count
        return RowBatch(mx.concatenate(tokens), mx.concatenate(positions), decode, chunks)

    def _rows_of(self, group: _Group, first: int) -> DecodeGroup:
        layout = group.layout
        tail_positions = group.positions - layout.sealed
        visible = mx.arange(self._tails.capacity) <= tail_positions[..., None]
        if group.width > 1:
            visible = mx.repeat(visible, self._model.shape.heads, axis=1)
        return DecodeGroup(
            first=first,
            sequences=len(group.sequences),
            width=group.width,
            spans=layout.spans,
            levels=layout.levels,
            slots=layout.slots,
            tail_positions=tail_positions.flatten(),
            order=layout.slot_order,
            visible=visible,
        )

    # -- sampling -------------------------------------------------------------------------

    def _sample(
        self,
        plan: Plan,
        groups: list[_Group],
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
            first += len(group.sequences) * group.width
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
            if len(places) < hidden.shape[0]:
                chosen = mx.array(places)
                hidden, at = hidden[chosen], at[chosen]
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

    def _confirm(self, flight: Flight, groups: list[_Group], sampled: Sampled) -> None:
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
        widths: list[int], groups: list[_Group], sampled: mx.array
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

    # -- drafting -------------------------------------------------------------------------

    def _successors(self, plan: Plan, groups: list[_Group], flight: Flight) -> mx.array:
        """The token that follows each row's, as far as the step knows: [N] int32."""
        parts = []
        if groups:
            assert flight.tokens is not None
            place = 0
            for group in groups:
                n = len(group.sequences)
                parts.append(flight.tokens[place : place + n, : group.width].flatten())
                place += n
        sampled = flight.place
        for sequence, count in plan.chunks:
            start = sequence.computed
            stop = min(start + count + 1, sequence.length)
            parts.append(mx.array(sequence.tokens(start + 1, stop)))
            if id(sequence) in sampled:
                assert flight.last is not None
                place = sampled[id(sequence)]
                parts.append(flight.last[place : place + 1])
        return mx.concatenate(parts)

    def _draft(
        self, plan: Plan, groups: list[_Group], flight: Flight, hidden: mx.array, count: int
    ) -> mx.array:
        """Draft `count` tokens behind the last confirmed one of every sampled sequence.

        Drafts are sampled as the model's tokens are, with the noise of the position that they
        are for: where both distributions agree, so do the choices.

        Args:
            hidden: [N, hidden], the main model's, of all rows of the step.

        Returns:
            [S, count] int32.
        """
        assert self._model.mtp is not None
        assert flight.counts is not None
        assert flight.last is not None
        rows, positions = self._last_rows(plan, groups)
        h = hidden[rows + flight.counts - 1]
        at = positions + flight.counts - 1
        token = flight.last
        specs = [Row(s.draft_sampling, 0, None) for s in flight.sequences]
        drafts = []
        for _ in range(count):
            h = self._draft_one(flight.sequences, token, h, at)
            token = sample(self._model.mtp.logits(h), specs, at + 2).tokens
            at = at + 1
            drafts.append(token)
        return mx.stack(drafts, axis=1)

    def _last_rows(self, plan: Plan, groups: list[_Group]) -> tuple[mx.array, mx.array]:
        """For each sampled sequence its first sampled row, and that row's position."""
        rows: list[int] = []
        positions = []
        first = 0
        for group in groups:
            n = len(group.sequences)
            rows += range(first, first + n * group.width, group.width)
            positions.append(group.positions[:, 0])
            first += n * group.width
        ends = []
        for sequence, count in plan.chunks:
            first += count
            if sequence.computed == sequence.length:
                rows.append(first - 1)
                ends.append(sequence.length - 1)
        if ends:
            positions.append(mx.array(ends, mx.int32))
        return mx.array(rows), mx.concatenate(positions)

    def _draft_one(
        self, sequences: list[Sequence], token: mx.array, hidden: mx.array, at: mx.array
    ) -> mx.array:
        """Run the MTP layer on one row of each sequence, at positions `at`.

        What this leaves in the tails is there already for the last confirmed row; behind it, it is
        overwritten when the positions are confirmed.

        Args:
            token: [S] int32, what follows each row's.
            hidden: [S, hidden], the main model's, or the layer's own for its own draft.

        Returns:
            [S, hidden], the layer's.
        """
        assert self._model.mtp is not None
        for sequence in sequences:
            self._scheduler.give_slot(sequence)
        self._tails.ensure(MAX_WIDTH)
        layout = self._layouts.of(sequences, 1)
        order = layout.order
        moved = order != sorted(order)
        if moved:
            by_row = mx.array(order)
            token, hidden, at = token[by_row], hidden[by_row], at[by_row]
        group = _Group([sequences[i] for i in order], 1, token[:, None], at[:, None], layout)
        batch = RowBatch(token, at, [self._rows_of(group, 0)], [])
        h = self._model.mtp.hidden(token, hidden, batch, self._tails)
        return h[mx.array(np.argsort(order).astype(np.int32))] if moved else h

    # -- booking --------------------------------------------------------------------------

    def _book(self, plan: Plan, groups: list[_Group], caches: list[mx.array]) -> None:
        """Note what the step computes; chunks are sealed at once.

        Where a token's key takes the one that follows it, a prompt's last row begins the tail.
        """
        first = 0
        begun: list[tuple[Sequence, int]] = []
        for group in groups:
            first += len(group.sequences) * group.width
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
