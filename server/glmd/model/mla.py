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

from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import DecodeGroup, ForwardBatch, KVSpan, PaddedSpans, SpanLevel

SCORE_BYTES = 256 << 20
"""Bytes of attention scores of one chunk in one layer. Chunks shrink, and the expanded form tiles
its queries, to stay near this size."""

EXPANDED_BYTES = 1 << 30
"""Bytes of expanded keys and values in one layer. Longer contexts (52k tokens of GLM-4.7-Flash in
bfloat16) use the absorbed form for chunks of any size."""

MIN_CHUNK = 16
"""Rows that a chunk may always have."""

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
    slices_copied: bool = False
    """Whether the device copies a slice of columns before multiplying it. A CPU does."""

    @property
    def kv_width(self) -> int:
        """Values cached per token and layer."""
        return self.latent + self.rope

    @property
    def break_even_rows(self) -> int:
        """New rows from which the expanded form costs fewer operations than the absorbed form."""
        saved = 2 * self.latent + self.rope - (self.nope + self.rope + self.value)
        return max(1, self.latent * (self.nope + self.value) // max(1, saved))


def select_form(shape: MLAShape, context: int, rows: int, itemsize: int) -> tuple[int, bool]:
    """Choose the form of MLA for a chunk of up to `rows` rows behind `context` tokens.

    Args:
        itemsize: bytes of one activation.

    Returns:
        the number of rows that keeps within the memory limits; whether to use the expanded form.
    """
    total = context + rows
    expanded_bytes = total * shape.heads * (shape.nope + shape.rope + shape.value) * itemsize
    if rows >= shape.break_even_rows and expanded_bytes <= shape.expanded_bytes:
        return rows, True
    fitting = shape.score_bytes // (shape.heads * total * itemsize)
    return min(rows, max(MIN_CHUNK, fitting)), False


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


def project_qkv(
    attn: Any, shape: MLAShape, x: mx.array, positions: mx.array
) -> tuple[Queries, mx.array]:
    """Compute queries and cache vectors of N rows.

    Args:
        attn: mlx-lm's `Glm4MoeLiteAttention`, for its weights.
        x: [N, hidden], normalised.
        positions: [N] int32.

    Returns:
        queries; cache vectors [N, kv_width].
    """
    rows = x.shape[0]
    if attn.q_lora_rank is None:
        q = attn.q_proj(x)
    else:
        q = attn.q_b_proj(attn.q_a_layernorm(attn.q_a_proj(x)))
    q = q.reshape(rows, shape.heads, shape.nope + shape.rope) * attn.scale
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


def _absorb(attn: Any, q: Queries) -> mx.array:
    """Queries in the space of the cache: [rows, heads, kv_width]."""
    latent = attn.embed_q(q.nope.swapaxes(0, 1)).swapaxes(0, 1)
    return mx.concatenate([latent, q.rope], axis=-1)


def _unembed(attn: Any, shape: MLAShape, out: mx.array) -> mx.array:
    """[rows, heads, latent] → [rows, heads * value]."""
    rows = out.shape[0]
    out = attn.unembed_out(out.swapaxes(0, 1)).swapaxes(0, 1)
    return out.reshape(rows, shape.heads * shape.value)


# -- attention ------------------------------------------------------------------------------


def attend(
    attn: Any,
    shape: MLAShape,
    layer: int,
    q: Queries,
    kv: mx.array,
    batch: ForwardBatch,
    tails: TailPool,
) -> mx.array:
    """Run one layer's attention, after writing the decode rows' `kv` to their tails.

    Args:
        q: of all N rows, or only of `ForwardBatch.logits_rows`.
        kv: [N, kv_width] cache vectors.

    Returns:
        [rows of q, heads * value], before the output projection.
    """
    all_rows = q.nope.shape[0] == kv.shape[0]
    outs = []
    for group in batch.decode:
        queries, new = q.slice(group.start, group.end), kv[group.start : group.end]
        outs.append(_attend_decode(attn, shape, layer, queries, new, group, tails))
    start = batch.decode[-1].end if batch.decode else 0
    for chunk in batch.chunks:
        rows = chunk.end - chunk.start if all_rows else chunk.logits_rows
        if rows:
            queries, new = q.slice(start, start + rows), kv[chunk.start : chunk.end]
            # Expanding the whole context does not pay for a prompt's last row.
            expanded = chunk.expanded and rows == new.shape[0]
            form = _attend_expanded if expanded else _attend_absorbed
            outs.append(form(attn, shape, layer, queries, new, chunk.spans))
            start += rows
    return _concat(outs, 0)


def _attend_decode(
    attn: Any,
    shape: MLAShape,
    layer: int,
    queries: Queries,
    kv: mx.array,
    group: DecodeGroup,
    tails: TailPool,
) -> mx.array:
    tails.write(layer, group.slots, group.tail_positions, kv)
    q = _absorb(attn, queries)
    out, lse = _attend_fused(shape, layer, q, group, tails.view(layer))
    if lse is not None:
        others = [_attend_level(shape, layer, q, level) for level in group.levels]
        out = _merge([Partial(out, lse), *others])
    return _unembed(attn, shape, out)


def _attend_absorbed(
    attn: Any, shape: MLAShape, layer: int, queries: Queries, kv: mx.array, spans: list[KVSpan]
) -> mx.array:
    q = _absorb(attn, queries)  # [rows, heads, kv_width]
    keys = kv.shape[0]
    scores = _scores(shape, q, kv)  # [rows, heads, keys]
    later = mx.arange(keys - q.shape[0], keys)[:, None, None] < mx.arange(keys)
    partials = [_softmax_partial(shape, mx.where(later, -mx.inf, scores), [kv])]
    partials += [_attend_part(shape, layer, q, span) for span in spans]
    return _unembed(attn, shape, _merge(partials))


def _attend_expanded(
    attn: Any, shape: MLAShape, layer: int, queries: Queries, kv: mx.array, spans: list[KVSpan]
) -> mx.array:
    past = [keys for span in spans for keys in span.keys(layer)]
    keys = mx.concatenate([*past, kv])[None]  # [1, T, kv_width]
    latent = keys[..., : shape.latent]
    k_nope = attn.embed_q(latent, transpose=False)  # [heads, T, nope]
    k_rope = mx.broadcast_to(keys[..., shape.latent :], (shape.heads, keys.shape[1], shape.rope))
    k = mx.concatenate([k_nope, k_rope], axis=-1)[None]  # [1, heads, T, nope + rope]
    v = attn.unembed_out(latent)[None]  # [1, heads, T, value]
    q = mx.concatenate([queries.nope, queries.rope], axis=-1)
    q = q.swapaxes(0, 1)[None]  # [1, heads, rows, nope + rope]
    rows, total = q.shape[2], k.shape[2]
    # Without a fused kernel the scores are materialised, so the queries are tiled.
    tile = max(MIN_CHUNK, shape.score_bytes // (shape.heads * total * q.dtype.size))
    outs = []
    for start in range(0, rows, tile):
        end = min(start + tile, rows)
        seen = total - rows + end
        outs.append(
            mx.fast.scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], scale=1.0, mask="causal"
            )
        )
    out = _concat(outs, 2)  # [1, heads, rows, value]
    return out[0].swapaxes(0, 1).reshape(rows, shape.heads * shape.value)


def _attend_fused(
    shape: MLAShape, layer: int, q: mx.array, group: DecodeGroup, tails: mx.array
) -> tuple[mx.array, mx.array | None]:
    """Attend to the tails and the fused levels in one softmax.

    Returns:
        `out` and `lse` as in `Partial`; `lse` is None if there are no other levels.
    """
    scores = [_tail_scores(shape, q, group, tails)]
    common_keys: list[mx.array] = []
    for level in group.fused_levels[:-1]:
        (part,) = level.parts
        keys = part.keys(layer)
        scores += _part_scores(shape, q, part, keys)
        common_keys += keys
    common = _concat(scores, -1)  # [rows, heads, tail keys + common keys]
    common_len = common.shape[-1]
    outs, weights, lses = [], [], []
    for part in group.fused_levels[-1].parts if group.fused_levels else [KVSpan((), 0, q.shape[0])]:
        keys = part.keys(layer)
        own = _part_scores(shape, q, part, keys)
        part_scores = _concat([common[part.start : part.end], *own], -1)
        part_weights = mx.softmax(part_scores, axis=-1, precise=True)
        weights.append(part_weights[..., :common_len])
        if keys:
            outs.append(_weighted_values(shape, part_weights[..., common_len:], keys))
        if group.levels:
            lses.append(_log_denominator(part_scores, part_weights))
    all_weights = _concat(weights, 0)
    capacity = tails.shape[1]
    out = _tail_values(shape, all_weights[..., :capacity], group, tails)
    if common_keys:
        out = out + _weighted_values(shape, all_weights[..., capacity:], common_keys)
    if outs:
        out = out + _concat(outs, 0)
    return out, _concat(lses, 0) if lses else None


def _tail_scores(shape: MLAShape, q: mx.array, group: DecodeGroup, tails: mx.array) -> mx.array:
    """[rows, heads, capacity], -inf for keys that a row does not see."""
    q = q.reshape(group.sequences, group.width * shape.heads, shape.kv_width)
    if group.order is not None:
        q = q[group.order.sequences]
    scores = q @ tails.swapaxes(1, 2)  # [slots, width * heads, capacity]
    if group.order is not None:
        scores = scores[group.order.slots]
    scores = mx.where(group.visible, scores, -mx.inf)
    return scores.reshape(-1, shape.heads, scores.shape[-1])


def _tail_values(
    shape: MLAShape, weights: mx.array, group: DecodeGroup, tails: mx.array
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
        return Partial(_concat(outs, 0), _concat(lses, 0))
    outs.append(mx.zeros((1, shape.heads, shape.latent), q.dtype))
    lses.append(mx.full((1, shape.heads), -mx.inf))
    return Partial(mx.concatenate(outs)[level.order], mx.concatenate(lses)[level.order])


def _attend_part(shape: MLAShape, layer: int, q: mx.array, part: KVSpan | PaddedSpans) -> Partial:
    keys = part.keys(layer)
    # Scores are concatenated rather than keys, which are larger.
    scores = _concat(_part_scores(shape, q, part, keys), -1)
    return _softmax_partial(shape, scores, keys)


# -- scores and values ----------------------------------------------------------------------


def _part_scores(
    shape: MLAShape, q: mx.array, part: KVSpan | PaddedSpans, keys: list[mx.array]
) -> list[mx.array]:
    """For each array of the part's `keys` the scores of its rows, [its rows, heads, keys].

    Args:
        q: [rows, heads, kv_width], of all rows of the group.
    """
    if isinstance(part, KVSpan):
        return [_scores(shape, q[part.start : part.end], array) for array in keys]
    own = q[part.start : part.end] if part.rows is None else q[part.rows]
    return [_scores(shape, own, array, part.visible) for array in keys]


def _scores(
    shape: MLAShape, q: mx.array, keys: mx.array, visible: mx.array | None = None
) -> mx.array:
    """[rows, heads, keys] of q [rows, heads, kv_width].

    Args:
        keys: [keys, kv_width], or [spans, keys, kv_width] for equal numbers of rows.
        visible: [spans, 1, keys] bool; None: all.
    """
    scores = q.reshape(*keys.shape[:-2], -1, shape.kv_width) @ keys.swapaxes(-1, -2)
    if visible is not None:
        scores = mx.where(visible, scores, -mx.inf)
    return scores.reshape(q.shape[0], shape.heads, -1)


def _softmax_partial(shape: MLAShape, scores: mx.array, keys: list[mx.array]) -> Partial:
    """Attention by scores [rows, heads, keys of all arrays]."""
    weights = mx.softmax(scores, axis=-1, precise=True)
    return Partial(_weighted_values(shape, weights, keys), _log_denominator(scores, weights))


def _log_denominator(scores: mx.array, weights: mx.array) -> mx.array:
    """The log of the softmax denominator, float32."""
    # The largest weight is 1 / sum(exp(scores - max)), so no exponential is computed twice: on a
    # CPU they are most of the work. In bfloat16 the logarithm would be off by percents.
    largest = mx.max(scores, axis=-1).astype(mx.float32)
    return largest - mx.log(mx.max(weights, axis=-1).astype(mx.float32))


def _weighted_values(shape: MLAShape, weights: mx.array, keys: list[mx.array]) -> mx.array:
    """Sum the values in all `keys` by weights: [rows, heads, latent].

    Args:
        weights: [rows, heads, keys of all arrays], in the order of the arrays.
        keys: each as in `_scores`.
    """
    outs = []
    start = 0
    for array in keys:
        end = start + array.shape[-2]
        part = weights[..., start:end].reshape(*array.shape[:-2], -1, array.shape[-2])
        outs.append(_values(shape, part, array).reshape(-1, shape.heads, shape.latent))
        start = end
    return reduce(mx.add, outs)


def _values(shape: MLAShape, weights: mx.array, keys: mx.array) -> mx.array:
    """Weights [..., rows, keys] by the latents of keys [..., keys, kv_width]: [..., latent]."""
    if shape.slices_copied and weights.shape[-2] <= WHOLE_ROWS:
        return (weights @ keys)[..., : shape.latent]
    return weights @ keys[..., : shape.latent]


def _merge(partials: list[Partial]) -> mx.array:
    """Attention to the keys of all partials together: [rows, heads, latent]."""
    if len(partials) == 1:
        return partials[0].out
    weights = mx.softmax(mx.stack([partial.lse for partial in partials], axis=-1), axis=-1)
    weights = weights.astype(partials[0].out.dtype)
    return reduce(mx.add, [weights[..., i, None] * p.out for i, p in enumerate(partials)])


def _concat(arrays: list[mx.array], axis: int) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=axis)
