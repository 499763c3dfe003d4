"""`glmd service`: the server in the background, with the user's session."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from glmd.cli.daemon.health import Server
    from glmd.cli.daemon.manager import Manager, State

app = typer.Typer(
    help="Run the server in the background: launchd on macOS, systemd on Linux.",
    no_args_is_help=True,
)

PATIENCE = 300.0
"""Seconds. 20 GiB of weights take ten from an internal disk, minutes from an external one."""

Wait = Annotated[
    float,
    typer.Option("--wait", min=0, help="Seconds to wait until the model is loaded; 0: do not."),
]


@app.command()
def install(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder or Hugging Face repo id; none: what the settings say.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="As for serve.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="As for serve.", show_default=False)] = None,
    config: Annotated[
        Path | None, typer.Option(help="Configuration file, TOML.", show_default=False)
    ] = None,
    wait: Wait = PATIENCE,
) -> None:
    """Define the service, start it, and have it start with every login. Repeat it to change it.

    Other settings go into the configuration file. GLMD_… and HF_… variables of this shell (but not
    HF_TOKEN) are written into the service's definition, which only you can read: so GLMD_API_KEY
    is passed without showing up among the processes.
    """
    from glmd.api.access import require_key_on_public_bind
    from glmd.api.auth import ApiKeyStore, default_store
    from glmd.cli.daemon.detect import find_manager
    from glmd.cli.daemon.spec import define
    from glmd.cli.serve import find_model
    from glmd.config import load
    from glmd.utils.logging import choose_format, configure

    manager = find_manager()
    # Mistakes are answered and weights downloaded here, where someone sees it.
    settings = load({"model": model, "host": host, "port": port}, config)
    configure(settings.log_level, choose_format(settings.log_format, sys.stderr))
    require_key_on_public_bind(settings, ApiKeyStore.of(settings, default_store()))
    find_model(settings)
    definition = define(
        model=model,
        host=host,
        port=port,
        config=config,
        drain_timeout=settings.drain_timeout,
    )
    changed = manager.install(definition)
    typer.echo(
        f"{'Installed' if changed else 'Installed already, and running'}: {manager.definition_file}"
    )
    if definition.environment:
        typer.echo(f"With {', '.join(definition.environment)} from this shell.")
    _wait(manager, wait)


@app.command()
def uninstall() -> None:
    """Stop the service and remove its definition. Logs, settings and weights stay."""
    from glmd.cli.daemon.detect import find_manager

    removed = find_manager().uninstall()
    typer.echo("Uninstalled." if removed else "The service was not installed.")


@app.command()
def start(wait: Wait = PATIENCE) -> None:
    """Start the installed service."""
    from glmd.cli.daemon.detect import find_manager

    manager = find_manager()
    manager.start()
    _wait(manager, wait)


@app.command()
def stop() -> None:
    """Let running requests end, then stop the service until the next login or start."""
    from glmd.cli.daemon.detect import find_manager
    from glmd.cli.daemon.manager import require_installed

    manager = find_manager()
    require_installed(manager)
    manager.stop()
    typer.echo("Stopped.")


@app.command()
def restart(wait: Wait = PATIENCE) -> None:
    """Stop and start the service, with its settings read anew."""
    from glmd.cli.daemon.detect import find_manager
    from glmd.cli.daemon.manager import require_installed

    manager = find_manager()
    require_installed(manager)
    manager.stop()
    manager.start()
    _wait(manager, wait)


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether the service runs, and how its model is. Exit code 0 only if it is ready."""
    from glmd.cli.daemon.detect import find_manager
    from glmd.cli.daemon.health import look

    manager = find_manager()
    state = manager.state()
    server = look(state.pid) if state.pid is not None else None
    report = describe(manager, state, server)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        typer.echo(_lines(report))
    if report["status"] != "ready":
        raise typer.Exit(1)


@app.command()
def logs(
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="So many last lines.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows.")] = False,
) -> None:
    """Print the service's log: on a terminal as text, else as it is written."""
    from glmd.cli.daemon.detect import find_manager
    from glmd.cli.daemon.manager import require_installed
    from glmd.utils.logging import for_people

    manager = find_manager()
    require_installed(manager)
    try:
        command = manager.log_command(lines, follow=follow)
        if not sys.stdout.isatty():
            code = subprocess.run(command, check=False).returncode  # noqa: S603
        else:
            with subprocess.Popen(  # noqa: S603
                command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace"
            ) as reading:
                for line in reading.stdout or ():
                    print(for_people(line.rstrip("\n")), flush=True)
            code = reading.returncode
    except KeyboardInterrupt:  # the way to leave --follow
        return
    if code:
        raise typer.Exit(code)


def describe(manager: Manager, state: State, server: Server | None) -> dict[str, Any]:
    """What `status` says.

    `status` is `/health`'s, or "starting" while there is no answer yet, "stopped" or
    "not installed"; sizes are bytes, times seconds.
    """
    health = (server.health if server else None) or {}
    if server is not None:
        status = health.get("status", "starting")
    else:
        status = "stopped" if state.installed else "not installed"
    return {
        "status": status,
        "model": health.get("model"),
        "url": server.url if server else None,
        "port": int(server.url.rpartition(":")[2]) if server and server.url else None,
        "pid": state.pid,
        "uptime": round(server.uptime, 1) if server else None,
        "memory": server.memory if server else None,
        "starts": state.starts,
        "engine_restarts": health.get("restarts"),
        "failure": health.get("failure"),
        "last_exit": state.last_exit,
        "manager": manager.name,
        "definition": str(manager.definition_file) if state.installed else None,
    }


def _lines(report: dict[str, Any]) -> str:
    """The report for people. Not a table: nothing is cut where the terminal is narrow."""
    from glmd.cli.daemon.health import describe_exit

    shown = dict(report)
    if report["uptime"] is not None:
        shown["uptime"] = timedelta(seconds=int(report["uptime"]))
    if report["memory"] is not None:
        shown["memory"] = f"{report['memory'] / 2**30:.2f} GiB resident"
    if report["last_exit"] is not None:
        shown["last_exit"] = describe_exit(report["last_exit"])
    known = {name.replace("_", " "): value for name, value in shown.items() if value is not None}
    width = max(map(len, known))
    return "\n".join(f"{name:{width}}  {value}" for name, value in known.items())


def _wait(manager: Manager, seconds: float) -> None:
    if not seconds:
        return
    from glmd.cli.daemon.health import wait_until_ready

    with Console(stderr=True).status("Starting") as line:

        def progress(health: dict[str, Any]) -> None:
            loading = health.get("loading")
            if loading:
                done, total = (loading[key] / 2**30 for key in ("done_bytes", "total_bytes"))
                line.update(f"Loading {health['model']}: {done:.1f} of {total:.1f} GiB")

        server = wait_until_ready(manager, seconds, progress)
    typer.echo(f"Ready: {(server.health or {})['model']} at {server.url}/v1")
