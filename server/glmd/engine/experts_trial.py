"""Trial of the kernels of routed experts on this device, when a model is loaded.

As in `glmd.engine.kernel_trial`, with the model's own weights: what the kernels of
`glmd.model.experts_kernel` compute is compared with float32 on the CPU, once for each form of
weights, and layers are timed with them and with MLX's operations. Which is faster depends on the
number of rows, so each band of numbers is decided by itself.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from glmd.engine.kernel_trial import REPEATS, TOLERANCES, KernelSetting, passes_trial
from glmd.model.experts_kernel import ROWS, FusedExperts, run_experts
from glmd.model.glm4_moe_lite import DecoderBlock
from glmd.model.loader import LoadedModel
from glmd.model.moe import Projection, silu

log = logging.getLogger("glmd.engine")

BANDS = {1: range(1, 2), 2: range(2, 5), 5: range(5, 16), 31: range(16, 32), 63: range(32, 64)}
"""Numbers of rows, by the one that is timed. MLX's operations read each pair's expert below 16
rows, so the kernels gain with rows; from there on MLX computes as many pairs for any number."""

PROVED_EXPERTS = 8
"""Experts that rows choose in the comparison: each takes 38 MB in float32."""

ALL_ROWS = frozenset(range(1, ROWS[-1] + 1))

LAYERS = 8
"""Layers of one measurement, each with its own weights: caches hold the experts of a few rows."""


def find_fused_rows(setting: KernelSetting, model: LoadedModel) -> frozenset[int]:
    """Decide by a trial for which numbers of rows the kernels are used.

    Raises:
        SettingsError: the setting is on, and the kernels do not run here or compute another
            result.
    """
    rows = ALL_ROWS

    def find_problem() -> str | None:
        nonlocal rows
        problem = _find_problem(model)
        if problem is None and setting == "auto":
            rows = _find_gains(model)
            problem = None if rows else "it is slower"
        return problem

    if not passes_trial("Experts kernel", setting, find_problem):
        return frozenset()
    log.info("Experts kernel on: layers=%d rows=%s", len(_fused(model)), _bands(rows))
    return rows


def _bands(rows: frozenset[int]) -> str:
    bands = [band for band in BANDS.values() if rows.issuperset(band)]
    return ",".join(f"{band[0]}-{band[-1]}" for band in bands)


def _fused(model: LoadedModel) -> list[DecoderBlock]:
    """Layers that the kernels are made for."""
    return [block for block in model.all_blocks if block.fused_experts is not None]


def _find_problem(model: LoadedModel) -> str | None:
    blocks = _fused(model)
    if not blocks:
        return "it is not made for these weights"
    layers = {each.shape: each for block in blocks if (each := block.fused_experts)}
    for layer in layers.values():
        for rows in ROWS:
            error = largest_error(layer, model.dtype, rows)
            if not error <= TOLERANCES[model.dtype]:
                return f"its results are wrong by {error:.2g} (rows: {rows})"
    return None


def _find_gains(model: LoadedModel) -> frozenset[int]:
    """The bands in which the kernels are not slower."""
    found: set[int] = set()
    for rows, band in BANDS.items():
        kernel, reference = measure(model, rows)
        log.info(
            "Experts kernel: rows=%d kernel_us=%.0f reference_us=%.0f",
            rows,
            1e6 * kernel,
            1e6 * reference,
        )
        if kernel <= reference:
            found.update(band)
    return frozenset(found)


def largest_error(layer: FusedExperts, dtype: mx.Dtype, rows: int) -> float:
    """The kernels' largest error, as a share of the largest result."""
    shape, rng = layer.shape, np.random.default_rng(0)

    def values(*dims: int) -> mx.array:
        return mx.array(rng.normal(0, 1, dims).astype(np.float32))

    # Residuals would hide errors of the experts.
    inputs = [values(rows, shape.hidden).astype(dtype) for _ in range(3)]
    if rows > 1:
        inputs[0] = inputs[2] = mx.zeros_like(inputs[0])
    residual, x, shared = inputs
    bias, logits = 0.1 * values(shape.experts), values(rows, shape.experts)
    few = rng.permutation(shape.experts)[: max(PROVED_EXPERTS, shape.top)]
    bias[mx.array(few)] += 2  # more than all other scores
    moe = layer.moe
    out = run_experts(shape, moe.gate_up[0], moe.down, bias, residual, x, logits, shared)
    mx.eval(out)
    with mx.stream(mx.cpu):
        exact = [array.astype(mx.float32) for array in inputs]
        expected = _reference(layer, exact[1], logits, bias) + exact[0] + exact[2]
        error = mx.abs(out.astype(mx.float32) - expected).max() / mx.abs(expected).max()
        value: float = error.item()  # type: ignore[assignment]
        return value


def _reference(layer: FusedExperts, x: mx.array, logits: mx.array, bias: mx.array) -> mx.array:
    """The weighted sum of each row's experts, in float32: [rows, hidden]."""
    shape, moe = layer.shape, layer.moe
    scores = mx.sigmoid(logits)
    chosen = mx.argpartition(-(scores + bias), kth=shape.top - 1, axis=-1)[:, : shape.top]
    weights = mx.take_along_axis(scores, chosen, axis=-1)
    weights = shape.scale * weights / weights.sum(axis=-1, keepdims=True)
    found, total = np.array(chosen), mx.zeros((x.shape[0], shape.hidden))
    for expert in np.unique(found).tolist():
        gate, up = mx.split(x @ _dequantized(moe.gate_up[0], expert).T, 2, axis=-1)
        y = (silu(gate) * up) @ _dequantized(moe.down, expert).T
        weight = mx.where(chosen == expert, weights, 0).sum(axis=-1, keepdims=True)
        total = total + weight * y
        mx.eval(total)
    return total


def _dequantized(projection: Projection, expert: int) -> mx.array:
    """An expert's weights in float32: [outputs, inputs]."""
    assert projection.scales is not None
    assert projection.biases is not None
    scales, biases = projection.scales[expert], projection.biases[expert]
    return mx.dequantize(
        projection.weight[expert],
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        **projection.quantization,
    )


def measure(model: LoadedModel, rows: int) -> tuple[float, float]:
    """Seconds of a layer behind its attention with the kernels, and with MLX's operations."""
    fused = _fused(model)
    blocks = fused[:: -(-len(fused) // LAYERS)]
    shape, hidden = model.shape, model.args.hidden_size
    rng = np.random.default_rng(0)
    h, attended = (
        mx.array(rng.normal(0, 1, (rows, width)).astype(np.float32)).astype(model.dtype)
        for width in (hidden, shape.heads * shape.value)
    )
    mx.eval(h, attended)
    seconds: list[list[float]] = [[], []]
    used = model.fused_rows
    try:
        for _ in range(1 + REPEATS):
            for times, chosen in zip(seconds, (ALL_ROWS, frozenset[int]()), strict=True):
                model.use_fused_experts(chosen)
                times.append(_seconds(blocks, h, attended))
    finally:
        model.use_fused_experts(used)
    # The first call compiles.
    kernel, reference = (statistics.median(times[1:]) for times in seconds)
    return kernel, reference


def _seconds(blocks: Sequence[DecoderBlock], h: mx.array, attended: mx.array) -> float:
    start = time.perf_counter()
    for block in blocks:
        h = block.post_attention(h, attended)
    mx.eval(h)
    return (time.perf_counter() - start) / len(blocks)
