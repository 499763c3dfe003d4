"""Multi-head latent attention over shared segments and tails.

Per token and layer the cache holds one vector of `kv_lora_rank + qk_rope_head_dim` values,
shared by all heads (DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1). There are two
ways to use it, equal in exact arithmetic:

- *absorbed*: the up-projection of the keys is applied to the queries instead, and that of the
  values to the result. Heads become further rows of one product with the cached vectors, so
  they are read once for all heads. Work per row and key: 2 · H · (2·512 + 64) operations.
- *expanded*: keys and values of all heads are computed from the cached vectors, then attention
  is ordinary. Work per row and key: 2 · H · (256 + 256); per key, once: 2 · H · 512 · 448.

So the expanded form pays from `break_even_rows` new rows on (398 for GLM-4.7-Flash).

A row's keys lie in several places. Each place is attended to on its own, giving an output and
the log of its softmax denominator (`Partial`); partials combine exactly (as in FlashAttention,
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
"""Bytes that the attention scores of one chunk may take in one layer: chunks shrink, and the
expanded form tiles its queries, to stay near it."""

EXPANDED_BYTES = 1 << 30
"""Bytes that expanded keys and values may take in one layer; beyond it (52k tokens of
GLM-4.7-Flash in bfloat16) the absorbed form serves chunks of any size."""

MIN_CHUNK = 16
"""Rows that a chunk may always have."""

WHOLE_ROWS = 256
"""Rows up to which, where slices are copied, it is quicker to multiply keys whole for the values in
them than to copy these: 1.7 times at 20 rows, and 0.96 times at 320 (GLM-4.7-Flash, OpenBLAS)."""


@dataclass(frozen=True, slots=True)
class MLAShape:
    """The dimensions of one model's attention, and what it may take beside the weights."""

    heads: int
    latent: int
    """kv_lora_rank"""
    nope: int
    rope: int
    value: int
    score_bytes: int = SCORE_BYTES
    expanded_bytes: int = EXPANDED_BYTES
    slices_copied: bool = False
    """Whether the device copies a matrix of which a product takes some columns. A CPU does."""

    @property
    def kv_width(self) -> int:
        """Values cached per token and layer."""
        return self.latent + self.rope

    @property
    def break_even_rows(self) -> int:
        """New rows from which expanding the context costs fewer operations than absorbing."""
        saved = 2 * self.latent + self.rope - (self.nope + self.rope + self.value)
        return max(1, self.latent * (self.nope + self.value) // max(1, saved))


def select_form(shape: MLAShape, context: int, rows: int, itemsize: int) -> tuple[int, bool]:
    """How to run a chunk of up to `rows` rows behind `context` tokens.

    Args:
        itemsize: bytes of one activation.

    Returns:
        the number of rows whose transients stay bounded; whether to take the expanded form.
    """
    total = context + rows
    expanded_bytes = total * shape.heads * (shape.nope + shape.rope + shape.value) * itemsize
    if rows >= shape.break_even_rows and expanded_bytes <= shape.expanded_bytes:
        return rows, True
    fitting = shape.score_bytes // (shape.heads * total * itemsize)
    return min(rows, max(MIN_CHUNK, fitting)), False


@dataclass(frozen=True, slots=True)
class Partial:
    """Attention over some of a row's keys.

    Shapes: out [rows, heads, latent], lse [rows, heads] float32, the log of the softmax
    denominator; -inf where a row has no keys here.
    """

    out: mx.array
    lse: mx.array


@dataclass(frozen=True, slots=True)
class Queries:
    """Queries of N rows, scaled.

    Shapes: nope [N, heads, nope]; rope [N, heads, rope], rotated.
    """

    nope: mx.array
    rope: mx.array

    def rows(self, first: int, last: int) -> Queries:
        """Those of some rows."""
        return Queries(self.nope[first:last], self.rope[first:last])


def project_qkv(
    attn: Any, shape: MLAShape, x: mx.array, positions: mx.array
) -> tuple[Queries, mx.array]:
    """Queries and cache vectors of N rows.

    Args:
        attn: mlx-lm's `Glm4MoeLiteAttention`, used for its weights.
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
    nope, rope = mx.split(q, [shape.nope], axis=-1)
    latent, key = _compressed(attn, shape, x)
    # The key is rotated as one head more: a rotation is twenty operations where none is fused.
    rotated = _rotate(attn, mx.concatenate([rope, key], axis=1), positions)
    rope, key = mx.split(rotated, [shape.heads], axis=1)
    return Queries(nope, rope), mx.concatenate([latent, key[:, 0]], axis=-1)


def cache_vectors(attn: Any, shape: MLAShape, x: mx.array, positions: mx.array) -> mx.array:
    """The second result of `project` alone, [N, kv_width], of the same arguments."""
    latent, key = _compressed(attn, shape, x)
    return mx.concatenate([latent, _rotate(attn, key, positions)[:, 0]], axis=-1)


def _compressed(attn: Any, shape: MLAShape, x: mx.array) -> tuple[mx.array, mx.array]:
    """The normalised latent [N, latent]; the key of all heads, not yet rotated, [N, 1, rope]."""
    latent, key = mx.split(attn.kv_a_proj_with_mqa(x), [shape.latent], axis=-1)
    return attn.kv_a_layernorm(latent), key[:, None]


def _rotate(attn: Any, x: mx.array, positions: mx.array) -> mx.array:
    """[rows, heads, rope], each row rotated to its position."""
    # Rows are the batch axis of the rotation, heads its head axis.
    rotated: mx.array = attn.rope(x[:, :, None], offset=positions)
    return rotated.squeeze(2)


def attend(
    attn: Any,
    shape: MLAShape,
    layer: int,
    q: Queries,
    kv: mx.array,
    batch: ForwardBatch,
    tails: TailPool,
) -> mx.array:
    """Attention of rows in one layer, with the decode rows' `kv` written to their tails.

    Args:
        q: of all N rows, from `project`, or of those that are wanted only (`ForwardBatch.wanted`).
        kv: [N, kv_width], from `project`.

    Returns:
        [rows of q, heads * value], before the output projection.
    """
    whole = q.nope.shape[0] == kv.shape[0]
    outs = []
    for group in batch.decode:
        own, new = q.rows(group.start, group.end), kv[group.start : group.end]
        outs.append(_attend_decode(attn, shape, layer, own, new, group, tails))
    first = batch.decode[-1].end if batch.decode else 0
    for chunk in batch.chunks:
        rows = chunk.end - chunk.start if whole else chunk.logits_rows
        if rows:
            own, new = q.rows(first, first + rows), kv[chunk.start : chunk.end]
            # What is expanded for all rows is not worth it for the last one of a prompt.
            expanded = chunk.expanded and rows == new.shape[0]
            form = _attend_expanded if expanded else _attend_absorbed
            outs.append(form(attn, shape, layer, own, new, chunk.spans))
            first += rows
    return outs[0] if len(outs) == 1 else mx.concatenate(outs)


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
        far = [_level_partial(shape, layer, q, level) for level in group.levels]
        out = _merge([Partial(out, lse), *far])
    return _unembed(attn, shape, out)


def _attend_absorbed(
    attn: Any, shape: MLAShape, layer: int, queries: Queries, kv: mx.array, spans: list[KVSpan]
) -> mx.array:
    q = _absorb(attn, queries)
    keys = kv.shape[0]
    scores = _scores(shape, q, kv)
    later = mx.arange(keys - q.shape[0], keys)[:, None, None] < mx.arange(keys)
    partials = [_softmax_partial(shape, mx.where(later, -mx.inf, scores), [kv])]
    partials += [_part_partial(shape, layer, q, span) for span in spans]
    return _unembed(attn, shape, _merge(partials))


def _attend_expanded(
    attn: Any, shape: MLAShape, layer: int, queries: Queries, kv: mx.array, spans: list[KVSpan]
) -> mx.array:
    past = [keys for span in spans for keys in span.keys(layer)]
    keys = mx.concatenate([*past, kv])[None]  # [1, T, kv_width]
    latent = keys[..., : shape.latent]
    k_nope = attn.embed_q(latent, transpose=False)  # [heads, T, nope]
    k_rope = mx.broadcast_to(keys[..., shape.latent :], (shape.heads, keys.shape[1], shape.rope))
    k = mx.concatenate([k_nope, k_rope], axis=-1)[None]
    v = attn.unembed_out(latent)[None]
    q = mx.concatenate([queries.nope, queries.rope], axis=-1)
    q = q.swapaxes(0, 1)[None]  # [1, heads, rows, nope + rope]
    rows, total = q.shape[2], k.shape[2]
    # Where no fused kernel applies the scores are materialised: tile the queries.
    tile = max(MIN_CHUNK, shape.score_bytes // (shape.heads * total * q.dtype.size))
    outs = []
    for start in range(0, rows, tile):
        stop = min(start + tile, rows)
        seen = total - rows + stop
        outs.append(
            mx.fast.scaled_dot_product_attention(
                q[:, :, start:stop],
                k[:, :, :seen],
                v[:, :, :seen],
                scale=1.0,
                mask="causal",
            )
        )
    out = outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=2)
    return out[0].swapaxes(0, 1).reshape(rows, shape.heads * shape.value)


def _absorb(attn: Any, q: Queries) -> mx.array:
    """[rows, heads, kv_width], in the space of the cache."""
    latent = attn.embed_q(q.nope.swapaxes(0, 1)).swapaxes(0, 1)
    return mx.concatenate([latent, q.rope], axis=-1)


def _unembed(attn: Any, shape: MLAShape, out: mx.array) -> mx.array:
    """[rows, heads, latent] → [rows, heads * value]."""
    rows = out.shape[0]
    out = attn.unembed_out(out.swapaxes(0, 1)).swapaxes(0, 1)
    return out.reshape(rows, shape.heads * shape.value)


def _softmax_partial(shape: MLAShape, scores: mx.array, keys: list[mx.array]) -> Partial:
    """Of scores [rows, heads, keys of all arrays]."""
    weights = mx.softmax(scores, axis=-1, precise=True)
    return Partial(_weighted_values(shape, weights, keys), _log_denominator(scores, weights))


def _log_denominator(scores: mx.array, weights: mx.array) -> mx.array:
    """The log of the denominator by which `weights` came of `scores`, float32."""
    # The largest weight is one over the denominator of scores less their maximum. Exponentials
    # are most of the work on a CPU, so none is taken twice. The logarithm is in float32: in
    # bfloat16 it would be off by percents.
    largest = mx.max(scores, axis=-1).astype(mx.float32)
    return largest - mx.log(mx.max(weights, axis=-1).astype(mx.float32))


def _attend_fused(
    shape: MLAShape, layer: int, q: mx.array, group: DecodeGroup, tails: mx.array
) -> tuple[mx.array, mx.array | None]:
    """Attention to the tails and to what shares a softmax with them.

    Returns:
        as in `Partial`; the second is None where nothing is left to be merged with.
    """
    scores = [_tail_scores(shape, q, group, tails)]
    common: list[mx.array] = []
    for level in group.fused_levels[:-1]:
        (part,) = level.parts
        keys = part.keys(layer)
        scores += _part_scores(shape, q, part, keys)
        common += keys
    seen = _concat(scores, -1)
    shared = seen.shape[-1]
    outs, weights, lses = [], [], []
    for part in group.fused_levels[-1].parts if group.fused_levels else [KVSpan((), 0, q.shape[0])]:
        keys = part.keys(layer)
        own = _concat([seen[part.start : part.end], *_part_scores(shape, q, part, keys)], -1)
        part_weights = mx.softmax(own, axis=-1, precise=True)
        weights.append(part_weights[..., :shared])
        if keys:
            outs.append(_weighted_values(shape, part_weights[..., shared:], keys))
        if group.levels:
            lses.append(_log_denominator(own, part_weights))
    all_weights = _concat(weights, 0)
    capacity = tails.shape[1]
    out = _tail_values(shape, all_weights[..., :capacity], group, tails)
    if common:
        out = out + _weighted_values(shape, all_weights[..., capacity:], common)
    if outs:
        out = out + _concat(outs, 0)
    return out, _concat(lses, 0) if lses else None


def _tail_scores(shape: MLAShape, q: mx.array, group: DecodeGroup, tails: mx.array) -> mx.array:
    """[rows, heads, capacity], -inf for keys that a row does not see."""
    q = q.reshape(group.sequences, group.width * shape.heads, shape.kv_width)
    if group.order is not None:
        q = q[group.order.sequences]
    scores = q @ tails.swapaxes(1, 2)
    if group.order is not None:
        scores = scores[group.order.slots]
    scores = mx.where(group.visible, scores, -mx.inf)
    return scores.reshape(-1, shape.heads, scores.shape[-1])


def _tail_values(
    shape: MLAShape, weights: mx.array, group: DecodeGroup, tails: mx.array
) -> mx.array:
    """The values in the tails by weights [rows, heads, capacity]: [rows, heads, latent]."""
    weights = weights.reshape(group.sequences, group.width * shape.heads, -1)
    if group.order is not None:
        weights = weights[group.order.sequences]
    out = _values(shape, weights, tails)
    if group.order is not None:
        out = out[group.order.slots]
    return out.reshape(-1, shape.heads, shape.latent)


def _level_partial(shape: MLAShape, layer: int, q: mx.array, level: SpanLevel) -> Partial:
    """Attention to the segments of one level; rows that no span names get lse -inf."""
    parts = [_part_partial(shape, layer, q, part) for part in level.parts]
    outs, lses = [part.out for part in parts], [part.lse for part in parts]
    if level.order is None:
        return Partial(_concat(outs, 0), _concat(lses, 0))
    outs.append(mx.zeros((1, shape.heads, shape.latent), q.dtype))
    lses.append(mx.full((1, shape.heads), -mx.inf))
    return Partial(mx.concatenate(outs)[level.order], mx.concatenate(lses)[level.order])


def _part_partial(shape: MLAShape, layer: int, q: mx.array, part: KVSpan | PaddedSpans) -> Partial:
    keys = part.keys(layer)
    # Scores are put together rather than keys, of which there is more.
    scores = _concat(_part_scores(shape, q, part, keys), -1)
    return _softmax_partial(shape, scores, keys)


def _part_scores(
    shape: MLAShape, q: mx.array, part: KVSpan | PaddedSpans, keys: list[mx.array]
) -> list[mx.array]:
    """For each of the part's `keys` the scores of its rows, [its rows, heads, keys].

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
        keys: [keys, kv_width], or [parts, keys, kv_width] for as many rows each.
        visible: [parts, 1, keys] bool; None: all.
    """
    scores = q.reshape(*keys.shape[:-2], -1, shape.kv_width) @ keys.swapaxes(-1, -2)
    if visible is not None:
        scores = mx.where(visible, scores, -mx.inf)
    return scores.reshape(q.shape[0], shape.heads, -1)


def _weighted_values(shape: MLAShape, weights: mx.array, keys: list[mx.array]) -> mx.array:
    """The values in all `keys`, each as `_scores` takes them: [rows, heads, latent].

    Args:
        weights: [rows, heads, keys of all arrays], those of an array behind those of the one
            before.
    """
    outs = []
    first = 0
    for array in keys:
        last = first + array.shape[-2]
        part = weights[..., first:last].reshape(*array.shape[:-2], -1, array.shape[-2])
        outs.append(_values(shape, part, array).reshape(-1, shape.heads, shape.latent))
        first = last
    return reduce(mx.add, outs)


def _values(shape: MLAShape, weights: mx.array, keys: mx.array) -> mx.array:
    """The values in `keys` [..., keys, kv_width] by weights [..., rows, keys]: [..., latent]."""
    if shape.slices_copied and weights.shape[-2] <= WHOLE_ROWS:
        return (weights @ keys)[..., : shape.latent]
    return weights @ keys[..., : shape.latent]


def _concat(arrays: list[mx.array], axis: int) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays, axis=axis)


def _merge(partials: list[Partial]) -> mx.array:
    """The attention over all partials' keys together: [rows, heads, latent]."""
    if len(partials) == 1:
        return partials[0].out
    weights = mx.softmax(mx.stack([part.lse for part in partials], axis=-1), axis=-1)
    weights = weights.astype(partials[0].out.dtype)
    weighed = [weights[..., i : i + 1] * part.out for i, part in enumerate(partials)]
    return reduce(mx.add, weighed)
