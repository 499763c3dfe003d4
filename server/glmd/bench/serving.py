"""HTTP benchmark: the same conversations with glmd and mlx_lm.server, alternating."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from glmd.bench.backends import GlmdBackend
from glmd.bench.client import GLMD, MLX_LM, BenchServer, Recording, StreamedAnswer, play, running
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
    *,
    scale: float,
    repeat: int,
    only: str,
    log: Path,
    on_progress: Callable[[str], None],
) -> ServingReport:
    """Run the HTTP benchmark.

    Args:
        folder: checkpoint that both servers can load.
        scale: factor on the lengths of all prompts.
        repeat: runs with each server.
        only: run only scenarios whose name contains this text.
        log: file to which the servers' output is appended.
        on_progress: called with a line of progress.

    Raises:
        SettingsError: no scenario has `only` in its name.
        EngineUnavailable: a server did not start; see `log`.
    """
    chosen = [s for s in all_scenarios(Writer(folder, scale, seed=0)) if only in s.name]
    if not chosen:
        raise SettingsError(f"--only: no scenario has {only!r} in its name.")
    recordings = _record(folder, chosen, scale, repeat, log, on_progress)
    figures = [
        condense(folder, server, scenario, recordings[server.name, scenario.name])
        for scenario in chosen
        for server in (GLMD, MLX_LM)
    ]
    engine_only = None
    for scenario in chosen:
        if scenario.name == ENGINE_ONLY:
            on_progress("the engine without HTTP")
            recorded = recordings[GLMD.name, ENGINE_ONLY][0]
            engine_only = engine_only_rate(folder, scenario, recorded, repeat)
    return ServingReport(figures, engine_only, list(target_checks(figures, engine_only)))


def _record(
    folder: Path,
    chosen: Sequence[Scenario],
    scale: float,
    repeat: int,
    log: Path,
    on_progress: Callable[[str], None],
) -> Recordings:
    """Play all scenarios with both servers alternately, each time with a new process."""
    warm_up = uniform(Writer(folder, scale, seed=1), 2)
    recordings: Recordings = {}
    for number in range(repeat):
        for server in (GLMD, MLX_LM)[:: -1 if number % 2 else 1]:
            on_progress(f"starting {server.name}")
            with running(server, folder, log) as (url, model):
                asyncio.run(play(url, model, warm_up))
                for scenario in chosen:
                    on_progress(f"{server.name}, {scenario.name}, {number + 1} of {repeat}")
                    recording = asyncio.run(play(url, model, scenario))
                    recordings.setdefault((server.name, scenario.name), []).append(recording)
    return recordings


def condense(
    folder: Path, server: BenchServer, scenario: Scenario, recordings: list[Recording]
) -> Figures:
    """Compute the figures of one scenario with one server from all recordings."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = [answer for r in recordings for each in r.answers for answer in each]
    complete = [answer for answer in answers if answer.error is None]
    errors = [answer.error for answer in answers if answer.error is not None]
    between = [b - a for answer in complete for a, b in pairwise(answer.arrivals)]
    return Figures(
        server=server.name,
        scenario=scenario.name,
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
        least=round(median(_least(tokenizer, scenario, recording) for recording in recordings)),
        failed=len(errors),
        errors=list(dict.fromkeys(errors))[:SHOWN_ERRORS],
    )


def _complete(recording: Recording) -> list[StreamedAnswer]:
    return [answer for each in recording.answers for answer in each if answer.error is None]


def _first_prompts(
    tokenizer: Any, scenario: Scenario, recording: Recording
) -> Iterator[tuple[Any, StreamedAnswer]]:
    """Yield prompt and answer of each conversation whose first answer is complete."""
    for conversation, answers in zip(scenario.conversations, recording.answers, strict=True):
        if answers and answers[0].error is None:
            yield first_prompt(tokenizer, conversation), answers[0]


def _least(tokenizer: Any, scenario: Scenario, recording: Recording) -> int:
    """Count the prompt tokens that a perfect cache would have computed.

    First turns: each distinct token once. Later turns: the tokens after the previous turn and its
    answer, plus the answer's last token, which was not run through the model.
    """
    first = (prompt for prompt, _ in _first_prompts(tokenizer, scenario, recording))
    later = sum(
        after.prompt_tokens - before.prompt_tokens - before.completion_tokens + 1
        for answers in recording.answers
        for before, after in pairwise(answers)
        if after.error is None
    )
    return unique_tokens(first) + later


def _at_percentiles(values: list[float]) -> list[float]:
    return [float(x) for x in np.percentile(values, PERCENTILES)] if values else []


def engine_only_rate(folder: Path, scenario: Scenario, recording: Recording, repeat: int) -> float:
    """Measure the engine's tokens per second without HTTP, median of `repeat` runs.

    The engine gets the recorded first prompts, all at once, and generates answers of the recorded
    lengths. The prompts must be the recorded ones: their common beginning costs an additional
    attention level in each step.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    requests = tuple(
        Request(prompt, answer.completion_tokens)
        for prompt, answer in _first_prompts(tokenizer, scenario, recording)
    )
    workload = Workload("engine only", (Wave(requests),))
    backend = GlmdBackend(folder, "auto")
    rates = [run(backend, workload).overall_rate() for _ in range(repeat + 1)]
    return median(rates[1:])  # the first run reads the weights for the first time


def target_checks(figures: Sequence[Figures], engine_only: float | None) -> Iterator[TargetCheck]:
    """Yield the targets that the played scenarios cover."""
    by = {(f.server, f.scenario): f for f in figures}
    for scenario in dict.fromkeys(f.scenario for f in figures):
        ours, theirs = by[GLMD.name, scenario], by[MLX_LM.name, scenario]
        if scenario == ENGINE_ONLY and engine_only is not None:
            share = ours.rate / engine_only
            yield TargetCheck(
                f"{scenario}: tokens/s, HTTP / engine only", share, "≥ 0.9", share >= 0.9
            )
        if scenario == "16 ragged":
            ratio = ours.rate / theirs.rate if theirs.rate else None
            met = None if ratio is None else ratio >= 1.2
            yield TargetCheck(f"{scenario}: tokens/s, glmd / mlx_lm", ratio, "≥ 1.2", met)
        if scenario.startswith("burst"):
            yield TargetCheck(f"{scenario}: failed requests", ours.failed, "0", ours.failed == 0)
        if "agents" in scenario:
            ratio = ours.computed / ours.least if ours.least else None
            met = None if ratio is None else ratio <= 1.05
            yield TargetCheck(f"{scenario}: prompt tokens computed / least", ratio, "≤ 1.05", met)
