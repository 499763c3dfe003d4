"""`glmd connect`: settings of clients for a running server."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from live import live_server
from typer.testing import CliRunner, Result

from glmd.api.client_settings import CLIENTS, Endpoint
from glmd.cli.connect import find_client, update, write_settings
from glmd.cli.main import app
from glmd.errors import SettingsError

SERVER = Endpoint("http://127.0.0.1:8123", None, 131_072)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in [name for name in os.environ if name.startswith("GLMD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    return tmp_path


def connect(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["connect", *arguments])


def written(name: str, home: Path, server: Endpoint = SERVER) -> tuple[Path, Any]:
    client = find_client(name)
    setup = client.setup(server)
    write_settings(client, setup, home)
    assert setup.file is not None
    file = home / setup.file
    return file, read(file)


def read(file: Path) -> Any:
    loads = {".json": json.loads, ".toml": tomllib.loads}.get(file.suffix, yaml.safe_load)
    return loads(file.read_text())


WITH_FILE = [each.name for each in CLIENTS if each.setup(SERVER).file is not None]


@pytest.mark.engine
def test_address_key_and_context_length_are_the_running_servers() -> None:
    with live_server(api_key="secret-key-for-one-test") as live:
        key = {"Authorization": "Bearer secret-key-for-one-test"}
        models = httpx.get(f"{live.url}/v1/models", headers=key, timeout=60).json()
        length = models["data"][0]["max_model_len"]
        arguments = ("--url", live.url, "--key", "secret-key-for-one-test")
        for client in CLIENTS:
            shown = connect(client.name, *arguments)
            assert shown.exit_code == 0, shown.output
            assert live.url in shown.output
            assert "secret-key-for-one-test" in shown.output
        assert str(length) in connect("claude", *arguments).output
        refused = connect("claude", "--url", live.url, "--key", "another")
        assert refused.exit_code == 1


def test_a_server_that_does_not_answer_is_an_error() -> None:
    done = connect("claude", "--url", "http://127.0.0.1:9")
    assert done.exit_code == 1
    assert "127.0.0.1:9" in str(done.exception)


@pytest.mark.parametrize("name", WITH_FILE)
def test_written_settings_are_what_is_printed_and_writing_twice_changes_nothing(
    name: str, home: Path
) -> None:
    file, content = written(name, home)
    assert content == find_client(name).setup(SERVER).content
    before = file.read_bytes()
    written(name, home)
    assert file.read_bytes() == before
    assert [each.name for each in file.parent.iterdir() if ".bak" in each.name] == []


@pytest.mark.parametrize("name", WITH_FILE)
def test_a_settings_file_keeps_the_rest_and_a_backup(name: str, home: Path) -> None:
    client = find_client(name)
    path = client.setup(SERVER).file
    assert path is not None
    file = home / path
    file.parent.mkdir(parents=True, exist_ok=True)
    old = {".json": '{"theirs": {"a": [1]}}', ".toml": "# mine\ntheirs = 1\n"}.get(
        file.suffix, "theirs: 1\n"
    )
    file.write_text(old)
    _, content = written(name, home)
    assert "theirs" in content
    for key, value in client.setup(SERVER).content.items():
        assert content[key] == value
    backup = file.with_name(f"{file.name}.bak")
    assert backup.read_text() == old
    if file.suffix == ".toml":
        assert "# mine" in file.read_text()
    written(name, home, Endpoint("http://127.0.0.1:9999", None, 4096))
    assert file.with_name(f"{file.name}.bak2").exists()
    assert backup.read_text() == old


@pytest.mark.parametrize(
    ("name", "old"), [("zed", "// mine\n{}"), ("continue", "# mine\nname: Local\n")]
)
def test_comments_are_never_lost(name: str, old: str, home: Path) -> None:
    client = find_client(name)
    path = client.setup(SERVER).file
    assert path is not None
    file = home / path
    file.parent.mkdir(parents=True)
    file.write_text(old)
    with pytest.raises(SettingsError, match="Add the settings that this command prints"):
        written(name, home)
    assert file.read_text() == old


def test_models_of_other_names_stay_in_lists() -> None:
    models = {"models": [{"name": "a", "x": 1}, {"name": "b"}]}
    update(models, {"models": [{"name": "b", "y": 2}]})
    assert models == {"models": [{"name": "a", "x": 1}, {"name": "b", "y": 2}]}


def test_launch_starts_the_client_with_its_settings(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = home / "bin" / "codex"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    started: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *given: started.append(given))
    with live_server(api_key="k" * 32) as live:
        done = connect("codex", "--launch", "--url", live.url, "--key", "k" * 32)
    assert done.exit_code == 0, done.output
    [(path, arguments, environment)] = started
    assert path == str(program)
    assert f'model_providers.glmd.base_url="{live.url}/v1"' in arguments
    assert environment["GLMD_API_KEY"] == "k" * 32
    assert not (home / ".codex").exists()


def test_a_client_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with live_server() as live:
        done = connect("goose", "--launch", "--url", live.url)
    assert done.exit_code == 1
    assert "goose is not installed" in str(done.exception)


def test_an_unknown_client_is_an_error_with_a_suggestion() -> None:
    assert "did you mean opencode?" in str(connect("opencod").exception)
