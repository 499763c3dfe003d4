"""How measurements are shown: pictures, by matplotlib, which the extra `plot` brings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtp import DraftingReport
from glmd.bench.engine import Report
from glmd.bench.serving import Figures
from glmd.errors import SettingsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".svg", ".png")

OURS, THEIRS, GOAL = "#3b6ea8", "#b9b9b9", "#c0392b"
"""Told apart in grey, and by whoever sees no red."""

WIDTH = 8.0
BAR = 0.32
"""Inches of a bar with its label."""

DOTS = 160
"""Per inch of a PNG."""


def require_plot(file: Path) -> None:
    """Raise SettingsError unless a picture can be written there; to be asked before measuring."""
    if file.suffix not in KINDS:
        raise SettingsError(f"--plot takes a file that ends in {' or '.join(KINDS)}, not {file}.")
    if not file.absolute().parent.is_dir():
        raise SettingsError(f"--plot: there is no folder {file.absolute().parent}.")
    try:
        import matplotlib  # noqa: F401, PLC0415  # the extra may be missing
    except ImportError:
        raise SettingsError(
            "--plot draws with matplotlib, which is not installed: pip install 'glmd[plot]'."
        ) from None


def engine_plot(report: Report, file: Path) -> None:
    """How many times better glmd is, by workload and goal."""
    rows = [row for row in report.rows if row.advantage]
    labels = [f"{row.workload}: {row.goal}" for row in rows]
    figure, (axes,) = _page([len(rows)])
    _bars(axes, labels, [[row.advantage or 0 for row in rows]], [OURS], "{:.2f}×")
    axes.set_xscale("log")
    for spread in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        spread("{x:g}")
    axes.axvline(1, color=THEIRS)
    for place, row in enumerate(rows):
        if row.ratio is not None:
            axes.plot([row.ratio] * 2, [place - 0.4, place + 0.4], color=GOAL)
    _title(axes, "glmd against mlx-lm's BatchGenerator", "times better; red: target")
    _write(figure, file)


def serving_plot(figures: Sequence[Figures], file: Path) -> None:
    """Tokens per second and time to the first token, by scenario and server."""
    scenarios = list(dict.fromkeys(each.scenario for each in figures))
    servers = list(dict.fromkeys(each.server for each in figures))
    found = {(each.server, each.scenario): each for each in figures}

    def values(read: Callable[[Figures], float]) -> list[list[float]]:
        return [
            [read(found[s, name]) if (s, name) in found else 0.0 for name in scenarios]
            for s in servers
        ]

    figure, (rate, first) = _page([len(figures)] * 2)
    colours = [OURS, THEIRS]
    _bars(rate, scenarios, values(lambda each: each.rate), colours, "{:.0f}", servers)
    _title(rate, "Through HTTP", "tokens per second")
    medians = values(lambda each: 1000 * each.first_token[0])
    _bars(first, scenarios, medians, colours, "{:.0f}", servers)
    _title(first, "", "ms to the first token, median")
    _write(figure, file)


def drafting_plot(report: DraftingReport, file: Path) -> None:
    """Acceptance by domain, and speed by batch."""
    figure, (acceptance, speed) = _page([len(report.acceptance), 2 * len(report.speed)])
    labels = [f"{one.domain}, temperature {one.temperature:g}" for one in report.acceptance]
    shares = [100 * one.accepted for one in report.acceptance]
    _bars(acceptance, labels, [shares], [OURS], "{:.0f} %")
    _title(acceptance, "MTP drafts", "accepted, in percent of one draft per step")
    ratios = [[row.with_draft for row in report.speed], [row.gate for row in report.speed]]
    batches = [f"batch {row.batch}" for row in report.speed]
    _bars(speed, batches, ratios, [THEIRS, OURS], "{:.2f}×", ["--mtp 1", "--mtp auto"])
    speed.axvline(1, color=GOAL)
    _title(speed, "", "times the speed of --mtp off")
    _write(figure, file)


def _page(bars: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """A figure with one part above the other, each as high as its bars need."""
    # Not by pyplot, which would look for a screen.
    from matplotlib.figure import Figure  # noqa: PLC0415

    heights = [BAR * count + 0.9 for count in bars]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    column = figure.subplots(len(bars), 1, height_ratios=heights, squeeze=False)[:, 0]
    return figure, list(column)


def _bars(
    axes: Axes,
    labels: Sequence[str],
    groups: Sequence[Sequence[float]],
    colours: Sequence[str],
    spelt: str,
    names: Sequence[str] = (),
) -> None:
    """Horizontal bars, first label on top; each group is one bar beside the others of a label."""
    thickness = 0.8 / len(groups)
    for number, (values, colour) in enumerate(zip(groups, colours, strict=False)):
        places = [
            place + (number - (len(groups) - 1) / 2) * thickness for place in range(len(labels))
        ]
        name = names[number] if names else None
        drawn = axes.barh(places, values, thickness, color=colour, label=name)
        axes.bar_label(drawn, [spelt.format(value) for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    if names:
        axes.legend(frameon=False, fontsize=8)


def _title(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel(unit)


def _write(figure: Figure, file: Path) -> None:
    figure.savefig(file, dpi=DOTS)
