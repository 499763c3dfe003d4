"""Configuration of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glmd.errors import SettingsError

MAX_DRAFTS = 3
"""Most MTP draft tokens per sequence and step."""

MAX_WIDTH = 1 + MAX_DRAFTS
"""Most rows that a decoding sequence may have in a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of the engine.

    Attributes:
        max_running: sequences that run at once. Others wait.
        max_step_tokens: rows of a step. Decoding sequences that fill it leave room for a few more,
            so that prompts progress.
        max_context: tokens of a sequence; None: the checkpoint's limit.
        memory_budget: bytes for weights, KV and working memory; None: from the device.
        min_stream_rate: tokens per second that each decoding sequence keeps on average while
            prompts are computed. Several short prompts may lower it
            (`scheduler.prefill_budget.FIRST_TOKEN_WEIGHT`), and so does a slow device.
        max_gap: longest time between two tokens of a sequence while prompts are computed, in
            seconds; at least two steps without prefill.
        max_slowdown: deprecated, use `max_gap`. Duration of a step with prefill, as a multiple of
            a step without, in addition to `max_gap`; None: no such limit.
        dtype: of activations and KV. "auto": bfloat16 on a GPU; float32 on a CPU, where quantised
            products in bfloat16 take eight times as long.
        mtp: draft tokens per sequence and step. "auto": none or one, by measurement. 0: the MTP
            layer is not loaded.
        prefix_cache: share KV between requests and keep it after they end.
    """

    max_running: int = 32
    max_step_tokens: int = 2048
    max_context: int | None = None
    memory_budget: int | None = None
    min_stream_rate: float = 10.0
    max_gap: float = 0.25
    max_slowdown: float | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    mtp: Literal["auto", 0, 1, 2, 3] = "auto"
    prefix_cache: bool = True

    @property
    def width(self) -> int:
        """Most rows that a decoding sequence has in a step."""
        return 2 if self.mtp == "auto" else 1 + self.mtp

    def __post_init__(self) -> None:
        for name in ("max_running", "max_step_tokens", "max_slowdown"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise SettingsError(f"{name} must be at least 1, not {value}.")
        for name in ("min_stream_rate", "max_gap"):
            value = getattr(self, name)
            if not value > 0:
                raise SettingsError(f"{name} must be greater than 0, not {value}.")
