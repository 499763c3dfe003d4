"""Memory plan: weights, KV and working memory within one budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import psutil

from glmd.checkpoint.config import ModelConfig
from glmd.checkpoint.stored import StoredWeights
from glmd.engine.config import EngineConfig
from glmd.engine.scheduler.prefill_budget import SMALLEST_CHUNK
from glmd.errors import CheckpointError
from glmd.kv_cache.prefix_tree import MAX_SEGMENT
from glmd.kv_cache.stored_keys import GROUP_SIZES, KVBits, vector_bytes
from glmd.kv_cache.tail_pool import TAIL_TOKENS
from glmd.model.attention import BLOCKS_AHEAD, KEY_BLOCK
from glmd.model.loader import choose_dtype, weight_bytes
from glmd.model.mla import EXPANDED_BYTES, SCORE_BYTES
from glmd.model.mlx_lm_layers import ModelArgs

CPU_SHARE = 0.6
"""Budget as a share of the available memory, where the device recommends no working set."""

CACHE_LIMIT = 2 << 30
"""Bytes that MLX's allocator may keep for reuse, within the budget."""

MIN_KV_TOKENS = 4096
"""Tokens of KV below which serving is refused."""

WANTED_KV_TOKENS = 36_864
"""Tokens of KV for which working memory is reduced, so that prompts run in smaller chunks, and the
MTP layer is left out. A coding agent's first prompt has 20k to 35k."""

PLENTY_KV_TOKENS = 65_536
"""Tokens of KV from which on `kv_bits` "auto" is 16."""

SCALES = (1, 2, 4, 8)
"""Divisors of working memory. At 8, chunks have 256 rows, few enough for the experts' weights to be
read noticeably more often."""

MERGE_SHARE = 1 / 16
"""Share of KV that may be left free for copies of merged segments."""

TAIL_ROOM = 2 * TAIL_TOKENS
"""Tokens kept free beside the longest sequence, for its tail."""


def default_budget() -> int:
    """Bytes of the recommended working set, else a share of available memory."""
    return _recommended_working_set() or int(CPU_SHARE * psutil.virtual_memory().available)


def recommended_working_set(gigabytes: int) -> int:
    """Bytes that macOS recommends for the GPU of a Mac with so much memory.

    Two thirds up to 36 GB, three quarters above.
    """
    return int(gigabytes * 2**30 * (2 / 3 if gigabytes <= 36 else 3 / 4))


def _recommended_working_set() -> int | None:
    size = mx.device_info().get("max_recommended_working_set_size")
    return None if size is None else int(size)


def device_name() -> str:
    """The device's display name, such as "Apple M4 Max (gpu)"."""
    kind = mx.default_device().type.name
    return f"{mx.device_info().get('device_name', 'unknown device')} ({kind})"


class DeviceLimits:
    """MLX's memory limits, which are set while the process has engines.

    The process may be a user's own (`glmd.LLM`), so the limits that the first engine found are
    restored when the last one is gone.
    """

    _engines = 0
    _before: tuple[int, int, int | None]

    @classmethod
    def set(cls, budget: int) -> None:
        """Limit MLX to `budget` bytes; with unified memory, wire the weights."""
        memory = mx.set_memory_limit(budget)
        cache = mx.set_cache_limit(min(CACHE_LIMIT, budget))
        wired = None
        recommended = _recommended_working_set()
        if recommended is not None and mx.metal.is_available():
            wired = mx.set_wired_limit(min(budget, recommended))
        if not cls._engines:
            cls._before = memory, cache, wired
        cls._engines += 1

    @classmethod
    def restore(cls) -> None:
        """Undo one `set`."""
        cls._engines -= 1
        if cls._engines:
            return
        memory, cache, wired = cls._before
        mx.set_memory_limit(memory)
        mx.set_cache_limit(cache)
        if wired is not None:
            mx.set_wired_limit(wired)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A divided memory budget.

    Attributes:
        weights: bytes, with the MTP layer unless it is left out.
        activations: bytes of a step's transients.
        kv: bytes left for KV.
        config: the engine's, with `max_step_tokens` that fit `activations`, and `mtp` 0 if the MTP
            layer is left out.
        score_bytes, expanded_bytes: see `glmd.model.mla.MLAShape`.
        max_segment: tokens up to which segments are merged, a copy of which fits `activations`.
        kv_bits: see `EngineConfig`; chosen if that is "auto".
        token_bytes: bytes of KV per token.
    """

    weights: int
    activations: int
    kv: int
    config: EngineConfig
    score_bytes: int
    expanded_bytes: int
    max_segment: int
    kv_bits: KVBits
    token_bytes: int

    @property
    def kv_tokens(self) -> int:
        """Most tokens of a sequence, beside its tail."""
        return self.kv // self.token_bytes - TAIL_ROOM


def plan_checkpoint(stored: StoredWeights, config: EngineConfig, budget: int) -> MemoryPlan:
    """Plan from the headers of a checkpoint's files, before it is loaded.

    Raises:
        CheckpointError: as in `plan_memory`.
    """
    dtype = choose_dtype(config.dtype)
    weights = weight_bytes(stored, dtype, mtp=False)
    both = weight_bytes(stored, dtype, mtp=config.mtp != 0)
    return plan_memory(
        stored.folder,
        stored.config,
        config,
        budget,
        weights=weights,
        mtp_weights=both - weights,
        item=dtype.size,
    )


def kv_bytes_per_token(
    dims: ModelConfig | ModelArgs, layers: int, item: int, kv_bits: KVBits, *, deferred: bool
) -> int:
    """Most bytes of KV per token.

    Args:
        layers: with KV.
        item: bytes of one value.
        kv_bits: see `EngineConfig`.
        deferred: the last layer's KV may be deferred; see `glmd.kv_cache.segment.Segment`.
    """
    width = dims.kv_lora_rank + dims.qk_rope_head_dim
    vector = vector_bytes(width, item, kv_bits)
    last = max(vector, dims.hidden_size * item) if deferred else vector
    return (layers - 1) * vector + last


def plan_memory(
    folder: Path,
    dims: ModelConfig | ModelArgs,
    config: EngineConfig,
    budget: int,
    *,
    weights: int,
    mtp_weights: int,
    item: int,
) -> MemoryPlan:
    """Divide a budget.

    Where KV would be short, it is quantised first, unless `EngineConfig.kv_bits` says otherwise;
    then working memory is reduced; then, unless `EngineConfig.mtp` says otherwise, the MTP layer is
    left out.

    Args:
        folder: the checkpoint's, for the error message.
        weights: bytes of the main model's weights.
        mtp_weights: bytes of the MTP layer's; 0: there is none.
        item: bytes of one activation.

    Raises:
        CheckpointError: not enough is left for `MIN_KV_TOKENS` tokens of KV (or the model's
            context, if that is shorter) and a tail.
    """
    context = dims.max_position_embeddings
    plan = _plan_kv(dims, config, budget, weights=weights, mtp_weights=mtp_weights, item=item)
    if mtp_weights and config.mtp == "auto" and plan.kv_tokens < min(WANTED_KV_TOKENS, context):
        plan = _plan_kv(dims, config, budget, weights=weights, mtp_weights=0, item=item)
    least_tokens = min(MIN_KV_TOKENS, context) + TAIL_ROOM
    least = least_tokens * plan.token_bytes
    if plan.kv < least:
        total = plan.weights + plan.activations + least
        raise CheckpointError(
            f"{folder} does not fit in memory. Weights {_size(plan.weights)} + working memory"
            f" {_size(plan.activations)} + KV of {least_tokens} tokens {_size(least)} ="
            f" {_size(total)}, but the memory budget is {_size(budget)}"
            f" ({'memory_budget' if config.memory_budget else 'by default, for this machine'}).",
            file=str(folder),
        )
    return plan


def _plan_kv(
    dims: ModelConfig | ModelArgs,
    config: EngineConfig,
    budget: int,
    *,
    weights: int,
    mtp_weights: int,
    item: int,
) -> MemoryPlan:
    """Plan with or without the MTP layer, and choose `kv_bits` if they are "auto"."""
    width = dims.kv_lora_rank + dims.qk_rope_head_dim
    layers = dims.num_hidden_layers + (mtp_weights > 0)
    config = config if mtp_weights else replace(config, mtp=0)

    def plan_for(bits: KVBits) -> MemoryPlan:
        # The inputs of the last layer would take more than quantised KV saves.
        defers = mtp_weights > 0 and config.mtp == "auto" and bits == 16
        token_bytes = kv_bytes_per_token(dims, layers, item, bits, deferred=defers)
        total = weights + mtp_weights
        return _plan_scale(dims, config, budget, total, token_bytes, item, bits)

    if config.kv_bits != "auto":
        return plan_for(config.kv_bits)
    plan = plan_for(16)
    plenty = min(PLENTY_KV_TOKENS, dims.max_position_embeddings)
    if plan.kv_tokens >= plenty or width % GROUP_SIZES[-1]:
        return plan
    return plan_for(8)


def _plan_scale(
    dims: ModelConfig | ModelArgs,
    config: EngineConfig,
    budget: int,
    weights: int,
    token_bytes: int,
    item: int,
    kv_bits: KVBits,
) -> MemoryPlan:
    """Plan with as much working memory as leaves `WANTED_KV_TOKENS`."""
    wanted = min(WANTED_KV_TOKENS, dims.max_position_embeddings)
    for scale in SCALES:
        rows = min(config.max_step_tokens, max(config.max_step_tokens // scale, TAIL_TOKENS))
        scaled = replace(config, max_step_tokens=rows)
        score, expanded = SCORE_BYTES // scale, EXPANDED_BYTES // scale
        segment = MAX_SEGMENT // scale
        working = activation_bytes(
            dims,
            scaled,
            item,
            token_bytes,
            score_bytes=score,
            expanded_bytes=expanded,
            max_segment=segment,
            context=(budget - weights) // token_bytes,
            kv_bits=kv_bits,
        )
        kv = budget - weights - working
        # Segments are merged when the layers' transients are gone. A longer copy takes room from
        # KV.
        segment = min(segment, max(working, int(kv * MERGE_SHARE)) // token_bytes)
        merging = max(0, segment * token_bytes - working)
        plan = MemoryPlan(
            weights=weights,
            activations=working + merging,
            kv=kv - merging,
            config=scaled,
            score_bytes=score,
            expanded_bytes=expanded,
            max_segment=segment,
            kv_bits=kv_bits,
            token_bytes=token_bytes,
        )
        if plan.kv_tokens >= wanted:
            break
    return plan


def activation_bytes(
    dims: ModelConfig | ModelArgs,
    config: EngineConfig,
    item: int,
    token_bytes: int,
    *,
    score_bytes: int = SCORE_BYTES,
    expanded_bytes: int = EXPANDED_BYTES,
    max_segment: int = MAX_SEGMENT,
    context: int | None = None,
    kv_bits: int = 16,
) -> int:
    """Upper bound of a step's transients, in bytes.

    Attention and activations of one layer, cache vectors of all layers until they are in the tree,
    and the logits of the sampled rows.

    Args:
        item: bytes of one activation.
        token_bytes: bytes of KV per token.
        context: most tokens of a sequence; None: the model's.
    """
    rows = max(config.max_step_tokens, config.max_running + SMALLEST_CHUNK)
    sampled = config.max_running * config.width
    context = max(0, min(context or dims.max_position_embeddings, dims.max_position_embeddings))
    heads = dims.num_attention_heads
    # Expanded keys and values: at least those of one head.
    head_bytes = context * item * (dims.qk_nope_head_dim + dims.qk_rope_head_dim + dims.v_head_dim)
    expanded = min(heads * head_bytes, max(expanded_bytes, head_bytes))
    width = dims.kv_lora_rank + dims.qk_rope_head_dim
    keys = min(context, BLOCKS_AHEAD * KEY_BLOCK)
    dequantized = keys * width * item if kv_bits < 16 else 0
    # They are written next to the parts that they consist of. Two blocks of scores, each with its
    # softmax.
    attention = 2 * expanded + dequantized + 4 * min(score_bytes, rows * heads * context * item)
    # Decode rows attend to one segment at a time, with a float32 copy of the scores.
    keys = min(max_segment, dims.max_position_embeddings)
    decoding = sampled * heads * keys * (2 * item + 4)
    width = max(
        dims.intermediate_size,
        dims.moe_intermediate_size * dims.num_experts_per_tok,
        heads * dims.kv_lora_rank,
    )
    logits = sampled * dims.vocab_size * 4
    cache_vectors = rows * token_bytes
    return max(attention, decoding) + 4 * rows * width * item + 3 * logits + cache_vectors


def _size(nbytes: int) -> str:
    """Display size: "19.93 GiB", or in MiB below 0.1 GiB."""
    gib = nbytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{nbytes / 2**20:.2f} MiB"
