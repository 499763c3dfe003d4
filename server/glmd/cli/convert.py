"""`glmd convert` and `glmd inspect`: convert checkpoints, print components."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
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

from glmd.cli.recipe import explain
from glmd.convert.inspect import Inspection
from glmd.convert.inspect import inspect as run
from glmd.convert.recipes import DEFAULT_RECIPE, RECIPES, Line, find_recipe, total
from glmd.utils.files import check_new
from glmd.utils.text import gb, gib

KV_BITS: dict[str, Literal["auto", 16, 8, 4]] = {"auto": "auto", "16": 16, "8": 8, "4": 4}
"""Values of `--kv-bits`, and what each is in the engine's configuration."""


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
        typer.Option(
            "--mtp-only",
            help="Only add the MTP layer of SRC to OUT; downloads only the files that hold it.",
        ),
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

    from glmd.checkpoint.hub import resolve_model, resolve_mtp
    from glmd.convert.add_mtp import add_mtp, check_target
    from glmd.convert.convert import convert as run

    if mtp_only:
        folder = resolve_mtp(source, lambda config: check_target(out, config, source))
    else:
        folder = resolve_model(source)

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
    memory: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="GB", help="Print what fits a Mac with so much memory instead."
        ),
    ] = None,
    kv_bits: Annotated[
        str, typer.Option(help="With --memory: the setting kv_bits: auto, 16, 8 or 4.")
    ] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, or write it to FILE.")
    ] = False,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="With --json: the file to write.")
    ] = None,
) -> None:
    """Print the parameters, bits and bytes of a model, computed from its shapes.

    For a folder with weights, also compare the size of the files with config.json.

    Examples:

        glmd inspect zai-org/GLM-4.7-Flash --recipe mixed-8-5

        glmd inspect zai-org/GLM-4.7-Flash --memory 32 --kv-bits 8 --json fit.json
    """
    from glmd.checkpoint.hub import resolve_config

    if file is not None and not as_json:
        raise typer.BadParameter("FILE: nothing is written there without --json.")
    path = resolve_config(model)
    found = run(path, recipe)
    result: dict[str, Any]
    if memory is not None:
        result = _fit(path, found, memory, kv_bits)
    elif kv_bits != "auto":
        raise typer.BadParameter("--kv-bits: needs --memory.")
    else:
        result = _for_machines(model, found)
    if as_json:
        text = json.dumps(result, indent=2)
        if file is None:
            typer.echo(text)
        else:
            file.write_text(text + "\n", encoding="utf-8")
        return
    if memory is not None:
        typer.echo(_describe_fit(result))
        return
    console = Console()
    # The widths of the tables of the full model.
    console.width = max(console.width, 80 if found.search is None else 100)
    by = f"by {found.recipe}" if found.recipe else "as stored"
    console.print(_table(f"{model}, {by}", found))
    for sentence in _comparison(found):
        console.print(sentence, soft_wrap=True, highlight=False)
    if found.search is not None:
        console.print("\nBits by measured KL (docs/quality.md):", highlight=False)
        explain(found.search, console)


def _fit(path: Path, found: Inspection, memory: int, kv_bits: str) -> dict[str, Any]:
    """Plan memory as the engine does on a Mac of `memory` GB.

    Raises:
        CheckpointError: the model does not fit.
        BadParameter: `kv_bits` is no value of the setting.
    """
    from glmd.checkpoint.config import load_config
    from glmd.engine.config import EngineConfig
    from glmd.engine.memory import plan_memory, recommended_working_set

    if kv_bits not in KV_BITS:
        raise typer.BadParameter(f"--kv-bits: must be one of {', '.join(KV_BITS)}.")
    budget = recommended_working_set(memory)
    plan = plan_memory(
        path,
        load_config(path),
        EngineConfig(kv_bits=KV_BITS[kv_bits]),
        budget,
        weights=found.main.nbytes,
        mtp_weights=found.mtp.nbytes if found.mtp else 0,
        item=2,
    )
    return {
        "memory_gb": memory,
        "budget_bytes": budget,
        "recipe": found.recipe,
        "weight_bytes": plan.weights,
        "working_bytes": plan.activations,
        "max_step_tokens": plan.config.max_step_tokens,
        "kv_bits": plan.kv_bits,
        "kv_bytes_per_token": plan.token_bytes,
        "kv_tokens": plan.kv_tokens,
        "mtp": "none" if found.mtp is None else "loaded" if plan.config.mtp else "left out",
    }


def _describe_fit(fit: dict[str, Any]) -> str:
    """Lines of text about the result of `_fit`."""
    mtp = {
        "none": "the model has no MTP layer",
        "loaded": "with the MTP layer",
        "left out": "without the MTP layer: memory is short",
    }
    return "\n".join(
        [
            f"A Mac with {fit['memory_gb']} GB recommends {gib(fit['budget_bytes'])} GiB"
            " for the GPU:",
            f"  weights         {gib(fit['weight_bytes'])} GiB, {mtp[fit['mtp']]}",
            f"  working memory  {gib(fit['working_bytes'])} GiB, for chunks of"
            f" {fit['max_step_tokens']} tokens",
            f"  KV              {fit['kv_tokens']:,} tokens of {fit['kv_bytes_per_token']:,} bytes"
            f" ({fit['kv_bits']} bit)",
        ]
    )


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
        "search": msgspec.to_builtins(found.search),
    }
