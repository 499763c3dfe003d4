"""`glmd config`: origins of values, and the template of a configuration file."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from glmd.cli.main import app
from glmd.config import Settings
from glmd.config_sources import load
from glmd.errors import SettingsError


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in [name for name in os.environ if name.startswith("GLMD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    return tmp_path


def config(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["config", *arguments])


def shown(*arguments: str) -> dict[str, Any]:
    run = config("show", "--json", *arguments)
    assert run.exit_code == 0, run.output
    settings: dict[str, Any] = json.loads(run.stdout)["settings"]
    return settings


def test_show_prints_each_value_with_its_origin(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = home / "a.toml"
    file.write_text("port = 1\nhost = 'x'\n[profiles.brief]\ntemperature = 0.1\n")
    monkeypatch.setenv("GLMD_HOST", "y")
    settings = shown("--config", str(file), "--max-context", "99", "--alias", "a", "--alias", "b")
    assert settings.keys() == Settings.model_fields.keys()

    def row(name: str) -> tuple[Any, str, str | None]:
        return settings[name]["value"], settings[name]["origin"], settings[name]["where"]

    assert row("max_context") == (99, "flag", "--max-context")
    assert row("host") == ("y", "env", "GLMD_HOST")
    assert row("port") == (1, "file", f"{file}: port")
    assert row("profiles") == ({"brief": {"temperature": 0.1}}, "file", f"{file}: profiles")
    assert row("aliases")[:2] == (["a", "b"], "flag")
    assert row("max_body") == ("32MiB", "default", None)


def test_secrets_are_masked_in_table_and_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMD_API_KEY", "hunter2")
    for arguments in (["show"], ["show", "--json"]):
        output = config(*arguments).output
        assert "hunter2" not in output
        assert "GLMD_API_KEY" in output


def test_path_prints_the_file_in_use_or_the_file_that_init_writes(home: Path) -> None:
    file = home / "xdg" / "glmd" / "config.toml"
    assert config("path").stdout == f"{file}\n"
    other = home / ".config" / "named.toml"
    assert config("path", "--config", str(other)).stdout == f"{other}\n"


def test_init_writes_every_default_into_a_private_file(home: Path) -> None:
    run = config("init")
    file = home / "xdg" / "glmd" / "config.toml"
    assert str(file) in run.stdout
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert load({}) == Settings.model_validate({})
    text = file.read_text()
    for name, field in Settings.model_fields.items():
        assert re.search(rf"^#\[?{name}\b", text, re.MULTILINE), name
        assert field.description
    file.write_text(re.sub(r"^#(?=[\w\[].*\S$)(?!\w+ =$)", "", text, flags=re.MULTILINE))
    settings = load({})
    assert settings.model_copy(update={"profiles": {}}) == Settings.model_validate({})
    assert settings.profiles["brief"].enable_thinking is False


def test_init_does_not_overwrite_a_file(home: Path) -> None:
    file = home / "mine.toml"
    file.write_text("port = 7\n")
    run = config("init", "--config", str(file))
    assert isinstance(run.exception, SettingsError)
    assert str(file) in run.exception.message
    assert file.read_text() == "port = 7\n"
