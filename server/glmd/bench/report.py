"""Tables, plots and JSON of the benchmarks."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from glmd import __version__
from glmd.bench.engine import EngineReport, EngineRow
from glmd.bench.http import PERCENTILES, Figures, TargetCheck
from glmd.engine.memory import device_name
from glmd.errors import SettingsError

NOT_MEASURED = "–"

WIDTH = 140
"""Columns of a table in a file or a pipe."""

PLOT_FORMATS = (".svg", ".png")
OURS, THEIRS, TARGET = "#3b6ea8", "#b9b9b9", "#c0392b"
"""Colors that also differ in greyscale."""

OTHERS = (THEIRS, "#6e6e6e", "#d9a441", "#93b48b")
"""Colors of glmd's competitors; a fifth has the first's."""

FIGURE_WIDTH, BAR_HEIGHT = 8.0, 0.32
"""Inches."""


def console() -> Console:
    """Return a console that does not wrap tables in a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Show progress on stderr: a status line on a terminal, else a line each."""
    stderr = Console(stderr=True)
    if stderr.is_terminal:
        with stderr.status("") as status:
            yield status.update
    else:
        yield stderr.print


def write_json(file: Path, report: Any, folder: Path, scale: float, repeat: int) -> None:
    """Write a report with versions, machine and parameters."""
    environment = {
        "glmd": __version__,
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
        "python": platform.python_version(),
        "device": device_name(),
        "cpus": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "checkpoint": folder.name,
        "scale": scale,
        "repeat": repeat,
    }
    text = json.dumps({**environment, **asdict(report)}, indent=2, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")


def make_table(title: str, text_columns: Sequence[str], indexcolumns: Sequence[str]) -> Table:
    """Return an empty table; columns of numbers are aligned to the right."""
    table = Table(title=title)
    for column in text_columns:
        table.add_column(column)
    for column in indexcolumns:
        table.add_column(column, justify="right")
    return table


def engine_table(report: EngineReport) -> Table:
    """One row per metric of the engine benchmark.

    Below, why a number was not measured.
    """
    table = make_table(
        _engine_title(report) + ", medians",
        ("workload", "measured"),
        (*report.sides, "better by", "target", ""),
    )
    previous = None
    for row in report.rows:
        table.add_row(
            row.workload if row.workload != previous else "",
            f"{row.goal}, {row.unit}" if row.unit else row.goal,
            NOT_MEASURED if row.glmd is None else number(row.glmd),
            NOT_MEASURED if row.other is None else number(row.other),
            f"{number(row.advantage)}×" if row.advantage else "",
            _target(row),
            _engine_verdict(row),
        )
        previous = row.workload
    table.caption_justify = "left"
    table.caption = "\n".join(
        f"{row.workload}, {row.goal}: {reason}" for row in report.rows for reason in row.reasons
    )
    return table


def _engine_title(report: EngineReport) -> str:
    ours, theirs = report.sides
    return f"{ours} against {theirs}'s BatchGenerator" if ours == "glmd" else f"{ours}, {theirs}"


def _engine_verdict(row: EngineRow) -> str:
    if row.ratio is None and row.bound is None:
        return ""
    return verdict(row.met)


def serving_table(figures: Sequence[Figures]) -> Table:
    """One row per scenario and server of the HTTP benchmark."""
    percentiles = "/".join(str(p) for p in PERCENTILES)
    table = make_table(
        f"Through HTTP; times in ms at the {percentiles}th percentiles",
        ("scenario", "server"),
        ("tokens/s", "first token", "between tokens", "computed", "least", "failed"),
    )
    previous = None
    for row in figures:
        table.add_row(
            row.scenario if row.scenario != previous else "",
            row.server,
            number(row.rate),
            _milliseconds(row.first_token),
            _milliseconds(row.between_tokens),
            str(row.computed),
            str(row.least),
            f"{row.failed} of {row.requests}",
        )
        previous = row.scenario
    return table


def checks_table(checks: Sequence[TargetCheck]) -> Table:
    """One row per target of the HTTP benchmark."""
    table = make_table("Targets", ("what",), ("value", "target", ""))
    for check in checks:
        value = NOT_MEASURED if check.value is None else number(check.value)
        table.add_row(check.what, value, check.target, verdict(check.met))
    return table


def number(value: float) -> str:
    """Format with three significant digits; integers completely."""
    if value == int(value):
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def verdict(met: bool | None) -> str:
    """Return a colored "met" or "missed"; None: not measured."""
    if met is None:
        return NOT_MEASURED
    return "[green]met[/]" if met else "[red]missed[/]"


def _milliseconds(seconds: Sequence[float]) -> str:
    return " / ".join(number(1000 * s) for s in seconds)


def _target(row: EngineRow) -> str:
    parts = []
    if row.ratio is not None:
        parts.append(f"≥ {row.ratio:g}×")
    if row.bound is not None:
        parts.append(f"{'≥' if row.better == 'higher' else '≤'} {number(row.bound)}")
    return ", ".join(parts)


def require_plot(file: Path | None) -> None:
    """Check before a benchmark that its plot can be written. None: no plot.

    Raises:
        SettingsError: wrong file type, missing folder, or matplotlib is not installed.
    """
    if file is None:
        return
    if file.suffix not in PLOT_FORMATS:
        raise SettingsError(f"--plot: {file} must end in {' or '.join(PLOT_FORMATS)}.")
    if not file.absolute().parent.is_dir():
        raise SettingsError(f"--plot: no folder {file.absolute().parent}.")
    try:
        import matplotlib  # noqa: F401, PLC0415  # an optional dependency
    except ImportError:
        raise SettingsError(
            "--plot: matplotlib is not installed. Run: pip install 'glmd[plot]'."
        ) from None


def engine_plot(report: EngineReport, file: Path) -> None:
    """Plot glmd's advantage by workload and metric."""
    rows = [row for row in report.rows if row.advantage]
    labels = [f"{row.workload}: {row.goal}" for row in rows]
    figure, (axes,) = make_figure([len(rows)])
    bars(axes, labels, [[row.advantage or 0 for row in rows]], [OURS], "{:.2f}×")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.axvline(1, color=THEIRS)
    for position, row in enumerate(rows):
        if row.ratio is not None:
            axes.plot([row.ratio] * 2, [position - 0.4, position + 0.4], color=TARGET)
    axes.set_title(_engine_title(report), loc="left")
    axes.set_xlabel("times better; red: target")
    figure.savefig(file, dpi=160)


def serving_plot(figures: Sequence[Figures], file: Path) -> None:
    """Plot tokens per second and time to the first token, by scenario and server."""
    scenarios = list(dict.fromkeys(each.scenario for each in figures))
    servers = list(dict.fromkeys(each.server for each in figures))
    by = {(each.server, each.scenario): each for each in figures}

    def values(read: Callable[[Figures], float]) -> list[list[float]]:
        return [
            [read(by[s, name]) if (s, name) in by else 0.0 for name in scenarios] for s in servers
        ]

    figure, (rate, first) = make_figure([len(figures)] * 2)
    colors = [OURS, *islice(cycle(OTHERS), len(servers) - 1)]
    rates = values(lambda each: each.rate)
    bars(rate, scenarios, rates, colors, "{:.0f}", servers)
    rate.set_title("Through HTTP", loc="left")
    rate.set_xlabel("tokens per second")
    medians = values(lambda each: 1000 * each.first_token[0])
    bars(first, scenarios, medians, colors, "{:.0f}", servers)
    first.set_xlabel("ms to the first token, median")
    figure.savefig(file, dpi=160)


def make_figure(bar_counts: Sequence[int]) -> tuple[Any, list[Any]]:
    """Return a matplotlib figure and its axes, stacked, with room for their bars."""
    # not pyplot, which needs a display
    from matplotlib.figure import Figure  # noqa: PLC0415

    heights = [BAR_HEIGHT * count + 0.9 for count in bar_counts]
    figure = Figure(figsize=(FIGURE_WIDTH, sum(heights)), layout="constrained")
    column = figure.subplots(len(bar_counts), 1, height_ratios=heights, squeeze=False)[:, 0]
    return figure, list(column)


def bars(
    axes: Any,
    labels: Sequence[str],
    groups: Sequence[Sequence[float]],
    colors: Sequence[str],
    value_format: str,
    names: Sequence[str] = (),
) -> None:
    """Draw horizontal bars, one per group for each label, the first label on top."""
    thickness = 0.8 / len(groups)
    for index, (values, color) in enumerate(zip(groups, colors, strict=False)):
        offset = (index - (len(groups) - 1) / 2) * thickness
        positions = [position + offset for position in range(len(labels))]
        name = names[index] if names else None
        drawn = axes.barh(positions, values, thickness, color=color, label=name)
        axes.bar_label(drawn, [value_format.format(v) for v in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    if names:
        axes.legend(frameon=False, fontsize=8)
