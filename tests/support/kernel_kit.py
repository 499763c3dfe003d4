"""Requests to an engine with glmd's kernels, and a kernel that fails."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from engines import Run, assert_idle, assert_reference_tokens, request

from glmd.engine.core import Engine
from glmd.ipc import EngineRequest
from glmd.model.loader import LoadedModel


def kernel_requests() -> list[EngineRequest]:
    """Four requests, of which some share a prefix."""
    prompt = np.random.default_rng(0).integers(1, 60, 90)
    return [
        request(f"r{i}", [*prompt[: 30 * i], 7, i + 1], max_tokens=12, ignore_eos=True)
        for i in range(4)
    ]


def assert_repeated_without_kernels(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    model: LoadedModel,
    engine: Engine,
    module: ModuleType,
    factory: str,
    failing: int,
) -> None:
    """Check that answers are right although a kernel fails, which is not tried again.

    Args:
        factory: function of `module` that makes the kernel for each call.
        failing: calls that succeed before.
    """
    made = getattr(module, factory)
    calls = 0

    def make(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > failing:
            raise RuntimeError("[metal::Device] Unable to build a kernel.")
        return made(*arguments)

    monkeypatch.setattr(module, factory, make)
    asked = kernel_requests()
    done = Run(engine)
    done.submit(*asked)
    done.finish()
    for one in asked:
        assert done.answer(one.id).finish == "length"
        assert_reference_tokens(model, one, done.answer(one.id))
    assert calls == failing + 1
    assert engine.stats().mla_kernel == engine.stats().experts_kernel == 0
    assert engine.stats().out_of_memory == 0
    assert "Step failed: Metal kernels off, KV dropped" in caplog.text
    assert_idle(engine)
