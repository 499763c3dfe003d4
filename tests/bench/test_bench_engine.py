"""The engine benchmark measures both backends with the same workloads."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np
import pytest

from glmd.bench import workloads
from glmd.bench.backends import GlmdBackend, MlxLmBackend
from glmd.bench.engine import EngineReport, Metric, bench_engine, measured_workloads
from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.bench.runner import Backend, RequestTrace, RunTrace, run, same_answers
from glmd.bench.workloads import Prompts, Request, unique_tokens
from glmd.errors import SettingsError

VOCAB = 512
SCALE = 0.02


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(folder, vocab_size=VOCAB, num_nextn_predict_layers=0)
    return folder


def bench(checkpoint: Path, scale: float, only: str) -> EngineReport:
    return bench_engine(
        checkpoint, scale=scale, repeat=1, only=only, mtp=True, on_progress=lambda line: None
    )


@pytest.fixture(scope="module")
def backends(checkpoint: Path) -> tuple[Backend, Backend]:
    return GlmdBackend(checkpoint, "float32"), MlxLmBackend(checkpoint, mx.float32)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def request_trace(prompt: np.ndarray, arrived: float, times: list[float]) -> RequestTrace:
    trace = RequestTrace(Request(prompt, len(times)), arrived)
    trace.times, trace.tokens, trace.ended = times, list(range(len(times))), times[-1]
    return trace


def test_unique_tokens_count_every_common_prefix_once() -> None:
    assert unique_tokens([ids(1, 2, 3), ids(1, 2, 4, 5), ids(1, 2), ids(7)]) == 6
    assert unique_tokens([ids(1, 2), ids(1, 2)]) == 2
    assert unique_tokens([]) == 0


def test_decode_rate_counts_only_while_all_streams_decode() -> None:
    early, late = (
        request_trace(ids(1), 0, [1, 2, 3, 4, 5]),
        request_trace(ids(2), 0, [3, 4, 5, 6, 7]),
    )
    assert RunTrace([[early, late]]).decode_rate() == pytest.approx(4 / 2)


def test_longest_gap_is_measured_on_the_first_wave_until_the_first_token() -> None:
    stream = request_trace(ids(1), 0, [1, 2, 3, 7, 8, 20])
    newcomer = request_trace(ids(2), 3.5, [7.5, 30])
    trace = RunTrace([[stream], [newcomer]])
    assert trace.longest_gap() == 4  # from 3 to 7; later gaps do not count
    assert trace.median_step() == 1


def test_a_metric_is_met_by_bound_and_ratio_together() -> None:
    metric = Metric("x", "s", "lower", lambda trace: 0.0, ratio=2.0, bound=3.0)
    assert metric.met(3.0, metric.advantage(3.0, 6.0))
    assert not metric.met(3.1, metric.advantage(3.1, 9.0))
    assert not metric.met(3.0, metric.advantage(3.0, 5.0))


def test_both_backends_get_the_same_prompts_and_give_the_same_answers(
    backends: tuple[Backend, Backend],
) -> None:
    workload = workloads.shared_prefix(Prompts(VOCAB, SCALE), rows=4, new=12)
    ours, theirs = (run(backend, workload) for backend in backends)
    assert [len(x.tokens) for x in ours.requests] == [len(x.tokens) for x in theirs.requests]
    assert same_answers(ours, theirs) == 1.0


def test_computed_prompt_tokens_are_counted_on_both_backends(
    backends: tuple[Backend, Backend],
) -> None:
    workload = workloads.ragged(Prompts(VOCAB, SCALE), new=4)
    prompts = [r.prompt for wave in workload.waves for r in wave.requests]
    ours, theirs = (run(backend, workload).computed for backend in backends)
    assert ours == unique_tokens(prompts)  # short random prompts may share a token or two
    assert theirs == sum(map(len, prompts))


def test_a_continued_conversation_is_cached_on_both_backends(
    backends: tuple[Backend, Backend],
) -> None:
    workload = workloads.returning(Prompts(VOCAB, SCALE))
    first = len(workload.waves[0].requests[0].prompt)
    for backend in backends:
        assert run(backend, workload).waves[-1][0].cached == first


def test_all_workloads_run_to_their_end_on_both_backends(checkpoint: Path) -> None:
    """Workloads with an 8 in their name, without the slow one."""
    report = bench_engine(
        checkpoint, scale=SCALE, repeat=1, only="8", mtp=True, on_progress=lambda line: None
    )
    expected = [
        (workload.name, metric.name)
        for workload, metrics in measured_workloads(Prompts(VOCAB, SCALE), 1)
        if "8" in workload.name
        for metric in metrics
    ]
    assert [(row.workload, row.goal) for row in report.rows] == expected
    assert all(row.glmd == median(ours for ours, _ in row.runs) for row in report.rows)


def test_a_checkpoint_is_measured_beyond_its_context(tmp_path: Path) -> None:
    context = 64
    write_random_checkpoint(
        tmp_path, vocab_size=VOCAB, num_nextn_predict_layers=0, max_position_embeddings=context
    )
    report = bench(tmp_path, SCALE, "one row at 8k")
    assert round(8192 * SCALE) > context
    assert report.same_answers == 1.0
    assert all(rate > 0 for row in report.rows for rate in (row.glmd, row.mlx_lm))


def test_an_unknown_workload_is_rejected(checkpoint: Path) -> None:
    with pytest.raises(SettingsError, match="nonsense"):
        bench(checkpoint, 1.0, "nonsense")
