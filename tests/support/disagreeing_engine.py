"""The engine, whose rank 0 sends a wrong digest after SIGUSR1, as if the others' KV were wrong."""

from __future__ import annotations

import signal
from types import FrameType

from glmd.engine.config import EngineConfig
from glmd.engine.core import load_engine
from glmd.engine.ranks.executor import RankExecutor
from glmd.engine.ranks.lead import LeadExecutor

__all__ = ["EngineConfig", "load_engine"]

right_digest = LeadExecutor.digest


def wrong_digest(executor: RankExecutor, step: int) -> int | None:
    digest = right_digest(executor, step)
    return None if digest is None else digest ^ 1


def disagree(number: int, frame: FrameType | None) -> None:
    LeadExecutor.digest = wrong_digest  # type: ignore[method-assign,assignment]


signal.signal(signal.SIGUSR1, disagree)
