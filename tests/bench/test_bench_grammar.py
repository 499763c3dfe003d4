"""The grammar benchmark holds the rows that it says it does, and measures all it reports."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from grammars import TAGS, answers, schema_matcher, validate
from rich.console import Console

from glmd.bench.checkpoints import write_talkative_checkpoint
from glmd.bench.forms import RECORD, agent_tools, forms
from glmd.bench.grammar import ROWS, bench_grammar
from glmd.bench.report import compiling_table, grammar_table
from glmd.structured_output.compiler import build_grammar


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_talkative_checkpoint(folder, dtype="F32", num_nextn_predict_layers=0)
    return folder


def test_every_form_is_followed_to_the_length_asked_for(checkpoint: Path) -> None:
    report = bench_grammar(
        checkpoint, scale=0, repeat=1, only="", on_progress=lambda line: None, tokens=8
    )
    assert [row.form for row in report.forms] == list(forms())
    for row in report.forms:
        assert row.free > 0 < row.held
        assert row.masks > 0, f"{row.form}: no masks"
        assert row.ratio == pytest.approx(row.held / row.free)
    assert report.rows == ROWS
    compiling = report.compiling
    assert all(seconds > 0 for seconds in asdict(compiling).values())
    assert json.dumps(asdict(report), allow_nan=False)
    console = Console(width=200, record=True)
    console.print(grammar_table(report), compiling_table(compiling))
    assert "calls of 20 tools" in console.export_text()


def test_all_of_the_agents_tools_can_be_enforced_strictly() -> None:
    structure = agent_tools("_x")
    assert len({rule.name for rule in structure.tools}) == 20
    assert build_grammar(structure, TAGS).relaxed == ()


def test_the_record_is_one_that_a_validator_knows() -> None:
    found = list(answers(schema_matcher(RECORD), 5))
    assert found
    for text in found:
        validate(text, RECORD)
