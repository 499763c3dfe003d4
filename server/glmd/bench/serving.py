"""The HTTP benchmark: glmd and mlx_lm.server in turn, the same conversations with both."""

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

from glmd.bench import scenarios
from glmd.bench.bare import bare_rate
from glmd.bench.client import Recording, Reply, play
from glmd.bench.scenarios import Scenario, Writer, first_prompt
from glmd.bench.servers import GLMD, MLX_LM, Server, running
from glmd.bench.workloads import unique_tokens
from glmd.errors import SettingsError

PERCENTILES = (50, 95, 99)

BARE = "16 uniform"
"""The scenario that the engine also gets without HTTP."""

SHOWN_ERRORS = 3


@dataclass(frozen=True, slots=True)
class Figures:
    """What one server did with one scenario in all runs together.

    Attributes:
        rate: tokens per second from the first request to the last byte, median of the runs.
        first_token: seconds from request to first text, at `PERCENTILES` of all requests.
        between_tokens: seconds between chunks with text, at `PERCENTILES` of all of them.
        computed: prompt tokens that were not cached, by the server's account; median.
        least: the fewest prompt tokens that could have been computed; median.
        failed: requests without a complete answer, of all runs.
        errors: what was said about some of them.
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
class Check:
    """One target, and whether it is reached."""

    what: str
    value: float
    target: str
    met: bool


@dataclass(frozen=True, slots=True)
class ServingReport:
    """Everything measured; `bare_engine` as in `glmd.bench.bare`, if `BARE` was played."""

    figures: list[Figures]
    bare_engine: float | None
    checks: list[Check]


Recordings = dict[tuple[str, str], list[Recording]]
"""By server and scenario, one recording per run."""


def bench_serving(
    folder: Path,
    *,
    scale: float,
    repeat: int,
    only: str,
    log: Path,
    on_progress: Callable[[str], None],
) -> ServingReport:
    """Measure.

    Args:
        folder: a checkpoint that both servers load.
        scale: factor on the lengths of all prompts.
        repeat: runs of everything with each server.
        only: play the scenarios whose name contains this.
        log: file to which the servers' output is appended.
        on_progress: called with a line of progress.

    Raises:
        SettingsError: no scenario has that name.
        EngineUnavailable: a server did not start; `log` says why.
    """
    chosen = [s for s in _all(Writer(folder, scale, seed=0)) if only in s.name]
    if not chosen:
        raise SettingsError(f"--only {only!r} is in the name of no scenario")
    recordings = _record(folder, chosen, scale, repeat, log, on_progress)
    figures = [
        condense(folder, server, scenario, recordings[server.name, scenario.name])
        for scenario in chosen
        for server in (GLMD, MLX_LM)
    ]
    bare = None
    for scenario in chosen:
        if scenario.name == BARE:
            on_progress("the engine alone")
            recorded = recordings[GLMD.name, BARE][0]
            bare = bare_rate(folder, scenario, recorded, repeat=repeat)
    return ServingReport(figures, bare, list(_checks(figures, bare)))


def _all(writer: Writer) -> Iterator[Scenario]:
    for streams in (1, 8, 16, 32):
        yield scenarios.uniform(writer, streams)
    for streams in (8, 16, 32):
        yield scenarios.ragged(writer, streams)
    yield scenarios.burst(writer)
    yield scenarios.agents(writer)


def _record(
    folder: Path,
    chosen: Sequence[Scenario],
    scale: float,
    repeat: int,
    log: Path,
    on_progress: Callable[[str], None],
) -> Recordings:
    """Play all scenarios with both servers in turns, a fresh server each time."""
    warm_up = scenarios.uniform(Writer(folder, scale, seed=1), 2)
    recordings: Recordings = {}
    for turn in range(repeat):
        for server in (GLMD, MLX_LM)[:: -1 if turn % 2 else 1]:
            on_progress(f"{server.name} starts")
            with running(server, folder, log) as address:
                asyncio.run(play(address.url, address.model, warm_up))
                for scenario in chosen:
                    on_progress(f"{server.name}, {scenario.name}, {turn + 1} of {repeat}")
                    recording = asyncio.run(play(address.url, address.model, scenario))
                    recordings.setdefault((server.name, scenario.name), []).append(recording)
    return recordings


def condense(
    folder: Path, server: Server, scenario: Scenario, recordings: list[Recording]
) -> Figures:
    """The figures of one scenario with one server, from recordings of its runs."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    replies = [reply for r in recordings for talk in r.replies for reply in talk]
    good = [reply for reply in replies if reply.error is None]
    errors = [reply.error for reply in replies if reply.error is not None]
    between = [b - a for reply in good for a, b in pairwise(reply.arrivals)]
    return Figures(
        server=server.name,
        scenario=scenario.name,
        requests=len(replies),
        rate=median(_rate(recording) for recording in recordings),
        first_token=_at_percentiles([r.arrivals[0] - r.sent for r in good if r.arrivals]),
        between_tokens=_at_percentiles(between),
        computed=round(median(_computed(recording) for recording in recordings)),
        least=round(median(_least(tokenizer, scenario, recording) for recording in recordings)),
        failed=len(errors),
        errors=list(dict.fromkeys(errors))[:SHOWN_ERRORS],
    )


def _checks(found: Sequence[Figures], bare: float | None) -> Iterator[Check]:
    """What the figures say about each target, as far as they cover it.

    Args:
        bare: tokens per second of the engine alone on `BARE`, if that was measured.
    """
    by = {(f.server, f.scenario): f for f in found}
    for scenario in dict.fromkeys(f.scenario for f in found):
        ours, theirs = by[GLMD.name, scenario], by[MLX_LM.name, scenario]
        if scenario == BARE and bare is not None:
            share = ours.rate / bare
            yield Check(f"{scenario}: tokens/s, HTTP / bare engine", share, "≥ 0.9", share >= 0.9)
        if scenario == "16 ragged":
            ratio = ours.rate / theirs.rate if theirs.rate else float("inf")
            yield Check(f"{scenario}: tokens/s, glmd / mlx_lm", ratio, "≥ 1.2", ratio >= 1.2)
        if scenario.startswith("burst"):
            yield Check(f"{scenario}: failed requests", ours.failed, "0", ours.failed == 0)
        if "agents" in scenario:
            share = ours.computed / ours.least
            yield Check(
                f"{scenario}: prompt tokens computed / least", share, "≤ 1.05", share <= 1.05
            )


def _rate(recording: Recording) -> float:
    replies = _complete(recording)
    return sum(reply.completion_tokens for reply in replies) / recording.seconds


def _computed(recording: Recording) -> int:
    return sum(reply.prompt_tokens - reply.cached_tokens for reply in _complete(recording))


def _complete(recording: Recording) -> list[Reply]:
    return [reply for talk in recording.replies for reply in talk if reply.error is None]


def _least(tokenizer: Any, scenario: Scenario, recording: Recording) -> int:
    """Prompt tokens that no cache could have known.

    Of the first turns, each distinct token once. Of a later turn, what comes after the turn
    before and its answer, and that answer's last token, which was not run through the model.
    """
    first = [
        first_prompt(tokenizer, talk)
        for talk, replies in zip(scenario.conversations, recording.replies, strict=True)
        if replies and replies[0].error is None
    ]
    later = sum(
        after.prompt_tokens - before.prompt_tokens - before.completion_tokens + 1
        for replies in recording.replies
        for before, after in pairwise(replies)
        if after.error is None
    )
    return unique_tokens(first) + later


def _at_percentiles(values: list[float]) -> list[float]:
    return [float(x) for x in np.percentile(values, PERCENTILES)] if values else []
