"""The trial of the MLA kernel at load, and the engine with the kernel and without it again."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from engines import assert_idle, assert_reference_tokens, run, tiny_engine, tiny_model
from kernel_kit import assert_repeated_without_kernels, kernel_requests
from metal_shim import run_kernels_here

from glmd.engine import kernel_trial
from glmd.engine.kernel_trial import Contexts, kernel_is_used
from glmd.engine.model_runner import ModelRunner
from glmd.errors import SettingsError
from glmd.kv_cache.stored_keys import KVBits
from glmd.model import mla_kernel, mla_metal
from glmd.model.loader import LoadedModel
from glmd.model.mla import MLAShape

SHAPE = MLAShape(heads=3, latent=64, nope=8, rope=8, value=6)
FEW = (
    Contexts("a", 3, 2, 40, (3, 50), 9),
    Contexts("b", 1, 1, 0, (), 0),
)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run_kernels_here(monkeypatch)
    monkeypatch.setattr(kernel_trial, "PROVED", FEW)
    monkeypatch.setattr(kernel_trial, "TIMED", FEW[:1])
    caplog.set_level(logging.INFO, logger="glmd.engine")


def _measure(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    monkeypatch.setattr(kernel_trial, "measure", lambda *_: seconds)


# -- the trial --------------------------------------------------------------------------------


def test_a_right_and_fast_kernel_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _measure(monkeypatch, 1e-6, 2e-6)
    assert kernel_is_used("auto", SHAPE, mx.float32)
    assert "MLA kernel on" in caplog.text


def test_a_slow_kernel_is_used_only_if_it_is_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _measure(monkeypatch, 3e-6, 2e-6)
    assert not kernel_is_used("auto", SHAPE, mx.float32)
    assert "MLA kernel off: it is slower (a: 1.50 x)" in caplog.text
    assert kernel_is_used("on", SHAPE, mx.float32)


def test_both_are_timed() -> None:
    assert min(kernel_trial.measure(SHAPE, mx.float32, FEW[0])) > 0


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("weight = seen ?", "weight = seen || key_is_odd ?"),  # does not compile
        ("total += weight", "total += weight * 1.01f"),
        ("start + lane < limit", "start + lane <= limit"),
        ("factors[r * 8 + y];", "1;"),
        ("a * sine + b", "a * sine - b"),
    ],
)
def test_a_wrong_kernel_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, right: str, wrong: str
) -> None:
    for name in ("PROJECT", "SPLIT", "REDUCE"):
        source = getattr(mla_metal, name)
        monkeypatch.setattr(mla_metal, name, source.replace(right, wrong))
    _measure(monkeypatch, 1e-6, 2e-6)
    assert not kernel_is_used("auto", SHAPE, mx.float32)
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    with pytest.raises(SettingsError, match=r"^mla_kernel: on, but it"):
        kernel_is_used("on", SHAPE, mx.float32)


def test_other_dimensions_use_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    assert not kernel_is_used("auto", replace(SHAPE, latent=48), mx.float32)
    assert "MLA kernel off: it is not made for latents of 48 + 8 values" in caplog.text


def test_it_is_off_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_trial, "is_available", lambda: False)
    assert not kernel_is_used("auto", SHAPE, mx.float32)
    with pytest.raises(SettingsError, match=r"there is no Apple GPU\. Use auto"):
        kernel_is_used("on", SHAPE, mx.float32)


def test_off_tries_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_trial, "_find_problem", None)
    assert not kernel_is_used("off", SHAPE, mx.float32)


# -- the engine -------------------------------------------------------------------------------


def _with_kernel(monkeypatch: pytest.MonkeyPatch, **config: Any) -> LoadedModel:
    model = tiny_model(**config)
    monkeypatch.setattr(model, "shape", replace(model.shape, kernel=True))
    return model


@pytest.mark.parametrize("drafts", [0, 1])
def test_the_engine_answers_with_the_kernel(monkeypatch: pytest.MonkeyPatch, drafts: int) -> None:
    model = _with_kernel(monkeypatch, num_nextn_predict_layers=drafts)
    engine = tiny_engine(model, mtp=drafts)
    asked = kernel_requests()
    done = run(engine, *asked)
    for one in asked:
        assert_reference_tokens(model, one, done.answer(one.id))
    assert engine.stats().mla_kernel == 1
    assert_idle(engine)


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_the_engine_answers_from_quantised_keys(
    monkeypatch: pytest.MonkeyPatch, kv_bits: KVBits
) -> None:
    without = run(tiny_engine(kv_bits=kv_bits), *kernel_requests())
    engine = tiny_engine(_with_kernel(monkeypatch), kv_bits=kv_bits)
    done = run(engine, *kernel_requests())
    for one in kernel_requests():
        assert done.answer(one.id) == without.answer(one.id)
    assert engine.stats().mla_kernel == 1


@pytest.mark.parametrize("failing", [0, 9])
def test_a_step_that_fails_in_the_kernel_is_repeated_without_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: int
) -> None:
    model = _with_kernel(monkeypatch)
    engine = tiny_engine(model)
    assert_repeated_without_kernels(
        monkeypatch, caplog, model, engine, mla_kernel, "_reduce_kernel", failing
    )


def test_other_errors_still_end_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(tiny_model())

    def fail(*_: Any) -> None:
        raise RuntimeError("no kernel is to blame")

    monkeypatch.setattr(ModelRunner, "execute", fail)
    with pytest.raises(RuntimeError, match="no kernel is to blame"):
        run(engine, *kernel_requests())
