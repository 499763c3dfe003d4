"""The forward pass of GLM-4.7-Flash over the rows of one step.

Layer definitions and weights are mlx-lm's (`mlx_lm.models.glm4_moe_lite`); this module runs
them over flattened rows, with glmd's attention. Where mlx-lm and transformers differ it follows
transformers, the reference of the checkpoint's authors: router logits in float32, and epsilon
1e-6 in the norms of the query and key-value latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.glm4_moe_lite import Glm4MoeLiteMoE, Model, ModelArgs, group_expert_select

from glmd.kv.tails import TailPool
from glmd.model.mla import MLAShape, attend, project
from glmd.model.rows import RowBatch
from glmd.model.weights import named_arrays

if TYPE_CHECKING:
    from glmd.model.mtp import MtpLayer

LATENT_NORM_EPS = 1e-6


class GlmModel:
    """The main model, ready to run.

    Attributes:
        args: mlx-lm's model arguments.
        shape: dimensions of the attention.
        mtp: the MTP layer, if the checkpoint has it and it was asked for.
        dtype: of activations and cached KV.
        folder: where the checkpoint lies.
        eos_token_ids: ids that end a sequence.
        bits_per_weight: of the files.
        weight_bytes: in memory.
    """

    def __init__(
        self,
        model: Model,
        dtype: mx.Dtype,
        *,
        folder: Path,
        eos_token_ids: tuple[int, ...],
        bits_per_weight: float,
    ) -> None:
        self.args: ModelArgs = model.args
        self.dtype = dtype
        self.folder = folder
        self.eos_token_ids = eos_token_ids
        self.bits_per_weight = bits_per_weight
        self.weight_bytes = sum(array.nbytes for _, array in named_arrays(model))
        self.shape = MLAShape(
            heads=self.args.num_attention_heads,
            latent=self.args.kv_lora_rank,
            nope=self.args.qk_nope_head_dim,
            rope=self.args.qk_rope_head_dim,
            value=self.args.v_head_dim,
            slices_copied=mx.default_device().type == mx.DeviceType.cpu,
        )
        self.mtp: MtpLayer | None = None
        self._model = model
        for layer in model.layers:
            follow_transformers(layer)

    @property
    def embed_tokens(self) -> Any:
        """The embedding, which an MTP layer may share."""
        return self._model.model.embed_tokens

    @property
    def kv_layers(self) -> int:
        """Layers that cache keys and values, the MTP layer included."""
        return int(self.args.num_hidden_layers) + (self.mtp is not None)

    @property
    def kv_bytes_per_token(self) -> int:
        return self.kv_layers * self.shape.kv_width * self.dtype.size

    def hidden(self, batch: RowBatch, tails: TailPool) -> tuple[mx.array, list[mx.array]]:
        """Run all layers over the rows of a step.

        Returns:
            hidden states after the final norm, [N, hidden]; cache vectors of all rows per
            layer, each [N, kv_width] (those of decode rows are in their tails already).
        """
        inner = self._model.model
        h = inner.embed_tokens(batch.tokens)
        caches = []
        for index, layer in enumerate(inner.layers):
            h, kv = decoder_layer(layer, self.shape, index, h, batch, tails)
            caches.append(kv)
        return inner.norm(h), caches

    def logits(self, hidden: mx.array) -> mx.array:
        """[rows, hidden] after the final norm → [rows, vocabulary] float32."""
        logits: mx.array = self._model.lm_head(hidden)
        return logits.astype(mx.float32)


def decoder_layer(
    layer: Any, shape: MLAShape, index: int, h: mx.array, batch: RowBatch, tails: TailPool
) -> tuple[mx.array, mx.array]:
    """One decoder layer over [N, hidden]; returns the new [N, hidden] and [N, kv_width]."""
    attn = layer.self_attn
    q, kv = project(attn, shape, layer.input_layernorm(h), batch.positions)
    h = h + attn.o_proj(attend(attn, shape, index, q, kv, batch, tails))
    x = layer.post_attention_layernorm(h)
    mlp = layer.mlp
    return h + (_moe(mlp, x) if isinstance(mlp, Glm4MoeLiteMoE) else mlp(x)), kv


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


def follow_transformers(layer: Any) -> None:
    """Set the epsilon of a layer's latent norms to transformers'."""
    attn = layer.self_attn
    attn.kv_a_layernorm.eps = LATENT_NORM_EPS
    if attn.q_lora_rank is not None:
        attn.q_a_layernorm.eps = LATENT_NORM_EPS
