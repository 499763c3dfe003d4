"""`glmd doctor`: each check finds its problem and names the remedy."""

from __future__ import annotations

import json
import platform
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from live import live_server
from paths import TESTS
from typer.testing import CliRunner

from glmd.cli import daemon
from glmd.cli.doctor import Finding
from glmd.cli.doctor import doctor as command
from glmd.config import Settings

# `from glmd.cli import doctor` may be the command.
doctor: Any = import_module("glmd.cli.doctor")

GIB = 2**30
REAL_CONFIG = TESTS / "fixtures" / "glm-4.7-flash" / "config.json"


def assert_problem(finding: Finding, found: str, advice: str) -> None:
    assert finding.verdict == "problem"
    assert found in finding.found
    assert finding.advice is not None
    assert advice in finding.advice


@pytest.fixture(scope="module")
def device() -> Any:
    return doctor.check_device()


def test_mlx_is_checked_in_another_process(device: tuple[object, Finding]) -> None:
    report, finding = device
    assert isinstance(report, dict)
    assert report["budget"] > 0
    assert report["device"] in finding.found
    assert finding.verdict == ("ok" if report["gpu"] else "warning")
    code = "import glmd.cli.doctor, sys; sys.exit('mlx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_openblas_is_a_warning_on_a_linux_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(doctor, "find_openblas", lambda: None)
    (finding,) = doctor.check_blas({"gpu": False})
    assert finding.verdict == "warning"
    assert "apt install libopenblas0" in finding.advice
    monkeypatch.setattr(doctor, "find_openblas", lambda: Path("/usr/lib/libopenblas.so.0"))
    (finding,) = doctor.check_blas({"gpu": False})
    assert finding.verdict == "ok"
    assert doctor.check_blas({"gpu": True}) == doctor.check_blas(None) == []
    monkeypatch.setattr(sys, "platform", "darwin")
    assert doctor.check_blas({"gpu": False}) == []


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("raise ImportError('no libmlx')", "ImportError: no libmlx"),
        ("import os; os.abort()", "signal 6"),
        ('print(\'{"wrong_bits": [5], "gpu": true, "device": "x"}\')', "wrong 5-bit products"),
    ],
)
def test_a_failing_mlx_is_a_problem_and_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, found: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{program}\n")
    python.chmod(0o755)
    monkeypatch.setattr(doctor.sys, "executable", str(python))
    assert_problem(doctor.check_device()[1], found, "force-reinstall")


@pytest.mark.parametrize(
    ("machine", "release", "verdict"),
    [
        ("arm64", "15.1", "ok"),
        ("arm64", "26.0", "ok"),
        ("arm64", "14.7", "warning"),
        ("arm64", "13.6", "problem"),
        ("x86_64", "15.1", "problem"),
    ],
)
def test_verdict_depends_on_machine_and_macos_version(
    monkeypatch: pytest.MonkeyPatch, machine: str, release: str, verdict: str
) -> None:
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "mac_ver", lambda: (release, ("", "", ""), ""))
    finding = doctor.check_system()
    assert finding.verdict == verdict
    assert (finding.advice is None) == (verdict == "ok")
    assert release in finding.found


@pytest.mark.parametrize(
    ("limit", "verdict", "found"),
    [
        ("0", "ok", "(iogpu.wired_limit_mb): macOS's default"),
        ("26000", "ok", "(iogpu.wired_limit_mb): 26,000 MB"),
        ("32000", "warning", "(iogpu.wired_limit_mb): 32,000 MB"),
    ],
)
def test_a_too_large_gpu_limit_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, verdict: str, found: str
) -> None:
    sysctl = tmp_path / "sysctl"
    sysctl.write_text(f"#!/bin/sh\ntest $2 = iogpu.wired_limit_mb && echo {limit}\n")
    sysctl.chmod(0o755)
    monkeypatch.setattr(doctor, "SYSCTL", str(sysctl))
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    memory = SimpleNamespace(total=32 * GIB, available=20 * GIB)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory)
    finding = doctor.check_memory(21 * GIB)
    assert (finding.verdict, found in finding.found) == (verdict, True)
    if verdict == "warning":
        assert "sudo sysctl iogpu.wired_limit_mb=28672" in (finding.advice or "")


def test_a_complete_model_that_fits_is_ok_with_its_room_for_tokens(random_checkpoint: Path) -> None:
    finding = doctor.check_model(str(random_checkpoint), GIB)
    assert finding.verdict == "ok"
    assert "GiB of weights, room for at most" in finding.found


def test_a_model_beyond_the_budget_is_a_problem(random_checkpoint: Path) -> None:
    finding = doctor.check_model(str(random_checkpoint), 1000)
    assert_problem(finding, "GiB of weights, memory budget", "iogpu.wired_limit_mb")


def test_ranks_divide_the_model_or_are_a_problem(random_checkpoint: Path) -> None:
    whole = doctor.check_model(str(random_checkpoint), GIB)
    finding = doctor.check_model(str(random_checkpoint), 2 * GIB, {"ranks": 2})
    assert finding.verdict == whole.verdict
    assert "on each of 2 ranks, room for" in finding.found
    finding = doctor.check_model(str(random_checkpoint), GIB, {"ranks": 3})
    assert_problem(finding, "among 3 ranks. Use 2 or 4", "leave it out")


def test_a_damaged_file_is_named(tmp_path: Path, random_checkpoint: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in random_checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_problem(doctor.check_model(str(folder), None), weights.name, "again")


def test_a_folder_without_weights_and_a_missing_folder_are_problems(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(REAL_CONFIG.read_bytes())
    assert_problem(doctor.check_model(str(tmp_path), None), "no model*", "again")
    assert_problem(doctor.check_model("/no/where/at/all", None), "no such file", "again")


def test_a_model_that_is_not_downloaded_is_a_warning_unless_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(doctor, "DOWNLOAD_BYTES", 1)
    finding = doctor.check_model("owner/name", None)
    assert finding.verdict == "warning"
    assert "glmd pull owner/name" in (finding.advice or "")
    monkeypatch.setattr(doctor, "DOWNLOAD_BYTES", 10**18)
    assert_problem(doctor.check_model("owner/name", None), "GiB free", "HF_HOME")


def test_a_port_in_use_is_a_problem() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        # Accepts connections, and never responds.
        finding = doctor.check_port("127.0.0.1", port)
    assert_problem(finding, f"port {port}: Address already in use", "--port")
    assert doctor.check_port("127.0.0.1", 0).verdict == "ok"


def test_a_port_that_glmd_uses_is_ok() -> None:
    with live_server() as live:
        port = int(live.url.rpartition(":")[2])
        finding = doctor.check_port("127.0.0.1", port)
    assert finding == Finding("port", "ok", f"127.0.0.1 port {port} serves test/tiny through glmd")


def test_a_bad_setting_is_quoted_and_defaults_are_checked(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("prot = 1\n")
    settings, finding = doctor.check_settings({}, config)
    assert settings == Settings()
    assert_problem(finding, "did you mean port?", "Correct this setting")


def test_a_machine_without_service_manager_is_ok(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(daemon, "BOOTED", tmp_path / "nothing")
    assert doctor.check_service().verdict == "ok"


def test_an_error_of_the_service_manager_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = doctor.check_service()
    assert finding.verdict == "warning"
    assert "No launchctl on the PATH" in finding.found


def test_a_low_limit_of_open_files_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (256, -1))
    finding = doctor.check_open_files()
    assert finding.verdict == "warning"
    assert "ulimit -n" in (finding.advice or "")


def test_exit_code_is_1_for_problems_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: tuple[object, Finding]
) -> None:
    monkeypatch.setattr(doctor, "check_device", lambda: device)
    monkeypatch.setattr(doctor, "check_service", lambda: Finding("service", "ok", "none"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    app = typer.Typer()
    app.command()(command)
    run = CliRunner(env={"COLUMNS": "200"})
    done = run.invoke(app, ["/no/where", "--port", "0", "--json"])
    assert done.exit_code == 1
    report = json.loads(done.output)
    assert report["verdict"] == "problem"
    names = [finding["name"] for finding in report["findings"] if finding["name"] != "blas"]
    assert names == [
        "versions", "system", "device", "dtype", "settings", "memory", "model", "port", "service",
        "open files",
    ]  # fmt: skip
    shown = run.invoke(app, ["/no/where", "--port", "0"])
    assert shown.exit_code == 1
    assert "→ Download or convert the model again." in shown.output
    monkeypatch.setattr(doctor, "check_model", lambda *_: Finding("model", "warning", "x", "y"))
    assert run.invoke(app, ["--port", "0"]).exit_code == 0


TIMES = {"dense": 1.0, "8-bit": 2.0, "8-bit, one row": 0.1}


def measured(ratio: float, *, gpu: bool = True) -> dict[str, Any]:
    """A report in which float16 takes `ratio` of the time of bfloat16."""
    dtypes = {kind: {"bfloat16": ms, "float16": ratio * ms} for kind, ms in TIMES.items()}
    return {"gpu": gpu, "dtypes": dtypes}


def test_products_in_both_dtypes_are_timed_on_this_machine(device: tuple[Any, Finding]) -> None:
    report, _ = device
    assert all(
        0 < found[dtype] < 60_000
        for found in report["dtypes"].values()
        for dtype in ("bfloat16", "float16")
    )
    (finding,) = doctor.check_dtype(report, "auto")
    assert "8-bit, one row" in finding.found


@pytest.mark.parametrize(
    ("ratio", "setting", "advised"),
    [
        (0.6, "auto", "float16"),
        (0.6, "bfloat16", "float16"),
        (0.6, "float16", None),
        (0.95, "auto", None),
        (1.05, "float16", None),
        (1.6, "auto", None),
        (1.6, "float16", "auto"),
    ],
)
def test_the_faster_dtype_is_advised_on_a_gpu(
    ratio: float, setting: str, advised: str | None
) -> None:
    (finding,) = doctor.check_dtype(measured(ratio), setting)
    if advised is None:
        assert (finding.verdict, finding.advice) == ("ok", None)
    else:
        assert finding.verdict == "warning"
        assert finding.advice.startswith(f"Set dtype = {advised} ")
    (finding,) = doctor.check_dtype(measured(ratio, gpu=False), setting)
    assert (finding.verdict, finding.advice) == ("ok", None)
