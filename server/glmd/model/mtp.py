"""The multi-token-prediction layer: from a token's hidden state and its successor, a draft.

DeepSeek-V3's form (https://arxiv.org/abs/2412.19437, section 2.2), as GLM-4.7-Flash uses it:
the successor's embedding and the main model's hidden state after its final norm are normalised,
joined (embedding first), projected, and run through one decoder layer that keeps KV of its own.
"""

from __future__ import annotations

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import RMSNorm
from mlx_lm.models.glm4_moe_lite import Glm4MoeLiteDecoderLayer, ModelArgs

from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch
from glmd.model.block import DecoderBlock, compiled
from glmd.model.glm4_moe_lite import Glm4MoeLiteModel, use_transformers_eps
from glmd.model.mla import cache_vectors


class SharedHead(Module):
    """The norm before the head, and the head where it is not the main model's."""

    def __init__(self, args: ModelArgs, *, own_head: bool) -> None:
        Module.__init__(self)
        self.norm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        if own_head:
            self.head = Linear(args.hidden_size, args.vocab_size, bias=False)


class MTPWeights(Glm4MoeLiteDecoderLayer):
    """The layer's modules, named as in the checkpoint."""

    def __init__(self, args: ModelArgs, *, own_embedding: bool, own_head: bool) -> None:
        super().__init__(args, args.num_hidden_layers)
        self.enorm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.hnorm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.eh_proj = Linear(2 * args.hidden_size, args.hidden_size, bias=False)
        self.shared_head = SharedHead(args, own_head=own_head)
        if own_embedding:
            self.embed_tokens = Embedding(args.vocab_size, args.hidden_size)


class MTPLayer:
    """The MTP layer of a loaded model, ready to run.

    Its KV is cached beside the main layers', under the index that follows theirs. As it is one
    layer, a row's KV depends on no attention: rows that draft nothing need no more than their KV.
    """

    def __init__(self, weights: MTPWeights, model: Glm4MoeLiteModel) -> None:
        self._weights = weights
        self._model = model
        self._index = model.args.num_hidden_layers
        use_transformers_eps(weights)
        self._block = DecoderBlock(weights, model.shape)
        self._joined = compiled(self._combine_inputs)
        self._vectors = compiled(self._compute_vectors)

    def compute_kv(
        self, successors: mx.array, hidden: mx.array, batch: ForwardBatch, tails: TailPool
    ) -> mx.array:
        """Compute the KV of a step's rows, and write that of decode rows to their tails.

        Args:
            successors, hidden: as for `forward`.

        Returns:
            cache vectors [N, kv_width].
        """
        kv = self._vectors(successors, hidden, batch.positions)
        for group in batch.decode:
            rows = kv[group.start : group.end]
            tails.write(self._index, group.slots, group.tail_positions, rows)
        return kv

    def forward(
        self, successors: mx.array, hidden: mx.array, batch: ForwardBatch, tails: TailPool
    ) -> mx.array:
        """Run the layer over rows that draft.

        Args:
            successors: [N] int32, the token that follows each row's.
            hidden: [N, hidden], from the main model after its final norm, or from this layer
                when it drafts further.

        Returns:
            hidden states after the shared head's norm, [N, hidden].
        """
        x = self._joined(successors, hidden)
        h, _ = self._block(self._model.shape, self._index, x, batch, tails)
        normed: mx.array = self._weights.shared_head.norm(h)
        return normed

    def _compute_vectors(
        self, successors: mx.array, hidden: mx.array, positions: mx.array
    ) -> mx.array:
        """Cache vectors [N, kv_width]."""
        layer = self._weights
        x = layer.input_layernorm(self._combine_inputs(successors, hidden))
        return cache_vectors(layer.self_attn, self._model.shape, x, positions)

    def _combine_inputs(self, successors: mx.array, hidden: mx.array) -> mx.array:
        """The layer's input: [N, hidden]."""
        weights = self._weights
        embed = weights.embed_tokens if "embed_tokens" in weights else self._model.embed_tokens
        x = mx.concatenate([weights.enorm(embed(successors)), weights.hnorm(hidden)], axis=-1)
        projected: mx.array = weights.eh_proj(x)
        return projected

    def logits(self, hidden: mx.array) -> mx.array:
        """[rows, hidden] from `forward` → [rows, vocabulary] float32."""
        head = self._weights.shared_head
        if "head" not in head:
            return self._model.logits(hidden)
        logits: mx.array = head.head(hidden)
        return logits.astype(mx.float32)
