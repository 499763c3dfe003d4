"""`glmd recipe search`: allocation, recipe files, and their conversion."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from glmd.cli.main import app
from glmd.cli.recipe import read_bytes
from glmd.cli.recipe import search as command
from glmd.convert.convert import convert
from glmd.convert.inspect import inspect
from glmd.convert.recipes import (
    DraftOption,
    Recipe,
    RecipeFile,
    SearchResult,
    find_recipe,
    name_bits,
)
from glmd.errors import CheckpointError, SettingsError
from glmd.evaluate import drafts, variants
from glmd.evaluate.allocation import Option, allocate
from glmd.evaluate.corpus import TokenSet
from glmd.evaluate.drafts import choose_option
from glmd.evaluate.layer_pass import Activations
from glmd.evaluate.model_pass import Candidate, Pass
from glmd.evaluate.search import REFINED, search

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


def calibration_text() -> TokenSet:
    tokens = np.random.default_rng(3).integers(0, 256, 400).astype(np.int32)
    return TokenSet(tokens, np.arange(0, 401, 50), ("random",) * 8)


@dataclass(frozen=True)
class Found:
    """A searched recipe's file, and how it was found."""

    file: Path
    result: SearchResult


def search_recipe(source: Path, out: str, work: str = "work") -> Found:
    """Search a recipe of the size of `mixed-8-5`, in two batches per layer."""
    size = inspect(source, "mixed-8-5").main.nbytes
    text = calibration_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "ROWS", 200)
        file = source.parent / out
        result = search(
            source, file, text, source.parent / work,
            nbytes=size, dtype=mx.float32, on_progress=lambda name, done, total: None,
        )  # fmt: skip
    return Found(file, result)


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
    assert 0.97 * budget < found.result.nbytes <= budget
    kl = found.result.measured_kl
    plain = {"mixed-8-5", "power law", "quadratic"}
    assert set(kl) == plain | {name + REFINED for name in plain}
    assert all(kl[name + REFINED] < kl[name] for name in plain)
    assert min(kl.values()) < kl["mixed-8-5"]
    assert kl[found.result.allocation + REFINED] == min(kl.values())


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


def test_gate_and_up_projection_are_quantised_alike(found: Found) -> None:
    """So that the engine multiplies with both at once."""
    modules = find_recipe(str(found.file)).modules
    assert modules is not None
    gates = [path for path in modules if path.endswith("gate_proj")]
    assert len(gates) == 5
    assert all(modules[path.replace("gate_proj", "up_proj")] == modules[path] for path in gates)


def test_sensitivities_are_measured_once(
    source: Path, found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For further sizes, too."""
    monkeypatch.delattr("glmd.evaluate.search.measure")
    again = search_recipe(source, "again.json")
    assert again.result == found.result


def before_steps(observe: Callable[[], object], patch: pytest.MonkeyPatch) -> None:
    """Call `observe` before each batch of a layer, or file of results, is written."""
    for owner, name in (
        (Activations, "write"), (variants, "atomic_write"), (drafts, "atomic_write"),
    ):  # fmt: skip
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
from glmd.utils.mlx_environment import prepare_mlx
prepare_mlx()  # As in this process, so that sums are equal to the bit.
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
    assert planned.main.nbytes == found.result.nbytes
    assert stored.stored is not None
    assert stored.stored.main_bytes == stored.stored.main_planned


def test_inspect_explains_the_bits_of_a_searched_recipe(
    source: Path, found: Found, converted: Path
) -> None:
    """Of the recipe's file, and of a checkpoint converted with it by its config.json alone."""
    table = json.loads((converted / "config.json").read_text())["quantization"]
    result = found.result
    explained = {
        "recipe": (str(source), "--recipe", str(found.file)),
        "converted": (str(converted / "config.json"),),
    }
    for arguments in explained.values():
        done = CliRunner().invoke(app, ["inspect", *arguments], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
        for each in result.components:
            layers = "" if each.layers is None else "–".join(map(str, dict.fromkeys(each.layers)))
            row = (each.component, layers, each.bits, f"{each.parameters:,}")
            at_4 = "" if each.kl_at_4_bits is None else f"{each.kl_at_4_bits:.6f}"
            cost = (f"{each.bits_per_weight:.2f}", at_4, f"{each.kl:.6f}")
            assert " ".join(filter(None, (*row, *cost))) in lines
        kept = f"{result.allocation}{REFINED} (kept): mean KL"
        assert f"{kept} {min(result.measured_kl.values()):.5f} on 400 tokens" in lines
        assert result.mtp is not None
        assert result.mtp.chosen is not None
        experts = f"MTP layer: routed experts {name_bits(result.mtp.chosen)}, others 8 bits."
        assert f"{experts} {result.mtp.chosen.acceptance:.2%} of its drafts" in done.stdout
    # The bits are those of the converted file's own table.
    for each in result.components:
        if each.component == "routed experts: down":
            assert each.layers == (1, 1)
            stored = table.get("model.layers.1.mlp.switch_mlp.down_proj", table)
            assert name_bits(QuantizedAs(stored["bits"], stored["group_size"])) == each.bits
    explanation = inspect(converted).search
    assert explanation == result.summary
    assert inspect(source, "mixed-8-5").search is None


def test_a_damaged_explanation_is_named(converted: Path, tmp_path: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    config["glmd"]["search"]["tokens"] = "many"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"glmd\.search: Expected `int`"):
        inspect(tmp_path)


def test_drafts_are_measured_as_by_an_evaluation(
    source: Path, found: Found, tmp_path: Path
) -> None:
    """The search quantises the MTP layer alone, `glmd convert` with the recipe `bf16` beside it."""
    measured = found.result.mtp
    assert measured is not None
    worst = next(o for o in measured.options if (o.bits, o.group_size) == (2, 32))
    modules = {
        path: worst.quantized if ".switch_mlp." in path else how
        for path, how in find_recipe(str(found.file)).modules.items()  # type: ignore[union-attr]
        if path.startswith("model.layers.2.")
    }
    convert(source, tmp_path / "two", Recipe("two", modules=modules))
    text = calibration_text()
    scores = [
        Pass(Candidate("mtp", folder), text, mx.float32, tmp_path).run(lambda *_: None)
        for folder in (source, tmp_path / "two")
    ]
    before, after = (float(np.mean(each.accepted)) for each in scores)  # type: ignore[arg-type]
    assert measured.reference == pytest.approx(before, abs=1e-5)
    assert worst.acceptance == pytest.approx(after, abs=1e-4)
    assert worst.loss == pytest.approx(before - after, abs=1e-4)
    assert worst.nbytes == inspect(tmp_path / "two").mtp.nbytes  # type: ignore[union-attr]
    kl = {(o.bits, o.group_size): o.kl for o in measured.options if o.mode == "affine"}
    assert kl[2, 32] > kl[4, 32] > kl[8, 32] > 0


def test_the_mtp_layer_gets_the_fewest_bytes_that_keep_acceptance(found: Found) -> None:
    def option(bits: Any, loss: float, error: float = 0.0005, **mode: Any) -> DraftOption:
        return DraftOption(
            bits, **mode, nbytes=bits, kl=0.1, acceptance=0.5, loss=loss, loss_error=error
        )

    best = option(5, 0.0005)
    assert choose_option([option(4, 0.0006), best, option(8, 0.0)]) == best
    assert choose_option([option(4, 0.0, group_size=32, mode="mxfp4"), best]) == best
    assert choose_option([option(2, -0.002, 0.002), option(8, 0.0, 0.002)]) is None
    measured = found.result.mtp
    assert measured is not None
    assert measured.chosen is not None
    assert measured.chosen == choose_option(measured.options)
    modules = find_recipe(str(found.file)).modules
    assert modules is not None
    experts = {how for path, how in modules.items() if path.startswith("model.layers.2.mlp.switch")}
    assert experts == {measured.chosen.quantized}
    assert modules["model.layers.2.eh_proj"] == QuantizedAs(bits=8)


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
    alone = typer.Typer()
    alone.command()(command)
    arguments = ["--bytes", "10kB", "--work", str(tmp_path), "--out", str(tmp_path / "r.json")]
    corpus = tmp_path / "text.txt"
    corpus.write_text("Some text. " * 20)
    with pytest.raises(SettingsError, match="the smallest takes"):
        CliRunner().invoke(
            alone, [str(source), *arguments, "--text", str(corpus)], catch_exceptions=False
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
