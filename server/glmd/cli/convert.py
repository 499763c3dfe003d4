"""`glmd convert` and `glmd inspect`: convert checkpoints, and print their components."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from glmd.convert.inspect import Inspection
from glmd.convert.inspect import inspect as run
from glmd.convert.recipes import DEFAULT_RECIPE, RECIPES, Line, find_recipe, total
from glmd.utils.files import check_new
from glmd.utils.text import gb, gib


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="BF16 checkpoint: a folder or a Hugging Face repo id."),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="New folder; with --mtp-only, the MLX folder to add the MTP layer to.",
        ),
    ],
    recipe: Annotated[
        str,
        typer.Option(
            help=f"Quantisation recipe: {', '.join(RECIPES)}, or a file of glmd recipe search."
        ),
    ] = DEFAULT_RECIPE,
    no_mtp: Annotated[
        bool, typer.Option("--no-mtp", help="Leave out the multi-token-prediction layer.")
    ] = False,
    mtp_only: Annotated[
        bool,
        typer.Option("--mtp-only", help="Only add the MTP layer of SRC to OUT."),
    ] = False,
) -> None:
    """Convert a BF16 checkpoint to quantised MLX files.

    Needs less than 3 GB of memory for any model size. OUT is created when it is complete; after an
    interruption, run the command again.

    Example: glmd convert zai-org/GLM-4.7-Flash ./GLM-4.7-Flash-mixed-8-5
    """
    if no_mtp and mtp_only:
        raise typer.BadParameter("--no-mtp and --mtp-only cannot be combined.")
    # Report errors before 62 GB are downloaded and mlx is imported.
    chosen = find_recipe(recipe)
    out = out.expanduser()
    if not mtp_only:
        check_new(out)

    from glmd.checkpoint.hub import resolve_model

    folder = resolve_model(source)

    from glmd.convert.convert import add_mtp
    from glmd.convert.convert import convert as run

    with _bar() as bar:
        task = bar.add_task("", total=None, visible=False)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        if mtp_only:
            done = add_mtp(folder, out, chosen, progress=advance)
        else:
            name = None if Path(source).expanduser().is_dir() else source
            done = run(folder, out, chosen, mtp=not no_mtp, name=name, progress=advance)
    for note in done.notes:
        typer.echo(f"Note: {note}", err=True)
    written = total(done.plan.main + done.plan.mtp, "")
    what = "MTP layer added, " if mtp_only else ""
    typer.echo(
        f"{out}: {what}{gb(written.nbytes)} GB ({gib(written.nbytes)} GiB),"
        f" {written.bits_per_weight:.3f} bits per weight."
    )


def _bar() -> Progress:
    """Create a progress bar on stderr: bytes written, speed, remaining time."""
    return Progress(
        TextColumn("Converting"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def inspect(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Folder, config.json or Hugging Face repo id."),
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            help=f"Recipe to plan for an unquantised model: {', '.join(RECIPES)}."
            f" Default: {DEFAULT_RECIPE}.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the parameters, bits and bytes of a model, computed from its shapes.

    For a folder with weights, also compare the size of the files with config.json.

    Example: glmd inspect zai-org/GLM-4.7-Flash --recipe mixed-8-5
    """
    from glmd.checkpoint.hub import resolve_config

    found = run(resolve_config(model), recipe)
    if as_json:
        typer.echo(json.dumps(_for_machines(model, found), indent=2))
        return
    console = Console()
    console.width = max(console.width, 80)  # the width of the table of the full model
    by = f"by {found.recipe}" if found.recipe else "as stored"
    console.print(_table(f"{model}, {by}", found))
    for sentence in _comparison(found):
        console.print(sentence, soft_wrap=True, highlight=False)


def _table(title: str, found: Inspection) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )
    for name in ("Component", "Bits"):
        table.add_column(name, no_wrap=True)
    for name in ("Parameters", "Bytes", "GiB", "Bits per\nweight"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in found.components:
        table.add_row(*_cells(line, line.bits))
    table.add_section()
    table.add_row(*_cells(found.main, ""), style="bold")
    for extra in (found.mtp, found.mtp_vocabulary):
        if extra is not None:
            table.add_row(*_cells(extra, ""))
    return table


def _cells(line: Line, bits: str) -> tuple[str, ...]:
    return (
        line.component,
        bits,
        f"{line.parameters:,}",
        f"{line.nbytes:,}",
        gib(line.nbytes),
        f"{line.bits_per_weight:.3f}",
    )


def _comparison(found: Inspection) -> list[str]:
    sentences = list(found.stored.warnings) if found.stored is not None else []
    if found.mtp is None:
        why = found.stored.no_drafts if found.stored else None
        sentences.append(why or "There is no MTP layer.")
    if found.mtp_vocabulary is not None:
        sentences.append(
            "The MTP vocabulary (embedding and head) is stored only if it differs from that of the"
            " main model."
        )
    if found.stored is not None:
        files = found.stored
        sentences.append(_compare("The main model's files", files.main_bytes, files.main_planned))
        if files.mtp_bytes:
            sentences.append(_compare("The MTP layer's", files.mtp_bytes, files.mtp_planned))
    return sentences


def _compare(subject: str, real: int, planned: int) -> str:
    if real == planned:
        return f"{subject} hold {real:,} bytes of arrays, exactly what config.json implies."
    return f"{subject} hold {real:,} bytes of arrays, where config.json implies {planned:,}."


def _for_machines(model: str, found: Inspection) -> dict[str, Any]:
    def line(value: Line | None) -> dict[str, Any] | None:
        if value is None:
            return None
        return {
            "component": value.component,
            "bits": value.bits,
            "parameters": value.parameters,
            "bytes": value.nbytes,
            "bits_per_weight": value.bits_per_weight,
        }

    return {
        "model": model,
        "recipe": found.recipe,
        "components": [line(value) for value in found.components],
        "main": line(found.main),
        "mtp": line(found.mtp),
        "mtp_vocabulary": line(found.mtp_vocabulary),
        "stored": dataclasses.asdict(found.stored) if found.stored else None,
    }
