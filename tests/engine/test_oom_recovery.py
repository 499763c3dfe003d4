"""Out-of-memory errors: recognised by MLX's own messages, and by nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from glmd.engine.oom_recovery import is_out_of_memory


@pytest.mark.parametrize(
    "message",
    [
        # mlx/backend/metal/allocator.cpp
        "[metal::malloc] Attempting to allocate 48736917632 bytes which is greater than the maximum"
        " allowed buffer size of 30150672384 bytes.",
        "[metal::malloc] Resource limit (499000) exceeded.",
        "[malloc] Unable to allocate 124367104 bytes.",
        "[malloc_or_wait] Unable to allocate 124367104 bytes.",
        # mlx/backend/metal/device.cpp
        "[METAL] Command buffer execution failed: Insufficient Memory"
        " (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
        "[METAL] Command buffer execution failed: Execution of the command buffer was aborted due"
        " to an error during execution. Insufficient Memory"
        " (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
        # mlx/backend/cuda/utils.cpp
        "cudaMallocAsync(&data, size, stream) failed: out of memory",
        "cudaMallocManaged(&data, size) failed: out of memory",
        "cudaGraphLaunch(graph_exec_, stream_) failed: out of memory",
    ],
)
def test_messages_of_mlx_about_memory_are_recognised(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))


def test_a_failed_allocation_of_c_plus_plus_objects_is_recognised() -> None:
    assert is_out_of_memory(MemoryError("std::bad_alloc"))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("[reshape] Cannot reshape array of size 8 into shape (3,) after allocation."),
        ValueError("[malloc] Unable to allocate 4096 bytes."),  # not the type that MLX raises
        RuntimeError("[matmul] Last dimension of first input does not match."),
        RuntimeError("[concatenate] the allocator's memory is described in the documentation"),
        RuntimeError("The grammar is out of memory limits: malloc"),
        RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error"
                     " (00000002:kIOGPUCommandBufferCallbackErrorTimeout)."),
        RuntimeError("[METAL] Command buffer execution failed: Impacting Interactivity"
                     " (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)."),
        RuntimeError("[metal::load_device] No Metal device available: insufficient memory"),
        RuntimeError("cudaGraphLaunch(graph_exec_, stream_) failed: invalid argument"),
        OSError("Cannot allocate memory"),
    ],
    ids=str,
)  # fmt: skip
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_errors_of_mlx_about_large_shapes_are_not_taken_for_it() -> None:
    provocations: tuple[Callable[[], mx.array], ...] = (
        lambda: mx.zeros((3, 4)) @ mx.zeros((3, 4)),
        lambda: mx.zeros((1 << 40,)),
        lambda: mx.zeros((8,)).reshape(1 << 30, 1 << 20),
        lambda: mx.array(np.zeros(3)).reshape(-5, 1 << 20),
    )
    for provoke in provocations:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            mx.eval(provoke())
        assert not is_out_of_memory(caught.value)


LIMITED = """
import resource
from pathlib import Path
import mlx.core as mx
from glmd.engine.oom_recovery import is_out_of_memory

mx.eval(mx.zeros(4))
numbers = [0] * (1 << 24)
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (8 << 20),) * 2)
try:
    mx.array(numbers)
except Exception as error:
    print(type(error).__name__, error)
    raise SystemExit(0 if is_out_of_memory(error) else 1)
raise SystemExit("64 MiB fit into 8 MiB")
"""

LARGE = """
import mlx.core as mx
from glmd.engine.oom_recovery import is_out_of_memory

try:
    mx.eval(mx.zeros((1 << 25, 1 << 25), mx.int8))
except Exception as error:
    print(type(error).__name__, error)
    raise SystemExit(0 if is_out_of_memory(error) else 1)
raise SystemExit("a pebibyte was allocated")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux: limits the address space")
def test_a_failed_allocation_in_mlx_is_recognised() -> None:
    found = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_refused_array_is_recognised_or_ends_the_process() -> None:
    """A GPU raises. The CPU allocator of MLX uses the null pointer, and the process dies."""
    found = subprocess.run(
        [sys.executable, "-c", LARGE], capture_output=True, text=True, check=False
    )
    cpu = mx.default_device() == mx.Device(mx.cpu)
    expected = {0, -signal.SIGSEGV} if cpu else {0}
    assert found.returncode in expected, found.stdout + found.stderr
