"""The engine: plans a step, launches it, reads the one before, and says what came of it."""

from __future__ import annotations

import logging
import secrets
import weakref
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher

from glmd.checkpoint.config import load_config
from glmd.engine import memory
from glmd.engine.config import EngineConfig
from glmd.engine.model_runner import ModelRunner
from glmd.engine.oom_recovery import OOMRecovery, is_out_of_memory
from glmd.engine.scheduler.scheduler import Scheduler, SchedulerOutput
from glmd.engine.sequence import Sequence
from glmd.engine.spec_decode.controller import DraftController
from glmd.engine.step import PendingStep
from glmd.engine.structured_output import StructuredOutputManager
from glmd.engine.validation import validate_request
from glmd.errors import GlmdError, InvalidRequest
from glmd.ipc import (
    EngineRequest,
    EngineStats,
    FinishReason,
    ModelInfo,
    SequenceOutput,
    TokenLogprobs,
    unpack_tokens,
)
from glmd.kv_cache.prefix_tree import PrefixTree
from glmd.kv_cache.segment import Segment
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.loader import LoadedModel, load_model
from glmd.model.mla import select_form
from glmd.model.sampler import SequenceSampling, noise_key
from glmd.utils.memory import process_memory_bytes

log = logging.getLogger(__name__)

COMPILE_POLL = 0.02
"""Seconds for which a step waits when there is nothing but grammars to wait for."""


def load_engine(
    folder: Path, config: EngineConfig, on_progress: Callable[[int, int], None]
) -> Engine:
    """Load a checkpoint and make an engine of it.

    Args:
        on_progress: called with (bytes loaded, bytes in all).

    Raises:
        CheckpointError: the folder holds no servable checkpoint, or one that does not fit in
            memory, which is found out before any weight is loaded.
    """
    budget = config.memory_budget or memory.default_budget()
    parsed = load_config(folder)
    memory.check_fit(folder, parsed, config, budget)
    constraints = StructuredOutputManager(folder, parsed.vocab_size, parsed.eos_token_ids)
    memory.DeviceLimits.set(budget)
    try:
        model = load_model(folder, config.dtype, on_progress, mtp=config.mtp != 0)
        model.warm_up()
        engine = Engine(model, config, budget, constraints)
    except BaseException:
        memory.DeviceLimits.restore()
        raise
    engine.release_limits = weakref.finalize(engine, memory.DeviceLimits.restore)
    return engine


class Engine:
    """Batches requests continuously over one shared KV store.

    Not thread-safe: MLX streams belong to a thread, so all calls come from one.

    Attributes:
        info: what is served.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig,
        memory_budget: int,
        constraints: StructuredOutputManager | None = None,
    ) -> None:
        """
        Args:
            constraints: made before the model was loaded, to save time; None: made here.
        """
        self._model = model
        self._memory_budget = memory_budget
        division = memory.plan_memory(
            model.folder,
            model.args,
            config,
            memory_budget,
            weights=model.weight_bytes,
            token_bytes=model.kv_bytes_per_token,
            item=model.dtype.size,
        )
        self._config = division.config
        model.shape = replace(
            model.shape,
            score_bytes=division.score_bytes,
            expanded_bytes=division.expanded_bytes,
        )
        self._tree: PrefixTree[Segment] = PrefixTree()
        self._tails = TailPool(model.kv_layers, model.shape.kv_width, model.dtype)
        token_bytes = model.kv_bytes_per_token
        room = division.kv // token_bytes - memory.TAIL_ROOM
        context = model.args.max_position_embeddings
        self.info = ModelInfo(
            path=str(model.folder),
            vocab_size=model.args.vocab_size,
            max_context=min(context, config.max_context or context, room),
            eos_token_ids=model.eos_token_ids,
            has_mtp=model.mtp is not None,
            weight_bytes=model.weight_bytes,
            kv_bytes_per_token=token_bytes,
            bits_per_weight=model.bits_per_weight,
            device=memory.device_name(),
        )
        self._scheduler = Scheduler(
            self._config,
            self._tree,
            self._tails,
            kv_budget=division.kv,
            kv_bytes_per_token=token_bytes,
            chunk_limit=lambda context, rows: select_form(
                model.shape, context, rows, model.dtype.size
            )[0],
        )
        self._requests: dict[str, list[Sequence]] = {}
        self._compiling: dict[str, Future[LLMatcher]] = {}
        """By request, the grammars that its sequences wait for."""
        self._constraints = constraints or StructuredOutputManager(
            model.folder, self.info.vocab_size, self.info.eos_token_ids
        )
        self._launcher = ModelRunner(
            model, self._scheduler, self._tree, self._tails, self._constraints
        )
        self._relief = OOMRecovery(
            self._scheduler,
            least_kv=(self.info.max_context + memory.TAIL_ROOM) * token_bytes,
        )
        self._gate = DraftController(config.mtp if model.mtp is not None else 0)
        self._in_flight: PendingStep | None = None
        self._outbox: list[SequenceOutput] = []
        self._last_landed = 0.0
        self._steps = 0
        self._rows = 0
        self._step_seconds = 0.0
        self._step_seconds_total = 0.0
        self._cached = 0
        self._generated = 0
        self._drafted = 0
        self._accepted = 0
        self._verified = 0
        self.release_limits: Callable[[], object] = lambda: None
        """Undoes what was set in MLX for this engine; does nothing the second time."""

    @property
    def kv_layers(self) -> int:
        """Layers that cache keys and values, and so arrays of each sealed segment."""
        return self._model.kv_layers

    # -- requests -------------------------------------------------------------------------

    def submit(self, request: EngineRequest) -> None:
        """Take a request in. What is wrong with it arrives as its Output."""
        try:
            sequences = self._sequences(request)
        except InvalidRequest as error:
            self._outbox.append(_refusal(request.id, error))
            return
        self._requests[request.id] = sequences
        if request.grammar is not None:
            self._compiling[request.id] = self._constraints.prepare(request.grammar)
            return
        for sequence in sequences:
            self._scheduler.add(sequence)

    def _admit_compiled(self) -> None:
        """Schedule the sequences whose grammars have been compiled."""
        for id, future in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[id]
            sequences = self._requests[id]
            guidance = sequences[0].request.grammar
            assert guidance is not None
            try:
                matcher = future.result()
            except GlmdError as error:
                del self._requests[id]
                self._outbox.append(_refusal(id, error))
                continue
            for sequence in sequences:
                sequence.grammar = self._constraints.start(guidance, matcher)
                self._scheduler.add(sequence)

    def _sequences(self, request: EngineRequest) -> list[Sequence]:
        prompt = unpack_tokens(request.prompt)
        if request.id in self._requests:
            raise InvalidRequest(f"A request with id {request.id!r} is running already.")
        validate_request(request, prompt, self.info)
        limit = self.info.max_context
        if request.max_tokens is not None:
            limit = min(limit, len(prompt) + request.max_tokens)
        seed = request.sampling.seed
        if seed is None:
            seed = secrets.randbits(63)
        return [
            Sequence(
                request,
                index,
                self._row_sampling(request, noise_key(seed, index)),
                limit,
                paired=self._model.mtp is not None,
            )
            for index in range(request.n)
        ]

    def _row_sampling(self, request: EngineRequest, key: tuple[int, int]) -> SequenceSampling:
        bias = None
        if request.sampling.logit_bias:
            dense = np.zeros(self.info.vocab_size, np.float32)
            for token, value in request.sampling.logit_bias.items():
                dense[token] = value
            bias = mx.array(dense)
        return SequenceSampling(
            params=request.sampling,
            key=key,
            min_tokens=request.min_tokens,
            banned_at_first=(*self.info.eos_token_ids, *request.stop_token_ids),
            bias=bias,
        )

    def cancel(self, id: str, index: int | None = None) -> None:
        """End a request, or one of its sequences; its rows are free from the next step on."""
        for sequence in list(self._requests.get(id, ())):
            if index is None or sequence.index == index:
                self._finish(sequence)
                self._outbox.append(
                    SequenceOutput(id=id, index=sequence.index, finish_reason="cancelled")
                )

    def _finish(self, sequence: Sequence) -> None:
        sequence.finished = True
        id = sequence.request.id
        if id not in self._compiling:
            self._scheduler.remove(sequence)
        siblings = self._requests[id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[id]
            self._compiling.pop(id, None)

    # -- stepping -------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._outbox or self._in_flight)

    def step(self) -> list[SequenceOutput]:
        """Launch the next step, then read the one before and return what it gave.

        The device works on the one while the host reads the other, so results come one call
        after the launch. If the device has no memory for it, the next call tries with less.
        """
        progress: list[SequenceOutput] = []
        try:
            progress = self._step()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._relieve(error)
        outputs, self._outbox = self._outbox, []
        return outputs + progress

    def _step(self) -> list[SequenceOutput]:
        """Launch a step, and read the one before into the outbox; returns prompts' progress."""
        if self._in_flight is not None and self._scheduler.requires_sync:
            self._read(self._in_flight)
            self._in_flight = None
        self._admit_compiled()
        plan = self._scheduler.schedule()
        launched = None
        if not plan and self._in_flight is None and self._compiling:
            wait(self._compiling.values(), COMPILE_POLL, FIRST_COMPLETED)
        if plan:
            drafts = self._gate.choose(max(1, len(plan.decode)))
            launched = self._launcher.execute(plan, self._in_flight, drafts)
        else:
            self._launcher.reset()
        if self._in_flight is not None:
            self._read(self._in_flight)
        self._in_flight = launched
        return self._progress(plan)

    def _relieve(self, error: BaseException) -> None:
        """Give up all KV. What the last step yielded counts, if it can still be read; what it did
        not yield will come out the same, since a token depends on nothing but its position."""
        flight, self._in_flight = self._in_flight, None
        self._launcher.reset()
        dropped = self._relief.step_failed(error)
        if flight is not None:
            try:
                self._read(flight)
            except (MemoryError, RuntimeError) as another:
                if not is_out_of_memory(another):
                    raise
        for sequence in self._scheduler.waiting:
            sequence.num_inflight_tokens = 0
        mx.clear_cache()
        for sequence in dropped:
            if not sequence.finished:
                self._finish(sequence)
                self._outbox.append(
                    SequenceOutput(
                        id=sequence.request.id,
                        index=sequence.index,
                        finish_reason="error",
                        error_kind="overloaded",
                        error="The device has no memory for this request at present.",
                    )
                )

    def _progress(self, plan: SchedulerOutput) -> list[SequenceOutput]:
        admitted = [
            SequenceOutput(
                id=sequence.request.id,
                index=sequence.index,
                admitted=True,
                cache_match=sequence.cache_match,
            )
            for sequence in plan.admitted
        ]
        return admitted + [
            SequenceOutput(
                id=sequence.request.id,
                index=sequence.index,
                computed_tokens=min(sequence.num_computed_tokens, sequence.prompt_length),
            )
            for sequence, _ in plan.chunks
            if sequence.request.prompt_progress and not sequence.finished
        ]

    def close(self) -> None:
        """Drop all work and memory; the engine is of no use afterwards."""
        for id in list(self._requests):
            self.cancel(id)
        self._in_flight = None
        self._launcher.reset()
        self._tree.clear()
        mx.clear_cache()
        self.release_limits()

    def _read(self, flight: PendingStep) -> None:
        """Wait for a launched step and turn its tokens into Outputs."""
        confirmed = flight.wait()
        self._relief.step_succeeded()
        landed = flight.completed_at(self._last_landed)
        seconds = landed - max(flight.launched, self._last_landed)
        self._last_landed = landed
        self._steps += 1
        self._rows += flight.prefill_rows + sum(flight.widths[: flight.num_decoding])
        self._step_seconds += 0.1 * (seconds - self._step_seconds)
        self._step_seconds_total += seconds
        accepted = self._read_tokens(flight, confirmed)
        alone = seconds if flight.prefill_rows == 0 else None
        drafts = max(flight.widths, default=1) - 1
        self._gate.observe(len(flight.sequences), drafts, accepted, alone)
        self._scheduler.prefill_budget.observe(flight.num_decoding, flight.prefill_rows, seconds)

    def _read_tokens(self, flight: PendingStep, confirmed: list[list[int]]) -> int:
        """Hand the confirmed tokens to their sequences; returns the number of accepted drafts.

        What is counted for users are the drafts that became output: none behind an answer's end.
        """
        accepted = 0
        for i, (sequence, tokens) in enumerate(zip(flight.sequences, confirmed, strict=True)):
            width, count = flight.widths[i], len(tokens)
            sequence.num_inflight_tokens -= width
            accepted += count - 1
            if sequence.finished:
                continue
            if sequence.lease is not None:
                sequence.num_computed_tokens = sequence.length + count - 1
            logprobs = [flight.logprobs.get((i, column)) for column in range(count)]
            output = self._output(sequence, tokens, logprobs)
            output.drafted, output.accepted = width - 1, len(output.tokens) - 1
            self._drafted += output.drafted
            self._accepted += output.accepted
            self._verified += output.drafted > 0
            constraint = sequence.grammar
            if constraint is not None and constraint.error and output.finish_reason is None:
                output.finish_reason, output.error_kind = "error", "internal"
                output.error = f"The grammar cannot be followed further: {constraint.error}"
            self._outbox.append(output)
            if output.finish_reason is not None:
                self._finish(sequence)
        return accepted

    def _output(
        self,
        sequence: Sequence,
        tokens: list[int],
        logprobs: list[tuple[mx.array, mx.array, mx.array] | None],
    ) -> SequenceOutput:
        """Add confirmed tokens to a sequence, up to its end."""
        output = SequenceOutput(id=sequence.request.id, index=sequence.index)
        if not sequence.reported_usage:
            sequence.reported_usage = True
            output.prompt_tokens = sequence.prompt_length
            output.cached_tokens = sequence.num_prompt_tokens_cached
            self._cached += sequence.num_prompt_tokens_cached
        for token, entry in zip(tokens, logprobs, strict=True):
            sequence.append(token)
            output.tokens.append(token)
            if entry is not None:
                chosen, ids, values = (np.array(part) for part in entry)
                found = TokenLogprobs(float(chosen), ids.tolist(), values.tolist())
                output.logprobs = [*(output.logprobs or []), found]
            output.finish_reason = self._finish_reason(sequence, token)
            if output.finish_reason is not None:
                break
        self._generated += len(output.tokens)
        return output

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        request = sequence.request
        constraint = sequence.grammar
        # Where a grammar ends there is nothing else to say.
        ignore_eos = request.ignore_eos and (constraint is None or not constraint.active)
        ended = token in request.stop_token_ids or (
            token in self.info.eos_token_ids and not ignore_eos
        )
        if ended:
            return "stop"
        return "length" if sequence.length >= sequence.max_length else None

    @property
    def kv_bytes(self) -> int:
        """Of all segments and tails."""
        return self._tree.nbytes + self._tails.nbytes

    def stats(self) -> EngineStats:
        """A snapshot of counters and gauges."""
        shape = self._tree.stats()
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_tokens=self._tree.tokens,
            kv_idle_tokens=self._tree.evictable_tokens,
            kv_segments=shape.segments,
            kv_branches=shape.branches,
            kv_longest=shape.longest,
            kv_bytes=self.kv_bytes,
            kv_budget_bytes=self._scheduler.kv_budget,
            memory_budget_bytes=self._memory_budget,
            weight_bytes=self._model.weight_bytes,
            active_bytes=mx.get_active_memory(),
            cache_bytes=mx.get_cache_memory(),
            footprint_bytes=process_memory_bytes(),
            out_of_memory=self._relief.failures,
            steps=self._steps,
            rows=self._rows,
            prompt_tokens_computed=self._launcher.prompt_rows,
            prompt_tokens_cached=self._cached,
            tokens_generated=self._generated,
            drafted=self._drafted,
            accepted=self._accepted,
            verified=self._verified,
            drafts=self._gate.drafts,
            acceptance=self._gate.acceptance if self.info.has_mtp else 0.0,
            preemptions=self._scheduler.preemptions,
            evicted_tokens=self._tree.evicted_tokens,
            step_seconds=self._step_seconds,
            step_seconds_total=self._step_seconds_total,
        )


def _refusal(id: str, error: GlmdError) -> SequenceOutput:
    param = error.param if isinstance(error, InvalidRequest) else None
    return SequenceOutput(
        id=id,
        finish_reason="error",
        error=error.message,
        error_kind="invalid_request",
        error_param=param,
    )
