"""The trial of the experts' kernels at load, and the engine with them and without them again."""

from __future__ import annotations

import logging
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from engines import (
    TINY,
    assert_idle,
    assert_reference_tokens,
    fresh_folder,
    load,
    one_shot_logits,
    run,
    tiny_engine,
    tiny_model,
)
from kernel_kit import assert_repeated_without_kernels, kernel_requests
from metal_shim import run_kernels_here

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.convert.convert import convert
from glmd.convert.recipes import RECIPES
from glmd.engine import experts_trial, kernel_trial
from glmd.engine.experts_trial import ALL_ROWS, BANDS, find_fused_rows, measure
from glmd.errors import SettingsError
from glmd.model import experts_kernel, experts_metal
from glmd.model.loader import LoadedModel


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    run_kernels_here(monkeypatch)
    caplog.set_level(logging.INFO, logger="glmd.engine")


@cache
def _converted() -> LoadedModel:
    folder = fresh_folder()
    config = TINY | {"num_nextn_predict_layers": 1}
    write_random_checkpoint(folder / "published", dtype="F32", **config)
    convert(folder / "published", folder / "converted", RECIPES["mixed-8-5"])
    return load(folder / "converted")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """A model with quantised experts, of which no layer runs in the kernels yet."""
    made = _converted()
    made.use_fused_experts(frozenset())
    return made


def _measure(monkeypatch: pytest.MonkeyPatch, *slow: int) -> None:
    """Let the kernels be slower for these numbers of rows."""
    monkeypatch.setattr(
        experts_trial, "measure", lambda _, rows: (3e-6 if rows in slow else 1e-6, 2e-6)
    )


# -- the trial --------------------------------------------------------------------------------


def test_right_and_fast_kernels_are_used_for_all_numbers_of_rows(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _measure(monkeypatch)
    assert find_fused_rows("auto", model) == ALL_ROWS == set(range(1, 64))
    assert "Experts kernel on: layers=2 rows=1-1,2-4,5-15,16-31,32-63" in caplog.text


def test_a_band_in_which_they_are_slower_is_left_to_mlx(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _measure(monkeypatch, 5)
    assert find_fused_rows("auto", model) == ALL_ROWS - set(range(5, 16))
    _measure(monkeypatch, *BANDS)
    assert not find_fused_rows("auto", model)
    assert "Experts kernel off: it is slower" in caplog.text
    assert find_fused_rows("on", model) == ALL_ROWS


def test_both_are_timed_and_the_model_stays_as_it_was(model: LoadedModel) -> None:
    assert min(measure(model, 2)) > 0
    assert not model.fused_rows


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("float sum = 0;", "float sum = nothing;"),  # does not compile
        ("+ bias * total[r]", ""),
        ("two << 1 <<", "two <<"),
        ("SCALE * logs[k]", "1.79f * logs[k]"),
        ("+ float(shared[place])", ""),
        ("gate < 0 ? 1 - larger", "gate < 0 ? larger"),
        ("weights[pair] * sum", "weights[order[from]] * sum"),
    ],
)
def test_wrong_kernels_are_not_used(
    model: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    right: str,
    wrong: str,
) -> None:
    for name in ("ROUTE", "GATE_UP", "DOWN", "PRODUCT"):
        source = getattr(experts_metal, name)
        monkeypatch.setattr(experts_metal, name, source.replace(right, wrong))
    assert not find_fused_rows("auto", model)
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    with pytest.raises(SettingsError, match=r"^experts_kernel: on, but it"):
        find_fused_rows("on", model)


def test_unquantised_experts_use_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    assert not find_fused_rows("auto", tiny_model())
    assert "Experts kernel off: it is not made for these weights" in caplog.text


def test_they_are_off_where_there_is_no_gpu(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_trial, "is_available", lambda: False)
    assert not find_fused_rows("auto", model)
    with pytest.raises(SettingsError, match=r"there is no Apple GPU\. Use auto"):
        find_fused_rows("on", model)


def test_off_tries_nothing(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_trial, "_find_problem", None)
    assert not find_fused_rows("off", model)


# -- the model and the engine -----------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 6, 63])
def test_logits_are_those_of_the_reference(model: LoadedModel, rows: int) -> None:
    tokens = np.random.default_rng(rows).integers(1, 500, rows)
    expected = one_shot_logits(model, tokens, expanded=False)
    model.use_fused_experts(ALL_ROWS)
    found = one_shot_logits(model, tokens, expanded=False)
    assert not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_the_engine_answers_with_the_kernels(model: LoadedModel) -> None:
    model.use_fused_experts(ALL_ROWS)
    engine = tiny_engine(model, mtp=1)
    asked = kernel_requests()
    done = run(engine, *asked)
    for one in asked:
        assert_reference_tokens(model, one, done.answer(one.id))
    assert engine.stats().experts_kernel == 1
    assert_idle(engine)


@pytest.mark.parametrize("failing", [0, 9])
def test_a_step_that_fails_in_a_kernel_is_repeated_without_them(
    model: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failing: int,
) -> None:
    model.use_fused_experts(ALL_ROWS)
    engine = tiny_engine(model, mtp=0)
    assert_repeated_without_kernels(
        monkeypatch, caplog, model, engine, experts_kernel, "_kernels", failing
    )


def test_more_rows_are_left_to_grouped_products(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.use_fused_experts(ALL_ROWS)
    monkeypatch.setattr(experts_kernel, "_kernels", None)
    tokens = np.arange(1, 65)
    assert np.isfinite(one_shot_logits(model, tokens, expanded=False)).all()
    assert mx.array(tokens).shape[0] not in model.fused_rows
