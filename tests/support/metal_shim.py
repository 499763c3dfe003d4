"""A stand-in for `mx.fast.metal_kernel` that compiles a kernel's source for the CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from engines import fresh_folder

from glmd.engine import kernel_trial
from glmd.model import experts_kernel, mla_kernel

COMPILER = shutil.which("g++")

_TYPES = {
    mx.bfloat16: "bfloat16_t",
    mx.float16: "half",
    mx.float32: "float",
    mx.int32: "int",
    mx.uint32: "uint",
}

ATTRIBUTES = {
    "threadgroup_position_in_grid": "uint3{shim_group, 0, 0}",
    "thread_position_in_threadgroup": "uint3{uint(shim::current), 0, 0}",
    "simdgroup_index_in_threadgroup": "uint(shim::current / 32)",
    "thread_index_in_simdgroup": "uint(shim::current % 32)",
}


OPTIONS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-clobbered"]

_compiled: dict[str, Any] = {}
"""By source."""


@cache
def _includes() -> Path:
    """A folder with the shim, compiled once, and the names of Metal's own headers."""
    folder = fresh_folder()
    for header in ("metal_stdlib", "metal_simdgroup_matrix"):
        (folder / header).write_text("")
    assert COMPILER is not None
    shim = Path(__file__).with_name("metal_shim.h")
    (folder / "shim.h").write_text(f'#include "{shim}"\n')
    command = [COMPILER, *OPTIONS, "-x", "c++-header", "shim.h", "-o", "shim.h.gch"]
    subprocess.run(command, cwd=folder, check=True)
    return folder


def run_kernels_here(monkeypatch: pytest.MonkeyPatch, *, order: int = 1) -> None:
    """Let glmd's kernels run on this device: where there is no Apple GPU, on the CPU.

    Args:
        order: in which threads run between barriers, 1 or -1.
    """
    if mx.metal.is_available():
        return
    if COMPILER is None:
        pytest.skip("needs g++")
    monkeypatch.setattr(mx.fast, "metal_kernel", partial(ShimKernel, order=order))
    monkeypatch.setattr(kernel_trial, "is_available", lambda: True)
    mla_kernel.forget()
    experts_kernel.forget()


@dataclass
class ShimKernel:
    """A kernel as `mx.fast.metal_kernel` returns it; arguments as there."""

    name: str
    input_names: list[str]
    output_names: list[str]
    source: str
    header: str
    order: int = 1

    def __call__(
        self,
        *,
        inputs: list[mx.array],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: list[tuple[int, ...]],
        output_dtypes: list[mx.Dtype],
    ) -> list[mx.array]:
        kinds = (*(array.dtype for array in inputs), *output_dtypes)
        run = self._compile(kinds)
        mx.eval(inputs)
        arrays = [np.ascontiguousarray(np.array(_bits(array))) for array in inputs]
        outputs = [
            np.full(shape, 0xFF, np.uint8).repeat(kind.size, axis=-1)
            for shape, kind in zip(output_shapes, output_dtypes, strict=True)
        ]
        shapes = [np.array(array.shape, np.int32) for array in inputs]
        assert not any(size % by for size, by in zip(grid, threadgroup, strict=True))
        pointers = (ctypes.c_void_p * (len(arrays) + len(outputs)))(
            *(array.ctypes.data for array in [*arrays, *outputs])
        )
        dims = (ctypes.c_void_p * len(shapes))(*(shape.ctypes.data for shape in shapes))
        run(pointers, dims, grid[0] // threadgroup[0], threadgroup[0], self.order)
        return [
            mx.array(output).view(kind).reshape(shape)
            for output, kind, shape in zip(outputs, output_dtypes, output_shapes, strict=True)
        ]

    def _compile(self, kinds: tuple[mx.Dtype, ...]) -> Any:
        """Compile a function (buffers, shapes of inputs, threadgroups, their threads, order)."""
        names = [*self.input_names, *self.output_names]
        assert len(names) <= 31, "Metal binds at most 31 buffers"
        lines = ['#include "shim.h"', self.header]
        lines.append(
            'extern "C" void run(void** buffers, int** shapes, uint shim_groups, int shim_threads,'
            " int shim_order)"
        )
        lines.append("{")
        for i, (name, kind) in enumerate(zip(names, kinds, strict=True)):
            qualifier = "const " if i < len(self.input_names) else ""
            lines.append(f"{qualifier}{_TYPES[kind]}* {name} = ({_TYPES[kind]}*)buffers[{i}];")
            if f"{name}_shape" in self.source:
                lines.append(f"const int* {name}_shape = shapes[{i}];")
        lines.append("shim::step = shim_order;")
        lines.append("for (uint g = 0; g < shim_groups; g++) shim::run_group([=, shim_group = g] {")
        lines += [
            f"const auto {name} = {value};"
            for name, value in ATTRIBUTES.items()
            if name in self.source
        ]
        lines += [self.source, "}, shim_threads); }"]
        text = "\n".join(lines)
        if text in _compiled:
            return _compiled[text]
        folder = fresh_folder()
        (folder / "kernel.cpp").write_text(text)
        assert COMPILER is not None
        command = [COMPILER, *OPTIONS, "-shared", "-Werror", f"-I{_includes()}"]
        subprocess.run([*command, "kernel.cpp", "-o", "kernel.so"], cwd=folder, check=True)
        _compiled[text] = ctypes.CDLL(str(folder / "kernel.so")).run
        return _compiled[text]


def _bits(array: mx.array) -> mx.array:
    """The array as numpy takes it."""
    return array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
