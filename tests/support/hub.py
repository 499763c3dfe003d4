"""A small Hugging Face hub over real HTTP, with the endpoints that a download needs."""

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
    repo: str = REPO
    url: str = ""


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
        if path.startswith(f"/api/models/{hub.repo}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                for name, data in hub.files.items()
            ]
            return self._json(tree, body=body)
        if path.startswith(f"/api/models/{hub.repo}"):
            siblings = [{"rfilename": name} for name in hub.files]
            return self._json({"id": hub.repo, "sha": SHA, "siblings": siblings}, body=body)
        prefix = f"/{hub.repo}/resolve/"
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


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    hub.url = url
    point_at(url, monkeypatch)
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
