"""Forward pass of GLM-4.7-Flash over the flattened rows of one step.

Layer definitions and weights are mlx-lm's (`mlx_lm.models.glm4_moe_lite`); this module runs them
over rows, with glmd's attention. Two details differ from mlx-lm and follow transformers, the
reference of the checkpoint's authors: router logits in float32, and an epsilon of 1e-6 in the
norms of the query and key-value latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import mlx.core as mx

from glmd.kv_cache.stored_keys import StoredKeys, store
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.attention import attend, stores_no_scores
from glmd.model.batch import ForwardBatch
from glmd.model.experts_kernel import FusedExperts
from glmd.model.mla import (
    MLAShape,
    Queries,
    cache_vectors,
    project_q,
    project_qkv,
    scaled_query_norm,
)
from glmd.model.mla_kernel import prepare_rows, rotates
from glmd.model.mlx_lm_layers import Glm4MoeLiteMoE, Model, ModelArgs
from glmd.model.moe import COMPILED_ROWS, GatedMLP, MixtureOfExperts, groups_pairs

LATENT_NORM_EPS = 1e-6

Result = TypeVar("Result")

SumRanks = Callable[[mx.array], mx.array]
"""Sums what each rank computed of an array. Ranks hold parts of the layers' weights."""


def identity(x: mx.array) -> mx.array:
    """The sum over a single rank."""
    return x


def compiled(function: Callable[..., Result]) -> Callable[..., Result]:
    """Compile a function of arrays with rows as first axis, for up to `COMPILED_ROWS` rows.

    A layer has some sixty operations besides attention. With few rows the host needs longer to
    build their graph than the device to compute it; `mx.compile` records the graph once and fuses
    operations.
    """
    fast: Callable[..., Result] = mx.compile(function)

    def run(*arrays: mx.array) -> Result:
        return (fast if arrays[0].shape[0] <= COMPILED_ROWS else function)(*arrays)

    return run


def mla_shape(args: ModelArgs) -> MLAShape:
    """The attention's dimensions, with the default memory limits."""
    return MLAShape(
        heads=args.num_attention_heads,
        latent=args.kv_lora_rank,
        nope=args.qk_nope_head_dim,
        rope=args.qk_rope_head_dim,
        value=args.v_head_dim,
        slices_copied=mx.default_device().type == mx.DeviceType.cpu,
    )


class DecoderBlock:
    """One decoder layer.

    Args:
        layer: mlx-lm's decoder layer. Its weights must not change afterwards.
        shape: dimensions of its attention.
        sum_ranks: applied to the outputs of attention and MLP.

    Attributes:
        fused_experts: the layer's experts for `glmd.model.experts_kernel`; None: it has none, or
            only for MLX's operations.
        fused_rows: numbers of rows for which these kernels are used. They sum no ranks.
    """

    def __init__(self, layer: Any, shape: MLAShape, sum_ranks: SumRanks = identity) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        attn.kv_a_layernorm.eps = LATENT_NORM_EPS
        if attn.q_lora_rank is not None:
            attn.q_a_layernorm.eps = LATENT_NORM_EPS
        run_mlp: Callable[[mx.array], mx.array]
        self.fused_experts: FusedExperts | None = None
        self.fused_rows: frozenset[int] = frozenset()
        if isinstance(mlp, Glm4MoeLiteMoE):
            run_mlp = moe = MixtureOfExperts(mlp, pad_pairs=groups_pairs())
            self.fused_experts = FusedExperts.of(moe)
        else:
            run_mlp = GatedMLP(mlp)

        query_norm = scaled_query_norm(attn)
        if query_norm is not None:
            mx.eval(query_norm)

        def pre_attention(h: mx.array, positions: mx.array) -> tuple[mx.array, mx.array, mx.array]:
            q, kv = project_qkv(attn, shape, layer.input_layernorm(h), positions, query_norm)
            return q.nope, q.rope, kv

        def pre_kernel(h: mx.array) -> tuple[mx.array, mx.array]:
            x = layer.input_layernorm(h)
            return project_q(attn, shape, x, query_norm), attn.kv_a_proj_with_mqa(x)

        def post_attention(h: mx.array, attended: mx.array) -> mx.array:
            h = h + sum_ranks(attn.o_proj(attended))
            return h + sum_ranks(run_mlp(layer.post_attention_layernorm(h)))

        def pre_experts(h: mx.array, attended: mx.array) -> tuple[mx.array, ...]:
            assert self.fused_experts is not None
            h = h + attn.o_proj(attended)
            x = layer.post_attention_layernorm(h)
            return h, x, *self.fused_experts.prepare(x)

        def compute_kv(h: mx.array, positions: mx.array) -> mx.array:
            return cache_vectors(attn, shape, layer.input_layernorm(h), positions)

        self._attn = attn
        self._compute_kv = compiled(compute_kv)
        self._pre_attention = compiled(pre_attention)
        self._pre_kernel = compiled(pre_kernel)
        self._post_attention = compiled(post_attention)
        self._pre_experts = compiled(pre_experts)

    def forward(
        self, shape: MLAShape, index: int, h: mx.array, batch: ForwardBatch, tails: TailPool
    ) -> tuple[mx.array, StoredKeys]:
        """Run the layer.

        Args:
            shape: with the current memory limits.
            index: of the layer in tails and segments.
            h: [N, hidden].

        Returns:
            new hidden states [N, hidden]; cache vectors [N, kv_width].
        """
        q, vectors = self._project(shape, h, batch.positions, kernel=batch.uses_kernel)
        kv = store(vectors, shape.kv_bits)
        attended = attend(self._attn, shape, index, q, kv, batch, tails)
        return self.post_attention(h, attended), kv

    def post_attention(self, h: mx.array, attended: mx.array) -> mx.array:
        """The layer from its attention's heads on.

        Args:
            h: [N, hidden], the layer's input.
            attended: [N, heads x value].

        Returns:
            new hidden states [N, hidden].
        """
        if self.fused_experts is not None and h.shape[0] in self.fused_rows:
            return self.fused_experts(*self._pre_experts(h, attended))
        return self._post_attention(h, attended)

    def _project(
        self, shape: MLAShape, h: mx.array, positions: mx.array, *, kernel: bool
    ) -> tuple[Queries, mx.array]:
        """Queries and cache vectors, as of `project_qkv`."""
        attn = self._attn
        if kernel and rotates(attn.rope, shape):
            q, compressed = self._pre_kernel(h)
            norm = attn.kv_a_layernorm
            rope, kv = prepare_rows(
                shape, attn.rope, q, compressed, norm.weight, norm.eps, positions
            )
            return Queries(q[..., : shape.nope], rope), kv
        q_nope, q_rope, kv = self._pre_attention(h, positions)
        return Queries(q_nope, q_rope), kv

    def forward_last(
        self, shape: MLAShape, index: int, h: mx.array, batch: ForwardBatch, tails: TailPool
    ) -> tuple[mx.array, StoredKeys]:
        """Run the layer as the model's last: only cache vectors for rows without logits.

        Returns:
            new hidden states [logits rows, hidden]; cache vectors [N, kv_width].
        """
        logits_rows = batch.logits_rows
        if len(logits_rows) == h.shape[0]:
            return self.forward(shape, index, h, batch, tails)
        kv = store(self._compute_kv(h, batch.positions), shape.kv_bits)
        if not logits_rows:
            return h[:0], kv
        rows = mx.array(logits_rows)
        h = h[rows]
        q, _ = self._project(shape, h, batch.positions[rows], kernel=batch.uses_kernel)
        attended = attend(self._attn, shape, index, q, kv, batch, tails)
        return self.post_attention(h, attended), kv


class Glm4MoeLiteModel:
    """The main model, without MTP layer.

    Attributes:
        args: mlx-lm's model arguments.
        shape: dimensions and memory limits of the attention.
        dtype: of activations and cached KV.
        blocks: all layers.
    """

    def __init__(self, model: Model, dtype: mx.Dtype, sum_ranks: SumRanks = identity) -> None:
        self.args: ModelArgs = model.args
        self.dtype = dtype
        shape = mla_shape(self.args)
        self.shape = replace(shape, fused=stores_no_scores(shape, dtype))
        self._model = model
        self.blocks = [DecoderBlock(layer, self.shape, sum_ranks) for layer in model.layers]

    def forward(self, batch: ForwardBatch, tails: TailPool) -> tuple[mx.array, list[StoredKeys]]:
        """Run all layers over the rows of a step, and write decode rows' KV to their tails.

        Returns:
            hidden states of `batch.logits_rows` after the final norm, [logits rows, hidden];
            cache vectors of all rows per layer, each [N, kv_width], and behind them, if
            `batch.deferred`, the input of the last layer, [N, hidden].
        """
        inner = self._model.model
        h = inner.embed_tokens(batch.tokens)  # [N, hidden]
        caches = []
        *others, last = self.blocks
        for index, block in enumerate(others):
            h, kv = block.forward(self.shape, index, h, batch, tails)
            caches.append(kv)
        out, kv = last.forward_last(self.shape, len(others), h, batch, tails)
        caches.append(kv)
        if batch.deferred:
            for group in batch.decode:
                rows = h[group.start : group.end]
                tails.write(tails.deferred_index, group.slots, group.tail_positions, rows)
            caches.append(h)
        return inner.norm(out), caches

    def forward_deferred(self, h: mx.array, batch: ForwardBatch, tails: TailPool) -> mx.array:
        """Run the last layer over the rows of a deferred segment.

        Args:
            h: [N, hidden], the layer's input.
            batch: one chunk of all rows.

        Returns:
            hidden states after the final norm, [N, hidden].
        """
        last = len(self.blocks) - 1
        out, _ = self.blocks[last].forward(self.shape, last, h, batch, tails)
        normed: mx.array = self._model.model.norm(out)
        return normed

    def logits(self, hidden: mx.array) -> mx.array:
        """[rows, hidden] after the final norm → [rows, vocabulary] float32."""
        logits: mx.array = self._model.lm_head(hidden)
        return logits.astype(mx.float32)
