"""Quantisation with scales and biases fitted by importance-weighted least squares.

`mx.quantize` spans each group's range from its least to its largest weight. The error of a layer's
output is Σ importance · (w − ŵ)², with the mean square of each input as importance, and is smaller
for a somewhat narrower range whose scale and bias are then the least-squares fit to the rounded
weights. The format is that of `mx.quantize`, so every reader of it takes the result.
"""

from __future__ import annotations

import mlx.core as mx

from glmd.checkpoint.config import QuantizedAs

SHRINK = (1.0, 0.96, 0.92, 0.88, 0.84, 0.78, 0.7)
"""Factors on a group's range to start from."""

ROUNDS = 3
"""Alternations of rounding and fitting."""

CHUNK = 4 << 20
"""Weights fitted together; the fit needs about forty bytes for each."""


def quantize(
    array: mx.array, how: QuantizedAs, importance: mx.array | None = None
) -> tuple[mx.array, ...]:
    """Quantise a matrix or a stack of matrices.

    Args:
        array: [..., rows, columns].
        importance: mean square of each input, [columns] or [stack, columns]. None: `mx.quantize`.

    Returns:
        weight, scales and, in affine mode, biases, as of `mx.quantize`.
    """
    if importance is None or how.mode != "affine":
        parts = mx.quantize(array, group_size=how.group_size, bits=how.bits, mode=how.mode)
        return tuple(parts)
    stack = array.reshape(-1, *array.shape[-2:])
    weights = mx.broadcast_to(importance[..., None, :], (stack.shape[0], 1, stack.shape[-1]))
    rows = max(1, CHUNK // stack.shape[-1])
    pieces = []
    for matrix, weight in zip(stack, weights, strict=True):
        for start in range(0, matrix.shape[0], rows):
            piece = _refine(matrix[start : start + rows], how, weight)
            mx.eval(piece)
            pieces.append(piece)
    joined = (mx.concatenate([piece[i] for piece in pieces]) for i in range(3))
    return tuple(part.reshape(*array.shape[:-1], -1) for part in joined)


def dequantize(parts: tuple[mx.array, ...], how: QuantizedAs) -> mx.array:
    """Weights as a matrix product uses them, in float32."""
    weight, scales, *rest = parts
    biases = None
    if how.mode == "affine":
        scales, biases = scales.astype(mx.float32), rest[0].astype(mx.float32)
    out = mx.dequantize(
        weight, scales, biases, group_size=how.group_size, bits=how.bits, mode=how.mode
    )
    return out.astype(mx.float32)


def _refine(
    matrix: mx.array, how: QuantizedAs, importance: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Fit one matrix, [rows, columns]; `importance` is [1, columns]."""
    shape = (matrix.shape[0], -1, how.group_size)
    w = matrix.astype(mx.float32).reshape(shape)
    # A floor, so that inputs that the calibration did not see keep some weight.
    floor = 1e-3 * importance.mean() + 1e-12
    weight = (importance.astype(mx.float32) + floor).reshape(1, -1, how.group_size)
    top = 2**how.bits - 1
    packed, scales, biases = mx.quantize(matrix, group_size=how.group_size, bits=how.bits)
    codes = mx.dequantize(
        packed, mx.ones_like(scales, mx.float32), mx.zeros_like(biases, mx.float32),
        group_size=how.group_size, bits=how.bits,
    ).reshape(shape)  # fmt: skip
    best = [codes, scales[..., None], biases[..., None]]
    error = _error(w, weight, *best)
    middle = (w.max(-1, keepdims=True) + w.min(-1, keepdims=True)) / 2
    half = (w.max(-1, keepdims=True) - w.min(-1, keepdims=True)) / 2
    for factor in SHRINK:
        scale = mx.maximum(2 * half * factor / top, 1e-12)
        bias = middle - half * factor
        for _ in range(ROUNDS):
            codes = mx.clip(mx.round((w - bias) / scale), 0, top)
            scale, bias = _fit(w, weight, codes, scale, bias)
        stored = scale.astype(scales.dtype), bias.astype(biases.dtype)
        coarse = [part.astype(mx.float32) for part in stored]
        step = mx.where(coarse[0] == 0, 1.0, coarse[0])
        codes = mx.clip(mx.round((w - coarse[1]) / step), 0, top)
        found = _error(w, weight, codes, *stored)
        better = found < error
        error = mx.where(better, found, error)
        best = [mx.where(better, new, old) for new, old in zip((codes, *stored), best, strict=True)]
        mx.eval(error, best)
    codes, scale, bias = best
    return pack(codes.reshape(matrix.shape), how.bits), scale[..., 0], bias[..., 0]


def _error(
    w: mx.array, weight: mx.array, codes: mx.array, scale: mx.array, bias: mx.array
) -> mx.array:
    rounded = codes * scale.astype(mx.float32) + bias.astype(mx.float32)
    return (weight * mx.square(w - rounded)).sum(-1, keepdims=True)


def _fit(
    w: mx.array, weight: mx.array, codes: mx.array, scale: mx.array, bias: mx.array
) -> tuple[mx.array, mx.array]:
    """Least squares of w ≈ scale · codes + bias in each group.

    As before if it has no solution.
    """
    total = weight.sum(-1, keepdims=True)
    mean_code = (weight * codes).sum(-1, keepdims=True) / total
    mean_w = (weight * w).sum(-1, keepdims=True) / total
    centred = codes - mean_code
    variance = (weight * mx.square(centred)).sum(-1, keepdims=True)
    covariance = (weight * centred * (w - mean_w)).sum(-1, keepdims=True)
    solved = (variance > 0) & (covariance > 0)
    fitted = covariance / mx.where(solved, variance, 1.0)
    new = mx.where(solved, fitted, scale)
    return new, mx.where(solved, mean_w - new * mean_code, bias)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes [rows, columns] as `mx.quantize` does, lowest bits first.

    Returns:
        [rows, columns · bits / 32] uint32.
    """
    values = codes.astype(mx.uint32).reshape(codes.shape[0], -1, 32)
    words = [mx.zeros(values.shape[:2], mx.uint32) for _ in range(bits)]
    for index in range(32):
        word, shift = divmod(index * bits, 32)
        value = values[..., index]
        words[word] = words[word] | (value << shift)
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (value >> (32 - shift))
    return mx.stack(words, axis=-1).reshape(codes.shape[0], -1)
