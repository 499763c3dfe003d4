"""The forward pass of GLM-4.7-Flash over the rows of one step.

Layer definitions and weights are mlx-lm's (`mlx_lm.models.glm4_moe_lite`); this module runs
them over flattened rows, with glmd's attention. Where mlx-lm and transformers differ it follows
transformers, the reference of the checkpoint's authors: router logits in float32
(`glmd.model.block`), and epsilon 1e-6 in the norms of the query and key-value latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.glm4_moe_lite import Model, ModelArgs

from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch, PrefillChunk
from glmd.model.block import DecoderBlock
from glmd.model.mla import MLAShape
from glmd.model.weights import named_arrays

if TYPE_CHECKING:
    from glmd.model.mtp import MTPLayer

LATENT_NORM_EPS = 1e-6


class Glm4MoeLiteModel:
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
        self.mtp: MTPLayer | None = None
        self._model = model
        for layer in model.layers:
            use_transformers_eps(layer)
        self._blocks = [DecoderBlock(layer, self.shape) for layer in model.layers]

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

    def forward(self, batch: ForwardBatch, tails: TailPool) -> tuple[mx.array, list[mx.array]]:
        """Run all layers over the rows of a step.

        Returns:
            hidden states of `batch.wanted` after the final norm, [wanted, hidden]; cache vectors
            of all rows per layer, each [N, kv_width] (those of decode rows are in their tails
            already).
        """
        inner = self._model.model
        h = inner.embed_tokens(batch.tokens)
        caches = []
        last = len(self._blocks) - 1
        for index, block in enumerate(self._blocks):
            run = block.forward_last if index == last else block
            h, kv = run(self.shape, index, h, batch, tails)
            caches.append(kv)
        return inner.norm(h), caches

    def warm_up(self) -> None:
        """Run a row, then two, so that it is no request that waits for kernels to be compiled.

        Other numbers of rows take the kernels of two.
        """
        tails = TailPool(self.kv_layers, self.shape.kv_width, self.dtype)
        for rows in (1, 2):
            tokens, positions = mx.zeros(rows, mx.int32), mx.arange(rows, dtype=mx.int32)
            batch = ForwardBatch(
                tokens, positions, [], [PrefillChunk(0, rows, [], expanded=False, logits_rows=rows)]
            )
            hidden, _ = self.forward(batch, tails)
            outcome = [self.logits(hidden)]
            if self.mtp is not None:
                outcome.append(self.mtp.compute_kv(tokens, hidden, batch, tails))
                outcome.append(self.mtp.forward(tokens, hidden, batch, tails))
            mx.eval(outcome)

    def logits(self, hidden: mx.array) -> mx.array:
        """[rows, hidden] after the final norm → [rows, vocabulary] float32."""
        logits: mx.array = self._model.lm_head(hidden)
        return logits.astype(mx.float32)


def use_transformers_eps(layer: Any) -> None:
    """Set the epsilon of a layer's latent norms to transformers'."""
    attn = layer.self_attn
    attn.kv_a_layernorm.eps = LATENT_NORM_EPS
    if attn.q_lora_rank is not None:
        attn.q_a_layernorm.eps = LATENT_NORM_EPS
