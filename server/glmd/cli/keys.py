"""`glmd key`: manage the API keys of the server."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Create, list and revoke API keys of the server.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of the key, such as laptop.", show_default=False)]


@app.command()
def create(
    name: Name,
    admin: Annotated[
        bool, typer.Option("--admin", help="See and cancel the requests of all keys.")
    ] = False,
) -> None:
    """Create a random API key and print it. Only its hash is stored.

    A running server accepts the key at once, and requires a key from then on.

    Example: glmd key create laptop
    """
    from glmd.api.auth import create_key, default_store, read_store

    key = create_key(default_store(), name, admin=admin)
    if len(read_store(default_store())) == 1:
        typer.echo(
            "This is the first key. Servers that run without one require it from now on, also"
            " after it is revoked, until they are restarted.",
            err=True,
        )
    typer.echo("Copy the key now; it is not shown again.", err=True)
    typer.echo(key)


@app.command("list")
def list_keys() -> None:
    """List the names of the keys and when they were created.

    Example: glmd key list
    """
    from glmd.api.auth import default_store, read_store

    for key in read_store(default_store()):
        typer.echo(f"{key.name}  {key.created}{'  admin' if key.admin else ''}")


@app.command()
def revoke(name: Name) -> None:
    """Revoke a key; a running server rejects it at once.

    Example: glmd key revoke laptop
    """
    from glmd.api.auth import default_store, revoke_key

    if not revoke_key(default_store(), name):
        typer.echo(
            "This was the last key. Running servers refuse all requests until a key is created or"
            " they are restarted. A server that is started on a loopback address from now on needs"
            " no key.",
            err=True,
        )
    typer.echo(f"Revoked: {name}")
