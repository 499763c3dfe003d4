"""How long compiling a form takes, where it is checked and where it is followed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from glmd.chat.tokenizer import Tokenizer
from glmd.checkpoint.config import load_config
from glmd.engine.structured_output import StructuredOutputManager
from glmd.ipc import GrammarSpec
from glmd.structured_output import GrammarCompiler, OutputSpec


@dataclass(frozen=True, slots=True)
class CompileTimes:
    """Medians, in seconds.

    Attributes:
        start: until the process that compiles is there, at the first form of a server's life.
        check: the API's part, in that process: from the request to a grammar.
        check_again: the same for a form that was seen before.
        follow: the engine's part, in a thread: from a grammar to the first mask.
        follow_again: the same for a grammar that was seen before.
    """

    start: float
    check: float
    check_again: float
    follow: float
    follow_again: float


def compile_times(folder: Path, form: Callable[[str], OutputSpec], repeat: int) -> CompileTimes:
    """Measure.

    Args:
        folder: of the checkpoint whose tokenizer counts.
        form: by a text, forms that differ in that text only.
        repeat: as many such forms.
    """
    return asyncio.run(_measure(folder, form, repeat))


async def _measure(folder: Path, form: Callable[[str], OutputSpec], repeat: int) -> CompileTimes:
    config = load_config(folder)
    compiler = GrammarCompiler(Tokenizer.load(folder).controls)
    constraints = StructuredOutputManager(folder, config.vocab_size, config.eos_token_ids)
    checks, checks_again, follows, follows_again = [], [], [], []
    start = 0.0
    try:
        for number in range(repeat + 1):
            structure = form(f"_{number}")
            guidance, seconds = await _check(compiler, structure)
            _, again = await _check(compiler, structure)
            follow = _follow(constraints, guidance)
            follow_again = _follow(constraints, guidance)
            if number == 0:  # waits for the process, and for the tokenizer in the engine
                start = seconds
                continue
            checks.append(seconds)
            checks_again.append(again)
            follows.append(follow)
            follows_again.append(follow_again)
    finally:
        await compiler.close()
    return CompileTimes(
        start, *(median(each) for each in (checks, checks_again, follows, follows_again))
    )


async def _check(compiler: GrammarCompiler, structure: OutputSpec) -> tuple[GrammarSpec, float]:
    start = time.perf_counter()
    guidance = await compiler.compile(structure, in_reasoning=False)
    seconds = time.perf_counter() - start
    assert guidance is not None
    return guidance, seconds


def _follow(constraints: StructuredOutputManager, guidance: GrammarSpec) -> float:
    start = time.perf_counter()
    constraints.start(guidance, constraints.prepare(guidance).result())
    return time.perf_counter() - start
