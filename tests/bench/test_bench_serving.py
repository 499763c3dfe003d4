"""The HTTP benchmark's client counts requests, tokens and failures correctly."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from glmd.bench.client import GLMD, MLX_LM, Recording, play, running
from glmd.bench.random_checkpoint import write_talkative_checkpoint
from glmd.bench.scenarios import ClientScript, Scenario, Writer, agents, uniform
from glmd.bench.serving import Figures, condense, target_checks


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
    figures = condense(checkpoint, GLMD, scenario, [recorded(server, scenario)])
    assert (figures.requests, figures.failed) == (3, 0)
    assert figures.rate > 0


def test_agents_prompts_are_computed_once(checkpoint: Path, server: tuple[str, str]) -> None:
    scenario = agents(Writer(checkpoint, 0.1, seed=0), count=3, turns=3)
    recording = recorded(server, scenario)
    assert [len(answers) for answers in recording.answers] == [3, 3, 3]
    figures = condense(checkpoint, GLMD, scenario, [recording])
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
