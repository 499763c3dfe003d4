"""`glmd bench simulate --calibrate` fits a device to measured steps."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from glmd.bench import calibrate
from glmd.bench.calibrate import FLASH, ModelSizes, fit
from glmd.bench.device_model import DEVICES, Device, StepCost, load_device
from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.cli.main import app

SMALL = ModelSizes(layers=5, dense=2e8, experts=4e8, expert_share=0.25, kv_token=5e4)


@pytest.mark.parametrize("sizes", [FLASH, SMALL], ids=["flash", "small"])
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_the_device_that_made_the_steps_is_found(sizes: ModelSizes, device: Device) -> None:
    row = device.row_ms * 1e-3 * sizes.row_bytes / FLASH.row_bytes

    def seconds(cost: StepCost, transfer: float, compute: float) -> float:
        kernels = sizes.layers * cost.dispatches * device.dispatch_us * 1e-6
        return max(transfer, compute) + kernels

    decode = [
        (cost, seconds(cost, sizes.step_bytes(cost) / device.bandwidth_gb * 1e-9, 0))
        for rows in (1, 2, 4, 8)
        for context in (100, 4000)
        for cost in [StepCost(rows, rows * context, 51 + 4 * rows)]
    ]
    prompts = [
        (cost, seconds(cost, 0, rows * row)) for rows in (512, 1024)
        for cost in [StepCost(rows, rows, 55)]
    ]  # fmt: skip
    found = fit("x", 1.0, sizes, decode, prompts)
    assert found.bandwidth_gb == pytest.approx(device.bandwidth_gb, rel=1e-3)
    assert found.dispatch_us == pytest.approx(device.dispatch_us, rel=1e-3)
    assert found.row_ms == pytest.approx(device.row_ms, rel=1e-3)


def test_steps_that_only_rows_explain_give_a_device_nevertheless() -> None:
    """On a CPU a step takes as long as its rows, whatever it reads."""
    steps = [(StepCost(rows, 100, 60), 1e-3 * rows) for rows in (1, 2, 4, 8)]
    found = fit("x", 1.0, SMALL, steps, [(StepCost(512, 512, 55), 0.5)])
    assert found.bandwidth_gb > 0
    assert found.dispatch_us > 0


def test_the_command_writes_a_device_that_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_checkpoint(tmp_path / "model", num_nextn_predict_layers=0)
    for name, value in {"BATCHES": (1, 3), "CONTEXTS": (16,), "PROMPTS": (64,)}.items():
        monkeypatch.setattr(calibrate, name, value)
    monkeypatch.setattr(calibrate, "STEPS", 3)
    file = tmp_path / "device.json"
    arguments = ["bench", "simulate", "--calibrate", str(file)]
    done = CliRunner().invoke(app, [*arguments, "--model", str(tmp_path / "model")])
    assert done.exit_code == 0, done.output
    device = load_device(file)
    assert msgspec.json.decode(file.read_bytes())["name"] == device.name
    assert device.name in done.output


@pytest.mark.parametrize(
    ("arguments", "field"),
    [(["--model", "demo"], "--model"), (["--calibrate", "a", "--device", "b"], "--device")],
)
def test_options_without_effect_are_refused(arguments: list[str], field: str) -> None:
    done = CliRunner().invoke(app, ["bench", "simulate", *arguments])
    assert done.exit_code
    assert str(done.exception or done.output).startswith((field, f"{field}:"))
