"""How much memory there is, and how it is divided: weights, KV, and working memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import psutil

from glmd.checkpoint.config import ModelConfig
from glmd.engine.config import EngineConfig
from glmd.engine.scheduler.prefill_budget import SMALLEST_CHUNK
from glmd.errors import CheckpointError
from glmd.kv_cache.prefix_tree import MAX_SEGMENT
from glmd.kv_cache.tail_pool import TAIL_TOKENS
from glmd.model.loader import choose_dtype, has_mtp_layer, weight_bytes
from glmd.model.mla import EXPANDED_BYTES, SCORE_BYTES

CPU_SHARE = 0.6
"""Of the memory available at start, where the device recommends no working set."""

CACHE_LIMIT = 2 << 30
"""Bytes that MLX's allocator may keep for reuse; fewer where the budget would be exceeded."""

MIN_KV_TOKENS = 4096
"""A server that cannot hold this many tokens is of no use."""

WANTED_KV_TOKENS = 32_768
"""For room to hold so many, working memory is made smaller and prompts are computed in smaller
chunks, which is slower."""

SCALES = (1, 2, 4, 8)
"""By how much working memory may be made smaller. At an eighth, chunks have 256 rows, few enough
to read the experts' weights noticeably more often."""

TAIL_ROOM = 2 * TAIL_TOKENS
"""Tokens that are kept free beside the longest sequence, for its tail in the coarsest unit."""


def default_budget() -> int:
    """Bytes for weights, KV and working memory: the device's recommended working set, else a
    share of the memory that is available now."""
    recommended = _recommended()
    return recommended or int(CPU_SHARE * psutil.virtual_memory().available)


def _recommended() -> int | None:
    size = mx.device_info().get("max_recommended_working_set_size")
    return None if size is None else int(size)


def device_name() -> str:
    """For people: "Apple M4 Max (gpu)"."""
    kind = mx.default_device().type.name
    return f"{mx.device_info().get('device_name', 'unknown device')} ({kind})"


class DeviceLimits:
    """MLX's limits for this process, set for as long as an engine lives.

    They belong to the process, which may be a user's own (`glmd.LLM`): the last engine to go puts
    back what the first one found.
    """

    _engines = 0
    _before: tuple[int, int, int | None]

    @classmethod
    def set(cls, budget: int) -> None:
        """Wire the weights where the device has unified memory, and let MLX's cache of freed
        arrays give way before the budget is exceeded.

        Args:
            budget: bytes for weights, KV and working memory.
        """
        memory = mx.set_memory_limit(budget)
        cache = mx.set_cache_limit(min(CACHE_LIMIT, budget))
        wired = None
        recommended = _recommended()
        if recommended is not None and mx.metal.is_available():
            wired = mx.set_wired_limit(min(budget, recommended))
        if not cls._engines:
            cls._before = memory, cache, wired
        cls._engines += 1

    @classmethod
    def restore(cls) -> None:
        """Take back one `set`."""
        cls._engines -= 1
        if cls._engines:
            return
        memory, cache, wired = cls._before
        mx.set_memory_limit(memory)
        mx.set_cache_limit(cache)
        if wired is not None:
            mx.set_wired_limit(wired)


class Dimensions(Protocol):
    """What working memory depends on: `ModelConfig`, or mlx-lm's `ModelArgs`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_experts_per_tok(self) -> int: ...
    @property
    def kv_lora_rank(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A memory budget, divided.

    Attributes:
        weights: bytes of weights.
        working: bytes of a step's transients.
        kv: bytes left for KV.
        config: the engine's configuration, with rows of a step that fit `activations`.
        score_bytes: see `glmd.model.mla.MLAShape`.
        expanded_bytes: likewise.
    """

    weights: int
    activations: int
    kv: int
    config: EngineConfig
    score_bytes: int
    expanded_bytes: int


def check_fit(folder: Path, model: ModelConfig, config: EngineConfig, budget: int) -> None:
    """Find out whether a checkpoint fits in a budget, from the headers of its files.

    Raises:
        CheckpointError: it does not, as in `divide`, or files are missing or damaged.
    """
    dtype = choose_dtype(config.dtype)
    mtp = config.mtp != 0
    layers = model.num_hidden_layers + (mtp and has_mtp_layer(folder, model))
    plan_memory(
        folder,
        model,
        config,
        budget,
        weights=weight_bytes(folder, model, dtype, mtp=mtp),
        token_bytes=layers * (model.kv_lora_rank + model.qk_rope_head_dim) * dtype.size,
        item=dtype.size,
    )


def plan_memory(
    folder: Path,
    dims: Dimensions,
    config: EngineConfig,
    budget: int,
    *,
    weights: int,
    token_bytes: int,
    item: int,
) -> MemoryPlan:
    """Divide a budget, with less working memory than would be best where KV is short.

    Args:
        folder: the checkpoint's, for the message.
        weights: bytes of them in memory.
        token_bytes: of KV.
        item: bytes of one activation.

    Raises:
        CheckpointError: beside weights and working memory there is no room for the KV of
            `MIN_KV_TOKENS` tokens (or the model's context, if that is shorter) and their tail.
    """
    context = dims.max_position_embeddings
    wanted = (min(WANTED_KV_TOKENS, context) + TAIL_ROOM) * token_bytes
    least_tokens = min(MIN_KV_TOKENS, context) + TAIL_ROOM
    least = least_tokens * token_bytes
    for scale in SCALES:
        rows = min(config.max_step_tokens, max(config.max_step_tokens // scale, TAIL_TOKENS))
        scaled = replace(config, max_step_tokens=rows)
        score, expanded = SCORE_BYTES // scale, EXPANDED_BYTES // scale
        working = activation_bytes(
            dims, scaled, item, token_bytes, score_bytes=score, expanded_bytes=expanded
        )
        kv = budget - weights - working
        if kv >= wanted:
            break
    if kv < least:
        raise CheckpointError(
            f"{folder}: this does not fit. Weights {size(weights)} + working memory"
            f" {size(working)} + KV of {least_tokens} tokens {size(least)} ="
            f" {size(weights + working + least)}, but the memory budget is {size(budget)}"
            f" ({'memory_budget' if config.memory_budget else 'by default, for this machine'}).",
            file=str(folder),
        )
    return MemoryPlan(weights, working, kv, scaled, score, expanded)


def activation_bytes(
    dims: Dimensions,
    config: EngineConfig,
    item: int,
    token_bytes: int,
    *,
    score_bytes: int = SCORE_BYTES,
    expanded_bytes: int = EXPANDED_BYTES,
) -> int:
    """Bytes of a step's transients, at most: attention in one layer, activations of all rows
    there, cache vectors of all layers until they are sealed, and the logits of the rows that are
    sampled.

    Args:
        item: bytes of one activation.
        token_bytes: of KV.
    """
    rows = max(config.max_step_tokens, config.max_running + SMALLEST_CHUNK)
    sampled = config.max_running * config.width
    attention = min(
        # Scores and their softmax exist together; expanded keys and values beside them.
        2 * score_bytes + expanded_bytes,
        # Small models never come near that: all they can ask for is a full context.
        2 * rows * dims.num_attention_heads * dims.max_position_embeddings * item,
    )
    # Decoding rows attend to one segment at a time, with a copy of the scores in float32.
    keys = min(MAX_SEGMENT, dims.max_position_embeddings)
    decoding = sampled * dims.num_attention_heads * keys * (2 * item + 4)
    width = max(
        dims.intermediate_size,
        dims.moe_intermediate_size * dims.num_experts_per_tok,
        dims.num_attention_heads * dims.kv_lora_rank,
    )
    logits = sampled * dims.vocab_size * 4
    unsealed = rows * token_bytes
    return max(attention, decoding) + 4 * rows * width * item + 3 * logits + unsealed


def size(nbytes: int) -> str:
    """For people: "19.93 GiB", or MiB where that would be hardly any."""
    gib = nbytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{nbytes / 2**20:.2f} MiB"
