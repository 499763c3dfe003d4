"""The multi-token-prediction (MTP) layer, which drafts the token after next.

DeepSeek-V3's form (https://arxiv.org/abs/2412.19437, section 2.2), as GLM-4.7-Flash uses it: the
next token's embedding and the main model's hidden state after its final norm are normalised,
concatenated (embedding first), projected, and run through one decoder layer with its own KV.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.normalization import RMSNorm

from glmd.kv_cache.stored_keys import StoredKeys, store
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch
from glmd.model.glm4_moe_lite import DecoderBlock, SumRanks, compiled, identity
from glmd.model.mla import MLAShape, cache_vectors
from glmd.model.mlx_lm_layers import Glm4MoeLiteDecoderLayer, ModelArgs


class SharedHead(Module):
    """The norm before the head, and the head unless it is the main model's."""

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
    """The MTP layer of a loaded model.

    Its KV is cached with the main layers', under the next index. Since the model has one MTP
    layer, a row's KV depends on no attention, so rows without drafts need only their KV.

    Args:
        index: of the layer in tails and segments.
        shape: dimensions of its attention.
        embed_tokens: the main model's embedding, used unless the layer has its own.
        lm_head: the main model's head, used unless the layer has its own.
        sum_ranks: see `DecoderBlock`.

    Attributes:
        block: the decoder layer.
    """

    def __init__(
        self,
        weights: MTPWeights,
        *,
        index: int,
        shape: MLAShape,
        embed_tokens: Callable[[mx.array], mx.array],
        lm_head: Callable[[mx.array], mx.array],
        sum_ranks: SumRanks = identity,
    ) -> None:
        self._weights = weights
        self._index = index
        self.shape = shape
        self._embed_tokens = weights.embed_tokens if "embed_tokens" in weights else embed_tokens
        head = weights.shared_head
        self._lm_head = head.head if "head" in head else lm_head
        self.block = DecoderBlock(weights, shape, sum_ranks)
        self._combine = compiled(self._combine_inputs)
        self._vectors = compiled(self._compute_vectors)

    def compute_kv(
        self, successors: mx.array, hidden: mx.array, batch: ForwardBatch, tails: TailPool
    ) -> StoredKeys:
        """Compute the KV of a step's rows, and write decode rows' KV to their tails.

        Args:
            successors, hidden: as for `forward`.

        Returns:
            cache vectors [N, kv_width].
        """
        kv = store(self._vectors(successors, hidden, batch.positions), self.shape.kv_bits)
        for group in batch.decode:
            rows = kv[group.start : group.end]
            tails.write(self._index, group.slots, group.tail_positions, rows)
        return kv

    def forward(
        self, successors: mx.array, hidden: mx.array, batch: ForwardBatch, tails: TailPool
    ) -> mx.array:
        """Run the layer over rows that draft.

        Args:
            successors: [N] int32, the token after each row's.
            hidden: [N, hidden], the main model's after its final norm, or this layer's for a
                further draft.

        Returns:
            hidden states after the shared head's norm, [N, hidden].
        """
        x = self._combine(successors, hidden)
        h, _ = self.block.forward(self.shape, self._index, x, batch, tails)
        normed: mx.array = self._weights.shared_head.norm(h)
        return normed

    def logits(self, hidden: mx.array) -> mx.array:
        """[rows, hidden] from `forward` → [rows, vocabulary] float32."""
        return self._lm_head(hidden).astype(mx.float32)

    def _combine_inputs(self, successors: mx.array, hidden: mx.array) -> mx.array:
        """The layer's input: [N, hidden]."""
        weights = self._weights
        normed = [weights.enorm(self._embed_tokens(successors)), weights.hnorm(hidden)]
        projected: mx.array = weights.eh_proj(mx.concatenate(normed, axis=-1))
        return projected

    def _compute_vectors(
        self, successors: mx.array, hidden: mx.array, positions: mx.array
    ) -> mx.array:
        """Cache vectors [N, kv_width]."""
        layer = self._weights
        x = layer.input_layernorm(self._combine_inputs(successors, hidden))
        return cache_vectors(layer.self_attn, self.shape, x, positions)
