"""Models by folder or repository id, against a small hub of our own over real HTTP."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.checkpoint.config import load_config
from glmd.checkpoint.hub import resolve_model
from glmd.checkpoint.weights import list_tensors
from glmd.errors import CheckpointError, ModelNotFound

REPO = "someone/glm-tiny"
SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A stand-in for the hub, with the files that were requested."""

    files: dict[str, bytes] = field(default_factory=dict)
    refuse: tuple[int, str] | None = None
    cut: str | None = None
    """Send half of a file's body, then close the connection."""
    served: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    """The four endpoints of the hub that a download needs."""

    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        hub = self.hub
        if hub.refuse is not None:
            status, code = hub.refuse
            return self._send(status, b"{}", {"X-Error-Code": code}, body=body)
        if path.startswith(f"/api/models/{REPO}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                for name, data in hub.files.items()
            ]
            return self._json(tree, body=body)
        if path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": name} for name in hub.files]
            return self._json({"id": REPO, "sha": SHA, "siblings": siblings}, body=body)
        prefix = f"/{REPO}/resolve/"
        name = path.removeprefix(prefix).partition("/")[2]
        if not path.startswith(prefix) or name not in hub.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)
        data = hub.files[name]
        if body:
            hub.served.append(name)
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        return self._send(200, data, headers, body=body, cut=body and hub.cut == name)

    def _json(self, value: Any, *, body: bool) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body=body)

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], *, body: bool, cut: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    _point_at(url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    silent = are_progress_bars_disabled()
    disable_progress_bars()
    yield hub
    if not silent:
        enable_progress_bars()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def published(hub: Hub, tmp_path: Path) -> Hub:
    write_random_checkpoint(tmp_path / "source", shards=2)
    for file in (tmp_path / "source").iterdir():
        hub.files[file.name] = file.read_bytes()
    hub.files |= {
        "mtp.safetensors": b"mtp",
        "chat_template.jinja": b"{{ x }}",
        "pytorch_model.bin": b"pickle",
        "gguf/model.safetensors": b"other",
    }
    return hub


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
    _point_at("http://127.0.0.1:9", monkeypatch)
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
