"""`glmd bench grammar`: what holding a batch to a form costs, and what compiling one takes.

The same rows decode with and without a form, turn by turn in one process, with the sampling that
the checkpoint recommends. No form ends before the tokens asked for, so both do the same work but
for the masks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec

from glmd.bench import workloads
from glmd.bench.checkpoints import on_gpu
from glmd.bench.compiling import CompileTimes, compile_times
from glmd.bench.forms import agent_tools, forms
from glmd.bench.backends import GlmdSession, GlmdSide
from glmd.bench.runner import Session, run
from glmd.bench.workloads import Prompts
from glmd.chat.special_tokens import SpecialTokens
from glmd.chat.tokenizer import Tokenizer
from glmd.checkpoint.config import load_config
from glmd.checkpoint.generation_config import sampling_defaults
from glmd.engine.structured_output import MaskRequest, StructuredOutputManager, Words
from glmd.ipc import GrammarSpec
from glmd.structured_output.compiler import build_grammar

ROWS = 16
TARGET = 0.9
"""Of the rate without a form."""

NEVER = -100.0
"""The bias of tokens that end an answer, on both sides: a form that may end need not."""


@dataclass(frozen=True, slots=True)
class FormSpeed:
    """One form.

    Attributes:
        free: tokens per second without it, the median.
        held: and with it.
        ratio: median of the repetitions' own ratios.
        free_step: seconds of a step without it, the median.
        held_step: and with it.
        masks: seconds per step in which the host computes masks, while the device runs the
            forward pass.
        runs: tokens per second without and with it, one pair per repetition.
    """

    form: str
    free: float
    held: float
    ratio: float
    free_step: float
    held_step: float
    masks: float
    runs: list[tuple[float, float]]

    @property
    def met(self) -> bool:
        return self.ratio >= TARGET


@dataclass(frozen=True, slots=True)
class GrammarReport:
    rows: int
    tokens: int
    """Per row."""
    forms: list[FormSpeed]
    compiling: CompileTimes


@dataclass(frozen=True, slots=True)
class _Run:
    rate: float
    step: float
    masks: float


class _TimedConstraints(StructuredOutputManager):
    """Notes how long each step's masks take."""

    def __init__(self, folder: Path) -> None:
        config = load_config(folder)
        super().__init__(folder, config.vocab_size, config.eos_token_ids)
        self.seconds: list[float] = []

    def masks(self, asks: Sequence[MaskRequest]) -> tuple[list[int], Words]:
        start = time.perf_counter()
        found = super().masks(asks)
        self.seconds.append(time.perf_counter() - start)
        return found


class _Held:
    """glmd with all rows held to a form, or to none."""

    name = "glmd"

    def __init__(self, glmd: GlmdSide, folder: Path, guidance: GrammarSpec | None) -> None:
        self.constraints = _TimedConstraints(folder)
        self._glmd = glmd
        ends = dict.fromkeys(load_config(folder).eos_token_ids, NEVER)
        self._form = {
            "grammar": guidance,
            "sampling": msgspec.structs.replace(
                sampling_defaults(folder), logit_bias=ends, seed=workloads.SEED
            ),
        }

    def open(self) -> Session:
        return GlmdSession(self._glmd.engine(self.constraints), **self._form)

    def run(self, workload: workloads.Workload) -> _Run:
        self.constraints.seconds.clear()
        trace = run(self, workload)
        rate = trace.decode_rate()
        masks = self.constraints.seconds
        return _Run(rate, len(trace.lives) / rate, median(masks) if masks else 0.0)


def bench_grammar(
    folder: Path,
    *,
    scale: float,
    repeat: int,
    only: str,
    on_progress: Callable[[str], None],
    tokens: int = 64,
) -> GrammarReport:
    """Measure.

    Args:
        folder: a checkpoint.
        scale: factor on all prompt lengths.
        repeat: runs of each form, with it and without.
        only: run the forms whose name contains this.
        on_progress: called with a line of progress.
        tokens: that each row generates.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
    """
    config = load_config(folder)
    tags = SpecialTokens.find(Tokenizer.load(folder).controls, "the tokenizer")
    on_progress(f"loading {folder.name}")
    glmd = GlmdSide(folder, "bfloat16" if on_gpu() else "float32")
    workload = workloads.decode(Prompts(config.vocab_size, scale), ROWS, new=tokens)
    free = _Held(glmd, folder, None)
    speeds = []
    for name, structure in forms().items():
        if only in name:
            held = _Held(glmd, folder, GrammarSpec(grammar=build_grammar(structure, tags).text))
            speeds.append(_speed(name, free, held, workload, repeat, on_progress))
    on_progress("compiling an agent's 20 tools")
    return GrammarReport(ROWS, tokens, speeds, compile_times(folder, agent_tools, repeat))


def _speed(
    name: str,
    free: _Held,
    held: _Held,
    workload: workloads.Workload,
    repeat: int,
    on_progress: Callable[[str], None],
) -> FormSpeed:
    pairs: list[tuple[_Run, _Run]] = []
    for turn in range(repeat + 1):
        on_progress(f"{ROWS} rows, {name}, {turn} of {repeat}")
        if turn % 2:
            first = held.run(workload)
            pairs.append((free.run(workload), first))
        else:
            pairs.append((free.run(workload), held.run(workload)))
    del pairs[0]  # compiles the grammar, and touches all weights
    return FormSpeed(
        form=name,
        free=median(one.rate for one, _ in pairs),
        held=median(one.rate for _, one in pairs),
        ratio=median(with_it.rate / without.rate for without, with_it in pairs),
        free_step=median(one.step for one, _ in pairs),
        held_step=median(one.step for _, one in pairs),
        masks=median(one.masks for _, one in pairs),
        runs=[(without.rate, with_it.rate) for without, with_it in pairs],
    )
