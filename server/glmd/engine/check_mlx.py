"""Report MLX's view of this machine as JSON: `python -m glmd.engine.check_mlx`.

Run in a process of its own, because MLX aborts the process when Metal refuses.
"""

from __future__ import annotations

import json

import mlx.core as mx

from glmd.engine.memory import default_budget, device_name

ROWS, INPUTS, OUTPUTS = 8, 256, 128

TOLERANCE = 1e-2
"""Maximum relative error of a float32 product with quantised weights; rounding explains 1e-3."""


def quantised_error(bits: int) -> float:
    """Return the largest relative error of a product with quantised weights.

    Runs the kernels that every layer of the model uses, which MLX compiles on this machine.
    """
    x = mx.random.normal((ROWS, INPUTS), key=mx.random.key(0))
    w = mx.random.normal((OUTPUTS, INPUTS), key=mx.random.key(1))
    packed, scales, biases = mx.quantize(w, group_size=64, bits=bits)
    product = mx.quantized_matmul(
        x, packed, scales, biases, transpose=True, group_size=64, bits=bits
    )
    reference = x @ mx.dequantize(packed, scales, biases, group_size=64, bits=bits).T
    return float(mx.max(mx.abs(product - reference)) / mx.max(mx.abs(reference)))


def main() -> None:
    """Print device, GPU or not, memory budget, and bit widths with wrong products."""
    errors = {bits: quantised_error(bits) for bits in (5, 8)}
    report = {
        "device": device_name(),
        "gpu": mx.default_device().type == mx.gpu,
        "budget": default_budget(),
        "wrong_bits": [bits for bits, error in errors.items() if not error < TOLERANCE],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
