"""A compiler for MLX's CPU kernels that has read their common header already.

MLX on a CPU compiles a kernel for each combination of fused operations, about a hundred in this
suite, and keeps them in `$TMPDIR/mlx`. Reading the header is three quarters of the 0.8 s for each.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

HEADER = "mlx/backend/cpu/compiled_preamble.h"

OPTIONS = ["-std=c++17", "-O3", "-Wall", "-fPIC"]
"""Those of MLX's own command; a header that was compiled with others is not used."""


def has_compiled() -> bool:
    """Whether MLX has compiled kernels on this machine before."""
    return any(Path(tempfile.gettempdir(), "mlx").glob("*/cpu/*.so"))


def precompile(folder: Path) -> None:
    """Compile the header into `folder`, and put a `g++` that looks there first on PATH."""
    compiler, mlx = shutil.which("g++"), find_spec("mlx")
    if compiler is None or mlx is None or mlx.submodule_search_locations is None:
        return
    include = Path(mlx.submodule_search_locations[0]) / "include"
    if not (include / HEADER).is_file():
        return  # On macOS, MLX compiles for Metal.
    target = folder / f"{HEADER}.gch"
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler, *OPTIONS, "-I", str(include), "-x", "c++-header", str(include / HEADER)]
    subprocess.run([*command, "-w", "-o", str(target)], check=True)
    wrapper = folder / "g++"
    command = [compiler, f"-I{folder}"]
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    wrapper.chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
