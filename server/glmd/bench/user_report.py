"""A short report on one machine and model, in Markdown, for users to share."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import psutil

from glmd import __version__
from glmd.bench import workloads
from glmd.bench.backends import Dtype, GlmdBackend
from glmd.bench.random_checkpoint import on_gpu
from glmd.bench.runner import NotMeasured, RunTrace, run
from glmd.bench.workloads import Prompts, Request, Wave, Workload
from glmd.chat.tokenizer import Tokenizer
from glmd.checkpoint.config import load_config
from glmd.engine.memory import device_name
from glmd.utils.text import gib

Line = tuple[str, str]

DECODING = (1, 4, 8)
"""Numbers of streams whose rate is reported."""

WINDOW = 64
"""Tokens of each stream in a rate."""

DRAFTED_TOKENS = 256
"""Tokens of the answer with which drafts are measured."""

QUESTION = (
    "[gMASK]<sop><|user|>Explain how a hash table resolves collisions, and write one in Python with"
    " open addressing, tests included.<|assistant|><think>"
)
"""A prompt with a predictable answer in prose and code, as drafts depend on the text."""


def measure(
    folder: Path, *, scale: float, repeat: int, on_progress: Callable[[str], None]
) -> list[Line]:
    """Measure a model on this machine.

    Args:
        folder: the checkpoint.
        scale: factor on all prompt lengths.
        repeat: runs of each workload; medians are reported.
        on_progress: called with a line of progress.

    Returns:
        names and values with units, in order.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
    """
    config = load_config(folder)
    dtype: Dtype = "auto" if on_gpu() else "float32"
    on_progress(f"loading {folder.name}")
    backend = GlmdBackend(folder, dtype)
    plain = backend.with_drafts(0)
    run(plain, workloads.decode(Prompts(config.vocab_size, 0), 2, window=4))  # compiles kernels
    prompts = Prompts(config.vocab_size, scale)
    lines: list[Line] = []

    def add(
        name: str, workload: Workload, read: Callable[[RunTrace], float], form: str
    ) -> float | None:
        values = []
        for number in range(repeat):
            on_progress(f"{name}, {number + 1} of {repeat}")
            try:
                values.append(read(run(plain, workload)))
            except NotMeasured as reason:
                lines.append((name, f"not measured: {reason}"))
                return None
        lines.append((name, form.format(median(values))))
        return median(values)

    plain.extend_context(prompts.draw(8192).size + 4096)
    for streams in DECODING:
        workload = workloads.decode(prompts, streams, window=WINDOW)
        add(
            f"decode, streams together: {streams}",
            workload,
            RunTrace.decode_rate,
            "{:.1f} tokens/s",
        )
    alone = Request(prompts.draw(4096), 1)
    add(
        "prefill, one prompt of 4k",
        Workload("prefill", (Wave((alone,)),)),
        lambda trace: len(alone.prompt) / trace.first_token_seconds(),
        "{:.0f} tokens/s",
    )
    add(
        "8k prompt among 8 streams, their longest gap",
        workloads.interrupted(prompts),
        RunTrace.longest_gap,
        "{:.2f} s",
    )
    add(
        "100 new tokens on a cached 8k context, first token",
        workloads.returning(prompts),
        RunTrace.first_token_seconds,
        "{:.2f} s",
    )
    lines += measure_drafts(backend, folder, repeat, on_progress)
    return lines


def measure_drafts(
    backend: GlmdBackend, folder: Path, repeat: int, on_progress: Callable[[str], None]
) -> Iterator[Line]:
    """Compare one draft per step with none, and report the accepted share."""
    if not backend.has_mtp:
        yield "MTP drafts", "the model has no MTP layer"
        return
    prompt = np.array(Tokenizer.load(folder).encode_markup(QUESTION), np.int32)
    request = Request(prompt, DRAFTED_TOKENS + 1)
    workload = Workload("drafts", (Wave((request,)),))
    rates: dict[Literal[0, 1], list[float]] = {0: [], 1: []}
    accepted = 0.0
    for number in range(repeat):
        on_progress(f"MTP drafts, {number + 1} of {repeat}")
        for drafts, found in rates.items():
            side = backend.with_drafts(drafts)
            trace = run(side, workload)
            times = trace.waves[0][0].times
            found.append((len(times) - 1) / (times[-1] - times[0]))
            if drafts:
                accepted = side.acceptance
    ratio = median(one / none for none, one in zip(rates[0], rates[1], strict=True))
    yield "one MTP draft per step, accepted", f"{100 * accepted:.0f} %"
    yield "one MTP draft per step, speed against none", f"{ratio:.2f} ×"


def markdown(folder: Path, lines: list[Line], name: str) -> str:
    """Format a report with device and versions."""
    config = load_config(folder)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    bits = "quantised" if config.quantization else "not quantised"
    system = platform.mac_ver()[0]
    facts = [
        ("device", device_name()),
        ("memory", f"{gib(psutil.virtual_memory().total)} GiB"),
        ("system", f"macOS {system}" if system else platform.platform()),
        ("model", f"{name}, {gib(weights)} GiB, {bits}, {config.num_hidden_layers} layers"),
        (
            "versions",
            f"glmd {__version__}, mlx {version('mlx')}, Python {platform.python_version()}",
        ),
    ]
    rows = [f"| {left} | {right} |" for left, right in (*facts, *lines)]
    return "\n".join(["# glmd bench report", "", "| | |", "|---|---|", *rows]) + "\n"
