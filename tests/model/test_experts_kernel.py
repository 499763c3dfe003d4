"""The kernels of routed experts against float64 from `mx.dequantize`.

On a Mac they run on the GPU; elsewhere a shim compiles the same source for the CPU.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from metal_shim import run_kernels_here

from glmd.model.experts_kernel import AFFINE_BITS, ROWS, ExpertsShape, FusedExperts, run_experts
from glmd.model.mlx_lm_layers import Glm4MoeLiteMoE, ModelArgs
from glmd.model.moe import MixtureOfExperts, Projection

Floats = npt.NDArray[np.float64]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    run_kernels_here(monkeypatch)


def _float64(array: mx.array) -> Floats:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def _dequantised(projection: Projection) -> Floats:
    """[experts, outputs, inputs]"""
    assert projection.scales is not None
    assert projection.biases is not None
    # In a narrower dtype every weight would be rounded, which the kernels do not do.
    scales, biases = (a.astype(mx.float32) for a in (projection.scales, projection.biases))
    return _float64(mx.dequantize(projection.weight, scales, biases, **projection.quantization))


class _Layer:
    """Random experts and rows."""

    def __init__(
        self,
        seed: int,
        dtype: mx.Dtype,
        rows: int,
        *,
        experts: int = 8,
        top: int = 2,
        hidden: int = 64,
        middle: int = 96,
        gate_up: tuple[int, int] = (5, 32),
        down: tuple[int, int] = (5, 32),
    ) -> None:
        self.rng, self.dtype = np.random.default_rng(seed), dtype
        self.shape = ExpertsShape(experts, top, hidden, middle, 1.8, gate_up, down)
        self.gate_up = self._quantised(2 * middle, hidden, *gate_up)
        self.down = self._quantised(hidden, middle, *down)
        self.bias = mx.array(self.rng.normal(0, 0.3, experts).astype(np.float32))
        self.logits = mx.array(self.rng.normal(0, 2, (rows, experts)).astype(np.float32))
        self.residual, self.x, self.shared = (self._random(rows, hidden) for _ in range(3))

    def _random(self, *dims: int, scale: float = 1.0) -> mx.array:
        return mx.array(self.rng.normal(0, scale, dims).astype(np.float32)).astype(self.dtype)

    def _quantised(self, outputs: int, inputs: int, bits: int, group: int) -> Projection:
        weights = self._random(self.shape.experts, outputs, inputs, scale=inputs**-0.5)
        how: dict[str, Any] = {"bits": bits, "group_size": group, "mode": "affine"}
        return Projection(*mx.quantize(weights, **how), how)

    def run(self) -> mx.array:
        return run_experts(
            self.shape,
            self.gate_up,
            self.down,
            self.bias,
            self.residual,
            self.x,
            self.logits,
            self.shared,
        )

    def error(self) -> float:
        """The largest error, as a share of the largest value."""
        gate_up, down = map(_dequantised, (self.gate_up, self.down))
        x, logits = _float64(self.x), _float64(self.logits)
        scores = 1 / (1 + np.exp(-logits))
        expected = _float64(self.residual) + _float64(self.shared)
        for row, ranks in enumerate(np.argsort(-(scores + _float64(self.bias)), axis=1)):
            chosen = ranks[: self.shape.top]
            for expert in chosen:
                gate, up = np.split(gate_up[expert] @ x[row], 2)
                y = down[expert] @ (gate * np.exp(-np.logaddexp(0, -gate)) * up)
                weight = scores[row, expert] / scores[row, chosen].sum()
                expected[row] += self.shape.scale * weight * y
        return float(np.abs(_float64(self.run()) - expected).max() / np.abs(expected).max())


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 2**32 - 1), st.one_of(st.integers(1, ROWS[-1]), st.sampled_from(ROWS)))
def test_any_number_of_rows_equals_the_dequantised_experts(seed: int, rows: int) -> None:
    assert _Layer(seed, mx.float32, rows).error() < 1e-5


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("first", [0, 3])
def test_weights_of_any_width_are_read_as_they_are_stored(first: int, group: int) -> None:
    """Each group size with each width, for one of the two products."""
    place = first + (32, 64, 128).index(group)
    bits, other = AFFINE_BITS[place], AFFINE_BITS[place - 3]
    sizes = {"hidden": 3 * group, "middle": 2 * group}
    case = _Layer(place, mx.float32, 3, gate_up=(bits, group), down=(other, group), **sizes)
    assert case.error() < 1e-5


def test_the_published_shape_stays_within_roundings_of_its_dtype() -> None:
    sizes = {"experts": 2, "hidden": 2048, "middle": 1536}
    case = _Layer(1, mx.bfloat16, 2, gate_up=(5, 64), down=(5, 64), **sizes)
    assert case.error() < 2.0**-8


def test_float16_stays_within_its_roundings() -> None:
    assert _Layer(1, mx.float16, 5).error() < 2.0**-10


@pytest.mark.parametrize("order", [1, -1])
def test_several_simdgroups_agree_in_any_order(monkeypatch: pytest.MonkeyPatch, order: int) -> None:
    run_kernels_here(monkeypatch, order=order)
    case = _Layer(2, mx.float32, 40, experts=70, top=3)
    assert case.error() < 1e-5


def test_rows_of_one_expert_and_scores_without_a_number_harm_no_other_row() -> None:
    case = _Layer(3, mx.float32, 12)
    case.bias[mx.array([1, 6])] += 9
    assert case.error() < 1e-5
    before = np.array(case.run())
    case.logits[5] = mx.nan
    after = np.array(case.run())
    others = np.arange(12) != 5
    np.testing.assert_array_equal(after[others], before[others])
    assert np.isnan(after[5]).all()


def test_large_values_do_not_overflow() -> None:
    case = _Layer(4, mx.float32, 3)
    case.x, case.logits = case.x * 300, case.logits * 40
    assert case.error() < 1e-5


def _moe(**args: Any) -> Glm4MoeLiteMoE:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
    }
    return Glm4MoeLiteMoE(ModelArgs(**sizes | args))


def _fused(mlp: Glm4MoeLiteMoE, **how: Any) -> FusedExperts | None:
    for name in ("gate_proj", "up_proj", "down_proj"):
        module = mlp.switch_mlp[name]
        mlp.switch_mlp[name] = module.to_quantized(**{"group_size": 64, "bits": 5, **how})
    return FusedExperts.of(MixtureOfExperts(mlp, pad_pairs=False))


def test_layers_that_the_kernels_cannot_compute_are_left_to_mlx() -> None:
    assert _fused(_moe()) is not None
    assert _fused(_moe(), mode="mxfp4", bits=4, group_size=32) is None
    assert _fused(_moe(n_group=4, topk_group=2)) is None
    assert _fused(_moe(norm_topk_prob=False)) is None
    assert _fused(_moe(n_routed_experts=64, num_experts_per_tok=17)) is None
    assert FusedExperts.of(MixtureOfExperts(_moe(), pad_pairs=False)) is None
    mixed = _moe()
    mixed.switch_mlp.up_proj = mixed.switch_mlp.up_proj.to_quantized(64, 8)
    for name in ("gate_proj", "down_proj"):
        mixed.switch_mlp[name] = mixed.switch_mlp[name].to_quantized(64, 5)
    assert FusedExperts.of(MixtureOfExperts(mixed, pad_pairs=False)) is None
