"""`glmd bench`: measure glmd next to mlx-lm on this machine."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from glmd.utils.mlx_environment import prepare_mlx

app = typer.Typer(
    help="Measure glmd next to mlx-lm on this machine, or simulate Macs. See docs/benchmarks.md.",
    no_args_is_help=True,
)

Model = Annotated[
    str | None,
    typer.Option(
        help="Checkpoint folder, `demo` for the bundled demo, or `deep` for 24 small layers of"
        " random weights. Default: a mid-size model of random weights."
    ),
]
Scale = Annotated[
    float, typer.Option(min=0.01, help="Factor on the lengths of all prompts, for example 0.25.")
]
Repeat = Annotated[int, typer.Option(min=1, help="Runs on each side; medians are shown.")]
Only = Annotated[str, typer.Option(help="Run only rows whose name contains this text.")]
Plot = Annotated[
    Path | None, typer.Option("--plot", help="Plot the results to this file, .svg or .png.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")]


@app.callback()
def prepare() -> None:
    """Measure as the engine process runs: benchmarks load MLX in this process."""
    prepare_mlx()


def checkpoint_folder(model: str | None, *, mtp: bool = False) -> Path:
    """Return the folder of `--model`.

    Args:
        mtp: random weights have an MTP layer.
    """
    from glmd.bench.random_checkpoint import middle_checkpoint
    from glmd.checkpoint.hub import DEMO

    if model is None or model == "deep":
        return middle_checkpoint(mtp=mtp, deep=model == "deep")
    return DEMO if model == "demo" else Path(model).expanduser()


@app.command()
def engine(
    model: Model = None,
    scale: Scale = 1.0,
    repeat: Repeat = 3,
    only: Only = "",
    no_mtp: Annotated[
        bool, typer.Option("--no-mtp", help="Load no MTP layer; mlx-lm has none.")
    ] = False,
    against: Annotated[
        Literal["mlx-lm", "mtp-off"],
        typer.Option(
            help="The other side. `mtp-off`: compare `--mtp auto` with `--mtp off`; random weights"
            " then have an MTP layer whose drafts are all accepted."
        ),
    ] = "mlx-lm",
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """Measure the engine without HTTP, against mlx-lm's BatchGenerator in one process.

    Example: glmd bench engine --model ./GLM-4.7-Flash-mixed-8-5 --repeat 5 --plot engine.svg
    """
    from glmd.bench import report
    from glmd.bench.engine import bench_engine
    from glmd.errors import SettingsError

    if no_mtp and against == "mtp-off":
        raise SettingsError("--no-mtp: cannot be compared with mtp-off. Leave one of both out.")
    report.require_plot(plot)
    folder = checkpoint_folder(model, mtp=against == "mtp-off")
    with report.progress() as on_progress:
        result = bench_engine(
            folder,
            scale=scale,
            repeat=repeat,
            only=only,
            mtp=not no_mtp,
            against=against,
            on_progress=on_progress,
        )
    report.console().print(report.engine_table(result))
    if plot is not None:
        report.engine_plot(result, plot)
    if json_file is not None:
        report.write_json(json_file, result, folder, scale, repeat)


@app.command()
def serve(
    model: Model = None,
    scale: Scale = 1.0,
    repeat: Repeat = 3,
    only: Only = "",
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="mlx_lm|URL|COMMAND",
            help="Another server with OpenAI's API: `mlx_lm` (the default), the URL of one that"
            " runs and has loaded the checkpoint, or a command that starts one, in which {model}"
            " and {port} are replaced. Several are given by several options.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Length of an answer of the uniform streams.")
    ] = 64,
    one_at_a_time: Annotated[
        bool,
        typer.Option(
            "--one-at-a-time",
            help="Run one server after the other, where memory does not hold them together.",
        ),
    ] = False,
    json_file: Json = None,
    plot: Plot = None,
) -> None:
    """Measure through HTTP, against other servers that are up at the same time.

    Example: glmd bench serve --model demo --against http://127.0.0.1:8080 --json serve.json
    """
    from glmd.bench import report
    from glmd.bench.http import bench_serving
    from glmd.bench.http_client import parse_servers

    report.require_plot(plot)
    others = parse_servers(against or ["mlx_lm"])
    folder = checkpoint_folder(model)
    log = Path(tempfile.gettempdir()) / "glmd-bench-serve.log"
    with report.progress() as on_progress:
        result = bench_serving(
            folder,
            others,
            scale=scale,
            max_tokens=max_tokens,
            repeat=repeat,
            only=only,
            one_at_a_time=one_at_a_time,
            log=log,
            on_progress=on_progress,
        )
    console = report.console()
    console.print(report.serving_table(result.figures), report.checks_table(result.checks))
    for figures in result.figures:
        for error in figures.errors:
            console.print(f"{figures.server}, {figures.scenario}: {error}", markup=False)
    if plot is not None:
        report.serving_plot(result.figures, plot)
    if json_file is not None:
        report.write_json(json_file, result, folder, scale, repeat)


@app.command()
def simulate(
    device: Annotated[
        Path | None,
        typer.Option(
            help='JSON file of a device, for example {"name": "M2 Ultra", "bandwidth_gb": 640,'
            ' "row_ms": 0.9, "memory_gib": 144}. Default: four Macs.'
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Measure steps of --model on this machine, and write the device that fits them to"
            " this file, for --device. Simulates nothing."
        ),
    ] = None,
    mla_kernel: Annotated[
        bool | None,
        typer.Option(
            help="Decode attention by the MLA kernel, as after a passed trial. Default: yes."
        ),
    ] = None,
    experts_kernel: Annotated[
        bool | None,
        typer.Option(help="Experts of up to 63 rows by their kernels, likewise. Default: yes."),
    ] = None,
    model: Model = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="Divide the model among so many such Macs, with --link.")
    ] = 1,
    link: Annotated[
        str | None,
        typer.Option(
            help="Link between ranks: thunderbolt, 10gbe, or a JSON file, for example"
            ' {"name": "40 Gb Ethernet", "latency_us": 100, "bandwidth_gb": 4}.'
        ),
    ] = None,
    only: Only = "",
    json_file: Json = None,
) -> None:
    """Simulate scheduling on Apple GPUs; needs no GPU and no weights but with --calibrate.

    Example: glmd bench simulate --json steps.json
    """
    from glmd.bench import report
    from glmd.bench.device_model import DEVICES, Ranks, load_device, load_link
    from glmd.bench.ranks import RanksRow, ranks_table, simulate_ranks
    from glmd.bench.simulate import SimulationRow, simulate, simulation_table
    from glmd.errors import SettingsError

    if calibrate is not None and device is not None:
        raise SettingsError("--device: is measured by --calibrate. Leave one of both out.")
    if (ranks > 1) != (link is not None):
        raise SettingsError("--ranks, --link: give both, or none.")
    if ranks not in (1, 2, 4):
        raise SettingsError(f"--ranks: GLM-4.7-Flash cannot be divided among {ranks}. Use 2 or 4.")
    kernels_chosen = mla_kernel is not None or experts_kernel is not None
    if ranks > 1 and (only or kernels_chosen or calibrate is not None):
        raise SettingsError("--ranks: has no scenarios and measures nothing. Leave the rest out.")
    if calibrate is not None and (only or kernels_chosen):
        raise SettingsError("--calibrate: simulates nothing. Leave all but --model out.")
    if model is not None and calibrate is None:
        raise SettingsError("--model: only --calibrate runs a model. Add --calibrate FILE.")
    if calibrate is not None:
        from glmd.bench import calibrate as calibration

        with report.progress() as on_progress:
            found = calibration.calibrate(checkpoint_folder(model), on_progress)
        calibrate.write_bytes(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
        typer.echo(calibrate.read_text(encoding="utf-8"), nl=False)
        return
    devices = DEVICES if device is None else (load_device(device),)
    rows: Sequence[SimulationRow | RanksRow]
    with report.progress() as on_progress:
        if link is not None:
            rows = compared = simulate_ranks(devices, Ranks(ranks, load_link(link)), on_progress)
            table = ranks_table(compared)
        else:
            rows = simulated = simulate(
                devices,
                on_progress,
                only=only,
                mla_kernel=mla_kernel is not False,
                experts_kernel=experts_kernel is not False,
            )
            table = simulation_table(simulated)
    report.console().print(table)
    if json_file is not None:
        text = json.dumps([asdict(row) for row in rows], indent=2, allow_nan=False)
        json_file.write_text(text + "\n", encoding="utf-8")


@app.command("report")
def report_machine(
    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint folder, repo id or short name. Default: the model of the settings,"
            " else what `glmd serve` serves by default."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Markdown file to write.")] = Path(
        "glmd-report.md"
    ),
    scale: Scale = 1.0,
    repeat: Repeat = 2,
) -> None:
    """Measure this machine and model in about three minutes, for an issue or for yourself.

    Stop a running server first: both would hold the weights in memory.

    Example: glmd bench report --out report.md
    """
    from glmd.bench import report
    from glmd.bench.user_report import markdown, measure
    from glmd.cli.serve import find_model
    from glmd.config_sources import load

    name, folder = find_model(load({"model": model}))
    with report.progress() as on_progress:
        lines = measure(folder, scale=scale, repeat=repeat, on_progress=on_progress)
    text = markdown(folder, lines, name)
    out.write_text(text, encoding="utf-8")
    typer.echo(f"{text}\nWritten to {out}. Paste it into an issue to share it.")


@app.command()
def kernels(only: Only = "", json_file: Json = None) -> None:
    """Count the kernels of a layer, against mlx-lm's; needs no GPU and no weights.

    Example: glmd bench kernels --json kernels.json
    """
    from glmd.bench import report
    from glmd.bench.graph import count_layers, kernels_table

    with report.progress() as on_progress:
        rows = count_layers(on_progress, only=only)
    report.console().print(kernels_table(rows))
    if json_file is not None:
        text = json.dumps([asdict(row) for row in rows], indent=2)
        json_file.write_text(text + "\n", encoding="utf-8")
