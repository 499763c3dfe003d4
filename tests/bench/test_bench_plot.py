"""Plots of the benchmarks' reports."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from glmd.bench.engine import EngineReport, EngineRow
from glmd.bench.http import Figures
from glmd.bench.report import engine_plot, require_plot, serving_plot
from glmd.errors import SettingsError
from mtp import Acceptance, DraftingReport, Speed
from mtp import plot as drafting_plot


def row(workload: str, advantage: float | None, ratio: float | None) -> EngineRow:
    return EngineRow(
        workload, "decode", "tokens/s", 8, 7, advantage, ratio, None, "higher", True, [], []
    )


def figures(server: str, scenario: str) -> Figures:
    times = [0.1, 0.2, 0.3]
    return Figures(server, scenario, 8, 12.5, times, times, 90, 80, 0, [])


ENGINE = EngineReport(
    ("glmd", "mlx-lm"),
    "float32",
    True,
    1,
    1,
    1.0,
    [row("batch 8", 1.25, 1.0), row("ragged & 7", None, None)],
)
SERVING = [
    figures(server, name)
    for name in ("8 streams", "agents")
    for server in ("glmd", "other", "third")
]
MTP = DraftingReport([Acceptance("echo", 0.2, 10, 0.9, 1.9)], [Speed(1, 1.2, 1.3, 0.8)], 1, 1)


def texts(file: Path) -> str:
    """Return the text of an SVG; matplotlib draws letters as shapes and keeps text as comments."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    tree = ElementTree.parse(file, parser)
    return "\n".join(each.text or "" for each in tree.iter() if callable(each.tag))


def test_each_plot_contains_labels_and_values(tmp_path: Path) -> None:
    file = tmp_path / "a.svg"
    engine_plot(ENGINE, file)
    assert "batch 8: decode" in texts(file)
    assert "1.25×" in texts(file)
    assert "ragged" not in texts(file), "rows without a ratio are left out"
    serving_plot(SERVING, file)
    for part in ("8 streams", "agents", "glmd", "other", "third", "tokens per second", "100"):
        assert part in texts(file)
    drafting_plot(MTP, file)
    for part in ("echo, temperature 0.2", "90 %", "batch 1", "1.30×", "mtp auto"):
        assert part in texts(file)


def test_the_suffix_selects_png(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    require_plot(file)
    drafting_plot(MTP, file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_written_is_rejected_before_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file, message in (
        (tmp_path / "a.gif", "must end in .svg or .png"),
        (tmp_path / "b/a.svg", "no folder"),
    ):
        with pytest.raises(SettingsError, match=message):
            require_plot(file)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SettingsError, match=r"pip install 'glmd\[plot\]'"):
        require_plot(tmp_path / "a.svg")
