"""Environment of processes that run MLX: command buffers on macOS, OpenBLAS on Linux."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from paths import ROOT

from glmd.engine.config import EngineConfig
from glmd.ipc import EXIT_REPORTED
from glmd.utils import mlx_environment
from glmd.utils.mlx_environment import (
    MAX_STEP_TOKENS,
    blas_threads,
    command_buffer_limits,
    find_openblas,
    load_openblas,
)

pytestmark = pytest.mark.unit

GIB = 2**30
on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="only on Linux, whose wheel has a slow BLAS"
)
with_openblas = pytest.mark.skipif(
    sys.platform == "linux" and find_openblas() is None,
    reason="needs OpenBLAS: apt install libopenblas0",
)

OPS, MB = "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"


def run(code: str, **variables: str) -> str:
    """Output of a process of its own, in which MLX is not loaded."""
    environment = {name: value for name, value in os.environ.items() if "THREADS" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(ROOT / "server"), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def buffer_mb(gib: float, rows: int = MAX_STEP_TOKENS) -> int:
    return int(command_buffer_limits(int(gib * GIB), rows)[MB])


def test_limits_follow_memory_budget_and_rows_of_a_step() -> None:
    assert command_buffer_limits(36 * GIB, 2048) == {OPS: "200", MB: "190"}
    assert buffer_mb(16) < buffer_mb(36) < buffer_mb(72)
    assert buffer_mb(36, 8192) < buffer_mb(36, 2048) < buffer_mb(36, 512)
    assert buffer_mb(4, 8192) == 50
    assert buffer_mb(400) == 400


@pytest.mark.parametrize(("gib", "rows"), [(21, 512), (21, 2048), (36, 8192), (72, 8192)])
def test_arrays_held_in_flight_stay_below_their_share_of_the_budget(gib: int, rows: int) -> None:
    """11 buffers of the limit hold at most 1/16 of the budget in intermediate arrays."""
    units = rows * 73_000 / 2**20
    layers = 11 * buffer_mb(gib, rows) / (117 + units)
    assert layers * rows * 73_000 * 2 <= gib * GIB / 16


def test_default_rows_are_those_of_the_engine() -> None:
    assert EngineConfig().max_step_tokens == MAX_STEP_TOKENS


def test_an_engine_process_has_limits_for_its_own_settings(tmp_path: Path) -> None:
    code = f"""
import os, sys, zmq
from pathlib import Path
from glmd.engine.main import run
sys.platform = "darwin"
config = {{"memory_budget": 36 << 30, "max_step_tokens": 8192}}
endpoint = "ipc://{tmp_path}/socket"
parent = zmq.Context.instance().socket(zmq.PAIR)
parent.bind(endpoint)
code = run(endpoint, Path("m"), "no_such_engine", config)
print(code, os.environ[{OPS!r}], os.environ[{MB!r}])
"""
    assert run(code) == f"{EXIT_REPORTED} 200 {buffer_mb(36, 8192)}"
    assert run(code, **{MB: "77"}) == f"{EXIT_REPORTED} 200 77"  # The user's own value.


def test_mlx_of_this_version_reads_these_variables() -> None:
    spec = find_spec("mlx")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    header = Path(spec.submodule_search_locations[0]) / "include" / "mlx" / "utils.h"
    assert OPS in header.read_text()
    assert MB in header.read_text()


@pytest.mark.parametrize(
    ("before", "value"),
    [("", "200"), (f"os.environ[{OPS!r}] = '50'", "50"), ("import mlx.core", "")],
    ids=["unset", "set by the user", "mlx loaded"],
)
def test_offline_api_sets_limits_before_mlx_is_loaded(before: str, value: str) -> None:
    code = f"""
import os, sys, types
import glmd
os.environ.pop({OPS!r}, None)
{before}
glmd.import_module = lambda name: types.SimpleNamespace(LLM=None)  # Fails on a Mac that is none.
sys.platform = "darwin"
from glmd import LLM
print(os.environ.get({OPS!r}, ""))
"""
    assert run(code) == value


@on_linux
@with_openblas
def test_openblas_computes_mlxs_products() -> None:
    """MLX's product of float32 matrices is, bit for bit, that of OpenBLAS."""
    code = """
import ctypes, numpy as np
from glmd.utils.mlx_environment import find_openblas, prepare_mlx
prepare_mlx()
import mlx.core as mx
a, b = np.random.default_rng(0).standard_normal((2, 96, 96), np.float32)
product = np.array(mx.array(a) @ mx.array(b))
c, real, size = np.empty_like(a), ctypes.c_float(1), 96
pointers = [each.ctypes.data_as(ctypes.c_void_p) for each in (a, b, c)]
ctypes.CDLL(str(find_openblas())).cblas_sgemm(
    101, 111, 111, size, size, size, real, pointers[0], size, pointers[1], size,
    ctypes.c_float(0), pointers[2], size,
)
print((product == c).all(), abs(product - a @ b).max() < 1e-4)
"""
    assert run(code) == "True True"


LOADED = """
import os
from glmd.utils import mlx_environment
mlx_environment.prepare_mlx()
blas = any("openblas" in line for line in open("/proc/self/maps"))
print(blas, os.environ.get("OPENBLAS_NUM_THREADS", ""))
"""


@on_linux
@with_openblas
def test_the_users_blas_and_threads_are_kept() -> None:
    loaded, threads = run(LOADED).split()
    assert loaded == "True"
    assert 1 <= int(threads) <= 8
    assert run(LOADED, OPENBLAS_NUM_THREADS="5") == "True 5"
    assert run(LOADED, OMP_NUM_THREADS="3") == "True"
    # A name that the dynamic linker does not find is ignored.
    assert run(LOADED, LD_PRELOAD="/nowhere/libmkl_rt.so") == "False"
    assert [blas_threads(cores) for cores in (1, 2, 4, 64)] == [1, 1, 3, 8]


def test_an_openblas_that_cannot_be_loaded_is_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "libopenblas.so.0"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(mlx_environment, "find_openblas", lambda: broken)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    load_openblas()
    assert "OpenBLAS cannot be loaded" in caplog.text
