"""Engine benchmark: each workload on glmd and mlx-lm in one process, alternating."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import mlx.core as mx

from glmd.bench import workloads
from glmd.bench.backends import Dtype, GlmdBackend, MlxLmBackend
from glmd.bench.random_checkpoint import on_gpu
from glmd.bench.runner import Backend, NotMeasured, RunTrace, run, same_answers
from glmd.bench.workloads import Prompts, Workload
from glmd.checkpoint.config import load_config
from glmd.errors import SettingsError

ENDLESS_ROOM = 2048
"""Tokens of context for the output of an endless stream."""

STRAY_BYTES = 1 << 20
"""Allowed bytes of live arrays besides weights and idle KV cache: constants of MLX itself."""

SLACK_BYTES = 2 * mmap.PAGESIZE
"""Allowed bytes per array: MLX's allocator reuses freed buffers up to two pages too large."""


MTP_WINDOW = 1024
"""Tokens of each stream in which the MTP layer is compared with none: enough for a trial of drafts
(`glmd.engine.spec_decode.controller.FIRST_TRIAL`) and as many steps behind it."""

MTP_RATIO = 0.97
"""Least speed with the MTP layer, relative to that without."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A number read from a run, and its target.

    Attributes:
        read: raises `NotMeasured` if the run does not show the number.
        ratio: glmd must be at least this many times better than mlx-lm. None: no such target.
        bound: limit of glmd's number, a minimum if higher is better. None: no such target.
    """

    name: str
    unit: str
    better: Literal["higher", "lower"]
    read: Callable[[RunTrace], float]
    ratio: float | None = None
    bound: float | None = None

    def advantage(self, glmd: float, other: float) -> float | None:
        """Return how many times better glmd is. None: one of the numbers is 0."""
        good, worse = (glmd, other) if self.better == "higher" else (other, glmd)
        return good / worse if good > 0 and worse > 0 else None

    def met(self, glmd: float, advantage: float | None) -> bool:
        """Return whether both targets are met."""
        within = self.bound is None or (
            glmd >= self.bound if self.better == "higher" else glmd <= self.bound
        )
        faster = self.ratio is None or (advantage is not None and advantage >= self.ratio)
        return within and faster


MeasuredWorkload = tuple[Workload, tuple[Metric, ...]]


def measured_workloads(prompts: Prompts, kv_bytes_per_token: int) -> Iterator[MeasuredWorkload]:
    """Yield the rows of the table in docs/benchmarks.md, in order."""

    def faster(ratio: float) -> Metric:
        return Metric("decode", "tokens/s", "higher", RunTrace.decode_rate, ratio=ratio)

    def kv_overhead(trace: RunTrace) -> float:
        return trace.kv_bytes / (trace.least_kv_tokens() * kv_bytes_per_token)

    def stray_mib(trace: RunTrace) -> float:
        slack = SLACK_BYTES * trace.idle_kv_arrays
        return max(0, trace.idle_bytes - trace.idle_kv_bytes - slack) / 2**20

    for rows in (1, 8, 32):
        # at least 48 tokens, a third of a second for one stream of a small model
        yield workloads.decode(prompts, rows, window=max(48, 256 // rows)), (faster(1.0),)
    yield workloads.ragged(prompts), (faster(4.0),)

    kv = Metric("KV held / KV needed", "×", "lower", kv_overhead, bound=1.15)
    yield workloads.shared_prefix(prompts), (kv, faster(1.0))
    yield workloads.long_context(prompts), (faster(1.0),)

    first = Metric("first token", "s", "lower", RunTrace.first_token_seconds, ratio=1.5)
    yield workloads.returning(prompts), (first,)

    stall = Metric(
        "longest gap / median step", "×", "lower",
        lambda trace: trace.longest_gap() / trace.median_step(),
    )  # fmt: skip
    noise = Metric(
        "longest gap before it / median step", "×", "lower",
        lambda trace: trace.longest_step() / trace.median_step(),
    )  # fmt: skip
    gap = Metric("longest gap", "s", "lower", RunTrace.longest_gap, ratio=10.0)
    answer = Metric(
        "first token of that prompt", "s", "lower", RunTrace.first_token_seconds, ratio=0.67
    )
    yield workloads.interrupted(prompts), (stall, noise, gap, answer)

    overall = Metric("arrival to end", "tokens/s", "higher", RunTrace.overall_rate, ratio=1.0)
    yield workloads.joining(prompts), (overall,)

    together = workloads.together(prompts)
    least = workloads.unique_tokens(r.prompt for r in together.waves[0].requests)
    computed = Metric(
        "prompt tokens computed", "", "lower", lambda trace: float(trace.computed), bound=least
    )
    yield together, (computed,)

    cached = Metric("cached", "of the prompt", "higher", RunTrace.cached_share, bound=0.75)
    yield workloads.cancelled(prompts), (cached,)

    stray = Metric(
        "memory at rest beside weights and stored KV", "MiB", "lower", stray_mib,
        bound=STRAY_BYTES / 2**20,
    )  # fmt: skip
    yield workloads.mixed(prompts), (stray,)


def mtp_workloads(prompts: Prompts, kv_bytes_per_token: int) -> Iterator[MeasuredWorkload]:
    """Yield the rows that compare the MTP layer with none (target `MTP_RATIO`)."""
    decode = Metric("decode", "tokens/s", "higher", RunTrace.decode_rate, ratio=MTP_RATIO)
    for rows in (1, 8, 32):
        workload = workloads.decode(prompts, rows, window=MTP_WINDOW)
        yield replace(workload, name=f"{workload.name}, {MTP_WINDOW} tokens each"), (decode,)
    for workload, metrics in measured_workloads(prompts, kv_bytes_per_token):
        kept = [replace(m, ratio=MTP_RATIO, bound=None) for m in metrics if m.ratio is not None]
        if kept:
            yield workload, tuple(kept)


@dataclass(frozen=True, slots=True)
class EngineRow:
    """Medians of one metric of one workload.

    Attributes:
        glmd, other: medians of both sides. None: not measured in at least one repetition; see
            `reasons`.
        advantage: median of the ratios within each repetition, so that a slow minute affects both
            backends. None: not comparable.
        met: whether both targets are met. None: a number for the targets was not measured.
        runs: values of both sides in each repetition. None: not measured.
        reasons: a line for each number that was not measured.
    """

    workload: str
    goal: str
    unit: str
    glmd: float | None
    other: float | None
    advantage: float | None
    ratio: float | None
    bound: float | None
    better: str
    met: bool | None
    runs: list[tuple[float | None, float | None]]
    reasons: list[str]


@dataclass(frozen=True, slots=True)
class EngineReport:
    """Result of the engine benchmark.

    Attributes:
        sides: names of the two sides.
        mtp: glmd loaded the MTP layer, if the checkpoint has one.
        same_answers: share of requests with the same tokens on both backends.
    """

    sides: tuple[str, str]
    dtype: str
    mtp: bool
    weight_bytes: int
    kv_bytes_per_token: int
    same_answers: float
    rows: list[EngineRow]


def bench_engine(
    folder: Path,
    *,
    scale: float,
    repeat: int,
    only: str,
    mtp: bool = True,
    against: Literal["mlx-lm", "mtp-off"] = "mlx-lm",
    on_progress: Callable[[str], None],
) -> EngineReport:
    """Run the engine benchmark.

    Args:
        folder: checkpoint that both backends can load.
        scale: factor on all prompt lengths.
        repeat: runs of each workload on each backend.
        only: run only workloads whose name contains this text.
        mtp: load glmd's MTP layer; mlx-lm has none.
        against: the other side, mlx-lm or glmd without the MTP layer. In the latter case streams of
            `MTP_WINDOW` tokens come first, and targets are those of `MTP_RATIO`.
        on_progress: called with a line of progress.

    Raises:
        SettingsError: no workload has `only` in its name.
        CheckpointError: the checkpoint cannot be loaded.
    """
    dtype: Dtype = "bfloat16" if on_gpu() else "float32"
    config = load_config(folder)
    on_progress(f"loading {folder.name} twice, {dtype}")
    glmd: GlmdBackend
    other: Backend
    prompts = Prompts(config.vocab_size, scale)
    if against == "mlx-lm":
        glmd = GlmdBackend(folder, dtype, mtp=mtp)
        other = MlxLmBackend(folder, getattr(mx, dtype))
        found = measured_workloads(prompts, glmd.kv_bytes_per_token)
    else:
        glmd = GlmdBackend(folder, dtype, name="mtp auto")
        other = GlmdBackend(folder, dtype, mtp=False, name="mtp off")
        found = mtp_workloads(prompts, glmd.kv_bytes_per_token)
    chosen = [(workload, metrics) for workload, metrics in found if only in workload.name]
    if not chosen:
        raise SettingsError(f"--only: no workload has {only!r} in its name.")
    context = max(workload.longest for workload, _ in chosen) + ENDLESS_ROOM
    for each in (glmd, other):
        if isinstance(each, GlmdBackend):
            each.extend_context(context)
    backends: list[Backend] = [glmd, other]
    for backend in backends:  # warm-up: compiles kernels and reads all weights
        run(backend, workloads.decode(Prompts(config.vocab_size, 0), 2, window=4))
    rows, agreement = [], []
    for workload, metrics in chosen:
        pairs = []
        for number in range(repeat):
            on_progress(f"{workload.name}, {number + 1} of {repeat}")
            order = backends[:: -1 if number % 2 else 1]
            traces = {backend.name: run(backend, workload) for backend in order}
            pairs.append((traces[glmd.name], traces[other.name]))
        agreement += [same_answers(*pair) for pair in pairs]
        sides = glmd.name, other.name
        rows += [make_row(workload.name, metric, pairs, sides) for metric in metrics]
    return EngineReport(
        sides=(glmd.name, other.name),
        dtype=dtype,
        mtp=mtp,
        weight_bytes=glmd.weight_bytes,
        kv_bytes_per_token=glmd.kv_bytes_per_token,
        same_answers=sum(agreement) / len(agreement),
        rows=rows,
    )


def make_row(
    workload: str,
    metric: Metric,
    pairs: Iterable[tuple[RunTrace, RunTrace]],
    sides: tuple[str, str] = ("glmd", "mlx-lm"),
) -> EngineRow:
    """Summarise a metric of all repetitions, each a run of both sides."""
    reasons: list[str] = []

    def read(backend: str, number: int, trace: RunTrace) -> float | None:
        try:
            return metric.read(trace)
        except NotMeasured as error:
            reasons.append(f"{backend}, run {number}: {error}")
            return None

    runs = [
        (read(sides[0], number, ours), read(sides[1], number, theirs))
        for number, (ours, theirs) in enumerate(pairs, 1)
    ]
    glmd = _median([ours for ours, _ in runs])
    other = _median([theirs for _, theirs in runs])
    advantage = _median(
        [
            None if ours is None or theirs is None else metric.advantage(ours, theirs)
            for ours, theirs in runs
        ]
    )
    met = None
    if glmd is not None and (metric.ratio is None or other is not None):
        met = metric.met(glmd, advantage)
    return EngineRow(
        workload=workload,
        goal=metric.name,
        unit=metric.unit,
        glmd=glmd,
        other=other,
        advantage=advantage,
        ratio=metric.ratio,
        bound=metric.bound,
        better=metric.better,
        met=met,
        runs=runs,
        reasons=reasons,
    )


def _median(values: Sequence[float | None]) -> float | None:
    """Return the median. None: a value is None."""
    known = [value for value in values if value is not None]
    return median(known) if len(known) == len(values) else None
