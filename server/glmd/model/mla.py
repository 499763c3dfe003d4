"""Multi-head latent attention over shared segments and tails.

Per token and layer the cache holds one vector of `kv_lora_rank + qk_rope_head_dim` values, shared
by all heads (DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1). There are two forms,
equal in exact arithmetic (numbers for GLM-4.7-Flash, H heads):

- *absorbed*: the up-projection of keys is applied to the queries, that of values to the result.
  Heads become further rows of one product with the cached vectors, which are read once for all
  heads. Operations per row and key: 2 · H · (2·512 + 64).
- *expanded*: keys and values of all heads are computed from the cached vectors, then attention is
  ordinary. Operations per row and key: 2 · H · (256 + 256); per key, once: 2 · H · 512 · 448.

The expanded form needs fewer operations from `break_even_rows` new rows (398).

A row's keys are in several places. Attention to each place gives an output and the log of its
softmax denominator (`Partial`); partials merge exactly (as in FlashAttention,
https://arxiv.org/abs/2205.14135, and cascade inference).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import mlx.core as mx

from glmd.kv_cache.stored_keys import KVBits, QuantizedKeys, StoredKeys
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import DecodeGroup, KVSpan, PaddedSpans, SpanLevel

SCORE_BYTES = 48 << 20
"""Bytes of attention scores of a block: the expanded form tiles its queries, the absorbed form its
keys. Two blocks are computed at a time."""

EXPANDED_BYTES = 160 << 20
"""Bytes of expanded keys and values: those of all heads for contexts up to 8k tokens of
GLM-4.7-Flash in bfloat16, of fewer heads at a time beyond, and of at least one head."""

SPLIT_KEYS, SPLIT_ROWS = 512, 256
"""Quantised values of up to `SPLIT_ROWS` rows are summed in blocks of so many keys, for which a GPU
has enough groups of threads: 18 for each block and 32 rows of GLM-4.7-Flash. MLX 0.32 splits only
products with transposed or with unquantised matrices by itself."""

WHOLE_ROWS = 256
"""Rows up to which, where slices are copied, multiplying by whole keys and slicing the result is
faster than copying their latents: 1.7 times at 20 rows, 0.96 times at 320 (GLM-4.7-Flash,
OpenBLAS)."""


@dataclass(frozen=True, slots=True)
class MLAShape:
    """Dimensions and memory limits of a model's attention."""

    heads: int
    latent: int
    """kv_lora_rank"""
    nope: int
    rope: int
    value: int
    score_bytes: int = SCORE_BYTES
    expanded_bytes: int = EXPANDED_BYTES
    kv_bits: KVBits = 16
    slices_copied: bool = False
    """Whether the device copies a slice of columns before multiplying it. A CPU does."""
    fused: bool = False
    """Whether attention of `attention.FUSED_ROWS` rows and more stores no scores."""
    kernel: bool = False
    """Whether decode groups use `glmd.model.mla_kernel`."""

    @property
    def kv_width(self) -> int:
        """Values cached per token and layer."""
        return self.latent + self.rope

    @property
    def break_even_rows(self) -> int:
        """New rows from which the expanded form costs fewer operations."""
        saved = 2 * self.latent + self.rope - (self.nope + self.rope + self.value)
        return max(1, self.latent * (self.nope + self.value) // max(1, saved))

    @property
    def expanded_width(self) -> int:
        """Values of a token's expanded key and value in one head."""
        return self.nope + self.rope + self.value


@dataclass(frozen=True, slots=True)
class Partial:
    """Attention to some of a row's keys.

    Shapes: out [rows, heads, latent]; lse [rows, heads] float32, the log of the softmax
    denominator, -inf for a row without keys here.
    """

    out: mx.array
    lse: mx.array


@dataclass(frozen=True, slots=True)
class Queries:
    """Scaled queries of N rows.

    Shapes: nope [N, heads, nope]; rope [N, heads, rope], rotated.
    """

    nope: mx.array
    rope: mx.array

    def slice(self, start: int, end: int) -> Queries:
        """The queries of rows `start` to `end`."""
        return Queries(self.nope[start:end], self.rope[start:end])


# -- projections ----------------------------------------------------------------------------


def scaled_query_norm(attn: Any) -> mx.array | None:
    """The weight of the norm of query latents, times the attention's scale.

    None: no such norm.
    """
    return None if attn.q_lora_rank is None else attn.q_a_layernorm.weight * attn.scale


def project_q(
    attn: Any, shape: MLAShape, x: mx.array, query_norm: mx.array | None = None
) -> mx.array:
    """Compute the scaled queries of N rows, not rotated: [N, heads, nope + rope]."""
    if attn.q_lora_rank is None:
        q = attn.q_proj(x) * attn.scale
    elif query_norm is None:
        q = attn.q_b_proj(attn.q_a_layernorm(attn.q_a_proj(x))) * attn.scale
    else:
        q = attn.q_b_proj(mx.fast.rms_norm(attn.q_a_proj(x), query_norm, attn.q_a_layernorm.eps))
    heads: mx.array = q.reshape(-1, shape.heads, shape.nope + shape.rope)
    return heads


def project_qkv(
    attn: Any,
    shape: MLAShape,
    x: mx.array,
    positions: mx.array,
    query_norm: mx.array | None = None,
) -> tuple[Queries, mx.array]:
    """Compute queries and cache vectors of N rows.

    Args:
        attn: mlx-lm's `Glm4MoeLiteAttention`, for its weights.
        x: [N, hidden], normalised.
        positions: [N] int32.
        query_norm: from `scaled_query_norm`, so that scaling the queries takes no kernel; None: it
            takes one.

    Returns:
        queries; cache vectors [N, kv_width].
    """
    q = project_q(attn, shape, x, query_norm)
    q_nope, q_rope = mx.split(q, [shape.nope], axis=-1)
    latent, k_rope = _compress(attn, shape, x)
    # Queries and key are rotated together: an unfused rotation is twenty operations.
    rotated = _rotate(attn, mx.concatenate([q_rope, k_rope], axis=1), positions)
    q_rope, k_rope = mx.split(rotated, [shape.heads], axis=1)
    return Queries(q_nope, q_rope), mx.concatenate([latent, k_rope[:, 0]], axis=-1)


def cache_vectors(attn: Any, shape: MLAShape, x: mx.array, positions: mx.array) -> mx.array:
    """Compute only the cache vectors of `project_qkv`: [N, kv_width]."""
    latent, k_rope = _compress(attn, shape, x)
    return mx.concatenate([latent, _rotate(attn, k_rope, positions)[:, 0]], axis=-1)


def _compress(attn: Any, shape: MLAShape, x: mx.array) -> tuple[mx.array, mx.array]:
    """Normalised latent [N, latent]; key of all heads before rotation, [N, 1, rope]."""
    latent, k_rope = mx.split(attn.kv_a_proj_with_mqa(x), [shape.latent], axis=-1)
    return attn.kv_a_layernorm(latent), k_rope[:, None]


def _rotate(attn: Any, x: mx.array, positions: mx.array) -> mx.array:
    """Rotate each row of [rows, heads, rope] to its position."""
    # Rows are the batch axis of `rope`, heads its head axis, with a sequence axis of 1.
    rotated: mx.array = attn.rope(x[:, :, None], offset=positions)
    return rotated.squeeze(2)


def absorb(attn: Any, q: Queries) -> mx.array:
    """Queries in the space of the cache: [rows, heads, kv_width]."""
    return mx.concatenate([absorb_nope(attn, q).swapaxes(0, 1), q.rope], axis=-1)


def absorb_nope(attn: Any, q: Queries) -> mx.array:
    """The unrotated part of queries in the space of the latents: [heads, rows, latent]."""
    latent: mx.array = attn.embed_q(q.nope.swapaxes(0, 1))
    return latent


def unembed(attn: Any, shape: MLAShape, out: mx.array) -> mx.array:
    """[rows, heads, latent] → [rows, heads * value]."""
    rows = out.shape[0]
    out = attn.unembed_out(out.swapaxes(0, 1)).swapaxes(0, 1)
    return out.reshape(rows, shape.heads * shape.value)


# -- attention ------------------------------------------------------------------------------


def attend_decode(
    shape: MLAShape, layer: int, q: mx.array, group: DecodeGroup, tails: TailPool
) -> mx.array:
    """Attend from absorbed queries [rows, heads, kv_width]: [rows, heads, latent]."""
    out, lse = _attend_fused(shape, layer, q, group, tails.view(layer))
    if lse is None:
        return out
    others = [_attend_level(shape, layer, q, level) for level in group.levels]
    return _merge([Partial(out, lse), *others])


def _attend_fused(
    shape: MLAShape, layer: int, q: mx.array, group: DecodeGroup, tails: StoredKeys
) -> tuple[mx.array, mx.array | None]:
    """Attend to the tails and the fused levels in one softmax.

    Returns:
        `out` and `lse` as in `Partial`; `lse` is None if there are no other levels.
    """
    scores = [_tail_scores(shape, q, group, tails)]
    common_keys: list[StoredKeys] = []
    for level in group.fused_levels[:-1]:
        (part,) = level.parts
        keys = part.keys(layer)
        scores += _part_scores(shape, q, part, keys)
        common_keys += keys
    common = concat(scores, -1)  # [rows, heads, tail keys + common keys]
    common_len = common.shape[-1]
    outs, weights, lses = [], [], []
    for part in group.fused_levels[-1].parts if group.fused_levels else [KVSpan((), 0, q.shape[0])]:
        keys = part.keys(layer)
        own = _part_scores(shape, q, part, keys)
        part_scores = concat([common[part.start : part.end], *own], -1)
        part_weights = mx.softmax(part_scores, axis=-1, precise=True)
        weights.append(part_weights[..., :common_len])
        if keys:
            outs.append(_weighted_values(shape, part_weights[..., common_len:], keys))
        if group.levels:
            lses.append(_log_denominator(part_scores, part_weights))
    all_weights = concat(weights, 0)
    capacity = tails.shape[1]
    out = _tail_values(shape, all_weights[..., :capacity], group, tails)
    if common_keys:
        out = _weighted_values(shape, all_weights[..., capacity:], common_keys, out)
    if outs:
        out = out + concat(outs, 0)
    return out, concat(lses, 0) if lses else None


def _tail_scores(shape: MLAShape, q: mx.array, group: DecodeGroup, tails: StoredKeys) -> mx.array:
    """[rows, heads, capacity], -inf for keys that a row does not see."""
    q = q.reshape(group.sequences, group.width * shape.heads, shape.kv_width)
    if group.order is not None:
        q = q[group.order.sequences]
    # [slots, width * heads, capacity]
    if isinstance(tails, QuantizedKeys):
        scores = _multiply(q, tails) + group.tail_mask
    else:
        scores = mx.addmm(group.tail_mask, q, tails.swapaxes(1, 2))
    if group.order is not None:
        scores = scores[group.order.slots]
    return scores.reshape(-1, shape.heads, scores.shape[-1])


def _tail_values(
    shape: MLAShape, weights: mx.array, group: DecodeGroup, tails: StoredKeys
) -> mx.array:
    """Sum the tails' values by weights [rows, heads, capacity]: [rows, heads, latent]."""
    weights = weights.reshape(group.sequences, group.width * shape.heads, -1)
    if group.order is not None:
        weights = weights[group.order.sequences]
    out = _values(shape, weights, tails)  # [slots, width * heads, latent]
    if group.order is not None:
        out = out[group.order.slots]
    return out.reshape(-1, shape.heads, shape.latent)


def _attend_level(shape: MLAShape, layer: int, q: mx.array, level: SpanLevel) -> Partial:
    """Attend to the spans of one level; rows without span get lse -inf."""
    partials = [_attend_part(shape, layer, q, part) for part in level.parts]
    outs, lses = [partial.out for partial in partials], [partial.lse for partial in partials]
    if level.order is None:
        return Partial(concat(outs, 0), concat(lses, 0))
    outs.append(mx.zeros((1, shape.heads, shape.latent), q.dtype))
    lses.append(mx.full((1, shape.heads), -mx.inf))
    return Partial(mx.concatenate(outs)[level.order], mx.concatenate(lses)[level.order])


def _attend_part(shape: MLAShape, layer: int, q: mx.array, part: KVSpan | PaddedSpans) -> Partial:
    keys = part.keys(layer)
    # Scores are concatenated rather than keys, which are larger.
    scores = concat(_part_scores(shape, q, part, keys), -1)
    return softmax_partial(shape, scores, keys)


# -- scores and values ----------------------------------------------------------------------


def _part_scores(
    shape: MLAShape, q: mx.array, part: KVSpan | PaddedSpans, keys: list[StoredKeys]
) -> list[mx.array]:
    """Scores [rows, heads, keys] for each array of the part's `keys`.

    Args:
        q: [rows, heads, kv_width], of all rows of the group.
    """
    if isinstance(part, KVSpan):
        return [key_scores(shape, q[part.start : part.end], array) for array in keys]
    own = q[part.start : part.end] if part.rows is None else q[part.rows]
    return [key_scores(shape, own, array, part.visible) for array in keys]


def key_scores(
    shape: MLAShape, q: mx.array, keys: StoredKeys, visible: mx.array | None = None
) -> mx.array:
    """[rows, heads, keys] of q [rows, heads, kv_width].

    Args:
        keys: [keys, kv_width], or [spans, keys, kv_width] for equal numbers of rows.
        visible: [spans, 1, keys] bool; None: all.
    """
    scores = _multiply(q.reshape(*keys.shape[:-2], -1, shape.kv_width), keys)
    if visible is not None:
        scores = mx.where(visible, scores, -mx.inf)
    return scores.reshape(q.shape[0], shape.heads, -1)


def softmax_partial(shape: MLAShape, scores: mx.array, keys: list[StoredKeys]) -> Partial:
    """Attention by scores [rows, heads, keys of all arrays]."""
    weights = mx.softmax(scores, axis=-1, precise=True)
    return Partial(_weighted_values(shape, weights, keys), _log_denominator(scores, weights))


def _log_denominator(scores: mx.array, weights: mx.array) -> mx.array:
    """The log of the softmax denominator, float32."""
    # The largest weight is 1 / sum(exp(scores - max)), so no exponential is computed twice: on a
    # CPU they are most of the work. In bfloat16 the logarithm would be off by percents.
    largest = mx.max(scores, axis=-1).astype(mx.float32)
    return largest - mx.log(mx.max(weights, axis=-1).astype(mx.float32))


def _weighted_values(
    shape: MLAShape, weights: mx.array, keys: list[StoredKeys], out: mx.array | None = None
) -> mx.array:
    """Sum the values in all `keys` by weights: [rows, heads, latent].

    Args:
        weights: [rows, heads, keys of all arrays], in the order of the arrays.
        keys: each as in `key_scores`.
        out: added to the sum.
    """
    start = 0
    for array in keys:
        end = start + array.shape[-2]
        part = weights[..., start:end].reshape(*array.shape[:-2], -1, array.shape[-2])
        if out is not None:
            out = out.reshape(*part.shape[:-1], shape.latent)
        out = _values(shape, part, array, out).reshape(-1, shape.heads, shape.latent)
        start = end
    assert out is not None
    return out


def _values(
    shape: MLAShape, weights: mx.array, keys: StoredKeys, added: mx.array | None = None
) -> mx.array:
    """Weights [..., rows, keys] by latents of keys [..., keys, kv_width].

    Args:
        added: to the product, in the same kernel.
    """
    if isinstance(keys, QuantizedKeys):
        product = _quantized_values(shape, weights, keys)
        return product if added is None else added + product
    if shape.slices_copied and weights.shape[-2] <= WHOLE_ROWS:
        product = (weights @ keys)[..., : shape.latent]
        return product if added is None else added + product
    if added is None:
        return weights @ keys[..., : shape.latent]
    return mx.addmm(added, weights, keys[..., : shape.latent])


def _quantized_values(shape: MLAShape, weights: mx.array, keys: QuantizedKeys) -> mx.array:
    """`_values` of quantised keys.

    MLX would copy their latents, so all columns are multiplied.
    """
    rows, count = weights.shape[-2:]
    blocks = count // SPLIT_KEYS
    if len(keys.shape) > 2 or rows > SPLIT_ROWS or blocks < 2 or shape.slices_copied:
        return _quantized_product(weights, keys, transpose=False)[..., : shape.latent]
    # MLX's kernel goes over all keys in one group of threads for 32 x 32 results.
    end = blocks * SPLIT_KEYS
    split = keys[:end]
    parts = QuantizedKeys(
        tuple(array.reshape(blocks, SPLIT_KEYS, -1) for array in split.arrays), keys.bits
    )
    own = weights[:, :end].reshape(rows, blocks, SPLIT_KEYS).swapaxes(0, 1)
    out = _quantized_product(own, parts, transpose=False).sum(axis=0)
    if end < count:
        out = out + _quantized_product(weights[:, end:], keys[end:], transpose=False)
    return out[..., : shape.latent]


def _multiply(q: mx.array, keys: StoredKeys) -> mx.array:
    """Products [..., rows, keys] of q [..., rows, kv_width] and keys."""
    if isinstance(keys, QuantizedKeys):
        return _quantized_product(q, keys, transpose=True)
    return q @ keys.swapaxes(-1, -2)


def _quantized_product(x: mx.array, keys: QuantizedKeys, *, transpose: bool) -> mx.array:
    weights, scales, biases = keys.arrays
    return mx.quantized_matmul(x, weights, scales, biases, transpose, **keys.options)


def _merge(partials: list[Partial]) -> mx.array:
    """Attention to the keys of all partials together: [rows, heads, latent]."""
    if len(partials) == 1:
        return partials[0].out
    weights = mx.softmax(mx.stack([partial.lse for partial in partials], axis=-1), axis=-1)
    weights = weights.astype(partials[0].out.dtype)
    return reduce(mx.add, [weights[..., i, None] * p.out for i, p in enumerate(partials)])


def concat(arrays: list[mx.array], axis: int) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=axis)
