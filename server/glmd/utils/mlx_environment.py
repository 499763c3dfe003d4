"""What a process sets up before it loads MLX: environment variables and OpenBLAS."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
from pathlib import Path

log = logging.getLogger("glmd.engine")

OPS_PER_BUFFER = 200
"""`MLX_MAX_OPS_PER_BUFFER`: kernel launches after which MLX commits a Metal command buffer.

MLX's default is 40 (base and Pro chips) or 50 (Max and Ultra), about one layer: a plain decode step
has 38 to 51 launches per layer. A commit costs the GPU about 20 µs. Four layers per buffer remove
most of that cost, and leave a dozen commits per step, so that the GPU starts while later layers are
still being encoded. MLX reads the variable once, with `atoi`, when the process first uses the GPU
(`Device::Device` in mlx/backend/metal/device.cpp, `env` in mlx/utils.h).
"""

MB_PER_BUFFER = 400
"""Most for `MLX_MAX_MB_PER_BUFFER`: size of inputs after which MLX commits a command buffer.

The unit is not bytes: MLX adds `array::data_size`, the number of elements (of 4-byte words in
quantised weights), of every distinct input buffer, and compares the sum divided by 2**20
(`CommandEncoder::set_input_array` and `needs_commit`). At the default of 40 or 50, a layer's three
expert tensors of 36 units each cause two or three commits.
"""

MIN_MB_PER_BUFFER = 50
"""Least for `MLX_MAX_MB_PER_BUFFER`: MLX's default on Max and Ultra chips."""

BUFFERS_IN_FLIGHT = 11
"""Command buffers whose inputs MLX holds: ten committed ones and the one that is being encoded
(`MAX_ACTIVE_TASKS` in mlx/transforms.cpp). An array is freed when its command buffer completes."""

LAYER_UNITS = 117
"""Weights of a GLM-4.7-Flash layer at 8/5 bits, in the unit of `MLX_MAX_MB_PER_BUFFER`."""

ROW_ELEMENTS = 73_000
"""Elements of intermediate arrays per row and layer: hidden states, queries, outputs of heads and
of four experts."""

ELEMENT_BYTES = 2
"""Bytes of a bfloat16 or float16."""

HELD_SHARE = 16
"""Divisor of the memory budget: bytes that intermediate arrays of command buffers in flight may
hold in a step of `max_step_tokens` rows. At the budget itself MLX waits for the GPU."""

GPU_SHARE = 0.7
"""Memory budget as a share of physical memory, where it is not set. macOS recommends 0.67 to
0.75."""

MAX_STEP_TOKENS = 2048
"""Default of `EngineConfig.max_step_tokens`."""

OPENBLAS = "libopenblas.so.0"
"""OpenBLAS as Debian (libopenblas0), Fedora (openblas) and Arch (openblas) install it."""

MAX_BLAS_THREADS = 8
"""More threads gain nothing with the products of one step."""


def prepare_mlx(memory_budget: int | None = None, max_step_tokens: int = MAX_STEP_TOKENS) -> None:
    """Prepare this process for MLX, before MLX is loaded; later calls do nothing.

    Sets MLX's limits of a command buffer on macOS, loads OpenBLAS on Linux. Variables that are set
    already win.

    Args:
        memory_budget: bytes, as in `EngineConfig`. None: a share of the physical memory.
        max_step_tokens: rows of a step, as in `EngineConfig`.
    """
    if "mlx.core" in sys.modules:
        return
    if sys.platform == "darwin":
        for name, value in command_buffer_limits(memory_budget, max_step_tokens).items():
            os.environ.setdefault(name, value)
    elif sys.platform == "linux":
        load_openblas()


def command_buffer_limits(memory_budget: int | None, max_step_tokens: int) -> dict[str, str]:
    """Return MLX's two limits of a Metal command buffer.

    Arguments as of `prepare_mlx`.

    Large command buffers make decode steps faster, but hold the intermediate arrays of steps with
    many rows for longer, so less memory or more rows mean smaller ones.
    """
    if memory_budget is None:
        memory_budget = int(GPU_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    layer_rows = ROW_ELEMENTS * max_step_tokens / 2**20
    held_layers = memory_budget / HELD_SHARE / (layer_rows * 2**20 * ELEMENT_BYTES)
    units = int(held_layers / BUFFERS_IN_FLIGHT * (LAYER_UNITS + layer_rows))
    return {
        "MLX_MAX_OPS_PER_BUFFER": str(OPS_PER_BUFFER),
        "MLX_MAX_MB_PER_BUFFER": str(min(MB_PER_BUFFER, max(MIN_MB_PER_BUFFER, units))),
    }


def load_openblas() -> None:
    """Load OpenBLAS, if it is installed, in place of the reference BLAS that MLX brings.

    The dynamic linker resolves symbols of libraries that are loaded later, such as MLX's, among
    the global ones first. A BLAS in LD_PRELOAD and thread counts are kept.
    """
    library, preloaded = find_openblas(), os.environ.get("LD_PRELOAD", "")
    if library is None or "blas" in preloaded or "mkl" in preloaded:
        return
    if not os.environ.keys() & {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"}:
        os.environ["OPENBLAS_NUM_THREADS"] = str(blas_threads(usable_cores()))
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        log.warning("OpenBLAS cannot be loaded; products are slow: %s", error)


def blas_threads(cores: int) -> int:
    """Number of OpenBLAS threads, which spin, so the API process keeps a core."""
    return max(1, min(MAX_BLAS_THREADS, cores - 1))


def usable_cores() -> int:
    """Number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only.
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def find_openblas() -> Path | None:
    """Find OpenBLAS in the system's library folders; None: not installed."""
    # ctypes.util.find_library would run ldconfig, and compilers where that finds nothing.
    folders = (
        f"/usr/lib/{platform.machine()}-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib",
    )
    candidates = (Path(folder) / OPENBLAS for folder in folders)
    return next((file for file in candidates if file.is_file()), None)
