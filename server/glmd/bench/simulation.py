"""Simulation of scheduling on Apple GPUs, with a virtual clock and without weights.

The scheduler, the prefix tree, the tail pool, the memory plan and the layout of each step are the
engine's own. Only the forward pass is replaced: its duration is computed by
`glmd.bench.device_model` from the rows and pieces of the step.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import mlx.core as mx

from glmd.bench.device_model import (
    WEIGHT_BYTES,
    Device,
    Ranks,
    StepCost,
    model_args,
    step_cost,
)
from glmd.engine.config import EngineConfig
from glmd.engine.memory import TAIL_ROOM, plan_memory
from glmd.engine.model_runner import ModelRunner
from glmd.engine.scheduler.scheduler import Scheduler
from glmd.engine.sequence import Sequence, SequenceStatus, make_sequences
from glmd.engine.spec_decode.controller import DraftPlan
from glmd.engine.step import PendingStep
from glmd.engine.structured_output import StructuredOutputManager
from glmd.ipc import EngineRequest, ModelInfo, SamplingParams, TokenArray, pack_tokens
from glmd.kv_cache.prefix_tree import PrefixTree
from glmd.kv_cache.stored_keys import StoredKeys
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch
from glmd.model.loader import LoadedModel
from glmd.model.mla import MLAShape

ITEM_BYTES = 2
"""Bytes of an activation in bfloat16."""

SIMULATED_VOCABULARY = 4
"""Columns of the logits, all 0: every sampled token is token 0."""


class SimulatedModel(LoadedModel):
    """Shapes of the model, with a forward pass that computes nothing.

    KV is one byte per token, so that bytes of KV are tokens.

    Attributes:
        cost: of the last step.
    """

    def __init__(self, shape: MLAShape, *, experts_kernel: bool) -> None:
        self._experts_kernel = experts_kernel
        self.args = model_args()
        self.shape = shape
        self.dtype = mx.bfloat16
        self.mtp = None
        self.cost = StepCost(0, 0, 0)

    def forward(self, batch: ForwardBatch, tails: TailPool) -> tuple[mx.array, list[StoredKeys]]:
        self.cost = step_cost(
            batch, tails.slots * tails.capacity, experts_kernel=self._experts_kernel
        )
        hidden = mx.zeros((len(batch.logits_rows), 1))
        return hidden, [mx.zeros((batch.tokens.shape[0], 1), mx.uint8)]

    def logits(self, hidden: mx.array) -> mx.array:
        return mx.zeros((hidden.shape[0], SIMULATED_VOCABULARY))


@dataclass(eq=False, slots=True)
class Stream:
    """A simulated request.

    Attributes:
        arrival: in virtual seconds.
        on_finish: called with the tokens of prompt and output at the end.
        times: of each output token, in virtual seconds.
    """

    prompt: TokenArray
    max_tokens: int
    arrival: float
    client: str
    on_finish: Callable[[TokenArray], None] | None = None
    times: list[float] = field(default_factory=list)

    @property
    def first_token(self) -> float:
        """Seconds from the arrival to the first token."""
        return self.times[0] - self.arrival


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """One step of a simulation, as executed.

    Attributes:
        end: in virtual seconds.
        pieces: most pieces of KV in the path of a running sequence.
    """

    end: float
    seconds: float
    decode_rows: int
    prefill_rows: int
    dispatches: int
    pieces: int


class Simulation:
    """The engine's loop on a device, with a virtual clock.

    As in `glmd.engine.core.Engine`, a step is launched before the one before is read.

    Args:
        config: the engine's; None: the defaults, without MTP.
        mla_kernel: whether decode attention is `glmd.model.mla_kernel`.
        experts_kernel: whether experts of few rows run in `glmd.model.experts_kernel`.
        ranks: of which `device` is one; None: it is alone.

    Attributes:
        clock: virtual seconds.
        steps: all steps so far.
    """

    def __init__(
        self,
        device: Device,
        config: EngineConfig | None = None,
        *,
        mla_kernel: bool = False,
        experts_kernel: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        args = model_args()
        weights = WEIGHT_BYTES
        if ranks is not None:
            weights = ranks.weight_bytes
            args.num_attention_heads //= ranks.count
        plan = plan_memory(
            Path("GLM-4.7-Flash"),
            args,
            config or EngineConfig(mtp=0),
            int(device.memory_gib * 2**30),
            weights=weights,
            mtp_weights=0,
            item=ITEM_BYTES,
        )
        shape = MLAShape(
            heads=args.num_attention_heads,
            latent=args.kv_lora_rank,
            nope=args.qk_nope_head_dim,
            rope=args.qk_rope_head_dim,
            value=args.v_head_dim,
            score_bytes=plan.score_bytes,
            expanded_bytes=plan.expanded_bytes,
            kernel=mla_kernel,
        )
        self.shape = shape
        kv_tokens = plan.kv // plan.token_bytes
        self.info = ModelInfo(
            path="GLM-4.7-Flash",
            vocab_size=args.vocab_size,
            max_context=min(args.max_position_embeddings, kv_tokens - TAIL_ROOM),
            eos_token_ids=(),
            has_mtp=False,
            weight_bytes=weights,
            kv_bytes_per_token=plan.token_bytes,
            kv_bits=plan.kv_bits,
            bits_per_weight=0.0,
            device=device.name,
        )
        self.clock = 0.0
        self.steps: list[SimulatedStep] = []
        self.scheduler = Scheduler(
            plan.config,
            PrefixTree(plan.max_segment),
            TailPool(1, 1, mx.uint8),
            kv_budget=kv_tokens,
            kv_bytes_per_token=1,
        )
        self._device = device
        self._ranks = ranks
        self._model = SimulatedModel(shape, experts_kernel=experts_kernel)
        # No request has a grammar.
        self._runner = ModelRunner(self._model, self.scheduler, cast(StructuredOutputManager, None))
        self._streams: dict[Sequence, Stream] = {}
        self._arrivals: list[tuple[float, int, Stream]] = []
        self._ids = itertools.count()
        self._pending: PendingStep | None = None
        self._device_free_at = 0.0
        self._copied_tokens = 0
        """Tokens that the tree had copied by the last step."""

    def submit(
        self,
        prompt: TokenArray,
        max_tokens: int,
        *,
        after: float = 0.0,
        client: str = "",
        on_finish: Callable[[TokenArray], None] | None = None,
    ) -> Stream:
        """Let a request arrive in `after` seconds."""
        stream = Stream(prompt, max_tokens, self.clock + after, client, on_finish)
        heapq.heappush(self._arrivals, (stream.arrival, next(self._ids), stream))
        return stream

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """Run until a condition holds after a step, or nothing is left to do."""
        while not until():
            self._deliver_arrivals()
            if self._pending is not None and self.scheduler.requires_sync:
                self._read(self._pending)
                self._pending = None
            output = self.scheduler.schedule()
            launched = self._runner.execute(output, self._pending, DraftPlan(0)) if output else None
            if launched is not None:
                self._record(launched)
            if self._pending is not None:
                self._read(self._pending, before=launched)
            elif launched is None:
                if not self._arrivals:
                    return
                self.clock = max(self.clock, self._arrivals[0][0])
            self._pending = launched

    def _deliver_arrivals(self) -> None:
        while self._arrivals and self._arrivals[0][0] <= self.clock:
            _, id, stream = heapq.heappop(self._arrivals)
            request = EngineRequest(
                id=str(id),
                prompt=pack_tokens(stream.prompt),
                sampling=SamplingParams(temperature=0.0),
                max_tokens=stream.max_tokens,
                client=stream.client,
            )
            (sequence,) = make_sequences(request, stream.prompt, self.info)
            self._streams[sequence] = stream
            self.scheduler.add(sequence)

    def _record(self, step: PendingStep) -> None:
        """Compute when a launched step ends. The device runs steps one after another."""
        tree = self.scheduler.tree
        copied, self._copied_tokens = tree.copied_tokens - self._copied_tokens, tree.copied_tokens
        cost = replace(self._model.cost, copied_tokens=copied)
        seconds = cost.seconds(self._device, self._ranks)
        self._device_free_at = max(self._device_free_at, self.clock) + seconds
        leases = [s.lease for s in self.scheduler.running if s.lease is not None]
        self.steps.append(
            SimulatedStep(
                end=self._device_free_at,
                seconds=seconds,
                decode_rows=step.rows.num_decode_rows,
                prefill_rows=step.rows.num_prefill_rows,
                dispatches=self._model.cost.dispatches,
                pieces=max(len(tree.path(lease)) for lease in leases),
            )
        )

    def _read(self, step: PendingStep, before: PendingStep | None = None) -> None:
        """Wait for a step and hand out its tokens.

        Args:
            before: the step launched since; None: there is none.
        """
        record = self.steps[-1 if before is None else -2]
        self.clock = max(self.clock, record.end)
        for rows, tokens in zip(step.rows.sampled, step.wait(), strict=True):
            sequence = rows.sequence
            sequence.num_inflight_tokens -= rows.num_sampled
            if sequence.status is SequenceStatus.FINISHED:
                continue
            if sequence.status is SequenceStatus.RUNNING:
                sequence.num_computed_tokens = sequence.length
            ended = sequence.advance(tokens, [None], ()).finish_reason is not None
            stream = self._streams[sequence]
            stream.times.append(self.clock)
            if ended:
                self.scheduler.finish(sequence)
                del self._streams[sequence]
                if stream.on_finish is not None:
                    stream.on_finish(sequence.tokens(0, sequence.length).copy())
        self.scheduler.prefill_budget.observe(
            len(step.rows.decode), step.rows.num_prefill_rows, record.seconds
        )
