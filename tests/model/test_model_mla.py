"""Both forms of MLA, over keys in any number of places, against softmax attention in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from mlx_lm.models.mla import MultiLinear

from glmd.engine.attention_metadata import (
    MAX_FUSED_SCORES,
    build_levels,
    pad_short_spans,
    slot_order,
    sort_by_prefix,
    split_fused_levels,
)
from glmd.kv_cache.node import Node, PathNode
from glmd.kv_cache.segment import Segment
from glmd.kv_cache.stored_keys import KVBits, StoredKeys, arrays_of, dequantize, map_arrays, store
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.attention import attend
from glmd.model.batch import DecodeGroup, ForwardBatch, KVSpan, PrefillChunk, SegmentSlice
from glmd.model.mla import MLAShape, Queries, softmax_partial

SHAPE = MLAShape(heads=3, latent=24, nope=8, rope=8, value=6)
PUBLISHED = MLAShape(heads=20, latent=512, nope=192, rope=64, value=256)

Floats = npt.NDArray[np.float64]
Path = list[PathNode[Segment]]


TOLERANCE = 5e-5
"""Largest difference of float32 attention from float64: seeds differ, the worst seen is 2.6e-5."""


def _attention(rng: np.random.Generator, dtype: mx.Dtype) -> Any:
    """The two projections of mlx-lm's attention module that `attend` uses."""
    embed_q = MultiLinear(SHAPE.nope, SHAPE.latent, SHAPE.heads)
    unembed_out = MultiLinear(SHAPE.latent, SHAPE.value, SHAPE.heads)
    for module in (embed_q, unembed_out):
        values = rng.normal(0, 0.4, module.weight.shape).astype(np.float32)
        module.weight = mx.array(values).astype(dtype)
    return SimpleNamespace(embed_q=embed_q, unembed_out=unembed_out)


def _float64(array: mx.array) -> Floats:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def _reference(attn: Any, q: Floats, keys: Floats) -> Floats:
    """One row's attention over `keys` [n, kv_width], head by head: [heads * value]."""
    up_k, up_v = _float64(attn.embed_q.weight), _float64(attn.unembed_out.weight)
    latent, rotated = keys[:, : SHAPE.latent], keys[:, SHAPE.latent :]
    heads = []
    for head in range(SHAPE.heads):
        k = np.concatenate([latent @ up_k[head], rotated], axis=1)
        scores = k @ q[head]
        weights = np.exp(scores - scores.max())
        heads.append(weights / weights.sum() @ (latent @ up_v[head].T))
    return np.concatenate(heads)


@dataclass
class Case:
    """A step: arguments of `attend`, and the keys that each row must see."""

    batch: ForwardBatch
    tails: TailPool
    q: mx.array
    kv: StoredKeys
    keys: list[Floats]


class _Steps:
    """Random steps over a random tree."""

    def __init__(self, seed: int, dtype: mx.Dtype, kv_bits: KVBits = 16) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.kv_bits = kv_bits
        self.paths: list[Path] = [[]]
        for _ in range(self.rng.integers(1, 6)):
            length = int(self.rng.integers(1, 40))
            segment = Segment([store(self._random(length), self.kv_bits)])
            node: Node[Segment] = Node(np.zeros(length, np.int32), segment, None, 0)
            before = list(self.paths[self.rng.integers(len(self.paths))])
            if before:
                last = before[-1].node
                before[-1] = PathNode(last, int(self.rng.integers(1, len(last) + 1)))
            self.paths.append([*before, PathNode(node, length)])

    def _random(self, *rows: int) -> mx.array:
        values = self.rng.normal(0, 1, (*rows, SHAPE.kv_width)).astype(np.float32)
        return mx.array(values).astype(self.dtype)

    def path(self) -> Path:
        path = list(self.paths[self.rng.integers(len(self.paths))])
        if path:
            last = path[-1].node
            path[-1] = PathNode(last, int(self.rng.integers(1, len(last) + 1)))
        return path

    def step(self, widths: list[int], chunks: list[tuple[int, bool]]) -> Case:
        """Decode groups of the given widths and chunks of (rows, expanded)."""
        tails = TailPool(1, SHAPE.kv_width, self.dtype, self.kv_bits)
        members = [[self.path() for _ in range(self.rng.integers(1, 6))] for _ in widths]
        row: Any = SimpleNamespace(slot=0)
        members = [
            [group[i] for i in sort_by_prefix([row] * len(group), group)] for group in members
        ]
        slots = np.array([tails.allocate() for group in members for _ in group], np.int64)
        if self.rng.random() < 0.7:
            slots = self.rng.permutation(slots)
        filled = self.rng.integers(0, 30, len(slots))
        tails.reserve(int(filled.max(initial=0)) + max(widths, default=0))
        content = self._random(tails.slots, tails.capacity)
        if tails.slots:
            stored = store(content, self.kv_bits)
            content = dequantize(stored)
            at = np.indices((tails.slots, tails.capacity)).reshape(2, -1)
            flat = map_arrays(lambda array: array.reshape(-1, array.shape[-1]), stored)
            tails.write(0, mx.array(at[0]), mx.array(at[1]), flat)
        count = sum(w * len(g) for w, g in zip(widths, members, strict=True))
        count += sum(rows for rows, _ in chunks)
        new = store(self._random(count), self.kv_bits)
        kv = dequantize(new)
        q = self.rng.normal(0, 0.6, (count, SHAPE.heads, SHAPE.nope + SHAPE.rope))
        keys: list[Floats] = []
        groups: list[DecodeGroup] = []
        for width, group in zip(widths, members, strict=True):
            own, slots = slots[: len(group)], slots[len(group) :]
            lengths, filled = filled[: len(group)], filled[len(group) :]
            groups.append(self._group(tails, group, width, own, lengths, len(keys)))
            for path, slot, length in zip(group, own, lengths, strict=True):
                tail = content[int(slot), : int(length)]
                first = len(keys)
                for row in range(width):
                    keys.append(_together([*_sealed(path), tail, kv[first : first + row + 1]]))
        prefills: list[PrefillChunk] = []
        for rows, expanded in chunks:
            first, path = len(keys), self.path()
            spans = [span for level in build_levels([path], rows) for span in level]
            wanted = int(self.rng.integers(0, rows + 1))
            prefills.append(PrefillChunk(first, first + rows, spans, expanded, wanted))
            for row in range(rows):
                keys.append(_together([*_sealed(path), kv[first : first + row + 1]]))
        empty = mx.zeros(count, mx.int32)
        batch = ForwardBatch(empty, empty, groups, prefills)
        return Case(batch, tails, mx.array(q.astype(np.float32)).astype(self.dtype), new, keys)

    @staticmethod
    def _group(
        tails: TailPool,
        paths: list[Path],
        width: int,
        slots: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        first: int,
    ) -> DecodeGroup:
        positions = lengths[:, None] + np.arange(width)
        mask = np.where(np.arange(tails.capacity) <= positions[..., None], 0.0, -np.inf)
        order = slot_order(slots.tolist(), tails.slots)
        if order is not None:
            mask = mask[np.array(order.sequences)]
        rows = len(paths) * width
        # At times as if there were so many heads that nothing fits one softmax with the tails.
        heads = SHAPE.heads if len(paths) % 2 else MAX_FUSED_SCORES
        found = [
            pad_short_spans(level, width, rows, SHAPE.kv_width, mx.float32)
            for level in build_levels(paths, width)
        ]
        closest, others = split_fused_levels(found, tails.capacity, heads)
        return DecodeGroup(
            start=first,
            sequences=len(paths),
            width=width,
            fused_levels=closest,
            levels=others,
            slots=mx.array(np.repeat(slots, width).astype(np.int32)),
            tail_positions=mx.array(positions.flatten().astype(np.int32)),
            order=order,
            tail_mask=mx.array(
                np.repeat(mask, SHAPE.heads if width > 1 else 1, axis=1),
                arrays_of(tails.view(0))[-1].dtype,
            ),
        )


def _sealed(path: Path) -> list[mx.array]:
    kept = [(piece.node.kv, piece.length) for piece in path]
    return [dequantize(kv.layers[0][:length]) for kv, length in kept if kv is not None]


def _together(parts: list[mx.array]) -> Floats:
    return np.concatenate([_float64(part) for part in parts])


def _queries(q: mx.array) -> Queries:
    return Queries(*mx.split(q, [SHAPE.nope], axis=-1))


def _worst(
    seed: int,
    dtype: mx.Dtype,
    widths: list[int],
    chunks: list[tuple[int, bool]],
    limits: tuple[int, int] = (SHAPE.score_bytes, SHAPE.expanded_bytes),
    kv_bits: KVBits = 16,
) -> float:
    """The largest deviation from the reference over all rows of a random step."""
    steps = _Steps(seed, dtype, kv_bits)
    attn = _attention(steps.rng, dtype)
    case = steps.step(widths, chunks)
    score_bytes, expanded_bytes = limits
    shape = replace(
        SHAPE,
        slices_copied=seed % 2 == 0,
        score_bytes=score_bytes,
        expanded_bytes=expanded_bytes,
        kv_bits=kv_bits,
    )
    out = _float64(attend(attn, shape, 0, _queries(case.q), case.kv, case.batch, case.tails))
    q = _float64(case.q)
    expected = np.array([_reference(attn, q[row], keys) for row, keys in enumerate(case.keys)])
    worst = float(np.abs(out - expected).max())
    wanted = case.batch.logits_rows
    if wanted:
        queries = _queries(case.q[mx.array(wanted)])
        out = _float64(attend(attn, shape, 0, queries, case.kv, case.batch, case.tails))
        worst = max(worst, float(np.abs(out - expected[wanted]).max()))
    return worst


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 4), max_size=2),
    st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=3),
)
def test_every_form_equals_softmax_attention(
    seed: int, widths: list[int], chunks: list[tuple[int, bool]]
) -> None:
    if widths or chunks:
        assert _worst(seed, mx.float32, widths, chunks) < TOLERANCE


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([8, 4]),
    st.lists(st.integers(1, 4), max_size=2),
    st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=3),
    st.integers(1, 30_000),
)
def test_quantised_keys_are_read_as_they_are_stored(
    seed: int,
    kv_bits: KVBits,
    widths: list[int],
    chunks: list[tuple[int, bool]],
    limit: int,
) -> None:
    """The reference attends to the values that the stored form stands for."""
    assert _worst(seed, mx.float32, widths, chunks, (limit, limit), kv_bits) < TOLERANCE


@pytest.mark.parametrize("count", [1023, 1024, 1500])
def test_many_quantised_keys_are_summed_in_blocks(count: int) -> None:
    rng = np.random.default_rng(count)
    stored = store(mx.array(rng.normal(0, 1, (count, 32)).astype(np.float32)), 8)
    scores = mx.array(rng.normal(0, 1, (5, 3, count)).astype(np.float32))
    for copied in (False, True):
        shape = replace(SHAPE, slices_copied=copied, kv_bits=8)
        out = softmax_partial(shape, scores, [stored]).out
        expected = mx.softmax(scores, axis=-1) @ dequantize(stored)[:, : SHAPE.latent]
        np.testing.assert_allclose(np.array(out), np.array(expected), atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_bfloat16_stays_within_its_rounding(seed: int) -> None:
    assert _worst(seed, mx.bfloat16, [1, 3], [(20, False), (20, True)]) < 0.2


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 100),
    st.booleans(),
    st.integers(1, 30_000),
    st.integers(1, 30_000),
)
def test_blocks_of_keys_heads_and_queries_change_nothing(
    seed: int, rows: int, expanded: bool, score_bytes: int, expanded_bytes: int
) -> None:
    limits = score_bytes, expanded_bytes
    assert _worst(seed, mx.float32, [], [(rows, expanded)], limits) < TOLERANCE


def test_large_scores_do_not_overflow() -> None:
    steps = _Steps(0, mx.float32)
    attn = _attention(steps.rng, mx.float32)
    case = steps.step([2], [(9, False), (9, True)])
    for scale in (300.0, -300.0):
        q = case.q * scale
        out = _float64(attend(attn, SHAPE, 0, _queries(q), case.kv, case.batch, case.tails))
        expected = [_reference(attn, _float64(q)[row], keys) for row, keys in enumerate(case.keys)]
        np.testing.assert_allclose(out, expected, atol=1e-3)


# -- which form -------------------------------------------------------------------------------


def test_forms_break_even_at_398_rows_in_the_published_model() -> None:
    assert PUBLISHED.break_even_rows == 398
    assert PUBLISHED.kv_width == 576


# -- transients -------------------------------------------------------------------------------

LONG = MLAShape(
    heads=20,
    latent=32,
    nope=12,
    rope=4,
    value=16,
    score_bytes=256 << 10,
    expanded_bytes=3 << 20,
    slices_copied=mx.default_device().type == mx.DeviceType.cpu,
)
"""Limits of which 1,024 tokens need nearly all, and one head of 16,384 tokens."""


def _peak(context: int, rows: int, *, expanded: bool) -> int:
    """Bytes of transients of a chunk behind `context` tokens in segments of 1,024."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (1024, LONG.kv_width)).astype(np.float32)
    spans = [
        KVSpan((SegmentSlice(Segment([mx.array(values)]), 0, 1024),), 0, rows)
        for _ in range(context // 1024)
    ]
    embed_q = MultiLinear(LONG.nope, LONG.latent, LONG.heads)
    unembed_out = MultiLinear(LONG.latent, LONG.value, LONG.heads)
    attn = SimpleNamespace(embed_q=embed_q, unembed_out=unembed_out)
    queries = Queries(
        mx.zeros((rows, LONG.heads, LONG.nope)), mx.zeros((rows, LONG.heads, LONG.rope))
    )
    kv = mx.array(values[:rows])
    empty = mx.zeros(rows, mx.int32)
    chunk = PrefillChunk(0, rows, spans, expanded, rows)
    batch = ForwardBatch(empty, empty, [], [chunk])
    mx.eval(embed_q.weight, unembed_out.weight, queries.nope, queries.rope, kv, empty)
    mx.eval([piece.segment.layers for span in spans for piece in span.slices])
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(attend(attn, LONG, 0, queries, kv, batch, TailPool(1, LONG.kv_width, mx.float32)))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize(("rows", "expanded"), [(32, False), (64, True)])
def test_transients_do_not_grow_with_the_context(rows: int, expanded: bool) -> None:
    short, long = (_peak(context, rows, expanded=expanded) for context in (1024, 16_384))
    assert long <= 1.5 * short
    # Outputs of the blocks in flight come on top.
    assert long <= 10 * LONG.score_bytes + (2 * LONG.expanded_bytes if expanded else 0)
