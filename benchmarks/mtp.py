"""Measure the acceptance and the speed of MTP drafts.

    python benchmarks/mtp.py --prompts 8 --repeat 3

Acceptance depends on the weights and the text, so it is measured per domain on conversations.
Speed depends on the machine and the batch size, so it is measured against the same engine with
drafting off, in alternating runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from glmd.bench import report
from glmd.checkpoint.hub import DEMO
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
"""Tokens per sequence in the speed measurement."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Acceptance of drafts in one domain at one temperature.

    Attributes:
        accepted: share of accepted drafts.
        tokens_per_step: tokens per sequence and forward pass of the main model.
    """

    domain: str
    temperature: float
    drafted: int
    accepted: float
    tokens_per_step: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed with one draft and with `--mtp auto`, relative to the speed without drafts.

    Attributes:
        auto_drafts: share of rows with a draft under `--mtp auto`.
    """

    batch: int
    with_draft: float
    auto: float
    auto_drafts: float


@dataclass(frozen=True, slots=True)
class DraftingReport:
    """Result of the benchmark."""

    acceptance: list[Acceptance]
    speed: list[Speed]
    kv_bytes_per_token: int
    mtp_kv_bytes_per_token: int


def bench_drafting(folder: Path, *, prompts: int = 24, repeat: int = 5) -> DraftingReport:
    """Measure a checkpoint with an MTP layer.

    Args:
        prompts: conversations per domain.
        repeat: runs of each batch size with each setting.
    """
    engines: dict[int | str, LLM] = {mode: LLM(folder, mtp=mode) for mode in (0, 1, "auto")}
    with_mtp = engines[1].engine.info
    if not with_mtp.has_mtp:
        raise ValueError(
            f"{with_mtp.path} has no MTP layer. Add one with `glmd convert --mtp-only`."
        )
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
    """Yield conversations of a domain as keyword arguments of `LLM.chat_batch`."""
    random = Random(f"{domain} {seed}")  # reproducible, not secret
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


def _speed(engines: dict[int | str, LLM], batch: int, repeat: int) -> Speed:
    """Return medians over alternating runs, after a warm-up run."""
    rates: dict[int | str, list[float]] = {mode: [] for mode in engines}
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
    """Return tokens per second of one batch of the domains story and counting."""
    asked = [*conversations("story", batch, seed), *conversations("counting", batch, seed)]
    messages = [each["messages"] for each in asked][::2][:batch]
    started = time.perf_counter()
    completions = llm.chat_batch(
        messages, temperature=0.0, max_tokens=LENGTH, min_tokens=0, ignore_eos=True
    )
    seconds = time.perf_counter() - started
    return sum(len(completion.tokens) for completion in completions) / seconds


def tables(result: DraftingReport) -> tuple[Table, Table]:
    """Return acceptance by domain, and speed by batch size."""
    acceptance = report.make_table(
        "MTP drafts, one per step",
        ("domain",),
        ("temperature", "drafted", "accepted", "tokens per forward pass"),
    )
    for domain in result.acceptance:
        acceptance.add_row(
            domain.domain,
            report.number(domain.temperature),
            str(domain.drafted),
            f"{domain.accepted:.0%}",
            f"{domain.tokens_per_step:.2f}",
        )
    speed = report.make_table(
        "Speed against --mtp off, medians",
        (),
        ("batch", "--mtp 1", "--mtp auto", "rows with a draft under auto"),
    )
    for row in result.speed:
        ratios = f"{row.with_draft:.2f}×", f"{row.auto:.2f}×"
        speed.add_row(str(row.batch), *ratios, f"{row.auto_drafts:.0%}")
    return acceptance, speed


def plot(result: DraftingReport, file: Path) -> None:
    """Plot acceptance by domain, and speed by batch size."""
    figure, (acceptance, speed) = report.make_figure(
        [len(result.acceptance), 2 * len(result.speed)]
    )
    labels = [f"{each.domain}, temperature {each.temperature:g}" for each in result.acceptance]
    shares = [100 * each.accepted for each in result.acceptance]
    report.bars(acceptance, labels, [shares], [report.OURS], "{:.0f} %")
    acceptance.set_title("MTP drafts", loc="left")
    acceptance.set_xlabel("accepted, in percent of one draft per step")
    ratios = [[row.with_draft for row in result.speed], [row.auto for row in result.speed]]
    batches = [f"batch {row.batch}" for row in result.speed]
    colors = [report.THEIRS, report.OURS]
    report.bars(speed, batches, ratios, colors, "{:.2f}×", ["--mtp 1", "--mtp auto"])
    speed.axvline(1, color=report.TARGET)
    speed.set_xlabel("times the speed of --mtp off")
    figure.savefig(file, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO, help="checkpoint with an MTP layer")
    parser.add_argument("--prompts", type=int, default=24, help="conversations per domain")
    parser.add_argument("--repeat", type=int, default=5, help="runs; medians are shown")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--plot", type=Path, help="plot the results to this file, .svg or .png")
    options = parser.parse_args()
    report.require_plot(options.plot)
    with Console(stderr=True).status("drafting"):
        result = bench_drafting(options.model, prompts=options.prompts, repeat=options.repeat)
    console = report.console()
    console.print(*tables(result))
    console.print(
        f"KV per token: {result.kv_bytes_per_token} bytes, and {result.mtp_kv_bytes_per_token}"
        " for the MTP layer"
    )
    if options.plot is not None:
        plot(result, options.plot)
    if options.json is not None:
        report.write_json(options.json, result, options.model, 1.0, options.repeat)


if __name__ == "__main__":
    main()
