"""What can be configured about the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glmd.errors import SettingsError

MAX_DRAFTS = 3
"""MTP draft tokens per sequence and step, at most."""

MAX_WIDTH = 1 + MAX_DRAFTS
"""Rows that one decoding sequence may have in a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of the engine.

    Attributes:
        max_running: sequences that run at once; further ones wait.
        max_step_tokens: rows of one step; a few more where decoding sequences fill it, since
            a prompt must get on beside them.
        max_context: tokens of one sequence; None: the checkpoint's limit.
        memory_budget: bytes for weights, KV and transients together; None: from the device.
        max_slowdown: how much longer a step may take for the prefill rows in it, as a multiple
            of a step without any, while others are decoding; longer beside few streams where
            many short prompts are in prefill
            (`glmd.engine.scheduler.prefill_budget.FIRST_TOKENS_WORTH`).
        dtype: of activations and KV. "auto" is bfloat16 on a GPU and float32 on a CPU, where
            quantised products in bfloat16 take eight times as long.
        mtp: draft tokens per step from the checkpoint's MTP layer: "auto" lets a gate choose
            between none and one by measurement, 0 does not load the layer.
        prefix_cache: whether KV is shared between requests and kept after they end.
    """

    max_running: int = 32
    max_step_tokens: int = 2048
    max_context: int | None = None
    memory_budget: int | None = None
    max_slowdown: float = 1.75
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    mtp: Literal["auto", 0, 1, 2, 3] = "auto"
    prefix_cache: bool = True

    @property
    def width(self) -> int:
        """Rows that one decoding sequence has in a step, at most."""
        return 2 if self.mtp == "auto" else 1 + self.mtp

    def __post_init__(self) -> None:
        """
        Raises:
            SettingsError: no step could ever run.
        """
        for name in ("max_running", "max_step_tokens", "max_slowdown"):
            value = getattr(self, name)
            if not value >= 1:
                raise SettingsError(f"{name} must be 1 or more, not {value}.")
