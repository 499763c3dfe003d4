"""Report MLX's view of this machine as JSON: `python -m glmd.engine.check_mlx`.

Run in a process of its own, because MLX aborts the process when Metal refuses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

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


DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16}

TIMED_ROWS, TIMED_WIDTH = {True: 512, False: 16}, {True: 4096, False: 512}
"""Rows and width of the timed products, with a GPU or without: some milliseconds each."""

TIMED_RUNS = 5
"""Runs in each dtype after a first one, which compiles the kernel. The dtypes alternate, and the
fastest run counts."""


def measure_dtypes(gpu: bool) -> dict[str, dict[str, float]]:
    """Return milliseconds of each kind of product, by dtype of the activations.

    "dense" and "8-bit" multiply the rows of a prompt, "8-bit, one row" those of a decode step.
    """
    rows, width = TIMED_ROWS[gpu], TIMED_WIDTH[gpu]
    products: dict[tuple[str, str], Callable[[], mx.array]] = {}
    for name, dtype in DTYPES.items():
        x = mx.random.normal((rows, width), key=mx.random.key(0)).astype(dtype)
        w = mx.random.normal((width, width), key=mx.random.key(1)).astype(dtype)
        packed, scales, biases = mx.quantize(w, group_size=64, bits=8)
        mx.eval(x, w, packed, scales, biases)

        def quantised(
            x: mx.array, packed: mx.array = packed, scales: mx.array = scales,
            biases: mx.array = biases,
        ) -> mx.array:  # fmt: skip
            return mx.quantized_matmul(
                x, packed, scales, biases, transpose=True, group_size=64, bits=8
            )

        products["dense", name] = lambda x=x, w=w: x @ w.T  # type: ignore[misc]
        products["8-bit", name] = lambda x=x, run=quantised: run(x)  # type: ignore[misc]
        products["8-bit, one row", name] = lambda x=x, run=quantised: run(x[:1])  # type: ignore[misc]
    best = dict.fromkeys(products, float("inf"))
    for number in range(1 + TIMED_RUNS):
        for key, product in products.items():
            start = time.perf_counter()
            mx.eval(product())
            if number:
                best[key] = min(best[key], 1e3 * (time.perf_counter() - start))
    kinds = dict.fromkeys(kind for kind, _ in products)
    return {kind: {name: best[kind, name] for name in DTYPES} for kind in kinds}


def main() -> None:
    """Print device, GPU, memory budget, wrong bit widths and times of both dtypes."""
    errors = {bits: quantised_error(bits) for bits in (5, 8)}
    gpu = mx.default_device().type == mx.gpu
    report = {
        "device": device_name(),
        "gpu": gpu,
        "budget": default_budget(),
        "wrong_bits": [bits for bits, error in errors.items() if not error < TOLERANCE],
        "dtypes": measure_dtypes(gpu),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
