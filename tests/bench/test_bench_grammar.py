"""The grammar benchmark constrains its rows and measures everything that it reports."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from grammars import TAGS, answers, schema_matcher, validate
from rich.console import Console

import grammar
from glmd.bench.random_checkpoint import write_talkative_checkpoint
from glmd.structured_output.compiler import build_grammar
from grammar import (
    RECORD,
    bench_grammar,
    compile_table,
    output_specs,
    speed_table,
    twenty_tools,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_talkative_checkpoint(folder, dtype="F32", num_nextn_predict_layers=0)
    return folder


def test_every_grammar_constrains_all_requested_tokens(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "ROWS", 4)
    report = bench_grammar(
        checkpoint, scale=0, repeat=1, only="", on_progress=lambda line: None, tokens=8
    )
    assert [row.grammar for row in report.grammars] == list(output_specs())
    for row in report.grammars:
        assert row.free > 0 < row.constrained
        assert row.masks > 0, f"{row.grammar}: no masks"
        assert row.ratio == pytest.approx(row.constrained / row.free)
    assert report.rows == 4
    compiling = report.compiling
    assert all(seconds > 0 for seconds in asdict(compiling).values())
    assert json.dumps(asdict(report), allow_nan=False)
    console = Console(width=200, record=True)
    console.print(speed_table(report), compile_table(compiling))
    assert "calls of 20 tools" in console.export_text()


def test_all_twenty_tools_can_be_enforced_strictly() -> None:
    structure = twenty_tools("_x")
    assert len({rule.name for rule in structure.tools}) == 20
    assert build_grammar(structure, TAGS).relaxed == ()


def test_the_record_schema_agrees_with_a_validator() -> None:
    found = list(answers(schema_matcher(RECORD), 5))
    assert found
    for text in found:
        validate(text, RECORD)
