"""`glmd convert` and `glmd inspect`, as typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from paths import ROOT, TESTS
from typer.testing import CliRunner

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.checkpoint.config import load_config
from glmd.cli.convert import convert, inspect
from glmd.errors import CheckpointError, ModelNotFound, SettingsError

REAL = TESTS / "fixtures" / "glm-4.7-flash"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    write_random_checkpoint(folder)
    return folder


def _glmd(*arguments: object) -> str:
    app = typer.Typer()
    app.command()(convert)
    app.command()(inspect)
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def _json(*arguments: object) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(_glmd("inspect", *arguments, "--json"))
    return value


def test_inspect_tells_the_real_models_size_from_its_config_alone() -> None:
    for path in (REAL, REAL / "config.json"):
        text = _glmd("inspect", path)
        main = next(line for line in text.splitlines() if line.startswith("main model"))
        assert main.split()[2:] == ["29,943,393,920", "21,402,104,832", "19.932", "5.718"]
        assert "643,706,176" in text


def test_inspect_tells_machines_the_same() -> None:
    found = _json(REAL, "--recipe", "mixed-8-5")
    assert found["main"]["bytes"] == 21_402_104_832
    assert round(found["main"]["bits_per_weight"], 3) == 5.718
    assert sum(line["bytes"] for line in found["components"]) == found["main"]["bytes"]
    assert found["mtp"]["parameters"] + found["mtp_vocabulary"]["parameters"] == 1_278_094_656
    assert found["stored"] is None
    assert _json(REAL, "--recipe", "bf16")["main"]["bits_per_weight"] > 16


def test_convert_then_inspect_agree_on_the_bytes(source: Path, tmp_path: Path) -> None:
    said = _glmd("convert", source, tmp_path / "out")
    assert said.splitlines() == [
        f"{tmp_path / 'out'}: 0.00124 GB (0.00116 GiB), 7.240 bits per weight."
    ]
    before, after = _json(source), _json(tmp_path / "out")
    for part in ("components", "main", "mtp"):
        assert before[part] == after[part]
    assert (before["recipe"], after["recipe"]) == ("mixed-8-5", None)
    assert after["stored"]["main_bytes"] == after["main"]["bytes"]
    assert before["stored"]["main_bytes"] == before["stored"]["main_planned"] == 2_013_760
    assert "exactly what config.json implies" in _glmd("inspect", tmp_path / "out")


def test_inspect_reports_a_difference_between_files_and_config(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "in", dtype="F32")
    assert "where config.json implies 2,013,760" in _glmd("inspect", tmp_path / "in")


def test_recipe_and_mtp_flags_take_effect(source: Path, tmp_path: Path) -> None:
    _glmd("convert", source, tmp_path / "out", "--recipe", "uniform-4", "--no-mtp")
    config = load_config(tmp_path / "out")
    assert config.quantization is not None
    assert config.quantization.default.bits == 4
    assert config.mtp is None
    said = _glmd("convert", "--mtp-only", source, tmp_path / "out", "--recipe", "uniform-4")
    assert "MTP layer added" in said
    assert load_config(tmp_path / "out").mtp is not None


def test_wrong_arguments_are_refused_before_anything_is_downloaded_or_written(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="did you mean mixed-8-5"):
        _glmd("convert", "no-one/has-this", tmp_path / "out", "--recipe", "mixed-85")
    with pytest.raises(CheckpointError, match="exists already"):
        _glmd("convert", "no-one/has-this", tmp_path)
    with pytest.raises(ModelNotFound, match="There is no folder"):
        _glmd("convert", tmp_path / "nothing", tmp_path / "out")
    _glmd("convert", source, tmp_path / "out")
    with pytest.raises(SettingsError, match="quantised already"):
        _glmd("inspect", tmp_path / "out", "--recipe", "bf16")


def test_inspecting_needs_no_mlx() -> None:
    code = (
        "import sys; from glmd.cli.convert import convert; from glmd.cli.convert import inspect;"
        f"inspect({str(REAL)!r}); assert not any(m.split('.')[0] == 'mlx' for m in sys.modules)"
    )
    env = {"PYTHONPATH": str(ROOT / "server")}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True)


@pytest.mark.parametrize(
    ("memory", "recipe", "tokens", "mtp"),
    [(32, "mixed-8-5", 36_000, "left out"), (36, "mixed-8-5", 100_000, "loaded"),
     (24, "mixed-8-3", 16_000, "loaded")],
)  # fmt: skip
def test_inspect_tells_what_fits_a_mac(
    memory: int, recipe: str, tokens: int, mtp: str, tmp_path: Path
) -> None:
    arguments = ["inspect", REAL / "config.json", "--memory", memory, "--recipe", recipe]
    _glmd(*arguments, "--json", tmp_path / "fit.json")
    fit = json.loads((tmp_path / "fit.json").read_text())
    assert fit["kv_tokens"] >= tokens
    assert fit["mtp"] == mtp
    assert fit["kv_bytes_per_token"] <= 29_400
    used = fit["weight_bytes"] + fit["working_bytes"]
    used += fit["kv_tokens"] * fit["kv_bytes_per_token"]
    assert used <= fit["budget_bytes"]
    assert f"{fit['kv_tokens']:,} tokens" in _glmd(*arguments)
    more = json.loads(_glmd(*arguments, "--kv-bits", "4", "--json"))
    assert more["kv_bytes_per_token"] <= 16_400
