"""The `glmd` command: one module per subcommand."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from glmd import __version__
from glmd.cli.bench import app as bench_app
from glmd.cli.chat import chat
from glmd.cli.config import app as config_app
from glmd.cli.connect import connect
from glmd.cli.convert import convert, inspect
from glmd.cli.doctor import doctor
from glmd.cli.evaluate import evaluate
from glmd.cli.keys import app as key_app
from glmd.cli.models import list_models, pull, remove
from glmd.cli.rank import rank
from glmd.cli.recipe import app as recipe_app
from glmd.cli.serve import serve
from glmd.cli.service import app as service_app
from glmd.cli.service import server_status
from glmd.errors import GlmdError

OTHER_NAMES = {
    "run": "chat --model MODEL` or `glmd serve MODEL",
    "start": "service start",
    "stop": "service stop",
    "restart": "service restart",
    "logs": "service logs",
    "ps": "status",
    "ls": "list",
    "models": "list",
    "rm": "remove",
    "delete": "remove",
    "download": "pull",
    "get": "pull",
    "show": "inspect",
    "launch": "connect CLIENT --launch",
    "quantize": "convert",
    "keys": "key",
    "benchmark": "bench",
}
"""Commands of other model servers, and glmd's for the same."""


app = typer.Typer(
    name="glmd",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (serve, chat, pull, connect, convert, inspect, evaluate, doctor, rank):
    app.command()(command)
app.command("list")(list_models)
app.command()(remove)
app.command("status")(server_status)
app.add_typer(bench_app, name="bench")
app.add_typer(config_app, name="config")
app.add_typer(key_app, name="key")
app.add_typer(recipe_app, name="recipe")
app.add_typer(service_app, name="service")


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"glmd {__version__}")
        raise typer.Exit


def lead_on(name: str) -> None:
    """Register a name of other programs, which fails with glmd's command for the same."""

    def fail(ctx: typer.Context) -> None:
        ctx.fail(f"There is no command {name}. Use `glmd {OTHER_NAMES[name]}`.")

    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(name, hidden=True, context_settings=settings)(fail)


for name in OTHER_NAMES:
    lead_on(name)


@app.command("help", hidden=True)
def show_help(ctx: typer.Context, command: Annotated[str | None, typer.Argument()] = None) -> None:
    """Print the help of glmd or of one command."""
    parent = ctx.parent
    assert parent is not None
    if command is None:
        typer.echo(parent.get_help())
        return
    group: Any = parent.command
    found = group.get_command(parent, command)
    if found is None:
        ctx.fail(f"There is no command {command}.")
    with found.make_context(command, [], parent=parent, resilient_parsing=True) as context:
        typer.echo(found.get_help(context))


@app.command("version", hidden=True)
def show_version() -> None:
    """Print the version."""
    print_version(True)


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Serve GLM-4.7-Flash on this machine. Example: glmd serve --port 8001"""


def main() -> None:
    """Run the command; a `GlmdError` is one line on stderr and exit code 1."""
    try:
        app()
    except GlmdError as error:
        sys.exit(f"glmd: {error.message}")
