"""Model of how long a step of GLM-4.7-Flash takes on an Apple GPU.

A step takes max(bytes / bandwidth, rows x time per row) + dispatches x time per dispatch. The
model serves to compare decisions: how many rows, how many pieces, which order. The numbers are not
predictions of speed.

Sizes are of the `mixed-8-5` recipe (`glmd inspect`). Expert reads follow MLX 0.32's `gather_qmm`,
which groups rows by expert from `GROUPED_ROWS` rows on and multiplies row by row below, and
`glmd.model.moe`, which pads to that number from `SORTED_ROWS` rows on. The kernels of
`glmd.model.experts_kernel` read each expert once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from mlx_lm.models.glm4_moe_lite import ModelArgs

from glmd.errors import SettingsError
from glmd.model.batch import ForwardBatch, KernelLaunch, KVSpan, PaddedSpans, SpanLevel
from glmd.model.experts_kernel import ROWS
from glmd.model.moe import GROUPED_PAIRS, SORTED_ROWS

LAYERS = 47
KV_TOKEN_BYTES = LAYERS * 576 * 2
"""Latent (512) and rotated key (64) in bfloat16."""

WEIGHT_BYTES = 21_402_104_832
"""All weights without the MTP layer."""

DENSE_BYTES = 1.95e9
"""Weights that every step reads: all but routed experts and the embedding."""

EXPERTS_BYTES = 19.1e9
"""All routed experts: 64 in each of 46 layers."""

EXPERTS, EXPERTS_PER_ROW = 64, 4

UNGROUPED_ROWS = 8
"""Rows from which ungrouped reads exceed the caches: every (row, expert) pair reads its expert."""

GROUPED_ROWS = GROUPED_PAIRS * EXPERTS // EXPERTS_PER_ROW
"""Rows from which `gather_qmm` reads each expert once. From `SORTED_ROWS` on, pairs are padded."""

EXPERT_SHARE = 0.55
"""Share of the routed experts in the operations of a row: 37.7 of 68.9 million per layer."""

BASE_DISPATCHES = 41
"""Kernels of a layer with one decoding sequence and one piece of KV, as `glmd bench kernels` counts
them, like those below."""

PIECE_DISPATCHES = 3
"""Kernels for each further piece of a product's keys."""

LEVEL_DISPATCHES = 4
"""Kernels for each further product that all rows share."""

SPAN_DISPATCHES = 7
"""Kernels for each further product of some of the rows."""

SPANS_DISPATCHES = 2
"""Kernels that combine the products of different rows."""

PADDING_DISPATCHES = 8
"""Kernels that pad the pairs of `SORTED_ROWS` to `GROUPED_ROWS` rows to groups."""

EXPERTS_KERNEL_DISPATCHES = -6
"""Kernels that a layer saves by `glmd.model.experts_kernel`, with fewer than `SORTED_ROWS` rows."""

KERNEL_DISPATCHES = 28
"""Kernels of a layer that uses `glmd.model.mla_kernel`, with up to 24 segments of 16 bits."""


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An Apple GPU.

    Attributes:
        bandwidth_gb: effective memory bandwidth in GB/s, about 80 % of the nominal one.
        row_ms: compute time of a prefill row, in ms.
        memory_gib: memory that macOS recommends for the GPU.
        dispatch_us: time per kernel of a dependent chain, in µs.
    """

    name: str
    bandwidth_gb: float
    row_ms: float
    memory_gib: float
    dispatch_us: float = 1.5

    def __post_init__(self) -> None:
        for field in ("bandwidth_gb", "row_ms", "memory_gib", "dispatch_us"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}: must be greater than 0")


DEVICES = (
    Device(name="M4 Pro", bandwidth_gb=220, row_ms=2.2, memory_gib=36),
    Device(name="M4 Max", bandwidth_gb=430, row_ms=0.85, memory_gib=48),
    Device(name="M3 Ultra", bandwidth_gb=650, row_ms=0.6, memory_gib=72),
    Device(name="M5 Max", bandwidth_gb=490, row_ms=0.25, memory_gib=48),
)
"""Macs with 48, 64, 96 and 64 GB. Time per row from reported prefill speeds of 30B-A3B models."""


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The connection between the machines of a group of ranks.

    Attributes:
        latency_us: duration of a small sum over two ranks, in µs.
        bandwidth_gb: of one direction, in GB/s.
    """

    name: str
    latency_us: float
    bandwidth_gb: float

    def __post_init__(self) -> None:
        for field in ("latency_us", "bandwidth_gb"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}: must be greater than 0")


LINKS = {
    "thunderbolt": Link(name="Thunderbolt 5, RDMA", latency_us=30, bandwidth_gb=6),
    "10gbe": Link(name="10 Gb Ethernet", latency_us=300, bandwidth_gb=1.2),
}

WHOLE_BYTES = 0.50e9
"""Part of `DENSE_BYTES` that each rank reads whole: head, latent projections, routers."""

WHOLE_WEIGHT_BYTES = 0.83e9
"""Part of `WEIGHT_BYTES` that each rank holds whole: these and the embedding."""

WHOLE_SHARE = 0.04
"""Share of a row's operations that each rank does whole: 2.8 of 68.9 million per layer."""

SUM_BYTES = 2048 * 2
"""Bytes of a row's hidden state, of which each layer has two sums."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Equal devices that serve one model together."""

    count: int
    link: Link

    @property
    def weight_bytes(self) -> int:
        """Weights on each rank."""
        return int(WHOLE_WEIGHT_BYTES + (WEIGHT_BYTES - WHOLE_WEIGHT_BYTES) / self.count)

    def sum_seconds(self, rows: int) -> float:
        """Duration of a step's sums over a ring of ranks."""
        hops = self.count - 1
        transfer = 2 * hops / self.count * rows * SUM_BYTES / (self.link.bandwidth_gb * 1e9)
        sums = 2 * LAYERS + 1  # One more shares tokens and positions.
        return sums * hops * self.link.latency_us * 1e-6 + 2 * LAYERS * transfer


def load_link(name: str) -> Link:
    """Find a link by its name, or read one from a JSON file with the fields of `Link`.

    Raises:
        SettingsError: the file cannot be read or is no link.
    """
    if name in LINKS:
        return LINKS[name]
    try:
        return msgspec.json.decode(Path(name).read_bytes(), type=Link)
    except (OSError, msgspec.MsgspecError) as error:
        raise SettingsError(f"--link: {name}: {error} Known links: {', '.join(LINKS)}.") from error


def load_device(file: Path) -> Device:
    """Read a device from a JSON file with the fields of `Device`.

    Raises:
        SettingsError: the file cannot be read or is no device.
    """
    try:
        return msgspec.json.decode(file.read_bytes(), type=Device)
    except (OSError, msgspec.MsgspecError) as error:
        raise SettingsError(f"--device: {file}: {error}") from error


def model_args() -> ModelArgs:
    """Dimensions of GLM-4.7-Flash, which are mlx-lm's defaults."""
    return ModelArgs()


def expert_bytes(rows: int, *, kernel: bool = False) -> float:
    """Bytes of routed experts that a step of `rows` rows reads.

    Args:
        kernel: with `glmd.model.experts_kernel`.
    """
    if UNGROUPED_ROWS <= rows < SORTED_ROWS and not kernel:
        return EXPERTS_BYTES * rows * EXPERTS_PER_ROW / EXPERTS
    unused = (1 - EXPERTS_PER_ROW / EXPERTS) ** rows
    return EXPERTS_BYTES * (1 - unused)


def computed_rows(rows: int, *, kernel: bool = False) -> float:
    """Rows that a step of `rows` rows computes, with the padding of pairs as a part of a row.

    Args:
        kernel: with `glmd.model.experts_kernel`, which pads nothing.
    """
    pads = SORTED_ROWS <= rows < GROUPED_ROWS and not kernel
    padding = GROUPED_ROWS - rows if pads else 0
    return rows + EXPERT_SHARE * padding


@dataclass(frozen=True, slots=True)
class StepCost:
    """Work of a step, on any device.

    Attributes:
        kv_tokens: tokens of KV read in each layer. A token read by two products counts twice.
        dispatches: kernels per layer.
        copied_tokens: tokens of KV copied to merge segments, each read and written.
        experts_kernel: whether experts run in `glmd.model.experts_kernel`.
    """

    rows: int
    kv_tokens: int
    dispatches: int
    copied_tokens: int = 0
    experts_kernel: bool = False

    @property
    def nbytes(self) -> float:
        """Bytes read, and bytes of KV written by copies."""
        return WHOLE_BYTES + self._divided_bytes + self._kv_bytes

    @property
    def _divided_bytes(self) -> float:
        """Bytes read of weights that ranks divide among them."""
        experts = expert_bytes(self.rows, kernel=self.experts_kernel)
        return DENSE_BYTES - WHOLE_BYTES + experts

    @property
    def _kv_bytes(self) -> float:
        return (self.kv_tokens + 2 * self.copied_tokens) * KV_TOKEN_BYTES

    def seconds(self, device: Device, ranks: Ranks | None = None) -> float:
        """Duration on a device, or on each of several ranks."""
        count = 1 if ranks is None else ranks.count
        read = WHOLE_BYTES + self._divided_bytes / count + self._kv_bytes
        computed = computed_rows(self.rows, kernel=self.experts_kernel)
        rows = computed * (WHOLE_SHARE + (1 - WHOLE_SHARE) / count)
        busy = max(read / (device.bandwidth_gb * 1e9), rows * device.row_ms * 1e-3)
        dispatching = LAYERS * self.dispatches * device.dispatch_us * 1e-6
        return busy + dispatching + (0.0 if ranks is None else ranks.sum_seconds(self.rows))


def step_cost(batch: ForwardBatch, tail_tokens: int, *, experts_kernel: bool = False) -> StepCost:
    """Count what a step does.

    Args:
        tail_tokens: tokens in all slots of the tail pool.
        experts_kernel: whether experts run in `glmd.model.experts_kernel` where they can.
    """
    dispatches, kv_tokens = BASE_DISPATCHES, 0
    for group in batch.decode:
        levels = [*group.fused_levels, *group.levels]
        kv_tokens += tail_tokens + sum(_tokens(part) for level in levels for part in level.parts)
        if group.plan is not None:
            dispatches += KERNEL_DISPATCHES - BASE_DISPATCHES + len(group.plan.launches) - 1
            kv_tokens += sum(map(_launch_tokens, group.plan.launches))
        elif levels:
            # One product over all rows is part of the base.
            dispatches += sum(map(_level_dispatches, levels)) - LEVEL_DISPATCHES
    for chunk in batch.chunks:
        dispatches += sum(LEVEL_DISPATCHES + _span_dispatches(span) for span in chunk.spans)
        kv_tokens += chunk.end - chunk.start + sum(map(_tokens, chunk.spans))
    if batch.decode and batch.chunks:
        dispatches += SPAN_DISPATCHES + SPANS_DISPATCHES
    rows = batch.tokens.shape[0]
    fused = experts_kernel and rows <= ROWS[-1]
    if fused:
        dispatches += EXPERTS_KERNEL_DISPATCHES
    elif SORTED_ROWS <= rows < GROUPED_ROWS:
        dispatches += PADDING_DISPATCHES
    return StepCost(rows, kv_tokens, dispatches, experts_kernel=fused)


def _level_dispatches(level: SpanLevel) -> int:
    several = len(level.parts) > 1 or level.order is not None
    return (
        sum(map(_span_dispatches, level.parts))
        + LEVEL_DISPATCHES
        + SPAN_DISPATCHES * (len(level.parts) - 1)
        + (SPANS_DISPATCHES if several else 0)
    )


def _span_dispatches(part: KVSpan | PaddedSpans) -> int:
    """Kernels that join the pieces of a product's keys."""
    if isinstance(part, KVSpan):
        return PIECE_DISPATCHES * (len(part.slices) - 1)
    return len(part.spans) + sum(len(span.slices) for span in part.spans)


def _tokens(part: KVSpan | PaddedSpans) -> int:
    """Tokens of KV that a product reads, and those that padding copies: reads and writes."""
    return len(part) if isinstance(part, KVSpan) else 3 * len(part) * len(part.spans)


def _launch_tokens(launch: KernelLaunch) -> int:
    """Tokens of KV that the items of segments read. Those of tails have a length of 0."""
    items = np.array(launch.items)
    return int((items[:, 2] - items[:, 1]).sum())
