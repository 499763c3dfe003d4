"""`glmd convert --mtp-only` of a repository: what is downloaded, and what is refused before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub import REPO, Hub
from huggingface_hub import constants
from typer.testing import CliRunner

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.checkpoint.config import load_config
from glmd.checkpoint.hub import resolve_model
from glmd.checkpoint.weights import INDEX_NAME, list_tensors
from glmd.cli.main import app
from glmd.convert.add_mtp import add_mtp
from glmd.convert.convert import convert
from glmd.convert.recipes import DEFAULT_RECIPE, find_recipe
from glmd.errors import CheckpointError

SHARDS = 24
RECIPE = find_recipe(DEFAULT_RECIPE)


def publish(hub: Hub, folder: Path, **config: Any) -> Path:
    write_random_checkpoint(folder, shards=SHARDS, **config)
    hub.files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return folder


def add(out: Path) -> str:
    done = CliRunner().invoke(app, ["convert", "--mtp-only", REPO, str(out)])
    return done.output if done.exit_code == 0 else str(done.exception)


def weights(hub: Hub) -> set[str]:
    """Names of the weight files that were downloaded."""
    return {name for name in hub.served if name.endswith(".safetensors")}


@pytest.fixture
def source(hub: Hub, tmp_path: Path) -> Path:
    return publish(hub, tmp_path / "in")


@pytest.fixture
def plain(source: Path, tmp_path: Path) -> Path:
    """MLX files of the source without its MTP layer."""
    convert(source, tmp_path / "out", RECIPE, mtp=False)
    return tmp_path / "out"


def test_only_the_files_with_the_layer_are_downloaded(
    hub: Hub, source: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "MTP layer added" in add(plain)
    files = json.loads((source / INDEX_NAME).read_text())["weight_map"]
    layer = {file for name, file in files.items() if name.startswith("model.layers.3.")}
    shared = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    assert weights(hub) == layer | {files[name] for name in shared}
    assert set(hub.served) - weights(hub) == {"config.json", INDEX_NAME}
    assert len(weights(hub)) <= SHARDS / 2  # a quarter of this small model is its MTP layer

    convert(source, tmp_path / "whole", RECIPE)
    for name in ("mtp.safetensors", "config.json"):
        assert (plain / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    # What is there serves again without a connection, and a download completes it.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    convert(source, tmp_path / "again", RECIPE, mtp=False)
    assert "MTP layer added" in add(tmp_path / "again")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    before = weights(hub)
    hub.served.clear()
    assert len({tensor.file for tensor in list_tensors(resolve_model(REPO)).values()}) == SHARDS
    assert weights(hub).isdisjoint(before)


def test_a_source_among_lm_studios_models_is_not_downloaded(
    hub: Hub, source: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / ".lmstudio" / "models" / REPO
    folder.parent.mkdir(parents=True)
    source.rename(folder)
    for name in ("chat_template.jinja", "tokenizer.json"):
        (folder / name).touch()
    assert "MTP layer added" in add(plain)
    assert hub.served == []


def test_a_source_of_one_file_is_downloaded_whole(hub: Hub, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "in")
    hub.files = {file.name: file.read_bytes() for file in (tmp_path / "in").iterdir()}
    hub.files["chat_template.jinja"] = b""
    convert(tmp_path / "in", tmp_path / "out", RECIPE, mtp=False)
    assert "MTP layer added" in add(tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"hidden_size": 192}, f"not of the model in {REPO}: hidden_size is 128, not 192"),
        ({"num_nextn_predict_layers": 0}, f"{REPO}: the checkpoint has no MTP layer"),
    ],
)
def test_what_cannot_be_added_is_refused_before_weights_are_downloaded(
    hub: Hub, plain: Path, tmp_path: Path, config: dict[str, Any], problem: str
) -> None:
    publish(hub, tmp_path / "other", **config)
    assert problem in add(plain)
    assert weights(hub) == set()


def test_another_models_layer_is_refused(hub: Hub, plain: Path, tmp_path: Path) -> None:
    publish(hub, tmp_path / "other", seed=9)
    assert "norm.weight differs" in add(plain)
    assert load_config(plain).mtp is None


def test_of_a_partial_folder_the_files_with_the_layer_must_be_there(
    source: Path, plain: Path
) -> None:
    files = json.loads((source / INDEX_NAME).read_text())["weight_map"]
    (source / files["model.layers.1.mlp.gate.weight"]).unlink()
    (source / files["model.layers.3.eh_proj.weight"]).unlink()
    with pytest.raises(CheckpointError, match=r"missing, of 24 files"):
        add_mtp(source, plain, RECIPE)
