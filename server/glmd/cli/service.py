"""`glmd service`: run the server in the background, started at login."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from typing import Annotated, Any

import typer
from rich.console import Console

from glmd.cli.daemon import (
    ServerProcess,
    base_url,
    describe_exit,
    find_manager,
    get_health,
    wait_until_ready,
)
from glmd.cli.daemon.spec import ServiceManager, ServiceState, build_spec, require_installed
from glmd.cli.serve import ConfigOption, HostOption, ModelArgument, PortOption
from glmd.config_sources import load
from glmd.errors import ServiceError
from glmd.utils.logging import choose_format, configure, json_line_to_text

app = typer.Typer(
    help="Run the server in the background, with launchd on macOS and systemd on Linux.",
    no_args_is_help=True,
)

START_TIMEOUT = 300.0
"""Seconds. Reading 20 GiB of weights takes ten from an internal disk, minutes from an external."""

Wait = Annotated[
    float,
    typer.Option("--wait", min=0, help="Seconds to wait for the model to load; 0 does not wait."),
]


@app.command()
def install(
    model: ModelArgument = None,
    host: HostOption = None,
    port: PortOption = None,
    config: ConfigOption = None,
    wait: Wait = START_TIMEOUT,
) -> None:
    """Install the service, start it, and start it at every login. Repeat to change it.

    Set other settings in the configuration file. GLMD_… and HF_… variables of this shell, except
    HF_TOKEN, are stored in the definition of the service, which only you can read.

    Example: glmd service install ./GLM-4.7-Flash-5bit-mlx --port 8001
    """
    from glmd.api.auth import ApiKeyStore, default_store, require_key_on_public_bind
    from glmd.cli.serve import find_model

    manager = find_manager()
    # Report errors and download weights here, where the user sees it.
    settings = load({"model": model, "host": host, "port": port}, config)
    configure(settings.log_level, choose_format(settings.log_format, sys.stderr))
    require_key_on_public_bind(settings, ApiKeyStore.of(settings, default_store()))
    find_model(settings)
    spec = build_spec(
        model, host=host, port=port, config=config, drain_timeout=settings.drain_timeout
    )
    changed = manager.install(spec)
    done = "Installed" if changed else "Already installed and running"
    typer.echo(f"{done}: {manager.definition_file}")
    if spec.environment:
        typer.echo(f"Variables from this shell: {', '.join(spec.environment)}")
    _wait(manager, wait)


@app.command()
def uninstall() -> None:
    """Stop the service and remove its definition. Keeps logs, settings and weights.

    Example: glmd service uninstall
    """
    removed = find_manager().uninstall()
    typer.echo("Uninstalled." if removed else "The service was not installed.")


@app.command()
def start(wait: Wait = START_TIMEOUT) -> None:
    """Start the installed service.

    Example: glmd service start --wait 0
    """
    manager = find_manager()
    manager.start()
    _wait(manager, wait)


@app.command()
def stop() -> None:
    """Stop the service, after its running requests, until the next login or start.

    Example: glmd service stop
    """
    manager = find_manager()
    require_installed(manager)
    manager.stop()
    typer.echo("Stopped.")


@app.command()
def restart(wait: Wait = START_TIMEOUT) -> None:
    """Stop and start the service, which reloads all settings.

    Example: glmd service restart --wait 0
    """
    manager = find_manager()
    require_installed(manager)
    manager.stop()
    manager.start()
    _wait(manager, wait)


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the state of the service and its model; exit code 0 if it accepts requests.

    Example: glmd service status --json
    """
    _print_report(_service_report(), as_json=as_json)


def server_status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    config: ConfigOption = None,
) -> None:
    """Print the state of the server and its model; exit code 0 if it accepts requests.

    That of the service or, if it does not run, of a server at the address of the settings.

    Example: glmd status --json
    """
    settings = load({}, config)
    url = base_url(settings.host, settings.port)
    health = get_health(url)
    try:
        report = _service_report()
    except ServiceError:
        if health is None:
            raise
        report = {"pid": None}
    if report["pid"] is None and health is not None:
        found = {name: health.get(name) for name in ("status", "model", "kv_bits", "failure")}
        report = {**found, "url": url, "engine_restarts": health.get("restarts"), "manager": None}
    _print_report(report, as_json=as_json)


def _service_report() -> dict[str, Any]:
    manager = find_manager()
    state = manager.state()
    return build_report(manager, state, ServerProcess.find(state.pid) if state.pid else None)


def _print_report(report: dict[str, Any], *, as_json: bool) -> None:
    typer.echo(json.dumps(report, indent=2) if as_json else _lines(report))
    if report["status"] not in ("ready", "unloaded"):
        raise typer.Exit(1)


@app.command()
def logs(
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=1, help="Number of lines to print.")
    ] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines, too.")] = False,
) -> None:
    """Print the log of the service: as text on a terminal, else unchanged.

    Example: glmd service logs -n 20 -f
    """
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
                    print(json_line_to_text(line.rstrip("\n")), flush=True)
            code = reading.returncode
    except KeyboardInterrupt:  # ends --follow
        return
    if code:
        raise typer.Exit(code)


def build_report(
    manager: ServiceManager, state: ServiceState, server: ServerProcess | None
) -> dict[str, Any]:
    """Build the report of `status`; sizes in bytes, times in seconds.

    `status` is that of `/health`, "starting" without a response, "stopped" or "not installed".
    """
    health = (server.health if server else None) or {}
    if server is not None:
        status = health.get("status", "starting")
    else:
        status = "stopped" if state.installed else "not installed"
    return {
        "status": status,
        "model": health.get("model"),
        "kv_bits": health.get("kv_bits"),
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
    """Format the report as lines, which a narrow terminal does not truncate."""
    shown = dict(report)
    if report.get("uptime") is not None:
        shown["uptime"] = timedelta(seconds=int(report["uptime"]))
    if report.get("memory") is not None:
        shown["memory"] = f"{report['memory'] / 2**30:.2f} GiB resident"
    if report.get("last_exit") is not None:
        shown["last_exit"] = describe_exit(report["last_exit"])
    known = {name.replace("_", " "): value for name, value in shown.items() if value is not None}
    width = max(map(len, known))
    return "\n".join(f"{name:{width}}  {value}" for name, value in known.items())


def _wait(manager: ServiceManager, seconds: float) -> None:
    if not seconds:
        return
    with Console(stderr=True).status("Starting") as line:
        server = wait_until_ready(manager, seconds, line.update)
    typer.echo(f"Ready: {(server.health or {})['model']} at {server.url}/v1")
