"""Measure the cost of grammars: decoding 16 rows with and without one, and compilation.

    python benchmarks/grammar.py --scale 0.25 --repeat 3

The same rows decode with and without a grammar, in alternating runs in one process, with the
checkpoint's recommended sampling. No grammar completes before the requested tokens, so both runs
do the same work except for the masks.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.table import Table

from agent_tools import AGENT_TOOLS
from glmd.bench import report, workloads
from glmd.bench.backends import GlmdBackend, GlmdSession
from glmd.bench.random_checkpoint import middle_checkpoint, on_gpu
from glmd.bench.runner import BackendSession, run
from glmd.bench.workloads import Prompts, Workload
from glmd.chat.tokenizer import SpecialTokens, Tokenizer
from glmd.chat.tools import read_tools
from glmd.checkpoint.config import load_config, sampling_defaults
from glmd.engine.structured_output import MaskRequest, StructuredOutputManager, Words
from glmd.ipc import GrammarSpec
from glmd.structured_output.compiler import GrammarCompiler, build_grammar
from glmd.structured_output.request import JsonSchema, OutputSpec, Regex, make_structure

ROWS = 16
TARGET = 0.9
"""Minimum rate with a grammar, relative to the rate without."""

NEVER = -100.0
"""Logit bias of EOS tokens in both runs: a grammar that may end must not end early."""

RECORD: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1, "maximum": 99_999},
        "title": {"type": "string", "minLength": 3, "maxLength": 40},
        "status": {"enum": ["open", "in progress", "blocked", "done"]},
        "price": {"anyOf": [{"type": "number", "minimum": 0}, {"type": "null"}]},
        "due": {"type": "string", "format": "date"},
        "owner": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 24},
                "email": {"type": "string", "format": "email", "maxLength": 40},
            },
            "required": ["name", "email"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
    },
    "required": ["id", "title", "status", "price", "due", "owner", "tags"],
    "additionalProperties": False,
}
"""Schema of a data extraction. Strings are bounded so that random weights reach every part."""

RECORDS: dict[str, Any] = {
    "type": "object",
    "properties": {"records": {"type": "array", "items": RECORD, "minItems": 1000}},
    "required": ["records"],
    "additionalProperties": False,
}


def twenty_tools(suffix: str = "") -> OutputSpec:
    """Return the spec of repeated calls of twenty tools.

    Args:
        suffix: appended to the tools' names, for a spec that is not cached.
    """
    tools = [
        {**tool, "function": {**tool["function"], "name": tool["function"]["name"] + suffix}}
        for tool in AGENT_TOOLS
    ]
    return make_structure(None, read_tools(tools), required=True)


def output_specs() -> dict[str, OutputSpec]:
    """Return the measured specs by name."""
    return {
        "any text": OutputSpec(Regex("(?s:.*)", "regex")),
        "JSON records": OutputSpec(JsonSchema(RECORDS, "schema")),
        "calls of 20 tools": twenty_tools(),
    }


@dataclass(frozen=True, slots=True)
class GrammarSpeed:
    """Speed with one grammar; medians.

    Attributes:
        free: tokens per second without the grammar.
        constrained: tokens per second with the grammar.
        ratio: constrained / free, median of the ratios within each repetition.
        free_step: seconds per step without the grammar.
        constrained_step: seconds per step with the grammar.
        masks: seconds per step in which the host computes masks during the forward pass.
        runs: tokens per second without and with the grammar in each repetition.
    """

    grammar: str
    free: float
    constrained: float
    ratio: float
    free_step: float
    constrained_step: float
    masks: float
    runs: list[tuple[float, float]]

    @property
    def met(self) -> bool:
        """Whether the target is met."""
        return self.ratio >= TARGET


@dataclass(frozen=True, slots=True)
class CompileTimes:
    """Medians in seconds.

    Attributes:
        start: start of the API's grammar worker, with the first grammar.
        api: from a request to a grammar, in the worker.
        api_again: the same for a cached grammar.
        engine: from a grammar to the first mask, in a thread of the engine process.
        engine_again: the same for a cached grammar.
    """

    start: float
    api: float
    api_again: float
    engine: float
    engine_again: float


@dataclass(frozen=True, slots=True)
class GrammarReport:
    """Result of the benchmark.

    Attributes:
        tokens: tokens of each row while all rows decode.
    """

    rows: int
    tokens: int
    grammars: list[GrammarSpeed]
    compiling: CompileTimes


@dataclass(frozen=True, slots=True)
class _Run:
    rate: float
    step: float
    masks: float


class _TimedManager(StructuredOutputManager):
    """Records the duration of each step's masks."""

    def __init__(self, folder: Path) -> None:
        config = load_config(folder)
        super().__init__(folder, config.vocab_size, config.eos_token_ids)
        self.seconds: list[float] = []

    def masks(self, asks: Sequence[MaskRequest]) -> tuple[list[int], Words]:
        start = time.perf_counter()
        found = super().masks(asks)
        self.seconds.append(time.perf_counter() - start)
        return found


class _ConstrainedBackend:
    """glmd with one grammar for all rows. `grammar=None`: no grammar."""

    name = "glmd"

    def __init__(self, glmd: GlmdBackend, folder: Path, grammar: GrammarSpec | None) -> None:
        self._manager = _TimedManager(folder)
        self._glmd = glmd
        eos_bias = dict.fromkeys(load_config(folder).eos_token_ids, NEVER)
        self._fields: dict[str, Any] = {
            "grammar": grammar,
            "sampling": msgspec.structs.replace(
                sampling_defaults(folder), logit_bias=eos_bias, seed=workloads.SEED
            ),
        }

    def open(self) -> BackendSession:
        return GlmdSession(self._glmd.engine(self._manager), **self._fields)

    def run(self, workload: Workload) -> _Run:
        self._manager.seconds.clear()
        trace = run(self, workload)
        rate = trace.decode_rate()
        masks = self._manager.seconds
        return _Run(rate, len(trace.requests) / rate, median(masks) if masks else 0.0)


def bench_grammar(
    folder: Path,
    *,
    scale: float,
    repeat: int,
    only: str,
    on_progress: Callable[[str], None],
    tokens: int = 64,
) -> GrammarReport:
    """Run the benchmark.

    Args:
        folder: checkpoint.
        scale: factor on all prompt lengths.
        repeat: runs with and without each grammar.
        only: run only grammars whose name contains this text.
        on_progress: called with a line of progress.
        tokens: tokens of each row while all rows decode.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
    """
    config = load_config(folder)
    special_tokens = SpecialTokens.find(Tokenizer.load(folder).controls, "the tokenizer")
    on_progress(f"loading {folder.name}")
    glmd = GlmdBackend(folder, "bfloat16" if on_gpu() else "float32")
    workload = workloads.decode(Prompts(config.vocab_size, scale), ROWS, window=tokens)
    free = _ConstrainedBackend(glmd, folder, None)
    speeds = []
    for name, spec in output_specs().items():
        if only in name:
            grammar = GrammarSpec(grammar=build_grammar(spec, special_tokens).text)
            constrained = _ConstrainedBackend(glmd, folder, grammar)
            speeds.append(_speed(name, free, constrained, workload, repeat, on_progress))
    on_progress("compiling an agent's 20 tools")
    compiling = asyncio.run(_compile_times(folder, repeat))
    return GrammarReport(ROWS, tokens, speeds, compiling)


def _speed(
    name: str,
    free: _ConstrainedBackend,
    constrained: _ConstrainedBackend,
    workload: Workload,
    repeat: int,
    on_progress: Callable[[str], None],
) -> GrammarSpeed:
    pairs: list[tuple[_Run, _Run]] = []
    for number in range(repeat + 1):
        on_progress(f"{ROWS} rows, {name}, {number} of {repeat}")
        if number % 2:
            second = constrained.run(workload)
            pairs.append((free.run(workload), second))
        else:
            pairs.append((free.run(workload), constrained.run(workload)))
    del pairs[0]  # warm-up: compiles the grammar and reads all weights
    return GrammarSpeed(
        grammar=name,
        free=median(without.rate for without, _ in pairs),
        constrained=median(with_it.rate for _, with_it in pairs),
        ratio=median(with_it.rate / without.rate for without, with_it in pairs),
        free_step=median(without.step for without, _ in pairs),
        constrained_step=median(with_it.step for _, with_it in pairs),
        masks=median(with_it.masks for _, with_it in pairs),
        runs=[(without.rate, with_it.rate) for without, with_it in pairs],
    )


async def _compile_times(folder: Path, repeat: int) -> CompileTimes:
    config = load_config(folder)
    compiler = GrammarCompiler(Tokenizer.load(folder).controls)
    manager = StructuredOutputManager(folder, config.vocab_size, config.eos_token_ids)
    rows: list[tuple[float, float, float, float]] = []

    async def compile_in_api(spec: OutputSpec) -> tuple[GrammarSpec, float]:
        start = time.perf_counter()
        grammar = await compiler.compile(spec, in_reasoning=False)
        seconds = time.perf_counter() - start
        assert grammar is not None
        return grammar, seconds

    def compile_in_engine(grammar: GrammarSpec) -> float:
        start = time.perf_counter()
        manager.start(grammar, manager.prepare(grammar).result())
        return time.perf_counter() - start

    try:
        for number in range(repeat + 1):
            spec = twenty_tools(f"_{number}")
            grammar, api = await compile_in_api(spec)
            _, api_again = await compile_in_api(spec)
            engine = compile_in_engine(grammar)
            rows.append((api, api_again, engine, compile_in_engine(grammar)))
    finally:
        await compiler.close()
    # The first row includes the start of the worker and of the engine's tokenizer.
    return CompileTimes(rows[0][0], *(median(column) for column in zip(*rows[1:], strict=True)))


def speed_table(result: GrammarReport) -> Table:
    """Return a table with one row per grammar."""
    table = report.make_table(
        f"{result.rows} rows with and without a grammar, medians",
        ("grammar",),
        (
            "tokens/s without", "with", "ratio", "target", "", "ms per step without", "with",
            "masks",
        ),
    )  # fmt: skip
    for row in result.grammars:
        steps = (row.free_step, row.constrained_step, row.masks)
        table.add_row(
            row.grammar,
            report.number(row.free),
            report.number(row.constrained),
            f"{row.ratio:.3f}×",
            f"≥ {TARGET:g}×",
            report.verdict(row.met),
            *(report.number(1000 * seconds) for seconds in steps),
        )
    return table


def compile_table(times: CompileTimes) -> Table:
    """Return a table of compile times by process."""
    table = report.make_table(
        "Compiling an agent's 20 tools, medians in ms", ("where",), ("first time", "again")
    )
    for where, *seconds in (
        ("API: check, in the grammar worker", times.api, times.api_again),
        ("engine: up to the first mask, in a thread", times.engine, times.engine_again),
    ):
        table.add_row(where, *(report.number(1000 * each) for each in seconds))
    table.caption = f"The first grammar starts the worker: {times.start:.2f} s."
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="checkpoint; default: random weights")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the prompt lengths")
    parser.add_argument("--repeat", type=int, default=5, help="runs; medians are shown")
    parser.add_argument("--only", default="", help="run only grammars whose name contains this")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args()
    folder = options.model or middle_checkpoint()
    with report.progress() as on_progress:
        result = bench_grammar(
            folder,
            scale=options.scale,
            repeat=options.repeat,
            only=options.only,
            on_progress=on_progress,
        )
    report.console().print(speed_table(result), compile_table(result.compiling))
    if options.json is not None:
        report.write_json(options.json, result, folder, options.scale, options.repeat)


if __name__ == "__main__":
    main()
