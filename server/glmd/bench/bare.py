"""The engine alone on the very prompts that the servers were given, to see what HTTP costs."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from transformers import AutoTokenizer

from glmd.bench.client import Recording
from glmd.bench.scenarios import Scenario, first_prompt
from glmd.bench.backends import GlmdSide
from glmd.bench.runner import run
from glmd.bench.workloads import Request, Wave, Workload


def bare_rate(folder: Path, scenario: Scenario, recording: Recording, *, repeat: int) -> float:
    """Tokens per second, from arrival to the last token, of the first turns that were recorded,
    all arriving at once, with answers of the recorded lengths. Median of `repeat` runs.

    The prompts must be the same: where they share their beginning, as templates have it, a step
    attends to that and to the rest apart, which costs more than prompts that share nothing."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    requests = tuple(
        Request(first_prompt(tokenizer, talk), replies[0].completion_tokens)
        for talk, replies in zip(scenario.conversations, recording.replies, strict=True)
        if replies and replies[0].error is None
    )
    workload = Workload("bare", (Wave(requests),))
    side = GlmdSide(folder, "auto")
    rates = []
    for _ in range(repeat + 1):
        (lives,) = run(side, workload).waves
        seconds = max(life.times[-1] for life in lives) - lives[0].arrived
        rates.append(sum(len(life.tokens) for life in lives) / seconds)
    return median(rates[1:])  # the first run touches the weights for the first time
