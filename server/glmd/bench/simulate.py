"""Scenarios of `glmd bench simulate`: what scheduling does on Apple GPUs, by `Simulation`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from rich.table import Table

from glmd.bench.device_model import Device
from glmd.bench.report import make_table, number
from glmd.bench.simulation import Simulation, Stream
from glmd.engine.config import EngineConfig
from glmd.ipc import TokenArray


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationRow:
    """Result of one scenario on one device; None: not applicable.

    Attributes:
        streams: requests that run beside those measured, or, of "agents", agents.
        ttft_s: time to first token, of several requests the median.
        ttft_ratio: to the same request alone.
        stream_rate: mean tokens/s of the slowest stream.
        gap_p50_ms, gap_p99_ms, gap_max_ms: time between two tokens of a stream.
        steps: number of steps until the measured requests were done.
        rows_median: prefill rows of a step with prefill.
        pieces_max: most pieces of KV in a sequence's path.
        dispatches_per_layer: most kernels per layer of a step without prefill.
        copies_per_token: how often a token's KV was copied to merge segments, on average.
    """

    device: str
    scenario: str
    streams: int
    ttft_s: float
    ttft_ratio: float
    stream_rate: float | None
    gap_p50_ms: float | None
    gap_p99_ms: float | None
    gap_max_ms: float | None
    steps: int
    rows_median: float
    pieces_max: int
    dispatches_per_layer: int
    copies_per_token: float


PROMPT_STREAMS = (0, 1, 3, 8)
STREAM_PROMPT = 1000
CROWD, CROWD_PROMPT, CROWD_OUTPUT = 16, 300, 100
AGENTS, AGENT_HEAD, AGENT_TURNS, AGENT_INPUT, AGENT_OUTPUT = 4, 25_000, 12, 400, 300
AGENT_PAUSE = 1.0
"""Seconds between an agent's answer and the next request, for the tool."""
FORKS, FORK_TOKENS = 50, 3
"""Turns of a conversation, and tokens at the end of each answer that the next prompt replaces."""
ENDLESS = 1 << 17

NewSimulation = Callable[[], Simulation]


class _Case:
    """One scenario on one device: builds the requests, runs them and reports a row."""

    def __init__(self, new: NewSimulation) -> None:
        self._rng = np.random.default_rng(20_260_119)
        self.sim = new()

    def tokens(self, count: int) -> TokenArray:
        """Random tokens, not 0: the sampled token."""
        return self._rng.integers(1, 150_000, count).astype(np.int32)

    def start_streams(self, count: int) -> list[Stream]:
        """Start endless streams, and let each decode for a second."""
        sim = self.sim
        streams = [
            sim.submit(self.tokens(STREAM_PROMPT), ENDLESS, client=f"stream {i}")
            for i in range(count)
        ]
        if streams:
            sim.run(lambda: all(s.times and sim.clock > s.times[0] + 1 for s in streams))
        return streams

    def row(
        self,
        scenario: str,
        streams: int,
        requests: list[Stream],
        alone: float | None,
        *,
        first_step: int,
        start: float,
        readers: list[Stream],
    ) -> SimulationRow:
        """Summarise the steps from `first_step` on.

        Args:
            alone: seconds to the first token alone; None: these are alone.
            start: from which time on the tokens of `readers` count.
        """
        steps, tree = self.sim.steps[first_step:], self.sim.scheduler.tree
        ttft = float(np.median([request.first_token for request in requests]))
        rates, gaps = [], []
        for reader in readers:
            times = np.array(reader.times)
            # The last token before the start begins the first gap.
            times = times[max(0, int(np.searchsorted(times, start)) - 1) :]
            if len(times) > 1:
                rates.append((len(times) - 1) / (times[-1] - times[0]))
                gaps.append(np.diff(times) * 1e3)
            elif len(reader.times) < reader.max_tokens:
                rates.append(0.0)
            if len(times) and len(reader.times) < reader.max_tokens:
                # The gap that the end of the scenario cuts.
                gaps.append(np.array([self.sim.clock - times[-1]]) * 1e3)
        gap = np.concatenate(gaps) if gaps else None
        plain = [step.dispatches for step in steps if not step.prefill_rows]
        return SimulationRow(
            device=self.sim.info.device,
            scenario=scenario,
            streams=streams,
            ttft_s=ttft,
            ttft_ratio=1.0 if alone is None else ttft / alone,
            stream_rate=float(min(rates)) if rates else None,
            gap_p50_ms=float(np.quantile(gap, 0.5)) if gap is not None else None,
            gap_p99_ms=float(np.quantile(gap, 0.99)) if gap is not None else None,
            gap_max_ms=float(gap.max()) if gap is not None else None,
            steps=len(steps),
            rows_median=float(np.median([s.prefill_rows for s in steps if s.prefill_rows])),
            pieces_max=max(step.pieces for step in steps),
            dispatches_per_layer=max(plain or [step.dispatches for step in steps]),
            copies_per_token=tree.copied_tokens / (tree.tokens + tree.evicted_tokens),
        )


def _prompt(
    new: NewSimulation,
    name: str,
    tokens: int,
    streams: int,
    alone: float | None,
) -> SimulationRow:
    """A long prompt beside streams."""
    case = _Case(new)
    sim = case.sim
    readers = case.start_streams(streams)
    first_step, start = len(sim.steps), sim.clock
    request = sim.submit(case.tokens(tokens), 2, client="prompt")
    sim.run(lambda: bool(request.times))
    return case.row(
        name, streams, [request], alone, first_step=first_step, start=start, readers=readers
    )


def _crowd(new: NewSimulation) -> SimulationRow:
    """Many short prompts at once beside one stream."""
    lone = _Case(new)
    request = lone.sim.submit(lone.tokens(CROWD_PROMPT), 2)
    lone.sim.run()
    case = _Case(new)
    sim = case.sim
    readers = case.start_streams(1)
    first_step, start = len(sim.steps), sim.clock
    requests = [
        sim.submit(case.tokens(CROWD_PROMPT), CROWD_OUTPUT, client=f"crowd {i}")
        for i in range(CROWD)
    ]
    sim.run(lambda: all(len(request.times) == CROWD_OUTPUT for request in requests))
    return case.row(
        "crowd",
        1,
        requests,
        request.first_token,
        first_step=first_step,
        start=start,
        readers=[*readers, *requests],
    )


def _agents(new: NewSimulation, agents: int, alone: float | None) -> SimulationRow:
    """Agents with one system prompt, whose prompts extend their history."""
    case = _Case(new)
    sim = case.sim
    head = case.tokens(AGENT_HEAD)
    requests: list[Stream] = []

    def next_turn(agent: int, history: TokenArray, turn: int) -> None:
        if turn == AGENT_TURNS:
            return
        requests.append(
            sim.submit(
                np.concatenate([history, case.tokens(AGENT_INPUT)]),
                AGENT_OUTPUT,
                after=AGENT_PAUSE if turn else 0.0,
                client=f"agent {agent}",
                on_finish=lambda tokens: next_turn(agent, tokens, turn + 1),
            )
        )

    for agent in range(agents):
        next_turn(agent, head, 0)
    sim.run()
    return case.row("agents", agents, requests, alone, first_step=0, start=0.0, readers=requests)


def _forks(new: NewSimulation) -> SimulationRow:
    """A conversation whose every prompt differs from the stored one near its end."""
    case = _Case(new)
    sim = case.sim
    requests: list[Stream] = []

    def next_turn(history: TokenArray) -> None:
        if len(requests) == FORKS:
            return
        kept = history[: max(0, len(history) - FORK_TOKENS)]
        prompt = np.concatenate([kept, case.tokens(AGENT_INPUT)])
        requests.append(sim.submit(prompt, AGENT_OUTPUT, on_finish=next_turn))

    next_turn(case.tokens(0))
    sim.run()
    first = requests[0].first_token
    return case.row("forks", 0, requests, first, first_step=0, start=0.0, readers=requests)


def simulate(
    devices: tuple[Device, ...],
    on_progress: Callable[[str], None],
    *,
    only: str = "",
    config: EngineConfig | None = None,
    mla_kernel: bool = True,
    experts_kernel: bool = True,
) -> list[SimulationRow]:
    """Run all scenarios on each device.

    Args:
        only: run only scenarios whose name contains this text.
        config: the engine's; None: the defaults, without MTP.
        mla_kernel: whether decode attention is `glmd.model.mla_kernel`.
        experts_kernel: whether experts of few rows run in `glmd.model.experts_kernel`.

    Raises:
        CheckpointError: the model does not fit in a device's memory.
    """
    rows: list[SimulationRow] = []
    for device in devices:
        new = partial(
            Simulation, device, config, mla_kernel=mla_kernel, experts_kernel=experts_kernel
        )

        def wanted(name: str, device: Device = device) -> bool:
            if only not in name:
                return False
            on_progress(f"{device.name}: {name}")
            return True

        if wanted("prompt-30k"):
            alone = None
            for streams in PROMPT_STREAMS:
                rows.append(_prompt(new, "prompt-30k", 30_000, streams, alone))
                alone = alone or rows[-1].ttft_s
        if wanted("agents"):
            single = _agents(new, 1, None)
            rows.append(_agents(new, AGENTS, single.ttft_s))
        if wanted("crowd"):
            rows.append(_crowd(new))
        if wanted("prompt-100k"):
            rows.append(_prompt(new, "prompt-100k", 100_000, 0, None))
        if wanted("prompt-200k"):
            rows.append(_prompt(new, "prompt-200k", 200_000, 0, None))
        if wanted("forks"):
            rows.append(_forks(new))
    return rows


def simulation_table(rows: list[SimulationRow]) -> Table:
    """One line per row of a simulation."""
    table = make_table(
        "Simulated: for comparing decisions, not a forecast of speed",
        ("device", "scenario"),
        (
            "streams",
            "first token, s",
            "× alone",
            "tokens/s",
            "gaps p50/p99/max, ms",
            "steps",
            "rows",
            "pieces",
            "dispatches",
            "copies",
        ),
    )
    for row in rows:
        gaps = [row.gap_p50_ms, row.gap_p99_ms, row.gap_max_ms]
        table.add_row(
            row.device,
            row.scenario,
            str(row.streams),
            number(row.ttft_s),
            f"{row.ttft_ratio:.2f}",
            number(row.stream_rate) if row.stream_rate is not None else "",
            " / ".join(f"{gap:.0f}" for gap in gaps if gap is not None),
            str(row.steps),
            f"{row.rows_median:.0f}",
            str(row.pieces_max),
            str(row.dispatches_per_layer),
            f"{row.copies_per_token:.1f}",
        )
    return table
