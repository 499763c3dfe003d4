"""`glmd bench simulate`: the device model, the virtual clock and the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mlx_lm.models.glm4_moe_lite import ModelArgs
from paths import ROOT
from typer.testing import CliRunner

from glmd.bench.device_model import (
    BASE_DISPATCHES,
    DENSE_BYTES,
    DEVICES,
    EXPERTS_BYTES,
    KV_TOKEN_BYTES,
    LAYERS,
    LINKS,
    WEIGHT_BYTES,
    Ranks,
    StepCost,
    computed_rows,
    expert_bytes,
    load_device,
    model_args,
)
from glmd.bench.simulate import simulate
from glmd.bench.simulation import Simulation
from glmd.cli.main import app
from glmd.convert.inspect import inspect
from glmd.errors import SettingsError
from glmd.ipc import TokenArray
from glmd.model.moe import SORTED_ROWS

CONFIG = ROOT / "tests" / "fixtures" / "glm-4.7-flash" / "config.json"
MAX = DEVICES[1]


def model_tokens(count: int) -> TokenArray:
    return np.arange(1, count + 1, dtype=np.int32)


def test_sizes_are_those_of_the_published_model() -> None:
    config = json.loads(CONFIG.read_text())
    args = model_args()
    for name in ModelArgs.__dataclass_fields__:
        if config.get(name) is not None:
            assert getattr(args, name) == config[name], name
    assert inspect(CONFIG).main.nbytes == WEIGHT_BYTES
    width = args.kv_lora_rank + args.qk_rope_head_dim
    assert args.num_hidden_layers * width * 2 == KV_TOKEN_BYTES


def test_a_plain_step_reads_four_experts_and_is_bound_by_dispatches_too() -> None:
    step = StepCost(rows=1, kv_tokens=0, dispatches=BASE_DISPATCHES)
    assert step.nbytes == pytest.approx(3.16e9, rel=0.02)
    assert step.seconds(MAX) == pytest.approx(7.3e-3 + 2.9e-3, rel=0.02)


def test_rows_read_experts_one_by_one_only_where_padding_to_groups_does_not_pay() -> None:
    """Grouped rows read each expert once; padding costs operations, so it begins at 16 rows."""
    assert expert_bytes(7) < expert_bytes(8) < expert_bytes(15)
    assert expert_bytes(15) == pytest.approx(15 * 4 / 64 * EXPERTS_BYTES)
    assert expert_bytes(16) == pytest.approx((1 - (60 / 64) ** 16) * EXPERTS_BYTES)
    assert expert_bytes(64) == pytest.approx(EXPERTS_BYTES, rel=0.02)
    assert computed_rows(15) == 15
    assert 16 < computed_rows(16) < computed_rows(63) < computed_rows(64) == 64
    for rows in (8, 15, 16, 63):
        unused = (60 / 64) ** rows
        assert expert_bytes(rows, kernel=True) == pytest.approx((1 - unused) * EXPERTS_BYTES)
        assert computed_rows(rows, kernel=True) == rows
    for device in DEVICES:
        for rows in range(SORTED_ROWS, 64):
            step = StepCost(rows, kv_tokens=0, dispatches=BASE_DISPATCHES)
            dense, pairs = DENSE_BYTES, rows * 4 / 64
            ungrouped = (dense + EXPERTS_BYTES * min(pairs, 2.2)) / (device.bandwidth_gb * 1e9)
            ungrouped += LAYERS * BASE_DISPATCHES * device.dispatch_us * 1e-6
            assert step.seconds(device) <= 1.01 * ungrouped, (device.name, rows)


def test_the_clock_advances_by_the_steps_of_the_model() -> None:
    sim = Simulation(MAX)
    stream = sim.submit(model_tokens(100), 5, after=3.0)
    sim.run()
    assert len(stream.times) == 5
    assert [step.prefill_rows for step in sim.steps] == [100, 0, 0, 0, 0]
    assert stream.times[0] == pytest.approx(3.0 + sim.steps[0].seconds)
    assert stream.times[-1] - 3.0 == pytest.approx(sum(step.seconds for step in sim.steps))
    assert not sim.scheduler.running


def test_a_cached_prompt_is_not_computed_again() -> None:
    sim = Simulation(MAX)
    for _ in range(2):
        sim.submit(model_tokens(1000), 2)
        sim.run()
    assert [step.prefill_rows for step in sim.steps if step.prefill_rows] == [1000]


def test_one_run_equals_the_next() -> None:
    first, second = (simulate((MAX,), lambda line: None, only="crowd") for _ in range(2))
    assert first == second


def test_the_command_writes_rows(tmp_path: Path) -> None:
    device, report = tmp_path / "device.json", tmp_path / "rows.json"
    device.write_text('{"name": "own", "bandwidth_gb": 100, "row_ms": 1, "memory_gib": 30}')
    arguments = ["bench", "simulate", "--device", str(device), "--only", "crowd"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(report)])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(report.read_text())
    assert {
        "device", "scenario", "streams", "ttft_s", "ttft_ratio", "stream_rate", "gap_p99_ms",
        "gap_max_ms", "steps", "rows_median", "pieces_max", "dispatches_per_layer",
    } <= row.keys()  # fmt: skip
    assert (row["device"], row["scenario"], row["streams"]) == ("own", "crowd", 1)


@pytest.mark.parametrize("text", ["{", '{"name": "x"}', '{"name": "x", "unknown": 1}'])
def test_an_invalid_device_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "device.json"
    file.write_text(text)
    with pytest.raises(SettingsError, match="--device"):
        load_device(file)


def test_ranks_divide_what_they_read_and_pay_for_their_sums() -> None:
    step = StepCost(rows=1, kv_tokens=0, dispatches=BASE_DISPATCHES)
    fast = Ranks(2, LINKS["thunderbolt"])
    sums = 95 * 30e-6 + 94 * 4096 / 6e9
    read = (0.5e9 + (step.nbytes - 0.5e9) / 2) / 430e9
    dispatches = LAYERS * BASE_DISPATCHES * 1.5e-6
    assert step.seconds(MAX, fast) == pytest.approx(read + dispatches + sums, rel=0.001)
    assert step.seconds(MAX, Ranks(2, LINKS["10gbe"])) > 3 * step.seconds(MAX)
    prompt = StepCost(rows=2048, kv_tokens=2048, dispatches=BASE_DISPATCHES)
    assert prompt.seconds(MAX, fast) < 0.65 * prompt.seconds(MAX)


def test_the_command_compares_ranks_with_one_mac(tmp_path: Path) -> None:
    device, link, out = (tmp_path / name for name in ("mac.json", "link.json", "rows.json"))
    device.write_text('{"name": "M2 Ultra", "bandwidth_gb": 640, "row_ms": 0.9, "memory_gib": 144}')
    link.write_text('{"name": "40 Gb Ethernet", "latency_us": 100, "bandwidth_gb": 4}')
    command = ["bench", "simulate", "--device", str(device), "--json", str(out)]
    done = CliRunner().invoke(app, [*command, "--ranks", "2", "--link", str(link)])
    assert done.exit_code == 0, done.output
    assert "40 Gb Ethernet" in done.output
    alone, group = json.loads(out.read_text())
    assert (alone["ranks"], group["ranks"]) == (1, 2)
    assert group["kv_tokens"] > alone["kv_tokens"]
    for wrong in (["--ranks", "3", "--link", "10gbe"], ["--ranks", "2"], ["--link", "10gbe"]):
        assert CliRunner().invoke(app, [*command, *wrong]).exit_code != 0


@pytest.mark.parametrize("option", ["--only=forks", "--no-mla-kernel", "--experts-kernel"])
@pytest.mark.parametrize("mode", ["--ranks=2 --link=10gbe", "--calibrate=device.json"])
def test_options_that_a_mode_would_ignore_are_refused(mode: str, option: str) -> None:
    with pytest.raises(SettingsError, match=mode.partition("=")[0]):
        CliRunner().invoke(
            app, ["bench", "simulate", *mode.split(), option], catch_exceptions=False
        )
