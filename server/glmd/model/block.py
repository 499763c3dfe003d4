"""A decoder layer over the rows of a step, compiled where they are few.

What a layer does before and behind its attention depends on its rows alone. With few of them the
host would spend longer on putting that together than the device on computing it: some sixty
operations, which `mx.compile` records once and also fuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.models.glm4_moe_lite import Glm4MoeLiteMoE, group_expert_select

from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch
from glmd.model.mla import MLAShape, Queries, attend, cache_vectors, project_qkv

COMPILED_ROWS = 32
"""Rows up to which a layer runs compiled. MLX keeps what it recorded for each number of them as
long as the model, so there must be a limit; with more rows it is the device that takes time."""

Result = TypeVar("Result")


def compiled(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function` of arrays with a row each for first axis, compiled for up to `COMPILED_ROWS`."""
    quick: Callable[..., Result] = mx.compile(function)

    def run(*arrays: mx.array) -> Result:
        return (quick if arrays[0].shape[0] <= COMPILED_ROWS else function)(*arrays)

    return run


class DecoderBlock:
    """One layer, ready to run.

    Args:
        layer: mlx-lm's decoder layer, with its weights; they are not to change any more.
        shape: dimensions of its attention.
    """

    def __init__(self, layer: Any, shape: MLAShape) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        routed = isinstance(mlp, Glm4MoeLiteMoE)

        def before(h: mx.array, positions: mx.array) -> tuple[mx.array, mx.array, mx.array]:
            q, kv = project_qkv(attn, shape, layer.input_layernorm(h), positions)
            return q.nope, q.rope, kv

        def behind(h: mx.array, attended: mx.array) -> mx.array:
            h = h + attn.o_proj(attended)
            x = layer.post_attention_layernorm(h)
            return h + (_moe(mlp, x) if routed else mlp(x))

        def vectors(h: mx.array, positions: mx.array) -> mx.array:
            return cache_vectors(attn, shape, layer.input_layernorm(h), positions)

        self._attn = attn
        self._vectors = compiled(vectors)
        self._before = compiled(before)
        self._behind = compiled(behind)

    def __call__(
        self, shape: MLAShape, index: int, h: mx.array, batch: ForwardBatch, tails: TailPool
    ) -> tuple[mx.array, mx.array]:
        """The layer over [N, hidden].

        Args:
            shape: with the limits that hold now.
            index: of the layer in the tails and segments.

        Returns:
            the new [N, hidden]; cache vectors [N, kv_width].
        """
        nope, rope, kv = self._before(h, batch.positions)
        attended = attend(self._attn, shape, index, Queries(nope, rope), kv, batch, tails)
        return self._behind(h, attended), kv

    def forward_last(
        self, shape: MLAShape, index: int, h: mx.array, batch: ForwardBatch, tails: TailPool
    ) -> tuple[mx.array, mx.array]:
        """The layer as the last one: of rows that are not wanted, cache vectors alone.

        Returns:
            the new [wanted, hidden]; cache vectors [N, kv_width].
        """
        wanted = batch.logits_rows
        if len(wanted) == h.shape[0]:
            return self(shape, index, h, batch, tails)
        kv = self._vectors(h, batch.positions)
        if not wanted:
            return h[:0], kv
        rows = mx.array(wanted)
        h = h[rows]
        nope, rope, _ = self._before(h, batch.positions[rows])
        attended = attend(self._attn, shape, index, Queries(nope, rope), kv, batch, tails)
        return self._behind(h, attended), kv


def _moe(mlp: Any, x: mx.array) -> mx.array:
    """[N, hidden] → [N, hidden]: the routed experts' weighted sum plus the shared expert."""
    gate = mlp.gate
    experts, scores = group_expert_select(
        x.astype(mx.float32) @ gate.weight.T,
        gate.e_score_correction_bias,
        gate.top_k,
        gate.n_group,
        gate.topk_group,
        gate.routed_scaling_factor,
        gate.norm_topk_prob,
    )
    y: mx.array = mlp.switch_mlp(x, experts)
    y = (y * scores[..., None]).sum(axis=-2).astype(x.dtype)
    y += mlp.shared_experts(x)
    return y
