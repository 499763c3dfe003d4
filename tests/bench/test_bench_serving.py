"""The HTTP benchmark's client counts requests, tokens and failures correctly."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

from glmd.bench.http import Figures, condense, target_checks
from glmd.bench.http_client import (
    GLMD,
    MLX_LM,
    BenchServer,
    Recording,
    parse_servers,
    play,
    running,
)
from glmd.bench.random_checkpoint import write_talkative_checkpoint
from glmd.bench.scenarios import ClientScript, Scenario, Writer, agents, uniform
from glmd.cli.bench import app
from glmd.errors import EngineUnavailable, SettingsError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_talkative_checkpoint(folder, dtype="F32", num_nextn_predict_layers=0)
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    with running(GLMD, checkpoint, tmp_path_factory.mktemp("log") / "log") as address:
        yield address


def recorded(server: tuple[str, str], scenario: Scenario) -> Recording:
    return asyncio.run(play(*server, scenario))


def test_text_has_the_requested_number_of_tokens(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    count = len(tokenizer.encode(Writer(checkpoint, 0.5, seed=0).text(400)).ids)
    assert 200 <= count <= 210


def test_every_stream_is_read_to_its_end(checkpoint: Path, server: tuple[str, str]) -> None:
    scenario = uniform(Writer(checkpoint, 0.1, seed=0), 3)
    figures = condense(checkpoint, GLMD, [recorded(server, scenario)])
    assert (figures.requests, figures.failed) == (3, 0)
    assert figures.rate > 0


def test_agents_prompts_are_computed_once(checkpoint: Path, server: tuple[str, str]) -> None:
    scenario = agents(Writer(checkpoint, 0.1, seed=0), count=3, turns=3)
    recording = recorded(server, scenario)
    assert [len(answers) for answers in recording.answers] == [3, 3, 3]
    figures = condense(checkpoint, GLMD, [recording])
    assert figures.failed == 0
    assert figures.computed <= 1.05 * figures.least


def test_refused_connections_are_counted_not_raised() -> None:
    scenario = Scenario("no server", (ClientScript(("hello",), 4),) * 3)
    recording = asyncio.run(play("http://127.0.0.1:9", "any", scenario))
    assert [len(answers) for answers in recording.answers] == [1, 1, 1]
    assert all("ConnectError" in (talk[0].error or "") for talk in recording.answers)


def test_a_target_that_a_server_did_not_allow_to_measure_is_neither_met_nor_missed() -> None:
    def figures(server: str, scenario: str, rate: float, least: int) -> Figures:
        return Figures(server, scenario, 1, rate, [], [], 10, least, 0, [])

    played = [figures(GLMD.name, "16 ragged", 100, 1), figures(MLX_LM.name, "16 ragged", 0, 1)]
    played += [figures(each.name, "4 agents", 100, 0) for each in (GLMD, MLX_LM)]
    assert [(check.value, check.met) for check in target_checks(played, None)] == [(None, None)] * 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mlx_lm", MLX_LM),
        ("http://localhost:1234/v1/", BenchServer("localhost:1234", url="http://localhost:1234")),
        (
            "other serve '{model}' --port={port}",
            BenchServer("other", ("other", "serve", "{model}", "--port={port}")),
        ),
        (
            "/opt/bin/python -m a.server --port {port}",
            BenchServer("a.server", ("/opt/bin/python", "-m", "a.server", "--port", "{port}")),
        ),
    ],
)
def test_another_server_is_a_name_a_url_or_a_command(text: str, expected: BenchServer) -> None:
    assert parse_servers([text]) == [expected]


def test_servers_of_one_program_have_different_names() -> None:
    names = [server.name for server in parse_servers(["glmd {port}", "x {port}", "/a/x {port} b"])]
    assert names == ["glmd 2", "x", "x 2"]


@pytest.mark.parametrize("text", ["", "server --port 80", "server '{port}"])
def test_a_command_that_cannot_listen_on_the_port_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="--against"):
        parse_servers([text])


def test_a_missing_program_and_a_silent_url_are_named(tmp_path: Path) -> None:
    for text, error in (
        ("no-such-program {port}", SettingsError),
        ("http://127.0.0.1:9", EngineUnavailable),
    ):
        (server,) = parse_servers([text])
        with pytest.raises(error, match=server.name), running(server, tmp_path, tmp_path / "log"):
            pass


def test_servers_play_in_turn_while_all_are_up(
    checkpoint: Path, server: tuple[str, str], tmp_path: Path
) -> None:
    """A running server and one behind a wrapper, which is stopped with what it started."""
    wrapped = f"sh -c '{sys.executable} -m glmd serve {{model}} --port {{port}}; true'"
    file = tmp_path / "result.json"
    arguments = ["serve", "--model", str(checkpoint), "--scale", "0.1", "--max-tokens", "6"]
    arguments += ["--repeat", "2", "--only", "4 uniform", "--json", str(file)]
    result = CliRunner().invoke(
        app, [*arguments, "--against", wrapped, "--against", f"{server[0]}/v1"]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["figures"]
    names = ["glmd", "sh", server[0].removeprefix("http://")]
    assert [row["server"] for row in rows] == names
    for row in rows:
        assert (row["scenario"], row["requests"], row["failed"]) == ("4 uniform", 8, 0)
        assert row["rate"] > 0
    assert rows[0]["computed"] >= 0.75 * rows[0]["least"], "runs have texts of their own"
    commands = [each.info["cmdline"] or [] for each in psutil.process_iter(["cmdline"])]
    serving = [command for command in commands if str(checkpoint) in command]
    assert all(server[0].endswith(command[-1]) for command in serving), "others are stopped"
