"""Tiny models and engines for tests, and a reference forward pass to compare with."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.engine import memory
from glmd.engine.config import EngineConfig
from glmd.engine.core import Engine
from glmd.engine.scheduler.scheduler import SchedulerOutput
from glmd.engine.spec_decode.controller import DraftPlan
from glmd.engine.step import PendingStep
from glmd.ipc import (
    EngineRequest,
    FinishReason,
    SamplingParams,
    SequenceOutput,
    pack_tokens,
    unpack_tokens,
)
from glmd.kv_cache.stored_keys import vector_bytes
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch, PrefillChunk
from glmd.model.loader import LoadedModel, load_model
from glmd.model.sampler import History, SamplingRow, SequenceSampling, noise_key, sample

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_nextn_predict_layers": 0,
}
"""Configuration with short steps, in which both forms of attention are used: the expanded one from
42 rows on."""

_folders: list[tempfile.TemporaryDirectory[str]] = []

Logits = npt.NDArray[np.float32]


def fresh_folder() -> Path:
    """A folder that is removed at the end of the test run."""
    _folders.append(tempfile.TemporaryDirectory(prefix="glmd-test-"))
    return Path(_folders[-1].name)


def load(folder: Path, **options: Any) -> LoadedModel:
    """Load a checkpoint in float32 on any device."""
    return load_model(folder, "float32", lambda done, total: None, **options)


@cache
def _tiny_model(config: str) -> LoadedModel:
    folder = fresh_folder()
    write_random_checkpoint(folder, dtype="F32", **TINY | json.loads(config))
    return load(folder)


def tiny_model(**config: Any) -> LoadedModel:
    """A random model, cached by its configuration."""
    return _tiny_model(json.dumps(config, sort_keys=True))


def one_shot_logits(model: LoadedModel, tokens: Iterable[int], *, expanded: bool) -> Logits:
    """Logits of glmd's forward pass over all tokens as one chunk: [tokens, vocabulary]."""
    ids = mx.array(np.array(list(tokens), np.int32))
    count = ids.shape[0]
    batch = ForwardBatch(ids, mx.arange(count), [], [PrefillChunk(0, count, [], expanded, count)])
    tails = TailPool(model.kv_layers, model.shape.kv_width, model.dtype)
    hidden, _ = model.forward(batch, tails)
    return np.array(model.logits(hidden))


def reference_logits(model: LoadedModel, tokens: Iterable[int]) -> Logits:
    """Logits of mlx-lm's forward pass over the same weights: [tokens, vocabulary].

    Loading has set the epsilon of the latent norms to transformers'; the router's dtype is that
    of the model, float32.
    """
    return np.array(
        model._model(mx.array(np.array(list(tokens), np.int32))[None])[0].astype(mx.float32)
    )


def tiny_engine(
    model: LoadedModel | None = None, *, kv_tokens: int | None = None, **config: Any
) -> Engine:
    """An engine with room for `kv_tokens` tokens of KV; None: 100,000."""
    model = model or tiny_model()
    defaults: dict[str, Any] = {"kv_bits": 16} | ({"mtp": 0} if model.mtp is None else {})
    settings = EngineConfig(**defaults | config)
    bits = 16 if settings.kv_bits == "auto" else settings.kv_bits
    item = model.dtype.size
    token_bytes = model.kv_layers * vector_bytes(model.shape.kv_width, item, bits)
    room = (kv_tokens or 100_000) * token_bytes
    working = memory.activation_bytes(model.args, settings, item, token_bytes, kv_bits=bits)
    budget = model.weight_bytes + working + room
    return Engine(model, settings, budget)


def request(id: str, prompt: Iterable[int], **fields: Any) -> EngineRequest:
    """A greedy request, with any fields of `EngineRequest` and `SamplingParams`."""
    names = set(SamplingParams.__struct_fields__)
    sampling = {name: value for name, value in fields.items() if name in names}
    rest = {name: value for name, value in fields.items() if name not in names}
    sampling.setdefault("temperature", 0.0)
    return EngineRequest(
        id=id,
        prompt=pack_tokens(np.array(list(prompt), np.int32)),
        sampling=SamplingParams(**sampling),
        **rest,
    )


@dataclass
class Answer:
    """Outputs of one sequence so far."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason | None = None
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    steps: list[int] = field(default_factory=list)
    """The step in which each output arrived."""
    progress: list[int] = field(default_factory=list)


class Run:
    """An engine and the answers to its requests.

    Attributes:
        answers: by (request id, index).
        steps: number of steps taken.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.answers: dict[tuple[str, int], Answer] = {}
        self.steps = 0

    def submit(self, *requests: EngineRequest) -> None:
        for one in requests:
            self.engine.submit(one)

    def step(self) -> list[SequenceOutput]:
        outputs = self.engine.step()
        self.steps += 1
        for output in outputs:
            answer = self.answers.setdefault((output.id, output.index), Answer())
            assert answer.finish is None, f"output after the end: {output}"
            answer.tokens += output.tokens
            answer.logprobs += [entry.logprob for entry in output.logprobs or []]
            answer.finish = output.finish_reason
            answer.error = output.error
            if output.tokens:
                if not answer.steps:
                    answer.prompt_tokens = output.prompt_tokens
                    answer.cached_tokens = output.cached_tokens
                answer.steps.append(self.steps)
            if output.computed_tokens:
                answer.progress.append(output.computed_tokens)
        return outputs

    def finish(self, limit: int = 5000) -> None:
        """Step until the engine has no work."""
        for _ in range(limit):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError(f"work left after {limit} steps: {self.engine.stats()}")

    def answer(self, id: str, index: int = 0) -> Answer:
        return self.answers[id, index]


def refuse_memory(engine: Engine, launches: Collection[int], *, late: bool) -> None:
    """Let some launches of steps, counted from 0, fail as MLX does without memory.

    Args:
        late: fail after the launch, as an evaluation would.
    """
    execute = engine._runner.execute
    numbers = itertools.count()

    def refuse(
        output: SchedulerOutput, previous: PendingStep | None, plan: DraftPlan
    ) -> PendingStep:
        refused = next(numbers) in launches
        if refused and not late:
            raise RuntimeError("[malloc] Unable to allocate 4096 bytes.")
        step = execute(output, previous, plan)
        if refused:
            raise MemoryError("std::bad_alloc")
        return step

    engine._runner.execute = refuse  # type: ignore[method-assign]


def run(engine: Engine, *requests: EngineRequest) -> Run:
    """Submit all requests at once and run them to the end."""
    running = Run(engine)
    running.submit(*requests)
    running.finish()
    return running


def assert_reference_tokens(
    model: LoadedModel,
    asked: EngineRequest,
    answer: Answer,
    index: int = 0,
    *,
    tie: float = 1e-4,
) -> None:
    """Assert that every token is the choice of the reference forward pass and the sampler.

    One forward over prompt and answer gives the logits behind every position. A token that
    differs is accepted where logits that are off by `tie` give it: there the choice is a tie.
    """
    prompt = unpack_tokens(asked.prompt)
    output = np.array(answer.tokens, np.int32)
    if not len(output):
        return
    whole = np.concatenate([prompt, output])
    logits = reference_logits(model, whole[:-1])[len(prompt) - 1 :]
    vocabulary = logits.shape[1]
    params = asked.sampling
    bias = np.zeros(vocabulary, np.float32)
    for token, value in params.logit_bias.items():
        bias[token] = value
    sampling = SequenceSampling(
        params=params,
        key=noise_key(params.seed or 0, index),
        min_tokens=asked.min_tokens,
        banned_at_first=(*model.eos_token_ids, *asked.stop_token_ids),
        bias=mx.array(bias),
    )
    forced = _forced(asked, answer.tokens)
    rows = []
    for i in range(len(output)):
        history = History(vocabulary, prompt, output[:i]) if sampling.penalised else None
        rows.append(SamplingRow(sampling, i, history, forced.get(i)))
    positions = mx.arange(len(prompt), len(prompt) + len(output))
    rng = np.random.default_rng(0)
    open_ = np.ones(len(output), bool)
    for attempt in range(20):
        noise = rng.normal(0, tie, logits.shape).astype(np.float32) if attempt else 0
        open_ &= np.array(sample(mx.array(logits + noise), rows, positions).tokens) != output
        if not open_.any():
            return
    at = int(np.flatnonzero(open_)[0])
    raise AssertionError(
        f"{asked.id}: token {at} of {len(output)} is {output[at]}, behind {len(prompt)} of prompt"
    )


def _forced(asked: EngineRequest, tokens: list[int]) -> dict[int, int]:
    """Tokens forced by a thinking budget, by index in the output."""
    if asked.thinking_budget is None or asked.thinking_close[-1] in tokens[: asked.thinking_budget]:
        return {}
    return {asked.thinking_budget + i: token for i, token in enumerate(asked.thinking_close)}


def assert_complete(model: LoadedModel, asked: EngineRequest, answer: Answer, context: int) -> None:
    """Assert that an answer ended where its finish reason says."""
    stops = set(asked.stop_token_ids)
    if not asked.ignore_eos:
        stops |= set(model.eos_token_ids)
    prompt = len(unpack_tokens(asked.prompt))
    most = min(asked.max_tokens or context, context - prompt)
    assert not stops & set(answer.tokens[:-1])
    if answer.finish == "stop":
        assert answer.tokens[-1] in stops
        assert len(answer.tokens) > asked.min_tokens
    elif answer.finish == "length":
        assert len(answer.tokens) == most
        assert answer.tokens[-1] not in stops
    else:
        assert answer.finish == "cancelled"
        assert len(answer.tokens) <= most
    if answer.tokens:
        assert answer.prompt_tokens == prompt
        assert 0 <= answer.cached_tokens < prompt
    if asked.sampling.logprobs is not None:
        assert len(answer.logprobs) == len(answer.tokens)


def assert_idle(engine: Engine) -> None:
    """Assert that no request and no lease is left, and that counters match the tree."""
    disk = engine.scheduler.disk
    while disk is not None and disk.held_bytes:
        disk.wait(1.0)  # For the writer, which holds evicted segments.
    stats = engine.stats()
    tree, tails = engine.scheduler.tree, engine.scheduler.tails
    assert (stats.running, stats.waiting) == (0, 0)
    assert (tails.used, tails.nbytes) == (0, 0)
    assert not tree.leases
    nodes = list(tree.nodes())
    assert not any(node.leases for node in nodes)
    assert tree.tokens == sum(len(node) for node in nodes)
    assert tree.nbytes == sum(node.kv.nbytes for node in nodes if node.kv is not None)
    most = tree.tokens * engine.info.kv_bytes_per_token
    assert tree.nbytes == stats.kv_bytes <= most
    assert tree.nbytes == most or engine.scheduler.tails.defers
    assert tree.evictable_tokens == tree.tokens
