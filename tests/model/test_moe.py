"""Experts: equal to mlx-lm's, however pairs are sorted, padded and fused."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten
from mlx_lm.models.glm4_moe_lite import Glm4MoeLiteMLP, Glm4MoeLiteMoE, ModelArgs

from glmd.model.moe import (
    COMPILED_ROWS,
    GROUPED_PAIRS,
    SORTED_ROWS,
    GatedMLP,
    MixtureOfExperts,
    fuse,
)

HIDDEN, EXPERTS, TOP = 64, 16, 4


def _experts(bits: int | None, **args: Any) -> Glm4MoeLiteMoE:
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": 128,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP,
    }
    mx.random.seed(3)
    mlp = Glm4MoeLiteMoE(ModelArgs(**sizes | args))
    mlp.gate.weight = mx.random.normal(mlp.gate.weight.shape) / 8
    mlp.gate.e_score_correction_bias = mx.random.normal((EXPERTS,)) / 4
    if bits is not None:
        quantize(mlp, 64, bits, class_predicate=lambda path, m: hasattr(m, "to_quantized"))
    mx.eval(mlp.parameters())
    return mlp


def _rows(count: int) -> mx.array:
    return mx.random.normal((count, HIDDEN), key=mx.random.key(count))


@pytest.mark.parametrize("pad_pairs", [False, True])
@pytest.mark.parametrize("bits", [None, 5, 8])
def test_any_number_of_rows_gives_what_mlx_lm_gives(bits: int | None, pad_pairs: bool) -> None:
    mlp = _experts(bits)
    ours = MixtureOfExperts(mlp, pad_pairs=pad_pairs)
    grouped = GROUPED_PAIRS * EXPERTS // TOP
    for count in (1, 2, SORTED_ROWS - 1, SORTED_ROWS, grouped + 1, COMPILED_ROWS + 1):
        x = _rows(count)
        np.testing.assert_allclose(np.array(ours(x)), np.array(mlp(x)), atol=2e-5)


@pytest.mark.parametrize(
    "args", [{"norm_topk_prob": False}, {"n_group": 4, "topk_group": 2}], ids=str
)
def test_other_routings_give_what_mlx_lm_gives(args: dict[str, Any]) -> None:
    mlp = _experts(None, **args)
    x = _rows(5)
    ours = MixtureOfExperts(mlp, pad_pairs=False)(x)
    np.testing.assert_allclose(np.array(ours), np.array(mlp(x)), atol=2e-5)


def test_scores_close_to_zero_are_divided_as_others() -> None:
    """The sum of sigmoids that underflow in float32 would be zero."""
    mlp = _experts(None)
    mlp.gate.weight = mlp.gate.weight - 40 * mx.ones((1, HIDDEN))
    x = mx.abs(_rows(3))
    ours = MixtureOfExperts(mlp, pad_pairs=False)
    _, weights = ours._route(x)
    np.testing.assert_allclose(np.array(weights.sum(axis=-1)), 1, rtol=1e-5)


def test_pairs_are_padded_to_the_number_from_which_experts_are_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mlp = _experts(8)
    calls: list[tuple[int, bool, bool]] = []
    multiply = mx.gather_qmm

    def record(*args: Any, sorted_indices: bool, **kwargs: Any) -> mx.array:
        rows, experts = args[4:6]
        ascending = bool((experts[1:] >= experts[:-1]).all())
        # MLX groups only rows in the order of the pairs.
        calls.append((experts.size, sorted_indices and ascending, rows is None))
        result: mx.array = multiply(*args, sorted_indices=sorted_indices, **kwargs)
        return result

    monkeypatch.setattr(mx, "gather_qmm", record)
    least = GROUPED_PAIRS * EXPERTS
    for count in (SORTED_ROWS - 1, SORTED_ROWS, least // TOP + 1):
        MixtureOfExperts(mlp, pad_pairs=True)(_rows(count))
        assert len(calls) == 2, "one for gate and up, one for down"
        pairs = count * TOP
        expected = (pairs, False, False) if count < SORTED_ROWS else (max(pairs, least), True, True)
        assert calls == [expected] * 2
        calls.clear()


@pytest.mark.parametrize("bits", [None, 4])
def test_fused_weights_are_stored_once(bits: int | None) -> None:
    mlp = Glm4MoeLiteMLP(ModelArgs(), 256, 512)
    if bits is not None:
        quantize(mlp, 64, bits)
    mx.eval(mlp.parameters())
    x = mx.random.normal((3, 256), key=mx.random.key(0))
    before = np.array(mlp(x))
    mx.clear_cache()
    active = mx.get_active_memory()
    ours = GatedMLP(mlp)
    assert mx.get_active_memory() <= active + 4096 * len(tree_flatten(mlp.parameters()))
    np.testing.assert_allclose(np.array(ours(x)), before, atol=1e-5)
    np.testing.assert_array_equal(np.array(mlp(x)), before)


def test_projections_of_different_precision_stay_apart() -> None:
    mlp = Glm4MoeLiteMLP(ModelArgs(), HIDDEN, 128)
    mlp.gate_proj = mlp.gate_proj.to_quantized(64, 8)
    mlp.up_proj = mlp.up_proj.to_quantized(64, 4)
    assert fuse(mlp.gate_proj, mlp.up_proj) is None
    x = _rows(3)
    np.testing.assert_allclose(np.array(GatedMLP(mlp)(x)), np.array(mlp(x)), atol=1e-6)
