"""`glmd bench report`: a Markdown table of this machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glmd import __version__
from glmd.bench import user_report
from glmd.cli.main import app


def test_the_report_has_device_versions_and_a_number_in_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_report, "DECODING", (1, 2))
    monkeypatch.setattr(user_report, "WINDOW", 8)
    monkeypatch.setattr(user_report, "DRAFTED_TOKENS", 32)
    file = tmp_path / "report.md"
    arguments = ["--model", "demo", "--scale", "0.02", "--repeat", "1", "--out", str(file)]
    done = CliRunner().invoke(app, ["bench", "report", *arguments])
    assert done.exit_code == 0, done.output
    text = file.read_text()
    assert f"glmd {__version__}" in text
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.M))
    units = {
        "decode, streams together: 1": "tokens/s",
        "decode, streams together: 2": "tokens/s",
        "prefill, one prompt of 4k": "tokens/s",
        "8k prompt among 8 streams, their longest gap": "s",
        "100 new tokens on a cached 8k context, first token": "s",
        "one MTP draft per step, accepted": "%",
        "one MTP draft per step, speed against none": "×",
    }
    for name, unit in units.items():
        value, found = rows[name].split(" ", 1)
        assert float(value) > 0
        assert found == unit
