"""`glmd bench`: measure glmd on this machine, against mlx-lm and against itself."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    help="Measure glmd on this machine; see docs/benchmarks.md.",
    no_args_is_help=True,
)

WIDTH = 140

Model = Annotated[
    Path | None,
    typer.Option(help="A checkpoint's folder. Default: random weights of a middling size."),
]
Scale = Annotated[float, typer.Option(min=0.01, help="Factor on the lengths of all prompts.")]
Repeat = Annotated[int, typer.Option(min=1, help="Runs of everything on each side.")]
Only = Annotated[str, typer.Option(help="Only what has this in its name.")]
Plot = Annotated[
    Path | None, typer.Option("--plot", help="Draw the results into this file, .svg or .png.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file, too.")]


@app.command()
def engine(
    model: Model = None,
    scale: Scale = 1.0,
    repeat: Repeat = 3,
    only: Only = "",
    no_mtp: Annotated[
        bool, typer.Option("--no-mtp", help="Load no MTP layer; mlx-lm's side has none.")
    ] = False,
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """The engine alone, against mlx-lm's BatchGenerator, in one process."""
    from glmd.bench.checkpoints import middle_checkpoint
    from glmd.bench.engine import bench_engine
    from glmd.bench.environment import environment
    from glmd.bench.plot import engine_plot, require_plot
    from glmd.bench.report import engine_table

    if plot is not None:
        require_plot(plot)
    folder = model or middle_checkpoint()
    with _progress() as on_progress:
        report = bench_engine(
            folder,
            scale=scale,
            repeat=repeat,
            only=only,
            mtp=not no_mtp,
            on_progress=on_progress,
        )
    _console().print(engine_table(report))
    if plot is not None:
        engine_plot(report, plot)
    if json_file is not None:
        _write(json_file, {**environment(folder, scale, repeat), **asdict(report)})


@app.command()
def serve(
    model: Model = None,
    scale: Scale = 1.0,
    repeat: Repeat = 3,
    only: Only = "",
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """Through HTTP, against mlx_lm.server, one server after the other."""
    from glmd.bench.checkpoints import middle_checkpoint
    from glmd.bench.environment import environment
    from glmd.bench.plot import require_plot, serving_plot
    from glmd.bench.report import checks_table, serving_table
    from glmd.bench.serving import bench_serving

    if plot is not None:
        require_plot(plot)
    folder = model or middle_checkpoint()
    log = Path(tempfile.gettempdir()) / "glmd-bench-serve.log"
    with _progress() as on_progress:
        report = bench_serving(
            folder, scale=scale, repeat=repeat, only=only, log=log, on_progress=on_progress
        )
    console = _console()
    console.print(serving_table(report.figures))
    console.print(checks_table(report.checks))
    for figures in report.figures:
        for error in figures.errors:
            console.print(f"{figures.server}, {figures.scenario}: {error}", markup=False)
    if plot is not None:
        serving_plot(report.figures, plot)
    if json_file is not None:
        _write(json_file, {**environment(folder, scale, repeat), **asdict(report)})


@app.command()
def mtp(
    model: Annotated[
        Path | None,
        typer.Option(help="A checkpoint's folder, with an MTP layer. Default: the demo."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Conversations per domain.")] = 24,
    repeat: Repeat = 5,
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """What the MTP layer's drafts give and cost, against the same engine without them."""
    from glmd.bench.drafting import bench_drafting
    from glmd.bench.environment import environment
    from glmd.bench.plot import drafting_plot, require_plot
    from glmd.bench.report import drafting_tables
    from glmd.checkpoint.hub import DEMO

    if plot is not None:
        require_plot(plot)
    folder = model or DEMO
    with Console(stderr=True).status("Drafting"):
        report = bench_drafting(folder, prompts=prompts, repeat=repeat)
    console = _console()
    for table in drafting_tables(report):
        console.print(table)
    console.print(
        f"KV per token: {report.kv_bytes_per_token} bytes, and {report.mtp_kv_bytes_per_token}"
        " for the MTP layer"
    )
    if plot is not None:
        drafting_plot(report, plot)
    if json_file is not None:
        _write(json_file, {**environment(folder, 1.0, repeat), **asdict(report)})


@app.command()
def grammar(
    model: Model = None,
    scale: Scale = 1.0,
    repeat: Repeat = 5,
    only: Only = "",
    json_file: Json = None,
) -> None:
    """What forms cost: 16 rows with and without one, and compiling an agent's tools."""
    from glmd.bench.checkpoints import middle_checkpoint
    from glmd.bench.environment import environment
    from glmd.bench.grammar import bench_grammar
    from glmd.bench.report import compiling_table, grammar_table

    folder = model or middle_checkpoint()
    with _progress() as on_progress:
        report = bench_grammar(
            folder, scale=scale, repeat=repeat, only=only, on_progress=on_progress
        )
    console = _console()
    console.print(grammar_table(report))
    console.print(compiling_table(report.compiling))
    if json_file is not None:
        _write(json_file, {**environment(folder, scale, repeat), **asdict(report)})


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows what is being done: in one changing line, or line by line where that cannot be."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
    else:
        yield console.print


def _console() -> Console:
    """Tables in a file or a pipe are not broken at 80 columns."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def _write(file: Path, report: dict[str, Any]) -> None:
    file.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
