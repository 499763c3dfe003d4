"""`glmd convert`: convert a BF16 checkpoint to MLX files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from glmd.convert.recipes import DEFAULT_RECIPE, RECIPES, find_recipe, total
from glmd.utils.files import check_new
from glmd.utils.units import gb, gib


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
        str, typer.Option(help=f"Quantisation recipe: {', '.join(RECIPES)}.")
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

    from glmd.convert.add_mtp import add_mtp
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
