"""`glmd config`: which settings there are, and what each of them is."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from glmd.cli.serve import flags_of, serve

app = typer.Typer(help="Look at the settings, or begin a configuration file.", no_args_is_help=True)

File = Annotated[
    Path | None, typer.Option("--config", help="Configuration file, TOML.", show_default=False)
]


def show(as_json: bool, **given: Any) -> None:
    """Print every setting, and where its value comes from. Takes the flags of `glmd serve`."""
    from glmd.config import load_with_origins
    from glmd.config_sources import show as shown

    loaded = load_with_origins(flags_of(given), given["config"])
    settings = list(shown(loaded))
    if as_json:
        listed = {each.name: dataclasses.asdict(each) for each in settings}
        file = str(loaded.file) if loaded.file else None
        typer.echo(json.dumps({"file": file, "settings": listed}, indent=2))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", style="dim")
    for each in settings:
        value = "" if each.value in (None, [], {}) else written(each.value)
        style = "" if each.origin == "default" else "bold"
        table.add_row(Text(each.name, style), Text(value, style), Text(each.where or "default"))
    Console().print(table)


def written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# `show` takes what `serve` takes, so that no flag can be there and not here.
show.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(
            "as_json",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option("--json", help="Print JSON.")],
        ),
        *(
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(serve, eval_str=True).parameters.values()
        ),
    ]
)
app.command()(show)


@app.command()
def path(config: File = None) -> None:
    """Print the configuration file's path: the one in use, or the one that `init` would write."""
    from glmd.config import default_configs, find_config

    typer.echo(config or find_config() or default_configs()[0])


@app.command()
def init(config: File = None) -> None:
    """Write a configuration file that explains every setting. One that is there is left alone."""
    from glmd.config import default_configs, find_config
    from glmd.config_sources import write_template

    file = config or find_config() or default_configs()[0]
    write_template(file)
    typer.echo(f"Written: {file}")
