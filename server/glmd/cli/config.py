"""`glmd config`: show the settings and their origin, write a configuration file."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from textwrap import wrap
from typing import Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table
from rich.text import Text

from glmd.cli.serve import ConfigOption, flags_of, serve
from glmd.config import Settings
from glmd.config_sources import LoadedSettings, default_configs, find_config, load_with_origins
from glmd.errors import SettingsError

app = typer.Typer(
    help="Show the settings and their origin, or write a configuration file.", no_args_is_help=True
)

WIDTH = 98


def show(as_json: bool, **given: Any) -> None:
    """Print every setting with its value and origin. Takes the flags of `glmd serve`.

    Example: glmd config show --port 8001
    """
    loaded = load_with_origins(flags_of(given), given["config"])
    settings = dict(describe(loaded))
    if as_json:
        file = str(loaded.file) if loaded.file else None
        typer.echo(json.dumps({"file": file, "settings": settings}, indent=2))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", style="dim")
    for name, each in settings.items():
        value = each["value"]
        if value in (None, [], {}):
            value = ""
        elif not isinstance(value, str):
            value = json.dumps(value)
        style = "" if each["where"] is None else "bold"
        table.add_row(Text(name, style), Text(value, style), Text(each["where"] or "default"))
    Console().print(table)


# The parameters of `serve`, so that both commands have the same flags.
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
def path(config: ConfigOption = None) -> None:
    """Print the path of the configuration file in use, or of the file for `init`.

    Example: glmd config path
    """
    typer.echo(config or find_config() or default_configs()[0])


@app.command()
def init(config: ConfigOption = None) -> None:
    """Write a configuration file that lists and explains every setting.

    Fails if the file exists. Example: glmd config init --config ./glmd.toml
    """
    file = config or find_config() or default_configs()[0]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SettingsError(f"{file} exists and was not changed.") from None
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}.") from error
    with os.fdopen(handle, "w", encoding="utf-8") as out:
        out.write(template())
    typer.echo(f"Wrote {file}")


def describe(loaded: LoadedSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each setting's name, and its value, origin and name in its source.

    `value` has JSON's types, with secrets masked; `origin` is "default", "file", "env" or "flag";
    `where` is such as `--port`, None for a default.
    """
    for name in Settings.model_fields:
        where = loaded.origins.get(name)
        if where is None:
            origin = "default"
        elif where.startswith("--"):
            origin = "flag"
        else:
            origin = "file" if ": " in where else "env"
        value = to_json(getattr(loaded.settings, name))
        yield name, {"name": name, "value": value, "origin": origin, "where": where}


def to_json(value: Any) -> Any:
    """Convert a setting's value to JSON's types, with secrets masked."""
    if isinstance(value, ByteSize):
        return format_size(value)
    return TypeAdapter(Any).dump_python(value, mode="json", exclude_defaults=True)


def format_size(size: ByteSize) -> str | int:
    """Format a size for the settings, in the largest unit without a fraction."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return int(size)


def template() -> str:
    """Return a configuration file with every setting commented out, at its default."""
    lines = [
        "# Settings of `glmd serve` with their defaults. Remove the # to change a setting.",
        "# Flags and environment variables (GLMD_PORT) override this file; `glmd config show`",
        "# prints the values in effect. A running server rereads this file on SIGHUP.",
    ]
    fields = dict(Settings.model_fields)
    profiles = fields.pop("profiles")  # tables, which must follow the other settings
    for name, field in fields.items():
        lines += ["", *comment(field), f"#{name} = {default_as_toml(field)}".rstrip()]
    lines += [
        "",
        *comment(profiles),
        "#[profiles.brief]",
        "#temperature = 0.2",
        "#enable_thinking = false",
        '#aliases = ["claude-haiku-*"]',
    ]
    return "\n".join(lines) + "\n"


def comment(field: FieldInfo) -> list[str]:
    return [f"# {line}" for line in wrap(field.description or "", WIDTH - 2)]


def default_as_toml(field: FieldInfo) -> str:
    """Format a default for TOML; None as an empty string."""
    if field.default is None:
        return ""
    if isinstance(field.default, dict):
        pairs = (f"{name} = {json.dumps(value)}" for name, value in field.default.items())
        return f"{{ {', '.join(pairs)} }}"
    return json.dumps(to_json(field.default))  # equal to TOML for the other types of settings
