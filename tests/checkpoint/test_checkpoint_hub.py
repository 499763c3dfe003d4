"""Models by folder or repository id, against a small hub of our own over real HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub import REPO, Hub, point_at
from huggingface_hub import constants

from glmd.checkpoint.config import load_config
from glmd.checkpoint.hub import resolve_model
from glmd.checkpoint.weights import list_tensors
from glmd.errors import CheckpointError, ModelNotFound


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_download_includes_the_mtp_file_and_the_template(published: Hub) -> None:
    folder = resolve_model(REPO)
    assert load_config(folder).num_hidden_layers == 3
    assert list_tensors(folder)
    assert (folder / "mtp.safetensors").read_bytes() == b"mtp"
    assert (folder / "chat_template.jinja").exists()
    assert (folder / "tokenizer.json").exists()
    assert "pytorch_model.bin" not in published.served
    assert "gguf/model.safetensors" not in published.served


def test_a_downloaded_repository_serves_without_connection(
    published: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve_model(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model(REPO) == folder


def test_a_complete_download_is_used_without_a_request_to_the_hub(published: Hub) -> None:
    folder = resolve_model(REPO)
    published.refuse = (500, "")
    assert resolve_model(REPO) == folder


def test_another_kind_of_model_is_refused_before_its_weights_come(published: Hub) -> None:
    published.files["config.json"] = b'{"model_type": "llama"}'
    with pytest.raises(CheckpointError, match='model_type is "llama"'):
        resolve_model(REPO)
    assert published.served == ["config.json"]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", f"{REPO} is gated: accept its terms at http://127"),
        (404, "RepoNotFound", "no accessible repository of that name"),
        (401, "", "no accessible repository of that name"),
    ],
)
def test_an_inaccessible_repository_is_explained(
    hub: Hub, status: int, code: str, message: str
) -> None:
    hub.refuse = (status, code)
    with pytest.raises(ModelNotFound, match=message) as error:
        resolve_model(REPO)
    assert "\n" not in error.value.message


def test_a_repository_without_a_model_is_explained(hub: Hub) -> None:
    hub.files["notes.txt"] = b""
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        resolve_model(REPO)


def test_offline_mode_is_explained(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match=r"is not downloaded, .* and HF_HUB_OFFLINE is set"):
        resolve_model(REPO)


def test_an_unreachable_hub_is_explained(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # its retries
    with pytest.raises(
        ModelNotFound, match=r"is not downloaded, .* and http://127.0.0.1:9 cannot be"
    ):
        resolve_model(REPO)


def test_a_download_that_broke_off_is_explained_and_then_completed(
    published: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    published.cut = "model-00002-of-00002.safetensors"
    with pytest.raises(ModelNotFound, match="was interrupted"):
        resolve_model(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match=r"not completely, and HF_HUB_OFFLINE is set"):
        resolve_model(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    published.cut = None
    assert list_tensors(resolve_model(REPO))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "glm", "a/b/c", "bad id/x"])
def test_a_name_of_neither_folder_nor_repository_is_explained(name: str) -> None:
    with pytest.raises(ModelNotFound, match="There is no folder"):
        resolve_model(name)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(ModelNotFound, match="is a file, not the folder of a model"):
        resolve_model(str(file))


def test_a_local_copy_without_tokenizer_or_template_is_completed(published: Hub) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        (resolve_model(REPO) / name).unlink()
        assert (resolve_model(REPO) / name).exists()


def test_a_local_copy_without_mtp_layer_is_completed_or_served_without(
    published: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads(published.files["config.json"])
    mtp = {"file": "mtp.safetensors", "shares_embedding": True, "shares_head": True}
    config["glmd"] = {"mtp": mtp | {"quantization": {}}}
    published.files["config.json"] = json.dumps(config).encode()
    folder = resolve_model(REPO)
    (folder / "mtp.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model(REPO) == folder
    assert "mtp.safetensors is missing, and cannot be downloaded" in caplog.text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert (resolve_model(REPO) / "mtp.safetensors").exists()


def test_gguf_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelNotFound, match=r"does not read GGUF\. Convert the BF16 model"):
        resolve_model(str(tmp_path / "model.gguf"))
