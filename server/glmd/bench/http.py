"""HTTP benchmark: the same conversations with glmd and other servers, alternating."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from glmd.bench.backends import GlmdBackend
from glmd.bench.http_client import (
    GLMD,
    MLX_LM,
    BenchServer,
    Recording,
    StreamedAnswer,
    play,
    running,
)
from glmd.bench.runner import run
from glmd.bench.scenarios import Scenario, Writer, all_scenarios, first_prompt, uniform
from glmd.bench.workloads import Request, Wave, Workload, unique_tokens
from glmd.errors import SettingsError

PERCENTILES = (50, 95, 99)

ENGINE_ONLY = "16 uniform"
"""Scenario that the engine also runs without HTTP."""

SHOWN_ERRORS = 3


@dataclass(frozen=True, slots=True)
class Figures:
    """Results of one server in one scenario, over all runs.

    Attributes:
        rate: tokens per second from the first request to the last byte, median of the runs.
        first_token: seconds from a request to its first text, at `PERCENTILES`.
        between_tokens: seconds between chunks with text, at `PERCENTILES`.
        computed: prompt tokens not cached according to the server's usage, median of the runs.
        least: minimum of `computed` with a perfect cache, median of the runs.
        failed: requests without a complete answer.
        errors: descriptions of some failures.
    """

    server: str
    scenario: str
    requests: int
    rate: float
    first_token: list[float]
    between_tokens: list[float]
    computed: int
    least: int
    failed: int
    errors: list[str]


@dataclass(frozen=True, slots=True)
class TargetCheck:
    """A target of the HTTP benchmark.

    Attributes:
        value, met: None if a server completed nothing that could be compared.
    """

    what: str
    value: float | None
    target: str
    met: bool | None


@dataclass(frozen=True, slots=True)
class ServingReport:
    """Result of the HTTP benchmark.

    Attributes:
        engine_only: tokens per second of the engine without HTTP. None: not measured.
    """

    figures: list[Figures]
    engine_only: float | None
    checks: list[TargetCheck]


Recordings = dict[tuple[str, str], list[Recording]]
"""Recordings of all runs, by server and scenario."""


def bench_serving(
    folder: Path,
    others: Sequence[BenchServer],
    *,
    scale: float,
    max_tokens: int,
    repeat: int,
    only: str,
    one_at_a_time: bool,
    log: Path,
    on_progress: Callable[[str], None],
) -> ServingReport:
    """Run the HTTP benchmark.

    Args:
        folder: checkpoint that all servers can load.
        others: servers to compare glmd with.
        scale: factor on the lengths of all prompts.
        max_tokens: see `all_scenarios`.
        repeat: runs with each server.
        only: run only scenarios whose name contains this text.
        one_at_a_time: run one server after the other. False: all are up, and play in turn.
        log: file to which the servers' output is appended.
        on_progress: called with a line of progress.

    Raises:
        SettingsError: no scenario has `only` in its name, or a command cannot be started.
        EngineUnavailable: a server did not start; see `log`.
    """
    # Each run has texts of its own, which no server has cached.
    runs = [
        [
            scenario
            for scenario in all_scenarios(Writer(folder, scale, seed=seed), max_tokens)
            if only in scenario.name
        ]
        for seed in range(repeat)
    ]
    if not runs[0]:
        raise SettingsError(f"--only: no scenario has {only!r} in its name.")
    warm_up = uniform(Writer(folder, scale, seed=repeat), 2)
    servers = [GLMD, *others]
    recordings: Recordings = {}
    for together in [[server] for server in servers] if one_at_a_time else [servers]:
        _record(folder, together, runs, warm_up, log, on_progress, recordings)
    names = [scenario.name for scenario in runs[0]]
    figures = [
        condense(folder, server, recordings[server.name, name])
        for name in names
        for server in servers
    ]
    engine_only = None
    if ENGINE_ONLY in names:
        on_progress("the engine without HTTP")
        recorded = recordings[GLMD.name, ENGINE_ONLY][0]
        engine_only = engine_only_rate(folder, recorded, repeat)
    return ServingReport(figures, engine_only, list(target_checks(figures, engine_only)))


def _record(
    folder: Path,
    servers: Sequence[BenchServer],
    runs: Sequence[Sequence[Scenario]],
    warm_up: Scenario,
    log: Path,
    on_progress: Callable[[str], None],
    recordings: Recordings,
) -> None:
    """Play all runs, each scenario with one server after the other; all are up."""
    with ExitStack() as stack:
        addresses = {}
        for server in servers:
            on_progress(f"starting {server.name}")
            addresses[server.name] = stack.enter_context(running(server, folder, log))
            asyncio.run(play(*addresses[server.name], warm_up))
        for number, scenarios in enumerate(runs):
            first = number % len(servers)
            for scenario in scenarios:
                for server in (*servers[first:], *servers[:first]):
                    on_progress(f"{server.name}, {scenario.name}, {number + 1} of {len(runs)}")
                    recording = asyncio.run(play(*addresses[server.name], scenario))
                    recordings.setdefault((server.name, scenario.name), []).append(recording)


def condense(folder: Path, server: BenchServer, recordings: list[Recording]) -> Figures:
    """Compute the figures of one scenario with one server from all recordings."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = [answer for r in recordings for each in r.answers for answer in each]
    complete = [answer for answer in answers if answer.error is None]
    errors = [answer.error for answer in answers if answer.error is not None]
    between = [b - a for answer in complete for a, b in pairwise(answer.arrivals)]
    return Figures(
        server=server.name,
        scenario=recordings[0].scenario.name,
        requests=len(answers),
        rate=median(
            sum(answer.completion_tokens for answer in _complete(recording)) / recording.seconds
            for recording in recordings
        ),
        first_token=_at_percentiles([r.arrivals[0] - r.sent for r in complete if r.arrivals]),
        between_tokens=_at_percentiles(between),
        computed=round(
            median(
                sum(answer.prompt_tokens - answer.cached_tokens for answer in _complete(recording))
                for recording in recordings
            )
        ),
        least=round(median(_least(tokenizer, recording) for recording in recordings)),
        failed=len(errors),
        errors=list(dict.fromkeys(errors))[:SHOWN_ERRORS],
    )


def _complete(recording: Recording) -> list[StreamedAnswer]:
    return [answer for each in recording.answers for answer in each if answer.error is None]


def _first_prompts(tokenizer: Any, recording: Recording) -> Iterator[tuple[Any, StreamedAnswer]]:
    """Yield prompt and answer of each conversation whose first answer is complete."""
    scripts = recording.scenario.conversations
    for conversation, answers in zip(scripts, recording.answers, strict=True):
        if answers and answers[0].error is None:
            yield first_prompt(tokenizer, conversation), answers[0]


def _least(tokenizer: Any, recording: Recording) -> int:
    """Count the prompt tokens that a perfect cache would have computed.

    First turns: each distinct token once. Later turns: the tokens after the previous turn and its
    answer, plus the answer's last token, which was not run through the model.
    """
    first = (prompt for prompt, _ in _first_prompts(tokenizer, recording))
    later = sum(
        after.prompt_tokens - before.prompt_tokens - before.completion_tokens + 1
        for answers in recording.answers
        for before, after in pairwise(answers)
        if after.error is None
    )
    return unique_tokens(first) + later


def _at_percentiles(values: list[float]) -> list[float]:
    return [float(x) for x in np.percentile(values, PERCENTILES)] if values else []


def engine_only_rate(folder: Path, recording: Recording, repeat: int) -> float:
    """Measure the engine's tokens per second without HTTP, median of `repeat` runs.

    The engine gets the recorded first prompts, all at once, and generates answers of the recorded
    lengths. The prompts must be the recorded ones: their common beginning costs an additional
    attention level in each step.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    requests = tuple(
        Request(prompt, answer.completion_tokens)
        for prompt, answer in _first_prompts(tokenizer, recording)
    )
    workload = Workload("engine only", (Wave(requests),))
    backend = GlmdBackend(folder, "auto")
    rates = [run(backend, workload).overall_rate() for _ in range(repeat + 1)]
    return median(rates[1:])  # the first run reads the weights for the first time


def target_checks(figures: Sequence[Figures], engine_only: float | None) -> Iterator[TargetCheck]:
    """Yield the targets that the played scenarios cover."""
    by = {(f.server, f.scenario): f for f in figures}
    for scenario in dict.fromkeys(f.scenario for f in figures):
        ours = by[GLMD.name, scenario]
        others = [f for f in figures if f.scenario == scenario and f is not ours]
        if scenario == ENGINE_ONLY and engine_only is not None:
            share = ours.rate / engine_only
            yield TargetCheck(
                f"{scenario}: tokens/s, HTTP / engine only", share, "≥ 0.9", share >= 0.9
            )
        if scenario.endswith(("uniform", "ragged")) and others:
            fastest = max(others, key=lambda figures: figures.rate)
            ratio = ours.rate / fastest.rate if fastest.rate else None
            least = 1.2 if scenario == "16 ragged" and fastest.server == MLX_LM.name else 1.0
            met = None if ratio is None else ratio >= least
            what = f"{scenario}: tokens/s, glmd / {fastest.server}"
            yield TargetCheck(what, ratio, f"≥ {least:g}", met)
        if scenario.startswith("burst"):
            yield TargetCheck(f"{scenario}: failed requests", ours.failed, "0", ours.failed == 0)
        if "agents" in scenario:
            ratio = ours.computed / ours.least if ours.least else None
            met = None if ratio is None else ratio <= 1.05
            yield TargetCheck(f"{scenario}: prompt tokens computed / least", ratio, "≤ 1.05", met)
