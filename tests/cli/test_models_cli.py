"""`glmd pull`, `list` and `remove`, against a small hub over real HTTP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub import REPO, Hub
from huggingface_hub import constants
from typer.testing import CliRunner, Result

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.checkpoint.hub import DEMO, RECOMMENDED, resolve_model
from glmd.cli.main import app
from glmd.cli.serve import find_model
from glmd.config import Settings
from glmd.convert.convert import convert
from glmd.convert.recipes import find_recipe
from glmd.errors import CheckpointError


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "home"


@pytest.fixture
def quantized(hub: Hub, tmp_path: Path) -> Hub:
    write_random_checkpoint(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "made", find_recipe("mixed-8-5"), mtp=False)
    hub.files = {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}
    return hub


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def listed() -> list[dict[str, Any]]:
    done = run("list", "--json")
    assert done.exit_code == 0, done.output
    models: list[dict[str, Any]] = json.loads(done.stdout)
    return models


def test_pull_tells_size_disk_and_memory_then_downloads(quantized: Hub) -> None:
    done = run("pull", REPO)
    assert done.exit_code == 0, (done.output, done.exception)
    for word in (REPO, "without the MTP layer", "disk: ", "GB free", "memory: ", "Complete: "):
        assert word in done.output
    [model] = listed()
    assert (model["name"], model["place"], model["problem"]) == (REPO, "Hugging Face cache", None)
    assert 5 < model["bits_per_weight"] < 9
    quantized.served.clear()
    again = run("pull", REPO)
    assert "0 GB to download" in again.output
    assert not [name for name in quantized.served if name.endswith(".safetensors")]


def test_a_model_that_does_not_fit_is_refused_before_its_weights_come(
    quantized: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmd.engine.memory.default_budget", lambda: 1 << 20)
    done = run("pull", REPO)
    assert "does not fit" in str(done.exception)
    assert quantized.served == ["config.json"]
    assert run("pull", REPO, "--force").exit_code == 0


def test_a_disk_without_room_is_refused_before_weights_come(
    quantized: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    done = run("pull", REPO)
    assert "are free on its disk" in str(done.exception)
    assert quantized.served == ["config.json"]


def test_serving_an_unquantised_model_names_the_commands_before_it_is_downloaded(
    published: Hub,
) -> None:
    with pytest.raises(CheckpointError) as error:
        find_model(Settings(model=REPO))
    for command in ("`glmd pull`", f"glmd convert {REPO}", f"`glmd pull {REPO}`"):
        assert command in error.value.message
    assert published.served == ["config.json"]
    assert resolve_model(REPO).is_dir()  # as `glmd convert` does
    assert find_model(Settings(model=REPO))[0] == REPO


def test_without_a_model_the_downloaded_recommendation_is_served_else_the_demo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert find_model(Settings()) == ("glmd-demo", DEMO)
    assert find_model(Settings(model="demo")) == ("glmd-demo", DEMO)
    monkeypatch.setattr(
        "glmd.checkpoint.hub.cached_folder", lambda repo: DEMO if repo == RECOMMENDED else None
    )
    assert find_model(Settings()) == (RECOMMENDED, DEMO)
    assert find_model(Settings(model="GLM-4.7-Flash")) == (RECOMMENDED, DEMO)


def test_models_of_other_programs_are_listed_and_lm_studios_are_served(
    home: Path, hub: Hub
) -> None:
    folder = home / ".lmstudio" / "models" / "someone" / "glm-mlx"
    shutil.copytree(DEMO, folder)
    gguf = home / ".lmstudio" / "models" / "other" / "x" / "GLM-4.7-Flash-Q4_K_M.gguf"
    gguf.parent.mkdir(parents=True)
    gguf.touch()
    manifest = home / ".ollama/models/manifests/registry.ollama.ai/library/glm-4.7-flash/latest"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    models = {each["name"]: each for each in listed()}
    assert models["someone/glm-mlx"]["problem"] is None
    assert models["someone/glm-mlx"]["place"] == "LM Studio"
    assert "GGUF" in models["other/x/GLM-4.7-Flash-Q4_K_M.gguf"]["problem"]
    assert models["glm-4.7-flash:latest"]["place"] == "Ollama"
    assert resolve_model("someone/glm-mlx") == folder
    assert hub.served == []
    assert "remove it there" in str(run("remove", "someone/glm-mlx", "--yes").exception)


def test_remove_frees_what_pull_stored(quantized: Hub, tmp_path: Path) -> None:
    assert run("pull", REPO).exit_code == 0
    assert run("remove", REPO, "--yes").exit_code == 0
    assert listed() == []
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert "is not in the Hugging Face cache" in str(run("remove", REPO, "--yes").exception)


def test_a_partial_download_is_listed_with_the_remedy(
    quantized: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    quantized.cut = next(name for name in quantized.files if name.endswith(".safetensors"))
    assert run("pull", REPO).exit_code == 1
    [model] = listed()
    assert "resumes" in model["problem"] or "missing" in model["problem"]
    quantized.cut = None
    assert run("pull", REPO).exit_code == 0
    assert listed()[0]["problem"] is None
