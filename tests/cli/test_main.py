"""The `glmd` command itself: names of other programs, help, version; ports and sizes."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
from collections.abc import Iterator
from inspect import unwrap
from pathlib import Path
from typing import Any

import pytest
import typer
from live import LiveServer
from typer.testing import CliRunner, Result

from glmd import __version__
from glmd.api.sockets import listen
from glmd.cli.main import OTHER_NAMES, app
from glmd.config import Settings
from glmd.config_sources import load
from glmd.engine.config import EngineConfig
from glmd.errors import SettingsError


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_help_and_version_work_as_commands() -> None:
    assert run("version").output == f"glmd {__version__}\n"
    assert "pull" in run("help").output
    assert "--force" in run("help", "pull").output


def commands(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The visible commands below a group that run something, with their names."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        elif not command.hidden:
            yield (*names, name), command


def test_every_command_has_an_example_that_it_takes_and_describes_its_options() -> None:
    by_name = dict(commands(typer.main.get_command(app)))
    assert len(by_name) > 20
    for names, command in by_name.items():
        examples = re.findall(r"(?:Example:|\n)\s+(?:.+ \| )?(glmd .+)", command.help)
        assert examples, names
        for example in examples:
            words = shlex.split(example)[1:]
            start = 1 if (words[0],) in by_name else 2
            other = by_name[tuple(words[:start])]
            assert unwrap(other.callback) is unwrap(command.callback), example
            other.make_context(words[start - 1], words[start:]).close()
        for parameter in command.params:
            assert parameter.help, (names, parameter.name)


def test_help_names_values_and_defaults_that_hold() -> None:
    text = " ".join(run("serve", "--help").output.replace("│", "").split())
    for value in ("off|auto|1|2|3", "Default: 8000", f"Default: {EngineConfig().max_running}."):
        assert value in text


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_commands_of_other_programs_lead_to_one_that_exists(name: str) -> None:
    done = run(name, "x")
    assert done.exit_code == 2
    assert f"Use `glmd {OTHER_NAMES[name]}`" in " ".join(done.output.replace("│", "").split())
    words = OTHER_NAMES[name].split("`")[0].split()
    words = [word for word in words if word.islower() and not word.startswith("-")]
    assert run(*words, "--help").exit_code == 0


def test_an_unknown_command_is_refused() -> None:
    assert run("sevre").exit_code == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 << 30), ("24 GB", 24 * 10**9), ("1.5GiB", 3 << 29), (str(3 << 30), 3 << 30)],
)
def test_memory_is_read_with_its_unit(text: str, size: int) -> None:
    assert Settings(memory_budget=text).memory_budget == size


def test_memory_may_be_a_share_of_this_machines() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    budget = Settings(memory_budget="75%").memory_budget
    assert budget is not None
    assert budget == pytest.approx(0.75 * total, rel=0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [("24", "24 means 24 bytes. Write 24GiB"), ("0%", "is not a share"), ("x%", "is not a share")],
)
def test_memory_that_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=f"^--memory-budget: .*{message}"):
        load({"memory_budget": text})


def test_a_port_in_use_names_its_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"in use by .*\(process {os.getpid()}\)"):
            listen("127.0.0.1", port)


def test_status_shows_a_server_that_no_service_started(
    scripted: LiveServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GLMD_PORT", scripted.url.rpartition(":")[2])
    done = run("status", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["status"], report["model"], report["kv_bits"]) == ("ready", "test/tiny", 16)
    assert report["url"] == scripted.url
    assert "test/tiny" in run("status").output
