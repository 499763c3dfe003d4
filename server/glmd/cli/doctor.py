"""`glmd doctor`: whether this machine can serve."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from glmd.cli.doctor_checks import Finding

STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder or Hugging Face repo id; none: what the settings say.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="As for serve.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="As for serve.", show_default=False)] = None,
    config: Annotated[
        Path | None, typer.Option(help="Configuration file, TOML.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at this machine as `glmd serve` would find it, and say what to do where it must change.

    Exit code 1 if something keeps glmd from serving.
    """
    from glmd.cli.doctor_checks import examine, worst

    findings = examine({"model": model, "host": host, "port": port}, config)
    verdict = worst(findings)
    if as_json:
        listed = [dataclasses.asdict(finding) for finding in findings]
        typer.echo(json.dumps({"verdict": verdict, "findings": listed}, indent=2))
    else:
        Console().print(_table(findings))
    if verdict == "problem":
        raise typer.Exit(1)


def _table(findings: list[Finding]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        said = Text(finding.found)
        if finding.advice:
            said.append(f"\n→ {finding.advice}", style=STYLES[finding.verdict])
        table.add_row(Text(finding.verdict, style=STYLES[finding.verdict]), finding.name, said)
    return table
