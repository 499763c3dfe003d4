"""Fit of a `Device` to steps of the engine that were measured on this machine.

Measured are decode steps of several batch sizes and contexts, and prompts alone. Bytes and kernels
of each step are counted as in `glmd.bench.device_model`, with the sizes of the measured model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from glmd.bench import device_model
from glmd.bench.backends import Dtype, GlmdSession
from glmd.bench.device_model import Device, StepCost, step_cost
from glmd.bench.random_checkpoint import on_gpu
from glmd.bench.workloads import ENDLESS, Prompts
from glmd.engine import memory
from glmd.engine.config import EngineConfig
from glmd.engine.core import Engine
from glmd.kv_cache.stored_keys import StoredKeys
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch
from glmd.model.loader import LoadedModel, load_model

BATCHES, CONTEXTS = (1, 2, 4, 8), (64, 1024)

PROMPTS = (512, 1024)
"""Rows of prompts that are computed alone, each in one step."""

WARM_STEPS, STEPS = 4, 16
"""Steps of each kind before the timed ones, and timed steps, of which the median counts."""

REPEATS = 3
"""Prompts of each length, of which the median counts."""

LEAST = 1e-15
"""Seconds per byte and per kernel at least. A fit may say that one of both takes no time."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Bytes that the steps of a model read (terms of `glmd.bench.device_model`).

    Attributes:
        expert_share: of the routed experts, read by a single row.
        kv_token: of all layers.
    """

    layers: int
    dense: float
    experts: float
    expert_share: float
    kv_token: float

    @classmethod
    def of(cls, model: LoadedModel) -> ModelSizes:
        """Sizes of a loaded model."""
        sizes = {"experts": 0, "embedding": 0, "dense": 0}
        weights: Any = tree_flatten(model._model.parameters())
        for name, array in weights:
            kind = "embedding" if "embed_tokens" in name else "dense"
            sizes["experts" if "switch_mlp" in name else kind] += array.nbytes
        args = model.args
        return cls(
            layers=args.num_hidden_layers,
            dense=sizes["dense"],
            experts=sizes["experts"],
            expert_share=args.num_experts_per_tok / (args.n_routed_experts or 1),
            kv_token=model.kv_bytes_per_token,
        )

    def step_bytes(self, cost: StepCost) -> float:
        """Bytes read by a decode step."""
        unused = (1 - self.expert_share) ** cost.rows
        return self.dense + self.experts * (1 - unused) + cost.kv_tokens * self.kv_token

    @property
    def row_bytes(self) -> float:
        """Weights that a row is multiplied with, without the embedding."""
        return self.dense + self.experts * self.expert_share


FLASH = ModelSizes(
    device_model.LAYERS,
    device_model.DENSE_BYTES,
    device_model.EXPERTS_BYTES,
    device_model.EXPERTS_PER_ROW / device_model.EXPERTS,
    device_model.KV_TOKEN_BYTES,
)
"""Sizes of GLM-4.7-Flash."""

Measured = tuple[StepCost, float]
"""A step and its seconds."""


def fit(
    name: str,
    memory_gib: float,
    sizes: ModelSizes,
    decode: Sequence[Measured],
    prompts: Sequence[Measured],
) -> Device:
    """Fit a device to measured steps: decode steps, then rows of prompts.

    A row's time is scaled from the measured model to GLM-4.7-Flash by the weights that it is
    multiplied with.
    """
    terms = np.array(
        [[sizes.step_bytes(cost), sizes.layers * cost.dispatches] for cost, _ in decode]
    )
    seconds = np.array([seconds for _, seconds in decode])
    # Relative errors count, so that long steps do not outweigh short ones.
    relative = terms / seconds[:, None]
    byte, kernel = np.linalg.lstsq(relative, np.ones(len(decode)), rcond=None)[0]
    if byte <= 0 or kernel <= 0:
        # A single term fits better than one of both below 0.
        alone = relative.sum(axis=0) / (relative**2).sum(axis=0)
        errors = ((relative * alone - 1) ** 2).sum(axis=0)
        byte, kernel = (alone[0], 0) if errors[0] < errors[1] else (0, alone[1])
    row = median((s - sizes.layers * c.dispatches * kernel) / c.rows for c, s in prompts)
    return Device(
        name=name,
        bandwidth_gb=1e-9 / max(float(byte), LEAST),
        row_ms=1e3 * max(float(row) * FLASH.row_bytes / sizes.row_bytes, LEAST),
        memory_gib=memory_gib,
        dispatch_us=1e6 * max(float(kernel), LEAST),
    )


def calibrate(folder: Path, on_progress: Callable[[str], None]) -> Device:
    """Measure steps of a checkpoint on this machine, and fit a device to them.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
    """
    dtype: Dtype = "bfloat16" if on_gpu() else "float32"
    model = load_model(folder, dtype, lambda done, total: None, mtp=False)
    model.warm_up()
    costs: list[StepCost] = []
    forward = model.forward

    def counted(batch: ForwardBatch, tails: TailPool) -> tuple[mx.array, list[StoredKeys]]:
        costs.append(step_cost(batch, tails.slots * tails.capacity))
        return forward(batch, tails)

    model.forward = counted  # type: ignore[method-assign]
    budget = memory.default_budget()
    prompts = Prompts(model.args.vocab_size, 1.0)
    decode: list[Measured] = []
    for context in CONTEXTS:
        for batch in BATCHES:
            on_progress(f"decode steps of {batch} at a context of {context}")
            seconds = _decode_seconds(model, budget, [prompts.draw(context) for _ in range(batch)])
            decode.append((costs[-1], seconds))
    computed: list[Measured] = []
    for rows in PROMPTS:
        on_progress(f"prompts of {rows}")
        costs.clear()
        times = list(_prompt_seconds(model, budget, rows, prompts))
        computed.append((next(cost for cost in costs if cost.rows == rows), median(times)))
    gib = budget / 2**30
    return fit(memory.device_name(), gib, ModelSizes.of(model), decode, computed)


def _decode_seconds(model: LoadedModel, budget: int, prompts: list[np.ndarray]) -> float:
    """Median seconds of a decode step of all prompts."""
    session = GlmdSession(Engine(model, EngineConfig(mtp=0), budget))
    for number, prompt in enumerate(prompts):
        session.submit(number, prompt, ENDLESS)
    started: set[int] = set()
    while len(started) < len(prompts):
        started |= {progress.request for progress in session.step() if progress.tokens}
    times = [time.perf_counter()]
    for _ in range(WARM_STEPS + STEPS):
        session.step()
        times.append(time.perf_counter())
    session.close()
    return median(np.diff(times[WARM_STEPS:]).tolist())


def _prompt_seconds(
    model: LoadedModel, budget: int, rows: int, prompts: Prompts
) -> Iterator[float]:
    """Seconds to the first token of prompts that are computed in one step."""
    for number in range(1 + REPEATS):
        config = EngineConfig(mtp=0, max_step_tokens=rows, prefix_cache=False)
        session = GlmdSession(Engine(model, config, budget))
        start = time.perf_counter()
        session.submit(0, prompts.draw(rows), 1)
        while not any(progress.ended for progress in session.step()):
            pass
        if number:  # the first compiles kernels
            yield time.perf_counter() - start
        session.close()
