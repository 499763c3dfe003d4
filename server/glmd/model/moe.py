"""Mixture of experts over rows: router, routed experts and the shared expert.

Weights are mlx-lm's modules. Three details are glmd's own, to launch fewer kernels and to read
fewer bytes:

- gate and up projection are one product; mlx-lm's modules become views of the fused weights;
- with few rows the sum over experts is elementwise, so that `mx.compile` fuses it;
- between `SORTED_ROWS` rows and the number from which MLX's Metal kernels read each expert once for
  all its rows, (row, expert) pairs are padded to that number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from glmd.model.mlx_lm_layers import group_expert_select

COMPILED_ROWS = 64
"""Number of rows up to which a layer runs compiled. MLX keeps a compiled graph for each number of
rows as long as the model exists, and with more rows the host is not the bottleneck."""

SORTED_ROWS = 16
"""Rows from which pairs are sorted by expert."""

GROUPED_PAIRS = 4
"""Pairs per expert from which MLX's Metal `gather_qmm` multiplies rows by expert; with fewer, every
pair reads its expert's weights by itself."""


def groups_pairs() -> bool:
    """Whether the device reads an expert once for `GROUPED_PAIRS` pairs or more."""
    return mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu


@dataclass(frozen=True, slots=True)
class Projection:
    """Weights of a linear layer, or of one per expert.

    Attributes:
        weight: [..., outputs, inputs], packed if quantised.
        scales, biases: of quantised weights.
        quantization: `group_size`, `bits` and `mode`; empty: not quantised.
    """

    weight: mx.array
    scales: mx.array | None
    biases: mx.array | None
    quantization: dict[str, Any]

    @classmethod
    def of(cls, module: Any) -> Projection:
        if "scales" not in module:
            return cls(module.weight, None, None, {})
        quantization = {name: getattr(module, name) for name in ("group_size", "bits", "mode")}
        return cls(module.weight, module.scales, module.get("biases"), quantization)

    def __call__(self, x: mx.array) -> mx.array:
        """[..., inputs] → [..., outputs]"""
        if self.scales is None:
            return x @ self.weight.T
        return mx.quantized_matmul(x, self.weight, self.scales, self.biases, **self.quantization)

    def gather(
        self, x: mx.array, rows: mx.array | None, experts: mx.array, *, grouped: bool
    ) -> mx.array:
        """Products of rows and experts: [pairs, 1, outputs].

        Args:
            x: [rows, 1, inputs].
            rows, experts: [pairs] uint32. `rows` None: pair i has row i.
            grouped: `experts` ascends, so that an expert's weights can be read once.
        """
        if self.scales is None:
            return mx.gather_mm(
                x, self.weight.swapaxes(-1, -2), rows, experts, sorted_indices=grouped
            )
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.biases,
            rows,
            experts,
            sorted_indices=grouped,
            **self.quantization,
        )


def fuse(first: Any, second: Any) -> Projection | None:
    """Join two projections of the same input by their outputs.

    The modules' weights become views of the joined ones, so that nothing is stored twice.

    Returns:
        None if they are quantised differently or have a bias.
    """
    one, other = Projection.of(first), Projection.of(second)
    if one.quantization != other.quantization or "bias" in first or "bias" in second:
        return None
    joined: dict[str, mx.array] = {}
    for name in ("weight", "scales", "biases"):
        arrays = [getattr(one, name), getattr(other, name)]
        if arrays[0] is not None:
            joined[name] = mx.concatenate(arrays, axis=-2)
    mx.eval(joined)
    for name, array in joined.items():
        first[name], second[name] = mx.split(array, [getattr(one, name).shape[-2]], axis=-2)
    mx.eval(first.parameters(), second.parameters())
    return Projection(
        joined["weight"], joined.get("scales"), joined.get("biases"), one.quantization
    )


class MixtureOfExperts:
    """The experts of one layer.

    Args:
        mlp: mlx-lm's `Glm4MoeLiteMoE`. Its weights must not change afterwards.
        pad_pairs: see `groups_pairs`.

    Attributes:
        gate: the router, mlx-lm's.
        scale: factor of the experts' weights.
        gate_up: gate and up projection of the routed experts, as one if they are quantised alike.
        down: their down projection.
        shared: the shared expert.
    """

    def __init__(self, mlp: Any, *, pad_pairs: bool) -> None:
        self.gate = mlp.gate
        self.scale: float = mlp.gate.routed_scaling_factor
        self.shared = GatedMLP(mlp.shared_experts)
        switch = mlp.switch_mlp
        fused = fuse(switch.gate_proj, switch.up_proj)
        self.gate_up = (
            [Projection.of(switch.gate_proj), Projection.of(switch.up_proj)]
            if fused is None
            else [fused]
        )
        self.down = Projection.of(switch.down_proj)
        pads = pad_pairs and self.down.scales is not None
        self._least_pairs: int = GROUPED_PAIRS * switch.down_proj.num_experts if pads else 0

    def __call__(self, x: mx.array) -> mx.array:
        """[N, hidden] → [N, hidden]"""
        experts, weights = self._route(x)
        count = x.shape[0]
        if count < SORTED_ROWS:
            rows = np.repeat(np.arange(count, dtype=np.uint32), experts.shape[1])
            y = self._multiply(x, mx.array(rows), experts.flatten())
        else:
            y = self._multiply_sorted(x, experts)
        y = y.reshape(*experts.shape, -1)  # [N, experts per token, hidden]
        if count <= COMPILED_ROWS:
            # One kernel, with what is added to it: a product and a sum would be two more.
            parts = [y[:, i] * weights[:, i, None] for i in range(experts.shape[1])]
            routed = sum(parts[1:], parts[0])
        else:
            routed = (y * weights[..., None]).sum(axis=-2)
        return (routed * self.scale).astype(x.dtype) + self.shared(x)

    def logits(self, x: mx.array) -> mx.array:
        """Of the router, in float32: [N, experts]."""
        logits: mx.array = x.astype(mx.float32) @ self.gate.weight.T
        return logits

    def _route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Experts of each row, and their weights in float32, both [N, experts per token].

        The weights are still to be multiplied by `self.scale`.
        """
        gate = self.gate
        logits = self.logits(x)
        bias, count = gate.e_score_correction_bias, gate.top_k
        if gate.n_group > 1 or not gate.norm_topk_prob:
            found: tuple[mx.array, mx.array] = group_expert_select(
                logits,
                bias,
                count,
                gate.n_group,
                gate.topk_group,
                1.0,
                gate.norm_topk_prob,
            )
            return found
        ranked = mx.argpartition(-(mx.sigmoid(logits) + bias), kth=count - 1, axis=-1)
        experts = ranked[:, :count]
        chosen = mx.take_along_axis(logits, experts, axis=-1)
        # Scores divided by their sum are the softmax of their logarithms.
        return experts, mx.softmax(-mx.logaddexp(-chosen, 0.0), axis=-1)

    def _multiply_sorted(self, x: mx.array, experts: mx.array) -> mx.array:
        """As `_multiply` for all pairs, in their order, with the pairs sorted by expert."""
        pairs, per_row = experts.size, experts.shape[1]
        order = mx.argsort(experts.flatten())
        inverse = mx.argsort(order)
        if pairs < self._least_pairs:
            order = order[mx.array(np.minimum(np.arange(self._least_pairs), pairs - 1))]
        # The kernel that groups pairs takes rows in the order of the pairs.
        return self._multiply(x[order // per_row], None, experts.flatten()[order])[inverse]

    def _multiply(self, x: mx.array, rows: mx.array | None, experts: mx.array) -> mx.array:
        """Each pair's expert applied to its row: [pairs, 1, hidden].

        Args:
            x: [rows, hidden].
            rows, experts: [pairs]. `rows` None: pair i has row i, and `experts` ascends.
        """
        x, grouped = x[:, None], rows is None
        outputs = [p.gather(x, rows, experts, grouped=grouped) for p in self.gate_up]
        gate, up = outputs if len(outputs) == 2 else mx.split(outputs[0], 2, axis=-1)
        # Indices that are not given would be computed by a kernel each time.
        own = None if grouped else mx.array(np.arange(experts.size, dtype=np.uint32))
        return self.down.gather(silu(gate) * up, own, experts, grouped=grouped)


class GatedMLP:
    """A dense MLP with a gate.

    Args:
        mlp: mlx-lm's `Glm4MoeLiteMLP`. Its weights must not change afterwards.
    """

    def __init__(self, mlp: Any) -> None:
        self._gate_up = fuse(mlp.gate_proj, mlp.up_proj)
        self._mlp = mlp

    def __call__(self, x: mx.array) -> mx.array:
        """[N, hidden] → [N, hidden]"""
        if self._gate_up is None:
            return self._mlp(x)  # type: ignore[no-any-return]
        gate, up = mx.split(self._gate_up(x), 2, axis=-1)
        return self._mlp.down_proj(silu(gate) * up)  # type: ignore[no-any-return]


def silu(x: mx.array) -> mx.array:
    """x · sigmoid(x)"""
    return x * mx.sigmoid(x)
