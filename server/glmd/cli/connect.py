"""`glmd connect`: print or write the settings of a client, or start the client."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import tomlkit
import typer
import yaml

from glmd.api.client_settings import CLIENTS, Client, Endpoint, Setup, describe, dump
from glmd.cli.chat import find_key
from glmd.cli.chat_session import ChatClient
from glmd.cli.daemon import base_url
from glmd.cli.serve import ConfigOption
from glmd.config_sources import load
from glmd.errors import ServerRefused, SettingsError
from glmd.utils.files import atomic_write
from glmd.utils.text import did_you_mean

ALIASES = {
    "claude-code": "claude",
    "qwen-code": "qwen",
    "cn": "continue",
    "openwebui": "open-webui",
}


# -- the command ------------------------------------------------------------------------------


def connect(
    client: Annotated[
        str,
        typer.Argument(
            metavar="CLIENT", help=f"Program: {', '.join(each.name for each in CLIENTS)}."
        ),
    ],
    write: Annotated[
        bool,
        typer.Option(
            "--write", help="Merge the settings into the client's file, and keep a backup of it."
        ),
    ] = False,
    launch: Annotated[
        bool,
        typer.Option(
            "--launch", help="Start the client with these settings. Writes no file if it need not."
        ),
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(
            help="URL of the server. Default: host and port of the settings.", show_default=False
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(help="API key. Default: that of the settings.", show_default=False),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Print the settings that a client needs for the running server, write them, or launch it.

    Address and context length are those of the running server.

    Example: glmd connect claude --launch
    """
    if write and launch:
        raise SettingsError("--write and --launch cannot be combined.")
    chosen = find_client(client)
    settings = load({}, config)
    server = find_endpoint(url or base_url(settings.host, settings.port), key or find_key(settings))
    setup = chosen.setup(server)
    if write:
        typer.echo(write_settings(chosen, setup, Path.home()))
    elif launch:
        launch_client(chosen, setup)
    else:
        typer.echo(describe(setup))


def find_client(name: str) -> Client:
    """Return a client by name.

    Raises:
        SettingsError: there is no such client.
    """
    wanted = ALIASES.get(name.lower(), name.lower())
    for each in CLIENTS:
        if each.name == wanted:
            return each
    names = [each.name for each in CLIENTS]
    raise SettingsError(
        f"CLIENT: {name} is not known{did_you_mean(wanted, names)} Known are {', '.join(names)}."
        " Any other client of OpenAI's or Anthropic's API works too; see docs/clients.md."
    )


def find_endpoint(url: str, key: str | None) -> Endpoint:
    """Ask a running server for its context length.

    Raises:
        ServerRefused: it does not answer, requires another key, or still loads the model.
    """
    with closing(ChatClient(url, key)) as client:
        served = client.models()[0]
    length = served.get("max_model_len")
    if length is None:
        raise ServerRefused(
            f"The server at {url} is still loading the model, so its context length is not known."
            " Try again when it is ready."
        )
    return Endpoint(url.rstrip("/"), key, length)


def write_settings(client: Client, setup: Setup, home: Path) -> str:
    """Write a client's settings; returns a sentence on what was done.

    Raises:
        SettingsError: the client keeps no file, or its file cannot be merged without loss.
    """
    if setup.configure:
        run(client, setup.configure)
        return f"Set up {client.title} with `{' '.join(setup.configure[:2])}`."
    if setup.file is None:
        raise SettingsError(f"--write: {client.title} keeps no settings file. {setup.steps}")
    file = home / setup.file
    old = file.read_text() if file.exists() else None
    new = dump(setup.content, file.suffix) if not old else merge(old, setup.content, file)
    if new == old:
        return f"{file} has these settings already."
    file.parent.mkdir(parents=True, exist_ok=True)
    if old is None:
        atomic_write(file, new.encode())
        return f"Wrote {file}."
    backup = free_name(file)
    shutil.copy2(file, backup)
    atomic_write(file, new.encode())
    return f"Changed {file}; the file as it was is {backup}."


def free_name(file: Path) -> Path:
    """Return the first of `file.bak`, `file.bak2`, … that does not exist."""
    names = (file.with_name(f"{file.name}.bak{n if n > 1 else ''}") for n in range(1, 1 << 30))
    return next(name for name in names if not name.exists())


def merge(old: str, content: Mapping[str, Any], file: Path) -> str:
    """Merge settings into the text of a file, and keep everything else in it.

    Raises:
        SettingsError: the text cannot be read, or comments would be lost.
    """
    advice = "Add the settings that this command prints without --write."
    if file.suffix == ".toml":
        document = tomlkit.parse(old)
        update(document, content)
        return tomlkit.dumps(document)
    try:
        data = json.loads(old) if file.suffix == ".json" else yaml.safe_load(old)
    except (ValueError, yaml.YAMLError):
        data = None
    if not isinstance(data, dict):
        raise SettingsError(f"{file}: not plain {file.suffix[1:].upper()}. {advice}")
    before = json.dumps(data)
    update(data, content)
    if json.dumps(data) == before:
        return old
    if file.suffix != ".json" and "#" in old:
        raise SettingsError(f"{file}: has comments, which would be lost. {advice}")
    return dump(data, file.suffix)


def update(target: Any, content: Mapping[str, Any]) -> None:
    """Set nested keys. A list of named objects keeps those of other names."""
    for key, value in content.items():
        present = target.get(key)
        if isinstance(value, Mapping) and isinstance(present, Mapping):
            update(present, value)
        elif isinstance(value, list) and isinstance(present, list) and present:
            names = {each["name"] for each in value if isinstance(each, dict) and "name" in each}
            others = [
                each
                for each in present
                if isinstance(each, dict) and each.get("name") not in names and names
            ]
            target[key] = [*others, *value]
        else:
            target[key] = value


def launch_client(client: Client, setup: Setup) -> None:
    """Replace this process by the client.

    Raises:
        SettingsError: the client has no command, or is not installed.
    """
    if setup.configure:
        run(client, setup.configure)
    elif setup.file is not None and not setup.environment:
        typer.echo(write_settings(client, setup, Path.home()), err=True)
    program = find_program(client, setup.command)
    sys.stdout.flush()
    environment = {**os.environ, **setup.environment}
    os.execve(program, setup.command, environment)  # noqa: S606


def run(client: Client, command: tuple[str, ...]) -> None:
    """Run a client's own configuration command.

    Raises:
        SettingsError: it is not installed, or fails.
    """
    done = subprocess.run(  # noqa: S603
        [find_program(client, command), *command[1:]], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise SettingsError(f"`{' '.join(command[:2])}` failed: {' '.join(last)}")


def find_program(client: Client, command: tuple[str, ...]) -> str:
    """Return the path of a client's program.

    Raises:
        SettingsError: it is not installed.
    """
    found = shutil.which(command[0])
    if found is None:
        raise SettingsError(
            f"{client.title} is not installed: there is no command `{command[0]}`. Install it, or"
            f" print its settings with `glmd connect {client.name}`."
        )
    return found
