"""Budgets of kernels per layer. They go down, never up."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from glmd.bench.device_model import step_cost
from glmd.bench.graph import (
    GraphRow,
    LayerCounter,
    count_kernels,
    count_layers,
    decode_batch,
    gpu_kernels,
    start_streams,
)
from glmd.cli.main import app

BUDGETS = {
    "batch 1, own contexts": (44, 44),
    "batch 8, own contexts": (64, 72),
    "batch 8, shared prefix": (62, 70),
    "batch 1, 1 forked turn": (44, 44),
    "batch 1, 10 forked turns": (48, 48),
    "batch 1, 50 forked turns": (48, 48),
}
"""Without drafts, and with one draft of each sequence."""

MLA_KERNEL_BUDGETS = {"batch 1,": (28, 28), "batch 8,": (28, 36)}
"""With the MLA kernel, whatever the number of pieces."""

BOTH_KERNELS_BUDGET = 22
"""With the experts' kernels, too, whatever the number of rows."""


@cache
def _rows() -> dict[tuple[str, int], GraphRow]:
    rows = [row for only in ("batch 1,", "batch 8,") for row in count_layers(print, only=only)]
    return {(row.workload, row.drafts): row for row in rows}


@pytest.mark.parametrize("drafts", [0, 1])
@pytest.mark.parametrize("workload", BUDGETS)
def test_a_layer_launches_no_more_kernels_than_its_budget(workload: str, drafts: int) -> None:
    assert _rows()[workload, drafts].kernels <= BUDGETS[workload][drafts]


@pytest.mark.parametrize("drafts", [0, 1])
@pytest.mark.parametrize("workload", BUDGETS)
def test_with_the_mla_kernel_pieces_cost_no_kernels(workload: str, drafts: int) -> None:
    (budget,) = (b[drafts] for batch, b in MLA_KERNEL_BUDGETS.items() if workload.startswith(batch))
    assert _rows()[workload, drafts].with_mla_kernel <= budget
    assert _rows()[workload, drafts].with_both <= BOTH_KERNELS_BUDGET


def test_one_sequence_takes_no_more_kernels_than_in_mlx_lm() -> None:
    row = _rows()["batch 1, own contexts", 0]
    assert row.mlx_lm is not None
    assert row.kernels <= row.mlx_lm


def test_fifty_forked_turns_cost_little_more_than_one() -> None:
    rows = _rows()
    one, fifty = (rows[f"batch 1, {turns}", 0] for turns in ("1 forked turn", "50 forked turns"))
    assert fifty.kernels <= 1.2 * one.kernels


@pytest.mark.parametrize(("streams", "shared"), [(1, 0), (4, 0), (8, 0), (8, 2000), (16, 0)])
def test_the_device_model_counts_about_as_many_kernels(streams: int, shared: int) -> None:
    own = 200 if streams > 8 else 1000
    simulation = start_streams(streams, shared=shared, own=own, output=150)
    with gpu_kernels():
        counter = LayerCounter()
        for mla, experts in itertools.product((False, True), repeat=2):
            batch = decode_batch(simulation, 1, mla_kernel=mla)
            cost = step_cost(batch, 0, experts_kernel=experts)
            counted = counter.glmd(simulation, 1, mla_kernel=mla, experts_kernel=experts)
            assert cost.dispatches == pytest.approx(counted, rel=0.1)


def test_views_are_free_and_a_concatenation_is_a_copy_of_each_input() -> None:
    x, weight = mx.ones((4, 8)), mx.ones(8)
    mx.eval(x, weight)
    assert count_kernels(x.T[1:3].reshape(-1, 2)) == 0
    assert count_kernels(mx.concatenate([x, x[:1], x[1:]])) == 3
    assert count_kernels(mx.exp(x) @ x.T) == 2
    with gpu_kernels():
        normed = mx.fast.rms_norm(x, weight, 1e-5)
        assert count_kernels(normed) == 1
    assert count_kernels(mx.fast.rms_norm(x, weight, 1e-5)) != 1 or mx.metal.is_available()


def test_the_command_writes_rows(tmp_path: Path) -> None:
    report = tmp_path / "rows.json"
    arguments = ["bench", "kernels", "--only", "1 forked turn", "--json", str(report)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert [row["drafts"] for row in json.loads(report.read_text())] == [0, 1]
