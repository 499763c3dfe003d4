"""`glmd key`: API keys that `glmd serve` asks for."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    help="Make, list and revoke the API keys that `glmd serve` asks for.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(help="Whose key it is, such as laptop.", show_default=False)]


@app.command()
def create(name: Name) -> None:
    """Make a random key and print it, this once: only its hash is kept.

    A running server takes it at once, and asks for a key from then on.
    """
    from glmd.api.auth import create_key, default_store

    key = create_key(default_store(), name)
    typer.echo("It is shown this once. Clients send it as their API key.", err=True)
    typer.echo(key)


@app.command("list")
def list_keys() -> None:
    """List the keys by name, with when they were made."""
    from glmd.api.auth import default_store, read_store

    for key in read_store(default_store()):
        typer.echo(f"{key.name}  {key.created}")


@app.command()
def revoke(name: Name) -> None:
    """Forget a key. A running server refuses it at once."""
    from glmd.api.auth import default_store, revoke_key

    if not revoke_key(default_store(), name):
        typer.echo(
            "That was the last one: a server that runs lets nobody in by these keys any more; one"
            " that starts anew on loopback asks for none.",
            err=True,
        )
    typer.echo(f"Revoked: {name}")
