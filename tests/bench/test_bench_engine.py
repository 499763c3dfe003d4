"""The engine benchmark measures both backends with the same workloads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np
import pytest

from glmd.bench import engine, workloads
from glmd.bench.backends import GlmdBackend, GlmdSession, MlxLmBackend
from glmd.bench.engine import EngineReport, Metric, bench_engine, make_row, measured_workloads
from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.bench.report import console, engine_table
from glmd.bench.runner import (
    Backend,
    NotMeasured,
    RequestProgress,
    RequestTrace,
    RunTrace,
    run,
    same_answers,
)
from glmd.bench.workloads import EARLY_TOKENS, Prompts, Request, unique_tokens
from glmd.checkpoint.hub import DEMO
from glmd.cli.bench import checkpoint_folder
from glmd.engine.config import EngineConfig
from glmd.engine.core import Engine
from glmd.errors import SettingsError
from glmd.ipc import TokenArray
from glmd.model.loader import load_model

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


@dataclass
class Staggered:
    """A backend and its session: one more prompt ends in every `interval` steps.

    Attributes:
        slots: requests that run at the same time.
    """

    interval: int
    slots: int = 1 << 10
    name: str = "staggered"
    kv_bytes: int = 0
    computed: int = 0
    idle_kv_bytes: int = 0
    idle_kv_arrays: int = 0
    _waiting: list[int] = field(default_factory=list)
    _left: dict[int, int] = field(default_factory=dict)
    _limits: dict[int, int] = field(default_factory=dict)
    _steps: int = 0

    def open(self) -> Staggered:
        return self

    def submit(self, request: int, prompt: TokenArray, max_tokens: int) -> None:
        self._waiting.append(request)
        self._limits[request] = max_tokens

    def cancel(self, request: int) -> None:
        self._left.pop(request, None)
        self._waiting = [each for each in self._waiting if each != request]

    def step(self) -> list[RequestProgress]:
        self._steps += 1
        if self._waiting and self._steps % self.interval == 0 and len(self._left) < self.slots:
            request = self._waiting.pop(0)
            self._left[request] = self._limits[request]
        self.kv_bytes = len(self._left)
        out = []
        for request in list(self._left):
            self._left[request] -= 1
            ended = not self._left[request]
            out.append(RequestProgress(request, (request,), ended=ended))
            if ended:
                del self._left[request]
        return out

    def close(self) -> None:
        pass


RATE = Metric("decode", "tokens/s", "higher", RunTrace.decode_rate, ratio=1.0)


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


def test_streams_decode_together_however_late_the_last_begins() -> None:
    for workload in (
        workloads.decode(Prompts(VOCAB, SCALE), 32, window=48),
        workloads.shared_prefix(Prompts(VOCAB, SCALE), window=48),
        workloads.ragged(Prompts(VOCAB, SCALE), window=48),
    ):
        trace = run(Staggered(interval=4), workload)
        wave = trace.waves[-1]
        start = max(request.times[0] for request in wave)
        assert len(wave[0].times) > 48 + 4 * (len(wave) - 1)
        assert all(sum(time > start for time in request.times) == 48 for request in wave)
        assert trace.decode_rate() > 0
        assert trace.kv_bytes >= len(wave)
        assert trace.least_kv_tokens() > 0


def test_a_rate_without_a_window_is_not_measured_and_says_why() -> None:
    early, late = request_trace(ids(1), 0, [1, 2, 3]), request_trace(ids(2), 0, [3, 4])
    with pytest.raises(NotMeasured, match="0 of 1 tokens while all 2 decoded"):
        RunTrace([[early, late]]).decode_rate()
    short = request_trace(ids(1), 0, [1, 2, 3, 4, 5])
    with pytest.raises(NotMeasured, match="1 of 4 tokens"):
        RunTrace([[short, late]], window=4).decode_rate()
    trace = RunTrace([[early, late]])
    with pytest.raises(NotMeasured, match="never decoded at the same time"):
        trace.least_kv_tokens()
    silent = RequestTrace(Request(ids(1), 1), 0)
    for read in (RunTrace.decode_rate, RunTrace.overall_rate, RunTrace.first_token_seconds):
        with pytest.raises(NotMeasured, match="1 of 1 requests got no token"):
            read(RunTrace([[silent]]))


def test_a_backend_that_cannot_run_all_streams_ends_without_a_rate() -> None:
    trace = run(Staggered(interval=1, slots=2), workloads.decode(Prompts(VOCAB, 0), 3, window=2))
    assert len(trace.requests[0].tokens) == EARLY_TOKENS + 2
    with pytest.raises(NotMeasured, match="1 of 3 requests got no token"):
        trace.decode_rate()


def test_a_row_is_empty_if_any_run_was_not_measured() -> None:
    good = RunTrace([[request_trace(ids(1), 0, [1, 2, 3])]])
    empty = RunTrace([[request_trace(ids(1), 0, [1, 2]), request_trace(ids(2), 0, [3, 4])]])
    row = make_row("w", RATE, [(good, good), (empty, good)])
    assert (row.glmd, row.other, row.advantage, row.met) == (None, 1.0, None, None)
    assert row.runs == [(1.0, 1.0), (None, 1.0)]
    assert row.reasons == ["glmd, run 2: a request had 0 of 1 tokens while all 2 decoded"]
    theirs = make_row("w", RATE, [(good, empty)])
    assert (theirs.glmd, theirs.other, theirs.met) == (1.0, None, None)
    with (screen := console()).capture() as printed:
        screen.print(
            engine_table(EngineReport(("glmd", "mlx-lm"), "float32", True, 1, 1, 1.0, [row]))
        )
    assert "–" in printed.get()
    assert f"w, decode: {row.reasons[0]}" in printed.get()


def test_longest_gap_is_measured_on_the_first_wave_until_the_first_token() -> None:
    stream = request_trace(ids(1), 0, [1, 2, 3, 7, 8, 20])
    newcomer = request_trace(ids(2), 3.5, [7.5, 30])
    trace = RunTrace([[stream], [newcomer]])
    assert trace.longest_gap() == 4  # from 3 to 7; later gaps do not count
    assert trace.median_step() == 1


def test_gaps_of_streams_that_ended_are_not_measured() -> None:
    ended = request_trace(ids(1), 0, [1, 2, 3])
    newcomer = request_trace(ids(2), 2.5, [7.5])
    with pytest.raises(NotMeasured, match="ended before the first token"):
        RunTrace([[ended], [newcomer]]).longest_gap()
    with pytest.raises(NotMeasured, match="no two tokens"):
        RunTrace([[request_trace(ids(1), 0, [3, 4])], [newcomer]]).median_step()


def test_a_prompt_cancelled_too_late_gives_no_cached_share() -> None:
    prompt = np.arange(100, dtype=np.int32)
    cancelled = RequestTrace(Request(prompt, 1, cancel_at=0.75), 0, prefilled=75, ended=1)
    again = RequestTrace(Request(prompt, 1), 1, [5], [2.0], cached=75, ended=2)
    assert RunTrace([[cancelled], [again]]).cached_share() == 0.75
    for prefilled in (99, 100):
        cancelled.prefilled = prefilled
        with pytest.raises(NotMeasured, match="before it could be cancelled"):
            RunTrace([[cancelled], [again]]).cached_share()


def test_a_metric_is_met_by_bound_and_ratio_together() -> None:
    metric = Metric("x", "s", "lower", lambda trace: 0.0, ratio=2.0, bound=3.0)
    assert metric.met(3.0, metric.advantage(3.0, 6.0))
    assert not metric.met(3.1, metric.advantage(3.1, 9.0))
    assert not metric.met(3.0, metric.advantage(3.0, 5.0))


def test_both_backends_get_the_same_prompts_and_give_the_same_answers(
    backends: tuple[Backend, Backend],
) -> None:
    workload = workloads.shared_prefix(Prompts(VOCAB, SCALE), rows=4, window=12)
    ours, theirs = (run(backend, workload) for backend in backends)
    for trace in (ours, theirs):
        assert all(len(request.tokens) > 12 for request in trace.waves[-1])
        assert trace.decode_rate() > 0
    assert same_answers(ours, theirs) == 1.0


def test_computed_prompt_tokens_are_counted_on_both_backends(
    backends: tuple[Backend, Backend],
) -> None:
    workload = workloads.ragged(Prompts(VOCAB, SCALE), window=4)
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
    for row in report.rows:
        if row.workload.startswith("cancelled"):  # this prompt is one chunk
            assert (row.glmd, row.other, row.met, len(row.reasons)) == (None, None, None, 2)
        else:
            assert not row.reasons
            assert row.glmd == median(ours for ours, _ in row.runs if ours is not None)


def test_a_checkpoint_is_measured_beyond_its_context(tmp_path: Path) -> None:
    context = 64
    write_random_checkpoint(
        tmp_path, vocab_size=VOCAB, num_nextn_predict_layers=0, max_position_embeddings=context
    )
    report = bench(tmp_path, SCALE, "one row at 8k")
    assert round(8192 * SCALE) > context
    assert report.same_answers == 1.0
    assert all(rate for row in report.rows for rate in (row.glmd, row.other))


def test_an_unknown_workload_is_rejected(checkpoint: Path) -> None:
    with pytest.raises(SettingsError, match="nonsense"):
        bench(checkpoint, 1.0, "nonsense")


def test_the_model_demo_is_the_bundled_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert checkpoint_folder("demo") == DEMO
    assert checkpoint_folder("./demo") == Path("demo")


def test_the_mtp_layer_is_compared_with_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_checkpoint(tmp_path, vocab_size=VOCAB, predictable=True)
    monkeypatch.setattr(engine, "MTP_WINDOW", 3)
    report = bench_engine(
        tmp_path,
        scale=SCALE,
        repeat=1,
        only="batch 1",
        against="mtp-off",
        on_progress=lambda line: None,
    )
    assert report.sides == ("mtp auto", "mtp off")
    assert report.same_answers == 1.0
    assert [row.workload for row in report.rows] == [
        "decode, batch 1, 3 tokens each",
        "decode, batch 1",
    ]
    assert all(row.ratio == engine.MTP_RATIO and row.advantage for row in report.rows)
    with (screen := console()).capture() as printed:
        screen.print(engine_table(report))
    assert "mtp auto, mtp off" in printed.get()


def test_a_predictable_checkpoint_accepts_all_drafts(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, vocab_size=VOCAB, predictable=True, dtype="F32")
    model = load_model(tmp_path, "float32", lambda done, total: None)
    running = Engine(model, EngineConfig(mtp=1), 1 << 30)
    session = GlmdSession(running)
    session.submit(0, ids(5, 6, 7), 41)
    while not any(progress.ended for progress in session.step()):
        pass
    assert running.stats().accepted == running.stats().drafted == 20
