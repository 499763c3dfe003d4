"""The plan of a conversion, from the shapes alone."""

from __future__ import annotations

import pytest
from paths import TESTS

from glmd.checkpoint.config import ModelConfig, load_config
from glmd.checkpoint.layout import Component
from glmd.convert.recipes import (
    DEFAULT_RECIPE,
    RECIPES,
    find_recipe,
    lines,
    plan_recipe,
    shard,
    total,
)
from glmd.errors import SettingsError

GIB = 2**30


@pytest.fixture(scope="module")
def real() -> ModelConfig:
    return load_config(TESTS / "fixtures" / "glm-4.7-flash")


def test_real_model_at_mixed_8_5_takes_exactly_the_published_bytes(real: ModelConfig) -> None:
    main = total(plan_recipe(real, find_recipe("mixed-8-5"), mtp=True).main, "main")
    assert main.parameters == 29_943_393_920
    assert main.nbytes == 21_402_104_832
    assert round(main.bits_per_weight, 3) == 5.718


@pytest.mark.parametrize(
    ("recipe", "gib"),
    [
        ("mixed-8-4", 16.70),
        ("mixed-8-5", 19.93),
        ("mixed-8-6", 23.17),
        ("uniform-4", 15.69),
        ("uniform-5", 19.18),
        ("uniform-6", 22.67),
        ("uniform-8", 29.64),
        ("bf16", 55.77),
    ],
)
def test_real_model_takes_the_known_size_at_every_recipe(
    real: ModelConfig, recipe: str, gib: float
) -> None:
    main = total(plan_recipe(real, find_recipe(recipe), mtp=False).main, recipe)
    assert round(main.nbytes / GIB, 2) == gib


def test_mtp_layer_is_counted_apart_with_and_without_its_own_vocabulary(
    real: ModelConfig,
) -> None:
    recipe = find_recipe("mixed-8-5")
    shared = plan_recipe(real, recipe, mtp=True)
    own = plan_recipe(real, recipe, mtp=True, own_embedding=True, own_head=True)
    assert total(shared.mtp, "MTP").parameters == 643_706_176
    assert total(own.mtp, "MTP").parameters == 1_278_094_656
    assert total(own.main, "main").parameters + 1_278_094_656 == 31_221_488_576
    assert shared.main == own.main
    assert plan_recipe(real, recipe, mtp=False).mtp == ()


def test_only_experts_get_five_bits_and_router_and_norms_get_none(real: ModelConfig) -> None:
    plan = plan_recipe(real, find_recipe(DEFAULT_RECIPE), mtp=True)
    bits = {line.component: line.bits for line in lines(plan.main + plan.mtp)}
    assert bits == {
        "embedding": "8",
        "attention": "8",
        "dense MLP": "8",
        "shared experts": "8",
        "routed experts": "5",
        "router": "bf16, f32",
        "norms": "bf16",
        "head": "8",
        "MTP projection": "8",
    }
    biases = [p for p in plan.main if p.weight.name.endswith("e_score_correction_bias")]
    assert len(biases) == 46
    assert all(p.specs[0].dtype == "F32" for p in biases)


def test_lines_add_up_to_the_total(real: ModelConfig) -> None:
    plan = plan_recipe(real, find_recipe("mixed-8-6"), mtp=True)
    parts = lines(plan.main)
    whole = total(plan.main, "main")
    assert sum(line.nbytes for line in parts) == whole.nbytes
    assert sum(line.parameters for line in parts) == whole.parameters
    assert [line.component for line in parts] == [
        c.value for c in Component if c is not Component.MTP_PROJECTION
    ]


def test_shards_keep_order_and_stay_below_the_limit(real: ModelConfig) -> None:
    plan = plan_recipe(real, find_recipe("mixed-8-5"), mtp=False)
    shards = shard(plan.main)
    assert len(shards) == 5
    assert all(sum(p.nbytes for p in part) <= 5_000_000_000 for part in shards)
    assert tuple(p for part in shards for p in part) == plan.main


def test_an_unknown_recipe_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(SettingsError, match=r'no recipe "mixed-5-8"; did you mean mixed-8-\d'):
        find_recipe("mixed-5-8")
    with pytest.raises(SettingsError, match="did you mean bf16"):
        find_recipe("BF16")
    with pytest.raises(SettingsError) as error:
        find_recipe("zzz")
    assert all(name in error.value.message for name in RECIPES)
