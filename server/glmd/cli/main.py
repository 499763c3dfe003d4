"""The `glmd` command: one module per subcommand."""

from __future__ import annotations

import sys
from typing import Annotated

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
from glmd.cli.serve import serve
from glmd.cli.service import app as service_app
from glmd.errors import GlmdError

app = typer.Typer(
    name="glmd",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (serve, chat, pull, connect, convert, inspect, evaluate, doctor):
    app.command()(command)
app.command("list")(list_models)
app.command()(remove)
app.add_typer(bench_app, name="bench")
app.add_typer(config_app, name="config")
app.add_typer(key_app, name="key")
app.add_typer(service_app, name="service")


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"glmd {__version__}")
        raise typer.Exit


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
