"""Environment of processes that run MLX: command buffers on macOS, OpenBLAS on Linux."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from paths import ROOT

from glmd.engine.config import EngineConfig
from glmd.engine_client.process import EngineProcessConfig
from glmd.utils import mlx_environment
from glmd.utils.mlx_environment import (
    MAX_STEP_TOKENS,
    blas_threads,
    command_buffer_limits,
    engine_environment,
    openblas_variables,
)

pytestmark = pytest.mark.unit

GIB = 2**30
OPS, MB = "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"
LIBRARY = Path("/usr/lib/libopenblas.so.0")


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


def test_engine_process_on_macos_has_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delenv(OPS, raising=False)
    monkeypatch.setenv(MB, "77")
    config = EngineProcessConfig(Path("m"), {"memory_budget": 36 * GIB, "max_step_tokens": 8192})
    environment = config.environment
    assert environment[OPS] == "200"
    assert environment[MB] == "77"  # The user's own value.
    monkeypatch.delenv(MB)
    assert config.environment[MB] == str(buffer_mb(36, 8192))
    assert {**config.environment, **os.environ} == config.environment


def test_limits_are_for_metal_only() -> None:
    assert OPS not in engine_environment(base={}, system="linux")


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
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "server")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == value


def test_openblas_is_preloaded_behind_the_users_own_libraries() -> None:
    assert openblas_variables({}, None) == {}
    added = openblas_variables({"LD_PRELOAD": "libjemalloc.so.2"}, LIBRARY)
    assert added["LD_PRELOAD"] == f"libjemalloc.so.2:{LIBRARY}"
    assert 1 <= int(added["OPENBLAS_NUM_THREADS"]) <= 8
    assert [blas_threads(cores) for cores in (1, 2, 4, 64)] == [1, 1, 3, 8]
    assert openblas_variables({"OMP_NUM_THREADS": "3"}, LIBRARY) == {"LD_PRELOAD": str(LIBRARY)}
    assert openblas_variables({"LD_PRELOAD": "/opt/libmkl_rt.so"}, LIBRARY) == {}


def test_openblas_is_for_linux_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_environment, "find_openblas", lambda: LIBRARY)
    assert engine_environment(base={}, system="linux")["LD_PRELOAD"] == str(LIBRARY)
    assert "LD_PRELOAD" not in engine_environment(base={}, system="darwin")
