"""How measurements are shown: tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from glmd.bench.compiling import CompileTimes
from mtp import DraftingReport
from glmd.bench.engine import Report, Row
from glmd.bench.grammar import TARGET, GrammarReport
from glmd.bench.serving import PERCENTILES, Check, Figures


def engine_table(report: Report) -> Table:
    """One line per goal."""
    table = Table(title="glmd against mlx-lm's BatchGenerator, medians")
    for column in ("workload", "measured"):
        table.add_column(column)
    for column in ("glmd", "mlx-lm", "better by", "target", ""):
        table.add_column(column, justify="right")
    last = None
    for row in report.rows:
        table.add_row(
            row.workload if row.workload != last else "",
            f"{row.goal}, {row.unit}" if row.unit else row.goal,
            number(row.glmd),
            number(row.mlx_lm),
            f"{number(row.advantage)}×" if row.advantage else "",
            _target(row),
            _verdict(row.met) if row.ratio or row.bound else "",
        )
        last = row.workload
    return table


def serving_table(figures: Sequence[Figures]) -> Table:
    """One line per scenario and server."""
    at = "/".join(str(p) for p in PERCENTILES)
    table = Table(title=f"Through HTTP; times in ms at the {at}th percentiles")
    table.add_column("scenario")
    table.add_column("server")
    for column in ("tokens/s", "first token", "between tokens", "computed", "least", "failed"):
        table.add_column(column, justify="right")
    last = None
    for row in figures:
        table.add_row(
            row.scenario if row.scenario != last else "",
            row.server,
            number(row.rate),
            _milliseconds(row.first_token),
            _milliseconds(row.between_tokens),
            str(row.computed),
            str(row.least),
            f"{row.failed} of {row.requests}",
        )
        last = row.scenario
    return table


def drafting_tables(report: DraftingReport) -> list[Table]:
    """Acceptance by domain, and speed by batch."""
    acceptance = Table(title="MTP drafts, one per step")
    for column in ("domain", "temperature", "drafted", "accepted", "tokens per forward pass"):
        acceptance.add_column(column, justify="left" if column == "domain" else "right")
    for one in report.acceptance:
        acceptance.add_row(
            one.domain,
            number(one.temperature),
            str(one.drafted),
            f"{one.accepted:.0%}",
            f"{one.tokens_per_step:.2f}",
        )
    speed = Table(title="Speed against --mtp off, medians")
    for column in ("batch", "--mtp 1", "--mtp auto", "rows that auto drafted for"):
        speed.add_column(column, justify="right")
    for row in report.speed:
        ratios = f"{row.with_draft:.2f}×", f"{row.gate:.2f}×"
        speed.add_row(str(row.batch), *ratios, f"{row.gate_drafts:.0%}")
    return [acceptance, speed]


def grammar_table(report: GrammarReport) -> Table:
    """One line per form."""
    table = Table(title=f"{report.rows} rows with and without a form, medians")
    table.add_column("form")
    for column in (
        "tokens/s without", "with", "ratio", "target", "", "ms per step without", "with",
        "of which masks",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for row in report.forms:
        table.add_row(
            row.form,
            number(row.free),
            number(row.held),
            f"{row.ratio:.3f}×",
            f"≥ {TARGET:g}×",
            _verdict(row.met),
            *(number(1000 * seconds) for seconds in (row.free_step, row.held_step, row.masks)),
        )
    return table


def compiling_table(times: CompileTimes) -> Table:
    """Where a form is compiled, the first time and again."""
    table = Table(title="Compiling an agent's 20 tools, medians in ms")
    table.add_column("where")
    for column in ("first time", "again"):
        table.add_column(column, justify="right")
    for where, *seconds in (
        ("in the API: checked, in a process of its own", times.check, times.check_again),
        ("in the engine: up to the first mask, in a thread", times.follow, times.follow_again),
    ):
        table.add_row(where, *(number(1000 * each) for each in seconds))
    table.caption = f"The process is started by a server's first form: {times.start:.2f} s."
    return table


def checks_table(checks: Sequence[Check]) -> Table:
    """One line per target of the HTTP benchmark."""
    table = Table(title="Targets")
    table.add_column("what")
    for column in ("value", "target", ""):
        table.add_column(column, justify="right")
    for check in checks:
        table.add_row(check.what, number(check.value), check.target, _verdict(check.met))
    return table


def number(value: float) -> str:
    """Three significant digits, integers whole."""
    if value == int(value):
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _milliseconds(seconds: Sequence[float]) -> str:
    return " / ".join(number(1000 * s) for s in seconds)


def _verdict(met: bool) -> str:
    return "[green]met[/]" if met else "[red]missed[/]"


def _target(row: Row) -> str:
    parts = []
    if row.ratio is not None:
        parts.append(f"≥ {row.ratio:g}×")
    if row.bound is not None:
        parts.append(f"{'≥' if row.better == 'higher' else '≤'} {number(row.bound)}")
    return ", ".join(parts)
