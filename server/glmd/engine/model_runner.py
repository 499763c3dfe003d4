"""Launch of a step: from the scheduler's output to arrays that the device computes.

Only the device knows the tokens that a step in flight will confirm, and with drafts their number.
The next step takes its first tokens, drafts and positions from that step's arrays, so that the host
need not wait before launching.
"""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import numpy as np

from glmd.engine.attention_metadata import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    build_levels,
)
from glmd.engine.config import MAX_WIDTH
from glmd.engine.executor import Executor
from glmd.engine.ranks.group import RankGroup
from glmd.engine.ranks.lead import LeadExecutor
from glmd.engine.scheduler.scheduler import Scheduler, SchedulerOutput
from glmd.engine.sequence import Sequence
from glmd.engine.spec_decode.controller import DraftPlan
from glmd.engine.spec_decode.proposer import MTPProposer
from glmd.engine.step import PendingStep, PromptScores, SequenceRows, StepRows
from glmd.engine.structured_output import MaskRequest, StructuredOutputManager
from glmd.kv_cache.stored_keys import StoredKeys, arrays_of
from glmd.model.batch import DecodeGroup, ForwardBatch, PrefillChunk
from glmd.model.loader import LoadedModel
from glmd.model.sampler import History, SamplingRow, TokenMasks, sample, token_logprobs

SCORED_ROWS = 64
"""Rows of a prompt whose logits are in memory at a time: 40 MB in float32."""


class ModelRunner:
    """Runs the model over the rows that the scheduler chose.

    Attributes:
        num_prompt_tokens_computed: since the start.
    """

    def __init__(
        self,
        model: LoadedModel,
        scheduler: Scheduler,
        structured_output: StructuredOutputManager,
        ranks: RankGroup | None = None,
    ) -> None:
        """
        Args:
            ranks: the other ranks; None: there are none.
        """
        self.num_prompt_tokens_computed = 0
        self._model = model
        self._scheduler = scheduler
        self._tree = scheduler.tree
        self._tails = scheduler.tails
        self._structured_output = structured_output
        self._metadata_builder = AttentionMetadataBuilder(
            self._tree, self._tails, model.shape, model.dtype
        )
        self._executor = (
            Executor(model, self._tails, self._metadata_builder)
            if ranks is None
            else LeadExecutor(model, self._tails, self._metadata_builder, ranks)
        )
        self._proposer: MTPProposer | None = None
        if model.mtp is not None:
            self._proposer = MTPProposer(
                model, model.mtp, scheduler, self._metadata_builder, self._executor
            )

    @property
    def kernel(self) -> bool:
        """Whether decode rows attend in `glmd.model.mla_kernel`."""
        return self._metadata_builder.kernel

    @kernel.setter
    def kernel(self, used: bool) -> None:
        self._metadata_builder.kernel = used

    @property
    def fused_rows(self) -> frozenset[int]:
        """Numbers of rows for which experts run in `glmd.model.experts_kernel`."""
        return self._model.fused_rows

    def stop_kernels(self) -> bool:
        """Use glmd's kernels no more; returns whether any was used."""
        used = self.kernel or bool(self.fused_rows)
        self.kernel = False
        self._model.use_fused_experts(frozenset())
        return used

    def rank_stats(self) -> dict[str, Any]:
        """Fields of `EngineStats` about ranks."""
        return self._executor.stats()

    def end_step(self) -> None:
        """Pass on what was done to KV since the last launch, if there are other ranks."""
        self._executor.end_step()

    def reset(self) -> None:
        """Release what is kept from step to step."""
        self._metadata_builder.clear()
        if self._proposer is not None:
            self._proposer.reset()

    def execute(
        self, output: SchedulerOutput, previous: PendingStep | None, plan: DraftPlan
    ) -> PendingStep:
        """Launch a step.

        Args:
            previous: the step in flight; None: there is none.
            plan: of the drafts for the next step. The tails have the MTP layer's KV if it has some.
        """
        proposer = self._proposer
        if proposer is not None and not self._tails.has_all_kv:
            proposer.reset()
            proposer = None
        if proposer is not None:
            proposer.catch_up(output.decode, plan)
        rows, batch, layouts = self._prepare_batch(output, previous)
        hidden, caches = self._executor.forward(batch, layouts)
        step = self._sample(rows, batch, hidden, previous)
        step.prompt_scores = self._score_prompts(rows, hidden)
        if proposer is not None:
            kv = proposer.compute_kv(rows, batch, step.tokens, hidden)
            caches = self._tails.in_order(caches, kv)
        self._commit_kv(rows, caches)
        if proposer is not None and plan.drafts and rows.sampled:
            proposer.draft(step, batch, hidden, plan)
        if previous is not None:
            step.verified_with_gaps = previous.with_gaps
        self._metadata_builder.next_step()
        self._dispatch(step, caches)
        for sampled in rows.sampled:
            sampled.sequence.num_inflight_tokens += sampled.num_sampled
        return step

    def _dispatch(self, step: PendingStep, caches: list[StoredKeys]) -> None:
        """Start the step's computation."""
        results = [step.tokens, step.counts, step.last, step.drafts]
        arrays = [array for array in results if array is not None]
        arrays += [array for entry in step.logprobs.values() for array in entry]
        arrays += [array for scores in step.prompt_scores for array in scores.arrays()]
        # Evaluate also what later steps build on, so that it does not keep this step's graph alive.
        histories = [rows.sequence.history for rows in step.rows.sampled]
        kept = [array for history in histories if history is not None for array in history.arrays()]
        mx.async_eval(*(arrays or arrays_of(caches[-1])), *kept, *self._tails.arrays())
        step.dispatched = time.monotonic()
        step.ready = arrays[0] if arrays else arrays_of(caches[-1])[0]

    # -- rows ---------------------------------------------------------------------------------

    def _prepare_batch(
        self, output: SchedulerOutput, previous: PendingStep | None
    ) -> tuple[StepRows, ForwardBatch, list[AttentionMetadata]]:
        """The table of the step's rows, the model's input, and the layouts of its decode groups.

        Sequences with drafts form one decode group, the others a second one.
        """
        rows = StepRows()
        tokens: list[mx.array] = []
        positions: list[mx.array] = []
        groups: list[DecodeGroup] = []
        layouts: list[AttentionMetadata] = []
        chunks: list[PrefillChunk] = []
        for members, width in self._decode_groups(output.decode, previous):
            metadata = self._metadata_builder.build(members, width)
            sequences = [members[i] for i in metadata.order]
            group_tokens, group_positions = self._decode_inputs(sequences, width, previous)
            groups.append(
                self._metadata_builder.decode_group(metadata, rows.num_rows, group_positions)
            )
            layouts.append(metadata)
            rows.add_decode(sequences, width)
            tokens.append(group_tokens.flatten())
            positions.append(group_positions.flatten())
        all_hidden = any(sequence.scores_prompt for sequence, _ in output.chunks)
        for sequence, count in output.chunks:
            chunk = rows.add_prefill(sequence, count)
            start = chunk.num_computed_tokens
            tokens.append(mx.array(sequence.tokens(start, start + count)))
            positions.append(mx.arange(start, start + count, dtype=mx.int32))
            chunks.append(self._prefill_chunk(chunk, all_hidden=all_hidden))
        deferred = self._tails.deferred
        batch = ForwardBatch(
            mx.concatenate(tokens), mx.concatenate(positions), groups, chunks, deferred
        )
        return rows, batch, layouts

    def _decode_groups(
        self, decode: list[Sequence], previous: PendingStep | None
    ) -> list[tuple[list[Sequence], int]]:
        """Sequences with as many rows each, and that number of rows."""
        drafts = previous.drafts if previous is not None else None
        if previous is None or drafts is None:
            return [(decode, 1)] if decode else []
        drafted: list[Sequence] = []
        others: list[Sequence] = []
        for sequence in decode:
            in_flight = sequence.num_inflight_tokens and sequence in previous.drafted
            (drafted if in_flight and sequence.can_draft else others).append(sequence)
        groups = [(drafted, 1 + drafts.shape[1]), (others, 1)]
        return [(sequences, width) for sequences, width in groups if sequences]

    def _decode_inputs(
        self, sequences: list[Sequence], width: int, previous: PendingStep | None
    ) -> tuple[mx.array, mx.array]:
        """Tokens and positions of a group, each [sequences, width] int32."""
        positions = mx.array([s.length - 1 for s in sequences], mx.int32)
        in_flight = [s.num_inflight_tokens > 0 for s in sequences]
        drafts = None
        if previous is None or not any(in_flight):
            tokens = _last_known_tokens(sequences)
        else:
            assert previous.last is not None
            assert previous.counts is not None
            if previous.rows.sampled_sequences == sequences and previous.all_in_flight:
                # The usual case: the same sequences as in the step before.
                tokens, drafts = previous.last, previous.drafts
                positions = positions + previous.counts
            else:
                index = previous.rows.sample_index
                source = mx.array([index.get(s, 0) for s in sequences])
                chosen = mx.array(in_flight)
                known = _last_known_tokens(sequences)
                tokens = mx.where(chosen, previous.last[source], known)
                positions = positions + mx.where(chosen, previous.counts[source], 0)
                drafts = previous.drafts[source] if previous.drafts is not None else None
        tokens, positions = tokens[:, None], positions[:, None]
        if width > 1:
            assert drafts is not None
            tokens = mx.concatenate([tokens, drafts], axis=1)
            positions = positions + mx.arange(width)
        return tokens, positions

    def _prefill_chunk(self, rows: SequenceRows, *, all_hidden: bool) -> PrefillChunk:
        assert rows.sequence.lease is not None
        path = self._tree.path(rows.sequence.lease)
        spans = [span for level in build_levels([path], len(rows)) for span in level]
        expanded = len(rows) >= self._model.shape.break_even_rows
        # The MTP layer computes its KV from the hidden states of all rows.
        upkeep = self._proposer is not None and self._tails.has_all_kv
        hidden_rows = len(rows) if upkeep or all_hidden else rows.num_sampled
        return PrefillChunk(rows.start, rows.end, spans, expanded, hidden_rows)

    # -- sampling -----------------------------------------------------------------------------

    def _sample(
        self,
        rows: StepRows,
        batch: ForwardBatch,
        hidden: mx.array,
        previous: PendingStep | None,
    ) -> PendingStep:
        """Choose a token behind every sampled row, and find out which of them are confirmed."""
        step = PendingStep(rows, ready=hidden, launched=time.monotonic())
        if not rows.sampled:
            return step
        positions = batch.positions
        if len(rows.sampled_rows) < rows.num_rows:
            index = mx.array(rows.sampled_rows)
            positions = positions[index]
            # Unless the MTP layer runs, or a prompt is scored, these rows' hidden states are all.
            if len(rows.sampled_rows) < hidden.shape[0]:
                hidden = hidden[index]
        logits = self._model.logits(hidden)
        sampling_rows = [row for each in rows.sampled for row in self._sampling_rows(each, batch)]
        masks = self._masks(rows, sampling_rows, logits, previous)
        sampled = sample(logits, sampling_rows, positions + 1, masks)
        step.tokens, step.logprobs = sampled.tokens, sampled.logprobs
        self._verify_drafts(step, batch)
        return step

    def _score_prompts(self, rows: StepRows, hidden: mx.array) -> list[PromptScores]:
        """Log-probabilities of the prompt tokens that follow the rows of chunks.

        The logits of few rows are in memory at a time: each block of them waits for the one before.
        """
        found = []
        for chunk in rows.prefill:
            sequence, start = chunk.sequence, chunk.num_computed_tokens
            end = min(start + len(chunk), sequence.prompt_length - 1)
            count = sequence.request.prompt_logprobs
            if not sequence.scores_prompt or count is None or end <= start:
                continue
            blocks: list[tuple[mx.array, mx.array, mx.array]] = []
            offset = chunk.start - start
            for block_start in range(start, end, SCORED_ROWS):
                block_end = min(block_start + SCORED_ROWS, end)
                block = hidden[offset + block_start : offset + block_end]
                if blocks:
                    block = mx.depends(block, list(blocks[-1]))
                targets = mx.array(sequence.tokens(block_start + 1, block_end + 1))
                blocks.append(token_logprobs(self._model.logits(block), targets, count))
            parts = [mx.concatenate(list(part)) for part in zip(*blocks, strict=True)]
            found.append(PromptScores(sequence, start + 1, *parts))
        return found

    def _sampling_rows(self, rows: SequenceRows, batch: ForwardBatch) -> list[SamplingRow]:
        """The sequence's sampled rows, each with the history that includes the drafts before."""
        sequence = rows.sequence
        if sequence.sampling.penalised and sequence.history is None:
            prompt = sequence.tokens(0, sequence.prompt_length)
            output = sequence.tokens(sequence.prompt_length, sequence.length)
            sequence.history = History(self._model.args.vocab_size, prompt, output)
        history = sequence.history
        generated = sequence.num_generated_tokens + rows.num_inflight_tokens
        found = [SamplingRow(sequence.sampling, generated, history, sequence.forced_token)]
        for draft in range(1, rows.num_sampled):
            if history is not None:
                history = history.with_token(batch.tokens[rows.start + draft])
            found.append(SamplingRow(sequence.sampling, generated + draft, history))
        return found

    def _masks(
        self,
        rows: StepRows,
        sampling_rows: list[SamplingRow],
        logits: mx.array,
        previous: PendingStep | None,
    ) -> TokenMasks | None:
        """Masks of the rows whose sequences follow a grammar; None if there are none.

        Masks depend on the tokens of the step in flight. While the host waits for them and computes
        the masks, the device runs this step's forward pass.
        """
        if not any(sampled.sequence.grammar is not None for sampled in rows.sampled):
            return None
        drafts: list[list[int]] = []
        if previous is not None:
            mx.async_eval(logits, *self._tails.arrays())
            previous.wait()
            if previous.drafts is not None:
                drafts = np.array(previous.drafts).tolist()
        requests: list[MaskRequest] = []
        requested: list[int] = []
        for sampled in rows.sampled:
            sequence, start, count = sampled.sequence, sampled.sample_start, sampled.num_sampled
            row = sampling_rows[start]
            if sequence.grammar is None or row.forced is not None:
                continue
            own_drafts: list[int] = []
            if count > 1:
                assert previous is not None
                own_drafts = drafts[previous.rows.sample_index[sequence]][: count - 1]
            requests.append(MaskRequest(sequence.grammar, own_drafts, row.banned))
            requested += range(start, start + count)
        masked, words = self._structured_output.masks(requests)
        return TokenMasks([requested[i] for i in masked], mx.array(words))

    def _verify_drafts(self, step: PendingStep, batch: ForwardBatch) -> None:
        """Find out which sampled tokens are confirmed: those behind drafts that are right.

        A row's token is drawn from the model's distribution behind the row, with noise that depends
        on the position alone. It is confirmed if the model chose all drafts before it, so the
        output is distributed as without drafts, and equal with the same seed.
        """
        assert step.tokens is not None
        sampled = step.rows.sampled
        widths = np.array([rows.num_sampled for rows in sampled], np.int32)[:, None]
        if widths.max() == 1:
            step.counts, step.last = mx.ones(len(sampled), mx.int32), step.tokens
        else:
            starts = np.array([rows.sample_start for rows in sampled], np.int32)[:, None]
            columns = np.arange(widths.max(), dtype=np.int32)
            index = mx.array(starts + np.minimum(columns, widths - 1))
            # Only decode rows have drafts, and their index among the sampled rows is the row.
            drafts = batch.tokens[index[:, 1:]]
            chosen = step.tokens[index[:, :-1]]
            agreed = (chosen == drafts) & mx.array(columns[1:] < widths)
            accepted = mx.cumprod(agreed.astype(mx.int32), axis=1).sum(axis=1)
            step.counts = 1 + accepted.astype(mx.int32)
            step.last = step.tokens[mx.array(starts[:, 0]) + step.counts - 1]
        for i, rows in enumerate(sampled):
            sequence = rows.sequence
            if sequence.history is None:
                continue
            for column in range(rows.num_sampled):
                confirmed = (step.counts[i] > column).astype(mx.float32)
                token = step.tokens[rows.sample_start + column]
                sequence.history = sequence.history.with_token(token, confirmed)

    # -- commit -------------------------------------------------------------------------------

    def _commit_kv(self, rows: StepRows, caches: list[StoredKeys]) -> None:
        """Note what the step computes, and insert chunks into the tree.

        A prompt's last token begins the tail where its key needs the next token.

        Args:
            caches: of each layer [N, kv_width], in the order of the tails.
        """
        for decode in rows.decode:
            if not decode.num_inflight_tokens:
                start = decode.num_computed_tokens
                computed = decode.sequence.mark_computed(start, start + 1)
                self.num_prompt_tokens_computed += computed
        begun: list[SequenceRows] = []
        for chunk in rows.prefill:
            sequence, start = chunk.sequence, chunk.num_computed_tokens
            sequence.num_computed_tokens = start + len(chunk)
            sequence.num_cached_tokens = sequence.num_cacheable_tokens
            self.num_prompt_tokens_computed += sequence.mark_computed(
                start, sequence.num_computed_tokens
            )
            keys = sequence.cache_keys(start, sequence.num_cached_tokens)
            kv = self._executor.seal(caches, chunk.start, chunk.start + len(keys))
            assert sequence.lease is not None
            self._tree.insert(sequence.lease, keys, kv, defer=not chunk.num_sampled)
            if sequence.num_cached_tokens < sequence.num_computed_tokens:
                begun.append(chunk)
        if not begun:
            return
        for chunk in begun:
            self._scheduler.allocate_slot(chunk.sequence)
        self._tails.ensure(MAX_WIDTH)
        last_rows = [chunk.end - 1 for chunk in begun]
        self._executor.begin_tails(caches, last_rows, [chunk.sequence.slot for chunk in begun])


def _last_known_tokens(sequences: list[Sequence]) -> mx.array:
    known = [sequence.tokens(sequence.length - 1, sequence.length)[0] for sequence in sequences]
    return mx.array(np.array(known, np.int32))
