"""The engine benchmark measures what it says, the same on both sides."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np
import pytest

from glmd.bench import workloads
from glmd.bench.cases import Goal, cases
from glmd.bench.engine import Report, bench_engine
from glmd.bench.backends import GlmdSide
from glmd.bench.mlx_lm_side import MlxLmSide
from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.bench.runner import Side, run, same_answers
from glmd.bench.trace import Life, Trace
from glmd.bench.workloads import Prompts, Request, unique_tokens
from glmd.errors import SettingsError

VOCAB = 512
SCALE = 0.02


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(folder, vocab_size=VOCAB, num_nextn_predict_layers=0)
    return folder


def bench(checkpoint: Path, scale: float, only: str) -> Report:
    return bench_engine(
        checkpoint, scale=scale, repeat=1, only=only, mtp=True, on_progress=lambda line: None
    )


@pytest.fixture(scope="module")
def sides(checkpoint: Path) -> tuple[Side, Side]:
    return GlmdSide(checkpoint, "float32"), MlxLmSide(checkpoint, mx.float32)


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def life(prompt: np.ndarray, arrived: float, times: list[float]) -> Life:
    one = Life(Request(prompt, len(times)), arrived)
    one.times, one.tokens, one.ended = times, list(range(len(times))), times[-1]
    return one


def test_unique_tokens_count_every_common_prefix_once() -> None:
    assert unique_tokens([ids(1, 2, 3), ids(1, 2, 4, 5), ids(1, 2), ids(7)]) == 6
    assert unique_tokens([ids(1, 2), ids(1, 2)]) == 2
    assert unique_tokens([]) == 0


def test_decode_rate_counts_only_while_all_streams_decode() -> None:
    early, late = life(ids(1), 0, [1, 2, 3, 4, 5]), life(ids(2), 0, [3, 4, 5, 6, 7])
    assert Trace([[early, late]]).decode_rate() == pytest.approx(4 / 2)


def test_longest_gap_is_that_of_the_streams_that_were_there_before() -> None:
    stream = life(ids(1), 0, [1, 2, 3, 7, 8, 20])
    newcomer = life(ids(2), 3.5, [7.5, 30])
    trace = Trace([[stream], [newcomer]])
    assert trace.longest_gap() == 4  # from 3 to 7; what follows the answer is not its doing
    assert trace.median_step() == 1


def test_a_goal_is_met_by_bound_and_ratio_together() -> None:
    goal = Goal("x", "s", "lower", lambda trace: 0.0, ratio=2.0, bound=3.0)
    assert goal.met(3.0, goal.advantage(3.0, 6.0))
    assert not goal.met(3.1, goal.advantage(3.1, 9.0))
    assert not goal.met(3.0, goal.advantage(3.0, 5.0))


def test_both_sides_get_the_same_prompts_and_give_the_same_answers(
    sides: tuple[Side, Side],
) -> None:
    workload = workloads.shared_prefix(Prompts(VOCAB, SCALE), rows=4, new=12)
    ours, theirs = (run(side, workload) for side in sides)
    assert [len(x.tokens) for x in ours.lives] == [len(x.tokens) for x in theirs.lives]
    assert same_answers(ours, theirs) == 1.0


def test_prompt_tokens_computed_are_counted_on_both_sides(sides: tuple[Side, Side]) -> None:
    workload = workloads.ragged(Prompts(VOCAB, SCALE), new=4)
    prompts = [r.prompt for wave in workload.waves for r in wave.requests]
    ours, theirs = (run(side, workload).computed for side in sides)
    assert ours == unique_tokens(prompts)  # short random prompts may share a token or two
    assert theirs == sum(map(len, prompts))


def test_a_returning_prompt_is_found_cached_on_both_sides(sides: tuple[Side, Side]) -> None:
    workload = workloads.returning(Prompts(VOCAB, SCALE))
    first = len(workload.waves[0].requests[0].prompt)
    for side in sides:
        assert run(side, workload).waves[-1][0].cached == first


def test_cases_run_to_their_end_on_both_sides(checkpoint: Path) -> None:
    """Those with an 8 in their name, which leaves out the slow one."""
    report = bench_engine(
        checkpoint, scale=SCALE, repeat=1, only="8", mtp=True, on_progress=lambda line: None
    )
    expected = [
        (case.workload.name, goal.what)
        for case in cases(Prompts(VOCAB, SCALE), 1)
        if "8" in case.workload.name
        for goal in case.goals
    ]
    assert [(row.workload, row.goal) for row in report.rows] == expected
    assert all(row.glmd == median(ours for ours, _ in row.runs) for row in report.rows)


def test_a_checkpoint_is_measured_beyond_its_context_too(tmp_path: Path) -> None:
    context = 64
    write_random_checkpoint(
        tmp_path, vocab_size=VOCAB, num_nextn_predict_layers=0, max_position_embeddings=context
    )
    report = bench(tmp_path, SCALE, "one row at 8k")
    assert round(8192 * SCALE) > context
    assert report.same_answers == 1.0
    assert all(rate > 0 for row in report.rows for rate in (row.glmd, row.mlx_lm))


def test_an_unknown_workload_is_refused(checkpoint: Path) -> None:
    with pytest.raises(SettingsError, match="nonsense"):
        bench(checkpoint, 1.0, "nonsense")
