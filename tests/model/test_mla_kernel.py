"""The kernels of MLA decode against softmax attention in float64.

On a Mac they run on the GPU; elsewhere a shim compiles the same source for the CPU.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from metal_shim import run_kernels_here
from mlx.nn.layers.positional_encoding import RoPE

from glmd.engine.attention_metadata import AttentionMetadataBuilder, sort_by_prefix
from glmd.kv_cache.node import Node, PathNode
from glmd.kv_cache.prefix_tree import PrefixTree
from glmd.kv_cache.segment import Segment
from glmd.kv_cache.stored_keys import KVBits, StoredKeys, dequantize, store
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.attention import attend_group
from glmd.model.batch import KVSpan, SegmentSlice
from glmd.model.mla import MLAShape
from glmd.model.mla_kernel import BUFFERS, LAUNCHES, plan_items, prepare_rows, supports

SMALL = MLAShape(heads=3, latent=64, nope=8, rope=8, value=6, kernel=True)
WIDE = MLAShape(heads=5, latent=128, nope=8, rope=32, value=6, kernel=True)
PUBLISHED = MLAShape(heads=20, latent=512, nope=192, rope=64, value=256, kernel=True)

Floats = npt.NDArray[np.float64]
Path = list[PathNode[Segment]]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    run_kernels_here(monkeypatch)


def _float64(array: mx.array) -> Floats:
    return np.array(array.astype(mx.float32)).astype(np.float64)


class _Group:
    """A decode group over random paths of a random tree."""

    def __init__(
        self,
        shape: MLAShape,
        dtype: mx.Dtype,
        seed: int,
        *,
        sequences: int,
        width: int,
        pieces: int,
        longest: int,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape, self.dtype = shape, dtype
        found: list[Path] = [[]]
        for _ in range(pieces):
            length = int(self.rng.integers(1, longest + 1))
            segment = Segment([self._stored(length)])
            node: Node[Segment] = Node(np.zeros(length, np.int32), segment, None, 0)
            # Mostly behind the last one: long paths.
            chosen = len(found) - 1 if self.rng.random() < 0.8 else self.rng.integers(len(found))
            before = list(found[chosen])
            if before:
                last = before[-1].node
                before[-1] = PathNode(last, int(self.rng.integers(1, len(last) + 1)))
            found.append([*before, PathNode(node, length)])
        paths = [list(found[self.rng.integers(len(found))]) for _ in range(sequences)]
        paths[0] = found[-1]
        row: Any = SimpleNamespace(slot=0)
        paths = [paths[i] for i in sort_by_prefix([row] * sequences, paths)]
        self.tails = TailPool(1, shape.kv_width, dtype, shape.kv_bits)
        slots = self.rng.permutation([self.tails.allocate() for _ in paths])
        filled = self.rng.integers(0, 40, sequences)
        self.tails.reserve(int(filled.max()) + width)
        at = np.indices((self.tails.slots, self.tails.capacity)).reshape(2, -1)
        content = self._random(at.shape[1], shape.kv_width)
        # What no row sees holds anything, from sequences before.
        seen = np.zeros((self.tails.slots, self.tails.capacity), bool)
        for slot, length in zip(slots, filled, strict=True):
            seen[slot, : length + width] = True
        content = mx.where(mx.array(seen.reshape(-1, 1)), content, mx.nan).astype(dtype)
        self.tails.write(0, mx.array(at[0]), mx.array(at[1]), store(content, shape.kv_bits))
        rows, scale = sequences * width, 3 / shape.kv_width**0.5
        self.q = (self._random(shape.heads, rows, shape.latent) * scale).astype(dtype)
        self.q_rope = (self._random(rows, shape.heads, shape.rope) * scale).astype(dtype)
        builder = AttentionMetadataBuilder(PrefixTree[Segment](1), self.tails, shape, dtype)
        order = list(range(sequences))
        metadata = builder.layout(order, paths, slots.tolist(), [7] * sequences, width)
        positions = 7 + filled[:, None] + np.arange(width)
        self.group = builder.decode_group(metadata, 0, mx.array(positions.astype(np.int32)))
        pool = _float64(dequantize(self.tails.view(0), mx.float32))
        self.keys = [
            np.concatenate([*_sealed(path), pool[slot, : length + row + 1]])
            for path, slot, length in zip(paths, slots, filled, strict=True)
            for row in range(width)
        ]

    def _random(self, *dims: int) -> mx.array:
        return mx.array(self.rng.normal(0, 1, dims).astype(np.float32)).astype(self.dtype)

    def _stored(self, count: int) -> StoredKeys:
        return store(self._random(count, self.shape.kv_width), self.shape.kv_bits)

    def error(self) -> float:
        """The largest error, as a share of the largest value."""
        found = attend_group(self.shape, 0, self.q, self.q_rope, self.group, self.tails)
        out = _float64(found)
        expected = []
        queries = mx.concatenate([self.q.swapaxes(0, 1), self.q_rope], axis=-1)
        for q, keys in zip(_float64(queries), self.keys, strict=True):
            scores = q @ keys.T
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            expected.append(weights @ keys[:, : self.shape.latent])
        return float(np.abs(out - expected).max() / np.abs(expected).max())


def _sealed(path: Path) -> list[Floats]:
    return [
        _float64(dequantize(part.node.kv.layers[0], mx.float32))[: part.length]
        for part in path
        if part.node.kv
    ]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(1, 4),
    st.one_of(st.integers(0, 6), st.integers(0, 60)),
    st.sampled_from([1, 16, 33, 200]),
)
def test_any_number_of_rows_and_pieces_equals_softmax_attention(
    seed: int, sequences: int, width: int, pieces: int, longest: int
) -> None:
    case = _Group(
        SMALL, mx.float32, seed, sequences=sequences, width=width, pieces=pieces, longest=longest
    )
    assert case.group.plan is not None
    assert case.error() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "width"), [(mx.bfloat16, 1), (mx.bfloat16, 2), (mx.float16, 1), (mx.float32, 1)]
)
def test_the_published_shape_stays_within_roundings_of_its_dtype(
    dtype: mx.Dtype, width: int
) -> None:
    case = _Group(PUBLISHED, dtype, 1, sequences=2, width=width, pieces=3, longest=60)
    tolerance = {mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11, mx.float32: 1e-5}[dtype]
    assert case.error() < tolerance


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 4]), st.integers(1, 5), st.integers(0, 30))
def test_quantised_keys_are_read_as_they_are_stored(
    seed: int, bits: KVBits, sequences: int, pieces: int
) -> None:
    shape = replace(SMALL, rope=32, kv_bits=bits)
    case = _Group(shape, mx.float32, seed, sequences=sequences, width=1, pieces=pieces, longest=70)
    assert case.error() < 1e-5


@pytest.mark.parametrize("bits", [8, 4])
def test_the_published_shape_reads_quantised_keys(bits: KVBits) -> None:
    shape = replace(PUBLISHED, kv_bits=bits)
    case = _Group(shape, mx.bfloat16, 1, sequences=2, width=1, pieces=3, longest=60)
    assert case.error() < 2.0**-7


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype"), [(SMALL, mx.float32), (PUBLISHED, mx.bfloat16), (PUBLISHED, mx.float16)]
)
def test_rows_are_normalised_and_rotated(shape: MLAShape, dtype: mx.Dtype, paired: bool) -> None:
    rng = np.random.default_rng(5)
    positions = np.array([0, 1, 77, 3000])
    rows, base, eps = len(positions), 1e6, 1e-6

    def random(*dims: int) -> mx.array:
        return mx.array(rng.normal(0, 1, dims).astype(np.float32)).astype(dtype)

    q = random(rows, shape.heads, shape.nope + shape.rope)
    compressed, weight = random(rows, shape.kv_width), random(shape.latent)
    rope = RoPE(shape.rope, traditional=paired, base=base)
    found = prepare_rows(shape, rope, q, compressed, weight, eps, mx.array(positions, mx.int32))

    latent, key = np.split(_float64(compressed), [shape.latent], axis=-1)
    latent *= _float64(weight) / np.sqrt((latent**2).mean(axis=-1, keepdims=True) + eps)
    heads = np.concatenate([_float64(q)[..., shape.nope :], key[:, None]], axis=1)
    half = shape.rope // 2
    angle = positions[:, None, None] * base ** (-np.arange(half) / half)
    first, second = (
        (slice(0, None, 2), slice(1, None, 2)) if paired else (slice(0, half), slice(half, None))
    )
    turned = (heads[..., first] + 1j * heads[..., second]) * np.exp(1j * angle)
    rotated = np.empty_like(heads)
    rotated[..., first], rotated[..., second] = turned.real, turned.imag
    expected = rotated[:, :-1], np.concatenate([latent, rotated[:, -1]], axis=-1)
    tolerance = {mx.bfloat16: 2.0**-7, mx.float16: 2.0**-9, mx.float32: 3e-4}[dtype]
    for got, want in zip(found, expected, strict=True):
        assert np.abs(_float64(got) - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("order", [1, -1])
def test_several_simdgroups_agree_in_any_order(monkeypatch: pytest.MonkeyPatch, order: int) -> None:
    run_kernels_here(monkeypatch, order=order)
    case = _Group(WIDE, mx.float32, 2, sequences=5, width=3, pieces=9, longest=120)
    assert case.error() < 1e-5


def test_large_scores_do_not_overflow() -> None:
    case = _Group(SMALL, mx.float32, 3, sequences=3, width=2, pieces=4, longest=40)
    for scale in (300.0, -300.0):
        case.q, case.q_rope = case.q * scale, case.q_rope * scale
        assert case.error() < 1e-3


def test_more_segments_than_buffers_are_left_to_the_reference() -> None:
    most = BUFFERS[16][-1] * LAUNCHES[-1]
    keys = mx.zeros((1, SMALL.kv_width))
    spans = [KVSpan((SegmentSlice(Segment([keys]), 0, 1),), 0, 1) for _ in range(most + 1)]
    assert plan_items(SMALL, spans[:most], [0], 1) is not None
    assert plan_items(SMALL, spans, [0], 1) is None


@pytest.mark.parametrize("change", [{"latent": 96}, {"rope": 32}, {"latent": 1024}, {"heads": 64}])
def test_shapes_that_do_not_divide_are_not_supported(change: dict[str, Any]) -> None:
    assert supports(PUBLISHED)
    assert not supports(replace(PUBLISHED, **change))
