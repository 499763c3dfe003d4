"""Attention of the rows of a step, in memory that does not depend on the context.

Decode groups and short chunks use the absorbed form of `glmd.model.mla`, long chunks the expanded
form. What is stored for a while, scores or expanded keys and values, is bounded by computing blocks
one after another: blocks of keys in the absorbed form, which merges partial results; groups of
heads in the expanded form, each over all keys, which needs no merging. MLX allocates what it has
scheduled, so blocks are not scheduled before earlier ones are done.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from glmd.kv_cache.stored_keys import StoredKeys, dequantize
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import DecodeGroup, ForwardBatch, KVSpan
from glmd.model.mla import (
    MLAShape,
    Partial,
    Queries,
    absorb,
    absorb_nope,
    attend_decode,
    concat,
    key_scores,
    softmax_partial,
    unembed,
)
from glmd.model.mla_kernel import attend_items

FUSED_ROWS = 1024
"""Rows from which MLX may have a fused kernel for 256 values per head (0.32: on M5, in
`ScaledDotProductAttention::use_fallback`; elsewhere it measured separate products as faster)."""

KEY_BLOCK, BLOCKS_AHEAD = 8192, 4
"""Keys that are dequantised and expanded at a time, and number of such blocks in memory."""


def stores_no_scores(shape: MLAShape, dtype: mx.Dtype) -> bool:
    """Measure whether the expanded form has a fused kernel at `FUSED_ROWS` rows.

    Which chips and sizes have one differs between versions of MLX, which does not tell.
    """
    width = shape.nope + shape.rope
    if not mx.metal.is_available() or mx.default_device().type == mx.DeviceType.cpu:
        return False
    q = mx.zeros((1, 1, FUSED_ROWS, width), dtype)
    v = mx.zeros((1, 1, FUSED_ROWS, shape.value), dtype)
    mx.eval(q, v)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.fast.scaled_dot_product_attention(q, q, v, scale=1.0, mask="causal"))
    return mx.get_peak_memory() - before < FUSED_ROWS**2 * dtype.size


def attend(
    attn: Any,
    shape: MLAShape,
    layer: int,
    q: Queries,
    kv: StoredKeys,
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
        tails.write(layer, group.slots, group.tail_positions, new)
        latents = attend_group(shape, layer, absorb_nope(attn, queries), queries.rope, group, tails)
        outs.append(unembed(attn, shape, latents))
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
    return concat(outs, 0)


def attend_group(
    shape: MLAShape,
    layer: int,
    q: mx.array,
    q_rope: mx.array,
    group: DecodeGroup,
    tails: TailPool,
) -> mx.array:
    """Attend from a decode group's absorbed queries.

    Args:
        q: [heads, rows, latent].
        q_rope: [rows, heads, rope], rotated.

    Returns:
        [rows, heads, latent]
    """
    if group.plan is not None:
        out = attend_items(shape, layer, q, q_rope, group, group.plan, tails)
        return out.swapaxes(0, 1)
    joined = mx.concatenate([q.swapaxes(0, 1), q_rope], axis=-1)
    return attend_decode(shape, layer, joined, group, tails)


def _attend_absorbed(
    attn: Any, shape: MLAShape, layer: int, queries: Queries, kv: StoredKeys, spans: list[KVSpan]
) -> mx.array:
    """Attend in the absorbed form, over blocks of keys one after another."""
    q = absorb(attn, queries)  # [rows, heads, kv_width]
    rows, keys = q.shape[0], kv.shape[0]
    own = key_scores(shape, q, kv)  # [rows, heads, keys]
    later = mx.arange(keys - rows, keys)[:, None, None] < mx.arange(keys)
    merged = softmax_partial(shape, mx.where(later, -mx.inf, own), [kv])
    longest = max(1, shape.score_bytes // (rows * shape.heads * q.dtype.size))
    merges = [merged.out]
    for block in _key_blocks([keys for span in spans for keys in span.keys(layer)], longest):
        if len(merges) > 1:
            _start(merges)
        seen = concat([key_scores(shape, q, array) for array in block], -1)
        merged = _merge_two(merged, softmax_partial(shape, seen, block))
        merges = [*merges[-1:], merged.out]
    return unembed(attn, shape, merged.out.astype(q.dtype))


def _key_blocks(arrays: list[StoredKeys], longest: int) -> list[list[StoredKeys]]:
    """Divide keys [keys, kv_width] into blocks of at most `longest` keys."""
    blocks: list[list[StoredKeys]] = []
    room = 0
    for array in arrays:
        start, count = 0, array.shape[0]
        while start < count:
            if not room:
                blocks.append([])
                room = longest
            end = min(count, start + room)
            blocks[-1].append(array if end - start == count else array[start:end])
            room -= end - start
            start = end
    return blocks


def _attend_expanded(
    attn: Any, shape: MLAShape, layer: int, queries: Queries, kv: StoredKeys, spans: list[KVSpan]
) -> mx.array:
    """Attend in the expanded form, for groups of heads one after another.

    Keys and values of a group take `MLAShape.expanded_bytes` at any context, and each group sees
    all keys, so that MLX's attention applies and there is nothing to merge.
    """
    parts: list[StoredKeys] = [*(keys for span in spans for keys in span.keys(layer)), kv]
    rows, total = kv.shape[0], sum(part.shape[0] for part in parts)
    q = mx.concatenate([queries.nope, queries.rope], axis=-1)
    q = q.swapaxes(0, 1)[None]  # [1, heads, rows, nope + rope]
    group_bytes = total * shape.expanded_width * q.dtype.size
    groups = -(-shape.heads * group_bytes // shape.expanded_bytes)
    outs: list[mx.array] = []
    for start, end in _equal_ranges(shape.heads, groups):
        if outs:
            mx.eval(outs[-1])
        k, v = _expand(attn, shape, parts, start, end, q.dtype)
        outs.append(_attend_causal(shape, q[:, start:end], k[None], v[None]))
    out = concat(outs, 1)  # [1, heads, rows, value]
    return out[0].swapaxes(0, 1).reshape(rows, shape.heads * shape.value)


def _expand(
    attn: Any, shape: MLAShape, parts: list[StoredKeys], start: int, end: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Compute keys and values of heads `start` to `end`.

    Args:
        parts: cache vectors, each [keys, kv_width].

    Returns:
        [heads, all keys, nope + rope]; [heads, all keys, value].
    """
    total = sum(part.shape[0] for part in parts)
    k = mx.zeros((end - start, total, shape.nope + shape.rope), dtype)
    v = mx.zeros((end - start, total, shape.value), dtype)
    at = 0
    blocks = [block for part in parts for (block,) in _key_blocks([part], KEY_BLOCK)]
    for number, block in enumerate(blocks):
        if shape.kv_bits < 16 and number % BLOCKS_AHEAD == 0:
            mx.eval(k, v)
        part = dequantize(block)
        # In place: a concatenation would hold everything twice.
        till = at + part.shape[0]
        latent = part[None, :, : shape.latent]
        if shape.slices_copied:
            latent = mx.contiguous(latent)  # Once, not for each head.
        k[:, at:till, : shape.nope] = _per_head(attn.embed_q, latent, start, end, transpose=False)
        k[:, at:till, shape.nope :] = part[:, shape.latent :]
        v[:, at:till] = _per_head(attn.unembed_out, latent, start, end, transpose=True)
        at = till
    return k, v


def _per_head(module: Any, x: mx.array, start: int, end: int, *, transpose: bool) -> mx.array:
    """Apply heads `start` to `end` of mlx-lm's `MultiLinear`, quantised or not."""
    weight = module.weight[start:end]
    if "scales" not in module:
        product: mx.array = x @ (weight.swapaxes(-1, -2) if transpose else weight)
        return product
    biases = module.get("biases")
    return mx.quantized_matmul(
        x,
        weight,
        scales=module.scales[start:end],
        biases=None if biases is None else biases[start:end],
        transpose=transpose,
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
    )


def _attend_causal(shape: MLAShape, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attend from the last rows of a sequence to all of it: [1, heads, rows, value].

    Where scores are stored, the queries are tiled.

    Args:
        q, k, v: [1, heads, rows or keys, width].
    """
    heads, rows, total = q.shape[1], q.shape[2], k.shape[2]
    tiles = 1
    if not shape.fused or rows < FUSED_ROWS:
        tiles = -(-rows * heads * total * q.dtype.size // shape.score_bytes)
    outs: list[mx.array] = []
    for start, end in _equal_ranges(rows, tiles):
        seen = total - rows + end
        if outs:
            _start(outs)
        outs.append(
            mx.fast.scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], scale=1.0, mask="causal"
            )
        )
    return concat(outs, 2)


def _start(blocks: list[mx.array]) -> None:
    """Start computing the last of `blocks`, and wait for the one before.

    So two are in memory, and the device need not wait for the next.
    """
    mx.async_eval(blocks[-1])
    if len(blocks) > 1:
        mx.eval(blocks[-2])


def _equal_ranges(count: int, parts: int) -> list[tuple[int, int]]:
    """Divide `count` into nearly equal ranges, none above max(1, count / parts)."""
    size = max(1, count // parts)
    size = -(-count // -(-count // size))
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _merge_two(a: Partial, b: Partial) -> Partial:
    """Attention to the keys of both, `out` in float32.

    No row may be without keys in both.
    """
    lse = mx.logaddexp(a.lse, b.lse)
    out = a.out * mx.exp(a.lse - lse)[..., None] + b.out * mx.exp(b.lse - lse)[..., None]
    return Partial(out, lse)
