"""`glmd bench simulate --ranks`: several Macs that serve one model, beside a single one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from glmd.bench.device_model import Device, Ranks
from glmd.bench.report import make_table, number
from glmd.bench.simulate import ENDLESS
from glmd.bench.simulation import Simulation
from glmd.errors import CheckpointError

CONTEXT = 4096
"""Tokens of the prompt of each stream."""

TOKENS = 64
"""Tokens of a stream that are timed."""

PROMPT = 30_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksRow:
    """Speeds of one or more devices.

    Attributes:
        link: between the ranks; "": there is one.
        decode_1, decode_8: tokens/s of a stream of 1 and of 8, with `CONTEXT` tokens each.
        prefill: tokens/s of a prompt of `PROMPT` tokens.
        kv_tokens: tokens of KV that fit.
        weights_gib: on each device.
    """

    device: str
    ranks: int
    link: str
    decode_1: float
    decode_8: float
    prefill: float
    kv_tokens: int
    weights_gib: float


def simulate_ranks(
    devices: tuple[Device, ...], ranks: Ranks, on_progress: Callable[[str], None]
) -> list[RanksRow]:
    """Simulate each device alone, where the model fits, and a group of ranks of its kind."""
    rows = []
    for device in devices:
        for group in (None, ranks):
            on_progress(f"{device.name}: {1 if group is None else group.count}")
            try:
                rows.append(_row(device, group))
            except CheckpointError:
                continue
    return rows


def _row(device: Device, ranks: Ranks | None) -> RanksRow:
    rng = np.random.default_rng(20_260_119)

    def decode(count: int) -> float:
        """Tokens/s of each of `count` streams, once all have their first token."""
        sim = Simulation(device, ranks=ranks)
        streams = [
            sim.submit(rng.integers(1, 150_000, CONTEXT).astype(np.int32), ENDLESS, client=str(i))
            for i in range(count)
        ]
        sim.run(lambda: all(stream.times for stream in streams))
        start, known = sim.clock, len(streams[0].times)
        sim.run(lambda: len(streams[0].times) == known + TOKENS)
        return TOKENS / (sim.clock - start)

    sim = Simulation(device, ranks=ranks)
    prompt = sim.submit(rng.integers(1, 150_000, PROMPT).astype(np.int32), 1)
    sim.run()
    return RanksRow(
        device=device.name,
        ranks=1 if ranks is None else ranks.count,
        link="" if ranks is None else ranks.link.name,
        decode_1=decode(1),
        decode_8=decode(8),
        prefill=PROMPT / prompt.first_token,
        kv_tokens=sim.scheduler.kv_budget,
        weights_gib=sim.info.weight_bytes / 2**30,
    )


def ranks_table(rows: list[RanksRow]) -> Table:
    """One line per row."""
    table = make_table(
        "Calculated: for comparing ways, not a forecast of speed",
        ("device", "link"),
        ("ranks", "tokens/s of 1", "of 8 streams", "prefill/s", "KV tokens", "weights, GiB"),
    )
    for row in rows:
        table.add_row(
            row.device,
            row.link,
            str(row.ranks),
            number(row.decode_1),
            number(row.decode_8),
            f"{row.prefill:.0f}",
            f"{row.kv_tokens:,}",
            f"{row.weights_gib:.1f}",
        )
    return table
