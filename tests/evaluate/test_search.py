"""`glmd recipe search`: allocation, recipe files, and their conversion."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import typer
from engines import TINY, load, one_shot_logits
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.utils import load_model as load_mlx_model
from safetensors.numpy import load_file
from typer.testing import CliRunner

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.checkpoint.config import QuantizedAs
from glmd.cli.recipe import read_bytes
from glmd.cli.recipe import search as command
from glmd.convert.convert import convert
from glmd.convert.inspect import inspect
from glmd.convert.recipes import Recipe, RecipeFile, find_recipe
from glmd.errors import SettingsError
from glmd.evaluate import variants
from glmd.evaluate.allocation import Option, allocate
from glmd.evaluate.corpus import TokenSet
from glmd.evaluate.layer_pass import Activations
from glmd.evaluate.search import REFINED, Found, search

TOKENS = np.random.default_rng(5).integers(0, 256, 48).astype(np.int32)

costs = st.floats(0, 100, allow_nan=False)
options = st.lists(st.builds(Option, st.integers(1, 40), costs), min_size=1, max_size=4)


@given(st.lists(options, min_size=1, max_size=4), st.integers(1, 120))
def test_allocation_fits_and_lies_within_its_bound(items: list[list[Option]], budget: int) -> None:
    found = allocate(items, budget)
    fitting = [
        sum(option.cost for option in choice)
        for choice in itertools.product(*items)
        if sum(option.nbytes for option in choice) <= budget
    ]
    if found is None:
        assert not fitting
        return
    chosen = [item[index] for item, index in zip(items, found.chosen, strict=True)]
    assert sum(option.nbytes for option in chosen) == found.nbytes <= budget
    assert found.cost == pytest.approx(sum(option.cost for option in chosen))
    assert found.bound - 1e-6 <= min(fitting) <= found.cost + 1e-6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search") / "source"
    # mlx-lm's epsilon of latent norms is `rms_norm_eps`, glmd's 1e-6.
    write_random_checkpoint(
        folder, **TINY | {"num_nextn_predict_layers": 1, "rms_norm_eps": 1e-6, "kv_lora_rank": 64}
    )
    return folder


def search_recipe(source: Path, out: str, work: str = "work") -> Found:
    """Search a recipe of the size of `mixed-8-5`, in two batches per layer."""
    size = inspect(source, "mixed-8-5").main.nbytes
    tokens = np.random.default_rng(3).integers(0, 256, 400).astype(np.int32)
    text = TokenSet(tokens, np.arange(0, 401, 50), ("random",) * 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "ROWS", 200)
        return search(
            source, source.parent / out, text, source.parent / work,
            nbytes=size, dtype=mx.float32, on_progress=lambda name, done, total: None,
        )  # fmt: skip


@pytest.fixture(scope="module")
def counted(source: Path) -> tuple[Found, int]:
    """A search, and its number of steps."""
    steps = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        before_steps(lambda: next(steps), patch)
        return search_recipe(source, "recipe.json"), next(steps)


@pytest.fixture(scope="module")
def found(counted: tuple[Found, int]) -> Found:
    return counted[0]


@pytest.fixture(scope="module")
def converted(source: Path, found: Found) -> Path:
    out = source.parent / "converted"
    convert(source, out, find_recipe(str(found.file)))
    return out


def test_search_keeps_to_the_size_and_beats_the_fixed_recipe(source: Path, found: Found) -> None:
    budget = inspect(source, "mixed-8-5").main.nbytes
    assert 0.97 * budget < found.nbytes <= budget
    kl = found.measured
    plain = {"mixed-8-5", "power law", "quadratic"}
    assert set(kl) == plain | {name + REFINED for name in plain}
    assert all(kl[name + REFINED] < kl[name] for name in plain)
    assert min(kl.values()) < kl["mixed-8-5"]
    content = json.loads(found.file.read_text())
    assert kl[content["search"]["allocation"] + REFINED] == min(kl.values())


def test_recipe_names_every_component_with_all_options(found: Found) -> None:
    read = json.loads(found.file.read_text())
    components = {line["component"] for line in read["search"]["components"]}
    assert components == {
        "embedding", "head", "dense MLP", "shared experts", "attention: query",
        "attention: key-value latent", "attention: key-value heads", "attention: attention output",
        "routed experts: gate and up", "routed experts: down",
    }  # fmt: skip
    head = next(c for c in read["search"]["components"] if c["component"] == "head")
    assert {(o["bits"], o["mode"]) for o in head["options"]} >= {
        (2, "affine"), (8, "affine"), (4, "mxfp4"), (4, "nvfp4")
    }  # fmt: skip
    assert all(option["kl"] > 0 for option in head["options"])
    assert any(path.startswith("model.layers.2.") for path in read["modules"]), "no MTP layer"


def test_sensitivities_are_measured_once(
    source: Path, found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For further sizes, too."""
    monkeypatch.delattr("glmd.evaluate.search.measure")
    again = search_recipe(source, "again.json")
    assert again.measured == found.measured
    assert again.components == found.components


def before_steps(observe: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    """Call `observe` before each batch of a layer, or file of results, is written."""
    for owner, name in ((Activations, "write"), (variants, "atomic_write")):
        original = getattr(owner, name)

        def observed(*args: Any, original: Any = original) -> None:
            observe()
            original(*args)

        patch.setattr(owner, name, observed)


def importance(found: Found) -> dict[str, Any]:
    return dict(load_file(found.file.with_suffix(".importance.safetensors")))


KILLED = """
import os, signal, sys
from pathlib import Path
import pytest
from test_search import before_steps, search_recipe

left = int(sys.argv[2])

def kill():
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

before_steps(kill, pytest.MonkeyPatch())
search_recipe(Path(sys.argv[1]), "killed.json", "killed")
"""


def test_a_search_that_is_killed_continues_and_finds_the_same(
    source: Path, counted: tuple[Found, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, uninterrupted = counted
    steps = left = 0

    def count() -> None:
        nonlocal steps, left
        if left == 0:
            raise KeyboardInterrupt
        steps, left = steps + 1, left - 1

    killed = uninterrupted // 3 | 1
    run = [sys.executable, "-c", KILLED, str(source), str(killed)]
    assert subprocess.run(run, cwd=Path(__file__).parent, check=False).returncode == -9
    before_steps(count, monkeypatch)
    interrupts = 0
    while True:
        left = uninterrupted // 4
        try:
            again = search_recipe(source, "again.json", "killed")
            break
        except KeyboardInterrupt:
            interrupts += 1
    assert again == replace(found, file=again.file)
    assert again.file.read_text().replace("again", "recipe") == found.file.read_text()
    np.testing.assert_equal(importance(again), importance(found))
    # The batches of the interrupted layer of one model are repeated.
    assert interrupts >= 2
    assert uninterrupted <= killed + steps <= uninterrupted + 2 * (interrupts + 1)
    assert not list((source.parent / "killed").rglob("*.bin"))


def test_inspect_tells_the_planned_and_the_stored_bytes(
    source: Path, found: Found, converted: Path
) -> None:
    planned, stored = inspect(source, str(found.file)), inspect(converted)
    assert planned.main == stored.main
    assert planned.main.nbytes == found.nbytes
    assert stored.stored is not None
    assert stored.stored.main_bytes == stored.stored.main_planned


def test_plain_mlx_lm_loads_the_result_with_the_same_logits(converted: Path) -> None:
    model, _ = load_mlx_model(converted)
    model.set_dtype(mx.float32)
    expected = np.array(model(mx.array(TOKENS)[None])[0])
    logits = one_shot_logits(load(converted), TOKENS, expanded=False)
    np.testing.assert_allclose(logits, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("mode", [("mxfp4", 32), ("nvfp4", 16)], ids=str)
def test_floating_point_modes_convert_and_load(
    source: Path, mode: tuple[str, int], tmp_path: Path
) -> None:
    how = QuantizedAs(bits=4, group_size=mode[1], mode=mode[0])  # type: ignore[arg-type]
    paths = (
        "model.layers.1.mlp.switch_mlp.up_proj", "model.layers.0.self_attn.o_proj",
        "model.layers.0.self_attn.embed_q",
    )  # fmt: skip
    modules = dict.fromkeys(paths, how) | {"lm_head": QuantizedAs(bits=8)}
    convert(source, tmp_path / "out", Recipe("float", modules=modules))
    stored = inspect(tmp_path / "out").stored
    assert stored is not None
    assert stored.main_bytes == stored.main_planned
    mlx_model, _ = load_mlx_model(tmp_path / "out")
    mlx_model.set_dtype(mx.float32)
    expected = np.array(mlx_model(mx.array(TOKENS)[None])[0])
    logits = one_shot_logits(load(tmp_path / "out"), TOKENS, expanded=False)
    np.testing.assert_allclose(logits, expected, atol=1e-3, rtol=0)


def test_too_small_sizes_are_refused_before_anything_is_measured(
    source: Path, tmp_path: Path
) -> None:
    app = typer.Typer()
    app.command()(command)
    arguments = ["--bytes", "10kB", "--work", str(tmp_path), "--out", str(tmp_path / "r.json")]
    corpus = tmp_path / "text.txt"
    corpus.write_text("Some text. " * 20)
    with pytest.raises(SettingsError, match="the smallest takes"):
        CliRunner().invoke(
            app, [str(source), *arguments, "--text", str(corpus)], catch_exceptions=False
        )


def test_damaged_recipe_files_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    with pytest.raises(SettingsError, match="cannot be read"):
        find_recipe(str(file))
    file.write_text('{"name": "x", "modules": {"lm_head": {"bits": 7}}}')
    with pytest.raises(SettingsError, match=r"recipe\.json: Invalid enum value 7"):
        find_recipe(str(file))
    file.write_text('{"name": "x", "modules": {}, "importance": "gone.safetensors"}')
    with pytest.raises(SettingsError, match=r"needs .*gone\.safetensors, which is missing"):
        find_recipe(str(file))
    assert RecipeFile(name="x", modules={}).importance is None


def test_sizes_are_read_with_their_units() -> None:
    assert read_bytes("18GiB") == 18 * 2**30
    assert read_bytes("20.5 GB") == 20_500_000_000
    with pytest.raises(typer.BadParameter, match="18GiB"):
        read_bytes("many")
