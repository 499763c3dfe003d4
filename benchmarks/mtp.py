"""`glmd bench mtp`: what the MTP layer's drafts give, and what they cost.

Acceptance depends on the weights and on what is asked, so it is measured by domain on real
conversations; speed depends on the machine and the batch, so it is measured against the same
engine with drafting off, turn by turn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Literal

from glmd.llm import LLM

NAMES = ("Nora", "Milan", "Ruth", "Oskar", "Tilda", "Hugo", "Vera", "Anton")
CITIES = ("Lisbon", "Turin", "Bergen", "Krakow", "Porto", "Ghent")
PHRASES = ("the green boat", "a small red house", "seven old clocks", "my left shoe is wet")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
DOMAINS = ("greeting", "arithmetic", "echo", "counting", "story", "tool call")

BATCHES = (1, 4, 16)
LENGTH = 64
"""Tokens per sequence where speed is measured."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """One domain at one temperature.

    Attributes:
        accepted: share of drafts that the model confirmed.
        tokens_per_step: tokens that a sequence gets per forward pass of the main model.
    """

    domain: str
    temperature: float
    drafted: int
    accepted: float
    tokens_per_step: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second with a draft, and as the gate chooses, over those without."""

    batch: int
    with_draft: float
    gate: float
    gate_drafts: float
    """Share of the gate's rows that had a draft."""


@dataclass(frozen=True, slots=True)
class DraftingReport:
    acceptance: list[Acceptance]
    speed: list[Speed]
    kv_bytes_per_token: int
    mtp_kv_bytes_per_token: int


def bench_drafting(folder: Path, *, prompts: int = 24, repeat: int = 5) -> DraftingReport:
    """Measure a checkpoint that has the MTP layer.

    Args:
        prompts: conversations per domain.
        repeat: runs of each batch with each setting; medians count.
    """
    engines = {mode: LLM(folder, mtp=mode) for mode in (0, 1, "auto")}
    with_mtp = engines[1].engine.info
    if not with_mtp.has_mtp:
        raise ValueError(f"{with_mtp.path} has no MTP layer; see `glmd convert --mtp-only`")
    try:
        acceptance = [
            _acceptance(engines[1], domain, temperature, prompts)
            for temperature in (0.0, 0.2)
            for domain in DOMAINS
        ]
        speed = [_speed(engines, batch, repeat) for batch in BATCHES]
    finally:
        for llm in engines.values():
            llm.close()
    plain = engines[0].engine.info.kv_bytes_per_token
    extra = with_mtp.kv_bytes_per_token - plain
    return DraftingReport(acceptance, speed, plain, extra)


def conversations(domain: str, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Conversations of a domain, as keywords of `LLM.chat_batch`."""
    random = Random(f"{domain} {seed}")  # noqa: S311  # repeatable, not secret
    for _ in range(count):
        name, city, phrase = (random.choice(each) for each in (NAMES, CITIES, PHRASES))
        a, b = random.randint(2, 60), random.randint(2, 30)
        text = {
            "greeting": f"Hello, I am {name}.",
            "arithmetic": f"What is {a} + {b}?",
            "echo": f"Repeat: {phrase}",
            "counting": f"Count from {b} to {b + 25}.",
            "story": f"Tell a story about {name}.",
            "tool call": f"What is the weather in {city}?",
        }[domain]
        yield {
            "messages": [{"role": "user", "content": text}],
            "tools": [WEATHER] if domain == "tool call" else None,
        }


def _acceptance(llm: LLM, domain: str, temperature: float, count: int) -> Acceptance:
    before = llm.engine.stats()
    asked = list(conversations(domain, count))
    completions = llm.chat_batch(
        [each["messages"] for each in asked],
        tools=asked[0]["tools"],
        temperature=temperature,
        seed=1,
        max_tokens=200,
    )
    after = llm.engine.stats()
    drafted = after.drafted - before.drafted
    accepted = after.accepted - before.accepted
    tokens = sum(len(completion.tokens) for completion in completions)
    return Acceptance(
        domain, temperature, drafted, accepted / max(1, drafted), tokens / max(1, tokens - accepted)
    )


def _speed(engines: dict[Literal[0, 1, "auto"] | str | int, LLM], batch: int, repeat: int) -> Speed:
    """Medians over alternating runs, after one that warms up."""
    rates: dict[str | int, list[float]] = {mode: [] for mode in engines}
    drafts = []
    for run in range(repeat + 1):
        for mode, llm in engines.items():
            before = llm.engine.stats()
            rate = _rate(llm, batch, seed=run)
            after = llm.engine.stats()
            if run:
                rates[mode].append(rate)
                if mode == "auto":
                    generated = after.tokens_generated - before.tokens_generated
                    accepted = after.accepted - before.accepted
                    rows = max(1, generated - accepted)
                    drafts.append((after.drafted - before.drafted) / rows)
    plain = median(rates[0])
    return Speed(batch, median(rates[1]) / plain, median(rates["auto"]) / plain, median(drafts))


def _rate(llm: LLM, batch: int, seed: int) -> float:
    """Tokens per second of one batch of stories and countings."""
    asked = [*conversations("story", batch, seed), *conversations("counting", batch, seed)]
    messages = [each["messages"] for each in asked][::2][:batch]
    started = time.perf_counter()
    completions = llm.chat_batch(
        messages, temperature=0.0, max_tokens=LENGTH, min_tokens=0, ignore_eos=True
    )
    seconds = time.perf_counter() - started
    return sum(len(completion.tokens) for completion in completions) / seconds
