"""Scales and biases by least squares, in the format of `mx.quantize`."""

from __future__ import annotations

import mlx.core as mx
import pytest

from glmd.checkpoint.config import QuantizedAs
from glmd.convert.refine import dequantize, pack, quantize

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])


@BITS
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_codes_are_packed_as_by_mlx(bits: int, group_size: int) -> None:
    w = mx.random.normal((6, 256), key=mx.random.key(1))
    packed, scales, biases = mx.quantize(w, group_size=group_size, bits=bits)
    codes = mx.dequantize(
        packed, mx.ones_like(scales), mx.zeros_like(biases), group_size=group_size, bits=bits
    )
    assert mx.array_equal(pack(codes, bits), packed)


@BITS
def test_no_group_has_a_larger_weighted_error_than_by_mlx(bits: int) -> None:
    how = QuantizedAs(bits=bits, group_size=64)  # type: ignore[arg-type]
    keys = mx.random.split(mx.random.key(2), 2)
    w = mx.random.normal((2, 24, 128), key=keys[0]).astype(mx.bfloat16)
    importance = mx.exp(mx.random.normal((2, 128), key=keys[1]))

    def errors(parts: tuple[mx.array, ...]) -> mx.array:
        square = mx.square(dequantize(parts, how) - w.astype(mx.float32))
        return (square * importance[:, None]).reshape(2, 24, 2, 64).sum(-1)

    plain, refined = errors(quantize(w, how)), errors(quantize(w, how, importance))
    assert (refined <= plain * 1.01 + 1e-9).all()
    assert (refined.sum() < 0.9 * plain.sum()).item()


def test_constant_rows_and_unused_inputs_stay_finite() -> None:
    how = QuantizedAs(bits=4, group_size=32)
    w = mx.concatenate([mx.zeros((2, 64)), mx.full((2, 64), 0.5)]).astype(mx.bfloat16)
    out = dequantize(quantize(w, how, mx.zeros((64,))), how)
    assert mx.allclose(out, w.astype(mx.float32), atol=1e-3)


def test_two_experts_get_scales_of_their_own_importance() -> None:
    how = QuantizedAs(bits=3, group_size=32)
    w = mx.random.normal((1, 8, 64), key=mx.random.key(3))
    stack = mx.concatenate([w, w]).astype(mx.bfloat16)
    importance = mx.stack([mx.ones(64), mx.where(mx.arange(64) % 2 == 0, 1.0, 1e-3)])
    first, second = dequantize(quantize(stack, how, importance), how)
    exact = stack[0].astype(mx.float32)
    even = mx.arange(0, 64, 2)
    assert mx.square(second - exact)[:, even].sum() < 0.8 * mx.square(first - exact)[:, even].sum()
