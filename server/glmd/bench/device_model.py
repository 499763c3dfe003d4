"""Model of how long a step of GLM-4.7-Flash takes on an Apple GPU.

A step takes max(bytes / bandwidth, rows x time per row) + dispatches x time per dispatch. The
model serves to compare decisions: how many rows, how many pieces, which order. The numbers are not
predictions of speed.

Sizes are of the `mixed-8-5` recipe (`glmd inspect`). Expert reads follow MLX 0.32's `gather_qmm`,
which groups rows by expert from `GROUPED_ROWS` rows on and multiplies row by row below, and
`glmd.model.moe`, which pads to that number from `SORTED_ROWS` rows on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
from mlx_lm.models.glm4_moe_lite import ModelArgs

from glmd.errors import SettingsError
from glmd.model.batch import ForwardBatch, KVSpan, PaddedSpans
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

BASE_DISPATCHES = 51
"""Kernels of a layer with one decoding sequence and one piece of KV."""

PIECE_DISPATCHES = 4
"""Kernels of a layer for each further piece of KV, and for each further attention product."""


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


def expert_bytes(rows: int) -> float:
    """Bytes of routed experts that a step of `rows` rows reads."""
    if UNGROUPED_ROWS <= rows < SORTED_ROWS:
        return EXPERTS_BYTES * rows * EXPERTS_PER_ROW / EXPERTS
    unused = (1 - EXPERTS_PER_ROW / EXPERTS) ** rows
    return EXPERTS_BYTES * (1 - unused)


def computed_rows(rows: int) -> float:
    """Rows that a step of `rows` rows computes, with the padding of pairs as a part of a row."""
    padding = GROUPED_ROWS - rows if SORTED_ROWS <= rows < GROUPED_ROWS else 0
    return rows + EXPERT_SHARE * padding


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step does on any device.

    Attributes:
        kv_tokens: tokens of KV read in each layer. A token read by two products counts twice.
        dispatches: kernels per layer.
        copied_tokens: tokens of KV copied to merge segments, each read and written.
    """

    rows: int
    kv_tokens: int
    dispatches: int
    copied_tokens: int = 0

    @property
    def nbytes(self) -> float:
        """Bytes read, and bytes of KV written by copies."""
        kv = (self.kv_tokens + 2 * self.copied_tokens) * KV_TOKEN_BYTES
        return DENSE_BYTES + expert_bytes(self.rows) + kv

    def seconds(self, device: Device) -> float:
        """Duration on a device."""
        reading = self.nbytes / (device.bandwidth_gb * 1e9)
        computing = computed_rows(self.rows) * device.row_ms * 1e-3
        return max(reading, computing) + LAYERS * self.dispatches * device.dispatch_us * 1e-6


def step_cost(batch: ForwardBatch, tail_tokens: int) -> StepCost:
    """Count what a step does.

    Args:
        tail_tokens: tokens in all slots of the tail pool.
    """
    pieces = products = kv_tokens = 0
    for group in batch.decode:
        parts = [part for level in (*group.fused_levels, *group.levels) for part in level.parts]
        products += max(1, len(parts))
        pieces += max(1, sum(map(_pieces, parts)))
        kv_tokens += tail_tokens + sum(map(_tokens, parts))
    for chunk in batch.chunks:
        products += 1 + len(chunk.spans)
        pieces += 1 + sum(map(_pieces, chunk.spans))
        kv_tokens += chunk.end - chunk.start + sum(map(_tokens, chunk.spans))
    dispatches = BASE_DISPATCHES + PIECE_DISPATCHES * (pieces - 1 + products - 1)
    return StepCost(batch.tokens.shape[0], kv_tokens, dispatches)


def _pieces(part: KVSpan | PaddedSpans) -> int:
    spans = [part] if isinstance(part, KVSpan) else part.spans
    return sum(len(span.slices) for span in spans)


def _tokens(part: KVSpan | PaddedSpans) -> int:
    return len(part) * (1 if isinstance(part, KVSpan) else len(part.spans))
