"""Routed experts of few rows in three Metal kernels.

The first chooses the experts of all rows, weighs them, and sorts the pairs (row, expert) by expert.
The second computes silu(gate) x up of all pairs, the third the down projection and the weighted sum
over the experts of each row, to which it adds the shared expert's output and the residual. Weights
of an expert are read once for up to `BLOCK_ROWS` of its rows, as they are stored, and become floats
in registers. A single kernel for the last two would compute a row's silu(gate) x up again in each
threadgroup of the down projection, which needs all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from glmd.model import experts_metal, mla_metal
from glmd.model.mla_kernel import make_kernel
from glmd.model.moe import MixtureOfExperts, Projection

ROWS = (1, 8, 63)
"""Numbers of rows up to which kernels are compiled. With more, MLX's grouped products pay."""

BLOCK_ROWS = 4
"""Rows of an expert that are multiplied in one pass over its weights."""

OUTPUTS = 4
"""Rows of weights that a simdgroup multiplies in one pass over the inputs."""

GATE_UP_SIMDGROUPS = 2
DOWN_SIMDGROUPS = 8

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
"""Widths that eight values of which are a number of bytes, in the order of their bits."""

MOST_THREADS = 1024


@dataclass(frozen=True, slots=True)
class ExpertsShape:
    """Dimensions of a layer's experts.

    Attributes:
        top: experts per row.
        hidden, middle: inputs of gate and up projection, and their outputs.
        scale: factor of the experts' weights.
        gate_up, down: bits and group size of the weights.
    """

    experts: int
    top: int
    hidden: int
    middle: int
    scale: float
    gate_up: tuple[int, int]
    down: tuple[int, int]


class FusedExperts:
    """The experts of one layer, by the kernels.

    Attributes:
        moe: the layer's router, weights and shared expert.
        shape: the kernels' dimensions.
    """

    def __init__(self, moe: MixtureOfExperts, shape: ExpertsShape) -> None:
        self.moe = moe
        self.shape = shape

    @classmethod
    def of(cls, moe: MixtureOfExperts) -> FusedExperts | None:
        """None: the kernels are not made for the layer's routing, weights or dimensions."""
        gate = moe.gate
        if len(moe.gate_up) != 1 or gate.n_group > 1 or not gate.norm_topk_prob:
            return None
        gate_up, down = _affine(moe.gate_up[0]), _affine(moe.down)
        if gate_up is None or down is None:
            return None
        experts, hidden, _ = moe.down.weight.shape
        middle = moe.gate_up[0].weight.shape[1] // 2
        shape = ExpertsShape(experts, gate.top_k, hidden, middle, moe.scale, gate_up, down)
        return cls(moe, shape) if _supports(shape) else None

    def prepare(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Router logits [N, experts] in float32, and the shared expert's output [N, hidden]."""
        return self.moe.logits(x), self.moe.shared(x)

    def __call__(
        self, residual: mx.array, x: mx.array, logits: mx.array, shared: mx.array
    ) -> mx.array:
        """Sum of the residual, the shared expert's and the routed experts' outputs: [N, hidden].

        Args:
            residual, x: [N, hidden].
            logits, shared: of `prepare`.
        """
        return run_experts(
            self.shape,
            self.moe.gate_up[0],
            self.moe.down,
            self.moe.gate.e_score_correction_bias,
            residual,
            x,
            logits,
            shared,
        )


def _affine(projection: Projection) -> tuple[int, int] | None:
    """Bits and group size of weights that the kernels can read."""
    how = projection.quantization
    if how.get("mode") != "affine" or how["bits"] not in AFFINE_BITS:
        return None
    return how["bits"], how["group_size"]


def _supports(shape: ExpertsShape) -> bool:
    tile = GATE_UP_SIMDGROUPS * OUTPUTS // 2
    divides = not (shape.middle % tile or shape.hidden % OUTPUTS)
    return divides and ROWS[-1] * shape.top <= MOST_THREADS and shape.top <= shape.experts


def run_experts(
    shape: ExpertsShape,
    gate_up: Projection,
    down: Projection,
    bias: mx.array,
    residual: mx.array,
    x: mx.array,
    logits: mx.array,
    shared: mx.array,
) -> mx.array:
    """As `FusedExperts.__call__`, with the router's `bias` of [experts] float32."""
    rows, kind = x.shape[0], x.dtype
    pairs = rows * shape.top
    slots = min(pairs, shape.experts)
    route, multiply, combine = _kernels(shape, kind, _most(rows))
    order, groups, weights = route(
        inputs=[logits, bias],
        grid=(_route_threads(shape, rows), 1, 1),
        threadgroup=(_route_threads(shape, rows), 1, 1),
        output_shapes=[(pairs,), (slots + 1, 2), (pairs,)],
        output_dtypes=[mx.int32, mx.int32, mx.float32],
    )
    threads = 32 * GATE_UP_SIMDGROUPS
    tiles = shape.middle // (GATE_UP_SIMDGROUPS * OUTPUTS // 2)
    (middle,) = multiply(
        inputs=[x, order, groups, gate_up.weight, gate_up.scales, gate_up.biases],
        grid=(slots * tiles * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(pairs, shape.middle)],
        output_dtypes=[kind],
    )
    threads = 32 * _down_simdgroups(shape, rows)
    (out,) = combine(
        inputs=[
            *(residual, shared, middle, order, groups, weights),
            *(down.weight, down.scales, down.biases),
        ],
        grid=(shape.hidden // OUTPUTS * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, shape.hidden)],
        output_dtypes=[kind],
    )
    return out


def _most(rows: int) -> int:
    """Rows up to which the kernels are compiled that take so many."""
    return next(most for most in ROWS if most >= rows)


def _route_threads(shape: ExpertsShape, rows: int) -> int:
    """One thread for each pair, in whole simdgroups."""
    return -(-_most(rows) * shape.top // 32) * 32


def _down_simdgroups(shape: ExpertsShape, rows: int) -> int:
    return min(DOWN_SIMDGROUPS, _most(rows) * shape.top)


@cache
def _kernels(
    shape: ExpertsShape, dtype: mx.Dtype, most: int
) -> tuple[Callable[..., list[mx.array]], ...]:
    """The three kernels for up to `most` rows."""
    common: dict[str, str | int] = {
        "TOP": shape.top,
        "MOST": most,
        "ROWS": min(BLOCK_ROWS, most),
        "OUTPUTS": OUTPUTS,
    }
    sizes = f"{shape.experts}_{shape.top}_{shape.hidden}_{shape.middle}"
    route = make_kernel(
        f"experts_route_{shape.experts}_{shape.top}_{most}",
        ["logits", "bias"],
        ["order", "groups", "weights"],
        experts_metal.ROUTE,
        mla_metal.header(
            dtype,
            {
                **common,
                "EXPERTS": shape.experts,
                "SHARE": -(-shape.experts // 32),
                "SIMDGROUPS": _route_threads(shape, most) // 32,
                "SCALE": f"{shape.scale:e}f",
            },
        ),
    )
    gate_up = make_kernel(
        f"experts_gate_up_{sizes}_{'_'.join(map(str, shape.gate_up))}_{most}",
        ["x", "order", "groups", "words", "scales", "biases"],
        ["middle"],
        experts_metal.gate_up(),
        mla_metal.header(
            dtype,
            {
                **common,
                **_packed(shape.hidden, *shape.gate_up),
                "MIDDLE": shape.middle,
                "SIMDGROUPS": GATE_UP_SIMDGROUPS,
                "TILES": shape.middle // (GATE_UP_SIMDGROUPS * OUTPUTS // 2),
            },
        ),
    )
    down = make_kernel(
        f"experts_down_{sizes}_{'_'.join(map(str, shape.down))}_{most}",
        [
            *("residual", "shared", "middle", "order", "groups", "weights"),
            *("words", "scales", "biases"),
        ],
        ["out"],
        experts_metal.down(),
        mla_metal.header(
            dtype,
            {
                **common,
                **_packed(shape.middle, *shape.down),
                "HIDDEN": shape.hidden,
                "SIMDGROUPS": _down_simdgroups(shape, most),
            },
        ),
    )
    return route, gate_up, down


def _packed(inputs: int, bits: int, group: int) -> dict[str, str | int]:
    """Constants of quantised weights with so many inputs."""
    return {"INPUTS": inputs, "BITS": bits, "GROUP": group, "MASK": f"{(1 << bits) - 1}u"}


def forget() -> None:
    """Forget all kernels, for other ones of `mx.fast.metal_kernel`."""
    _kernels.cache_clear()
