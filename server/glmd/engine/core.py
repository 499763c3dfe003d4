"""The engine: continuous batching over one shared KV store.

Each call of `Engine.step` launches a step and reads the results of the one before, so that the host
works while the device does.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from llguidance import LLMatcher

from glmd.checkpoint.config import load_config
from glmd.checkpoint.shard import shard_weights
from glmd.checkpoint.stored import read_weights
from glmd.engine import memory
from glmd.engine.config import EngineConfig, validate_request
from glmd.engine.experts_trial import find_fused_rows
from glmd.engine.kernel_trial import kernel_is_used
from glmd.engine.model_runner import ModelRunner
from glmd.engine.oom_recovery import OOMRecovery, is_out_of_memory
from glmd.engine.ranks.group import RankGroup
from glmd.engine.ranks.lead import make_tails
from glmd.engine.scheduler.disk_tier import DiskTier, open_disk_cache
from glmd.engine.scheduler.scheduler import Scheduler
from glmd.engine.sequence import Sequence, SequenceStatus, make_sequences
from glmd.engine.spec_decode.controller import DraftController, VerifiedDrafts
from glmd.engine.step import PendingStep
from glmd.engine.structured_output import StructuredOutputManager
from glmd.errors import GlmdError, InvalidRequest
from glmd.ipc import EngineRequest, EngineStats, ModelInfo, SequenceOutput, unpack_tokens
from glmd.kv_cache.kv_events import KVEventPublisher
from glmd.kv_cache.prefix_tree import PrefixTree
from glmd.kv_cache.segment import Segment
from glmd.model.loader import LoadedModel, load_model
from glmd.utils.memory import process_memory_bytes

log = logging.getLogger("glmd.engine")

COMPILE_POLL = 0.02
"""Seconds for which a step waits for a grammar when there is nothing else to do."""

DISK_POLL = 0.02
"""Seconds for which a step waits for a file when there is nothing else to do."""


def load_engine(
    folder: Path, config: EngineConfig, on_progress: Callable[[int, int], None]
) -> Engine:
    """Load a checkpoint into an engine.

    Args:
        on_progress: called with (bytes loaded, bytes in total).

    Raises:
        CheckpointError: the checkpoint cannot be served, or does not fit in memory. The latter is
            known before any weights are loaded.
    """
    parsed = load_config(folder)
    stored = read_weights(folder, parsed)
    budget, ranks = config.memory_budget or memory.default_budget(), None
    if config.ranks != 1:
        ranks = RankGroup(config, stored, lambda: on_progress(0, 1))
        budget, stored = ranks.budget, shard_weights(stored, 0, ranks.size)
    plan = memory.plan_checkpoint(stored, config, budget)
    for warning in stored.warnings:
        log.warning("%s", warning)
    if config.mtp != 0 and stored.no_drafts is not None:
        log.warning("%s", stored.no_drafts)
    left_out = plan.config.mtp == 0 and config.mtp != 0 and bool(stored.mtp)
    if left_out:
        log.warning(
            "MTP layer left out, as memory is short: no drafts. kv_tokens=%d", plan.kv_tokens
        )
    structured_output = StructuredOutputManager(folder, parsed.vocab_size, parsed.eos_token_ids)
    kv_events = KVEventPublisher.of(config.kv_events, config.kv_events_replay)
    memory.DeviceLimits.set(budget)
    try:
        mtp = plan.config.mtp != 0
        group = None if ranks is None else ranks.join(config.dtype, mtp=mtp)
        model = load_model(folder, config.dtype, on_progress, mtp=mtp, group=group)
        engine = Engine(
            model, config, budget, structured_output, kv_events, ranks, mtp_left_out=left_out
        )
        if ranks is not None:
            ranks.warm_up(model)
        else:
            model.warm_up()
            if kernel_is_used(config.mla_kernel, model.shape, model.dtype):
                engine.use_kernel()
            model.use_fused_experts(find_fused_rows(config.experts_kernel, model))
    except BaseException:
        memory.DeviceLimits.restore()
        if ranks is not None:
            ranks.close()
        raise
    engine.release_limits = weakref.finalize(engine, memory.DeviceLimits.restore)
    return engine


class Engine:
    """Serves requests in batches. Not thread-safe: MLX streams belong to a thread.

    Args:
        memory_budget: bytes for weights, KV and working memory.
        structured_output: started before the model was loaded, to save time; None: started here.
        kv_events: bound before the model was loaded, to fail early; None: bound here if configured.
        ranks: the other ranks, if `model` is one of several parts; None: it is whole.
        mtp_left_out: the checkpoint has an MTP layer that was not loaded, as memory is short.

    Attributes:
        info: the model served, and its limits.
        kv_layers: layers with cached KV, which is the number of arrays of a segment.
        config: with `max_step_tokens` reduced where working memory is short.
        scheduler: the queues and the KV store.
        pending_step: launched step whose results have not been read; None: there is none.
        release_limits: restores MLX's limits once this engine is gone; idempotent.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        memory_budget: int,
        structured_output: StructuredOutputManager | None = None,
        kv_events: KVEventPublisher | None = None,
        ranks: RankGroup | None = None,
        *,
        mtp_left_out: bool = False,
    ) -> None:
        plan = memory.plan_memory(
            model.folder,
            model.args,
            config,
            memory_budget,
            weights=model.weight_bytes - model.mtp_weight_bytes,
            mtp_weights=model.mtp_weight_bytes,
            item=model.dtype.size,
        )
        model.use_shape(
            replace(
                model.shape,
                score_bytes=plan.score_bytes,
                expanded_bytes=plan.expanded_bytes,
                kv_bits=plan.kv_bits,
            )
        )
        token_bytes = plan.token_bytes
        self._defers = config.mtp == "auto" and model.mtp is not None and plan.kv_bits == 16
        """The MTP layer's KV is deferred while drafts do not pay."""
        context = model.args.max_position_embeddings
        self.config = plan.config
        self.info = ModelInfo(
            path=str(model.folder),
            vocab_size=model.args.vocab_size,
            max_context=min(context, config.max_context or context, plan.kv_tokens),
            eos_token_ids=model.eos_token_ids,
            has_mtp=model.mtp is not None,
            mtp_left_out=mtp_left_out,
            weight_bytes=model.weight_bytes,
            kv_bytes_per_token=token_bytes,
            kv_bits=plan.kv_bits,
            bits_per_weight=model.bits_per_weight,
            device=memory.device_name(),
        )
        cache = open_disk_cache(config, model)
        tree = PrefixTree[Segment](plan.max_segment, track_unsaved=cache is not None)
        self._disk = None if cache is None else DiskTier(tree, cache, plan.kv_bits)
        publisher = kv_events or KVEventPublisher.of(config.kv_events, config.kv_events_replay)
        if publisher is not None:
            publisher.start(paired_keys=self.info.has_mtp)
        self._kv_events = publisher
        tree.observer = publisher
        self._ranks = ranks
        self.scheduler = Scheduler(
            self.config,
            tree,
            make_tails(model, model.args.hidden_size if self._defers else None, ranks),
            kv_budget=plan.kv,
            kv_bytes_per_token=token_bytes,
            disk=self._disk,
        )
        self.pending_step: PendingStep | None = None
        self.release_limits: Callable[[], object] = lambda: None
        self._memory_budget = memory_budget
        self.kv_layers = model.kv_layers
        self._structured_output = structured_output or StructuredOutputManager(
            model.folder, self.info.vocab_size, self.info.eos_token_ids
        )
        self._runner = ModelRunner(model, self.scheduler, self._structured_output, ranks)
        self._oom_recovery = OOMRecovery(
            self.scheduler, least_kv=(self.info.max_context + memory.TAIL_ROOM) * token_bytes
        )
        self._draft_controller = DraftController(config.mtp if model.mtp is not None else 0)
        self._requests: dict[str, list[Sequence]] = {}
        """Unfinished sequences by request."""
        self._compiling: dict[str, Future[LLMatcher]] = {}
        """Grammars being compiled, by request."""
        self._outputs: list[SequenceOutput] = []
        """Outputs for the next `step` to return."""
        self._ended: list[Sequence] = []
        """Sequences whose last token is known and reported, and that are not finished yet."""
        self._completed_at = 0.0
        """When the last step that was read ended."""
        self._steps = self._rows = 0
        self._step_seconds = self._step_seconds_total = 0.0
        self._cached = self._generated = 0
        self._drafted = self._accepted = self._verified = 0

    def use_kernel(self) -> None:
        """Let decode rows attend in `glmd.model.mla_kernel`."""
        self._runner.kernel = True

    # -- requests -----------------------------------------------------------------------------

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. An invalid one is answered with an error output."""
        prompt = unpack_tokens(request.prompt)
        try:
            if request.id in self._requests:
                raise InvalidRequest(f"A request with id {request.id!r} is already running.")
            validate_request(request, prompt, self.info)
        except InvalidRequest as error:
            self._refuse(request.id, error)
            return
        sequences = self._requests[request.id] = make_sequences(request, prompt, self.info)
        if request.grammar is not None:
            self._compiling[request.id] = self._structured_output.prepare(request.grammar)
            return
        for sequence in sequences:
            self.scheduler.add(sequence)

    def cancel(self, id: str, index: int | None = None) -> None:
        """Cancel a request or one of its sequences. Unknown ones are ignored."""
        for sequence in list(self._requests.get(id, ())):
            if index is None or sequence.index == index:
                self._outputs.append(sequence.output(finish_reason="cancelled"))
                try:
                    self._finish(sequence)
                except Exception as error:
                    self._recover(error)

    def _refuse(self, id: str, error: GlmdError) -> None:
        self._outputs.append(
            SequenceOutput(
                id=id,
                finish_reason="error",
                error=error.message,
                error_kind="invalid_request",
                error_param=error.param if isinstance(error, InvalidRequest) else None,
            )
        )

    def _schedule_compiled(self) -> None:
        """Queue the sequences whose grammars have been compiled."""
        for id, future in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[id]
            try:
                matcher = future.result()
            except GlmdError as error:
                del self._requests[id]
                self._refuse(id, error)
                continue
            for sequence in self._requests[id]:
                assert sequence.request.grammar is not None
                sequence.grammar = self._structured_output.start(sequence.request.grammar, matcher)
                self.scheduler.add(sequence)

    def _finish(self, sequence: Sequence) -> None:
        id = sequence.request.id
        self._requests[id].remove(sequence)
        if not self._requests[id]:
            del self._requests[id]
            self._compiling.pop(id, None)
        if sequence.status is SequenceStatus.COMPILING:
            sequence.status = SequenceStatus.FINISHED
        else:
            self.scheduler.finish(sequence)

    # -- steps --------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or return."""
        return bool(self._requests or self._outputs or self.pending_step)

    def step(self) -> list[SequenceOutput]:
        """Launch the next step, then read the one before; returns its outputs.

        After a step that ran out of memory, the next call tries a smaller one; after another error
        while glmd's Metal kernels are in use, one without them.
        """
        progress: list[SequenceOutput] = []
        try:
            progress = self._step()
        except Exception as error:
            self._recover(error)
        self._runner.end_step()
        outputs, self._outputs = self._outputs, []
        if self._disk is not None:
            self._disk.save(idle=not self._requests and self.pending_step is None)
        return outputs + progress

    def _step(self) -> list[SequenceOutput]:
        plan = self._draft_controller.choose(self.scheduler.num_decoding)
        screening = self._defers and plan.screens
        deferred = self._defers and (screening or not plan.drafts)
        tails = self.scheduler.tails
        switches = (deferred, screening) != (tails.deferred, tails.screening)
        if self.pending_step is not None and (self.scheduler.requires_sync or switches):
            self._read(self.pending_step)
            self.pending_step = None
        if switches:
            self.scheduler.set_deferred(deferred, screening=screening)
        self._schedule_compiled()
        scheduled = self.scheduler.schedule()
        if not scheduled and self.pending_step is None and self._compiling:
            wait(self._compiling.values(), COMPILE_POLL, FIRST_COMPLETED)
        elif not scheduled and self.pending_step is None and self._disk is not None:
            self._disk.wait(DISK_POLL)
        launched = None
        if scheduled:
            launched = self._runner.execute(scheduled, self.pending_step, plan)
        else:
            self._runner.reset()
        if self.pending_step is not None:
            self._read(self.pending_step)
        self.pending_step = launched
        return scheduled.progress()

    def _recover(self, error: Exception) -> None:
        """Drop all KV, and start over with the tokens known by then.

        MLX raises an error once, at whatever waits for the device next, and clears it. Everything
        in flight is void then, and so is KV that was computed from it: another attempt to read it
        would give arbitrary values. Tokens that are lost will be the same when computed again,
        since noise depends on the position alone.

        Raises:
            Exception: `error`, unless it is about memory, or a Metal kernel of glmd was in use
                and may be to blame. The engine can go on nevertheless.
        """
        if self._ranks is not None:
            raise error  # The other ranks may wait for this one in a collective.
        previous, self.pending_step = self.pending_step, None
        self._runner.reset()
        refused = is_out_of_memory(error)
        dropped = self._oom_recovery.step_failed(error) if refused else []
        if not refused:
            self.scheduler.reset_kv()
        if previous is not None and previous.confirmed is not None and not previous.read:
            self._read(previous)  # Its tokens were fetched for grammars, which are ahead by them.
        for sequence in [s for found in self._requests.values() for s in found]:
            sequence.num_inflight_tokens = 0
        self._finish_ended()
        mx.clear_cache()
        if not refused:
            if not self._runner.stop_kernels():
                raise error
            log.error("Step failed: Metal kernels off, KV dropped", exc_info=error)
        for sequence in dropped:
            if sequence.status is SequenceStatus.FINISHED:
                continue
            self._finish(sequence)
            message = "The device has no memory for this request at present."
            self._outputs.append(
                sequence.output(finish_reason="error", error_kind="overloaded", error=message)
            )

    def _read(self, step: PendingStep) -> None:
        """Wait for a launched step and turn its tokens into outputs."""
        confirmed = step.wait()
        self._oom_recovery.step_succeeded()
        completed = step.completed_at(self._completed_at)
        seconds = completed - max(step.launched, self._completed_at)
        self._completed_at = completed
        rows = step.rows
        self._steps += 1
        self._rows += rows.num_rows
        self._step_seconds += 0.1 * (seconds - self._step_seconds)
        self._step_seconds_total += seconds
        step.read = True
        for scores in step.prompt_scores:
            if scores.sequence.status is not SequenceStatus.FINISHED:
                self._outputs.append(scores.sequence.output(prompt_logprobs=[scores.read()]))
        verified = self._read_tokens(step, confirmed)
        # Drafts verified and drafts made, of each sequence.
        kinds = {each.num_sampled - 1 for each in rows.decode}
        made = 0 if step.drafts is None else step.drafts.shape[1]
        kinds.add(made if len(step.drafted) in (0, len(rows.sampled)) else -1)
        self._draft_controller.observe(
            len(rows.decode),
            kinds.pop() if len(kinds) == 1 else None,
            verified,
            seconds if not rows.prefill else None,
        )
        self.scheduler.prefill_budget.observe(len(rows.decode), rows.num_prefill_rows, seconds)

    def _read_tokens(self, step: PendingStep, confirmed: list[list[int]]) -> VerifiedDrafts:
        """Append confirmed tokens to their sequences.

        The statistics count as accepted only drafts up to the end of their sequence.
        """
        verified = VerifiedDrafts()
        for rows, tokens in zip(step.rows.sampled, confirmed, strict=True):
            sequence, count = rows.sequence, len(tokens)
            sequence.num_inflight_tokens -= rows.num_sampled
            gaps = sequence in step.verified_with_gaps
            verified.add(rows.num_sampled - 1, count - 1, with_gaps=gaps)
            if sequence.status is SequenceStatus.FINISHED:
                continue
            if sequence.status is SequenceStatus.RUNNING:
                sequence.num_computed_tokens = sequence.length + count - 1
            logprobs = [step.logprobs.get(rows.sample_start + i) for i in range(count)]
            output = sequence.advance(tokens, logprobs, self.info.eos_token_ids)
            output.drafted, output.accepted = rows.num_sampled - 1, max(0, len(output.tokens) - 1)
            self._cached += output.cached_tokens
            self._generated += len(output.tokens)
            self._drafted += output.drafted
            self._accepted += output.accepted
            self._verified += output.drafted > 0
            self._outputs.append(output)
            if output.finish_reason is not None:
                self._ended.append(sequence)
        self._finish_ended()
        return verified

    def _finish_ended(self) -> None:
        """Free the sequences that have ended. If MLX raises, the next call goes on."""
        while self._ended:
            self._finish(self._ended.pop())

    def close(self) -> None:
        """Drop all requests and memory. The engine cannot be used afterwards."""
        for id in list(self._requests):
            self.cancel(id)
        self.pending_step = None
        self._runner.reset()
        if self._disk is not None:
            self._disk.close()
        if self._kv_events is not None:
            self.scheduler.tree.observer = None
            self._kv_events.close()
        self.scheduler.tree.clear()
        if self._ranks is not None:
            self._ranks.close()
        mx.clear_cache()
        self.release_limits()

    def stats(self) -> EngineStats:
        """Current counters and gauges."""
        scheduler, tree = self.scheduler, self.scheduler.tree
        shape = tree.stats()
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_tokens=tree.tokens,
            kv_idle_tokens=tree.evictable_tokens,
            kv_segments=shape.segments,
            kv_branches=shape.branches,
            kv_longest=shape.longest,
            kv_bytes=scheduler.kv_bytes,
            kv_budget_bytes=scheduler.kv_budget,
            memory_budget_bytes=self._memory_budget,
            weight_bytes=self.info.weight_bytes,
            active_bytes=mx.get_active_memory(),
            cache_bytes=mx.get_cache_memory(),
            footprint_bytes=process_memory_bytes(),
            out_of_memory=self._oom_recovery.failures,
            mla_kernel=int(self._runner.kernel),
            experts_kernel=int(bool(self._runner.fused_rows)),
            steps=self._steps,
            rows=self._rows,
            prompt_tokens_computed=self._runner.num_prompt_tokens_computed,
            prompt_tokens_cached=self._cached,
            tokens_generated=self._generated,
            drafted=self._drafted,
            accepted=self._accepted,
            verified=self._verified,
            drafts=self._draft_controller.plan.drafts,
            acceptance=self._draft_controller.acceptance if self.info.has_mtp else 0.0,
            preemptions=scheduler.preemptions,
            evicted_tokens=tree.evicted_tokens,
            **({} if self._disk is None else self._disk.stats()),
            **self._runner.rank_stats(),
            step_seconds=self._step_seconds,
            step_seconds_total=self._step_seconds_total,
        )
