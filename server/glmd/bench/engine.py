"""The engine benchmark: every case on both sides in one process, in turns, medians of the runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import mlx.core as mx

from glmd.bench import workloads
from glmd.bench.cases import Case, Goal, cases
from glmd.bench.checkpoints import on_gpu
from glmd.bench.backends import Dtype, GlmdSide
from glmd.bench.mlx_lm_side import MlxLmSide
from glmd.bench.runner import Side, run, same_answers
from glmd.bench.trace import Trace
from glmd.bench.workloads import Prompts
from glmd.checkpoint.config import load_config
from glmd.errors import SettingsError

ENDLESS_ROOM = 2048
"""Tokens of context for what an endless stream gives until the others are done."""


@dataclass(frozen=True, slots=True)
class Row:
    """One goal of one workload: the medians, and whether it is reached."""

    workload: str
    goal: str
    unit: str
    glmd: float
    mlx_lm: float
    advantage: float | None
    """Median of the repetitions' own ratios, so that a slow minute hits both sides of one."""
    ratio: float | None
    bound: float | None
    better: str
    met: bool
    runs: list[tuple[float, float]]
    """glmd and mlx-lm, one pair per repetition."""


@dataclass(frozen=True, slots=True)
class Report:
    """All rows, and what was measured on.

    Attributes:
        mtp: whether glmd's side had an MTP layer, if there is one.
        same_answers: share of all requests whose tokens were the same on both sides.
    """

    dtype: str
    mtp: bool
    weight_bytes: int
    kv_bytes_per_token: int
    same_answers: float
    rows: list[Row]


def bench_engine(
    folder: Path,
    *,
    scale: float,
    repeat: int,
    only: str,
    mtp: bool,
    on_progress: Callable[[str], None],
) -> Report:
    """Measure.

    Args:
        folder: a checkpoint that both sides load.
        scale: factor on all prompt lengths.
        repeat: runs of each case on each side.
        only: run the cases whose name contains this.
        mtp: load glmd's MTP layer; mlx-lm has none.
        on_progress: called with a line of progress.

    Raises:
        SettingsError: no case has `only` in its name.
        CheckpointError: the checkpoint cannot be loaded.
    """
    dtype: Dtype = "bfloat16" if on_gpu() else "float32"
    config = load_config(folder)
    on_progress(f"loading {folder.name} twice, {dtype}")
    glmd = GlmdSide(folder, dtype, mtp=mtp)
    mlx_lm = MlxLmSide(folder, getattr(mx, dtype))
    chosen = [
        case
        for case in cases(Prompts(config.vocab_size, scale), glmd.kv_bytes_per_token)
        if only in case.workload.name
    ]
    if not chosen:
        raise SettingsError(f"--only {only!r} is in the name of no workload")
    glmd.extend_context(max(case.workload.longest for case in chosen) + ENDLESS_ROOM)
    sides: list[Side] = [glmd, mlx_lm]
    for side in sides:  # compiles what is compiled, and touches all weights
        run(side, workloads.decode(Prompts(config.vocab_size, 0), 2, new=4))
    rows, agreement = [], []
    for case in chosen:
        pairs = []
        for turn in range(repeat):
            on_progress(f"{case.workload.name}, {turn + 1} of {repeat}")
            traces = {s.name: run(s, case.workload) for s in sides[:: -1 if turn % 2 else 1]}
            pairs.append((traces["glmd"], traces["mlx-lm"]))
        agreement += [same_answers(*pair) for pair in pairs]
        rows += [_row(case, goal, pairs) for goal in case.goals]
    return Report(
        dtype=dtype,
        mtp=mtp,
        weight_bytes=glmd.weight_bytes,
        kv_bytes_per_token=glmd.kv_bytes_per_token,
        same_answers=sum(agreement) / len(agreement),
        rows=rows,
    )


def _row(case: Case, goal: Goal, pairs: Iterable[tuple[Trace, Trace]]) -> Row:
    runs = [(goal.read(ours), goal.read(theirs)) for ours, theirs in pairs]
    ours = median(a for a, _ in runs)
    advantages = [goal.advantage(a, b) for a, b in runs]
    advantage = median(x for x in advantages if x is not None) if all(advantages) else None
    return Row(
        workload=case.workload.name,
        goal=goal.what,
        unit=goal.unit,
        glmd=ours,
        mlx_lm=median(b for _, b in runs),
        advantage=advantage,
        ratio=goal.ratio,
        bound=goal.bound,
        better=goal.better,
        met=goal.met(ours, advantage),
        runs=runs,
    )
