"""`glmd rank`: one of the ranks among which a model is divided."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Annotated

import typer

from glmd.cli.serve import ConfigOption, ModelArgument, find_model, flag, flags_of
from glmd.config_sources import load
from glmd.errors import SettingsError
from glmd.utils.mlx_environment import MAX_STEP_TOKENS, prepare_mlx

RESTART_DELAY = 1.0
"""Seconds between the end of one group and the wait for the next."""


def rank(
    number: Annotated[
        int, typer.Argument(help="This machine's place in the file of hosts, from 1.")
    ],
    model: ModelArgument = None,
    ranks: Annotated[str | None, flag("ranks")] = None,
    rank_port: Annotated[int | None, flag("rank_port")] = None,
    rank_timeout: Annotated[float | None, flag("rank_timeout")] = None,
    memory_budget: Annotated[str | None, flag("memory_budget")] = None,
    log_level: Annotated[str | None, flag("log_level")] = None,
    config: ConfigOption = None,
) -> None:
    """Hold a part of a model that `glmd serve --ranks hosts.json` serves on another machine.

    Waits for the server, whenever it starts or restarts.

    Example: glmd rank 1 leonsarmiento/GLM-4.7-Flash-5bit-mlx --ranks hosts.json
    """
    settings = load(flags_of({**locals(), "aliases": None, "alias": None}), config, None)
    if isinstance(settings.ranks, int):
        raise SettingsError("ranks: name the file of hosts that the server uses.")
    budget, rows = settings.memory_budget, settings.max_step_tokens
    prepare_mlx(budget, rows or MAX_STEP_TOKENS)  # As in the server; the worker inherits variables.
    # Imported late: it loads MLX.
    from glmd.engine.ranks.hosts import Hosts

    hosts = Hosts.of(str(settings.ranks))
    if not 0 < number < len(hosts):
        raise SettingsError(f"{settings.ranks} has the ranks 1 to {len(hosts) - 1}, not {number}.")
    _, folder = find_model(settings)
    command = [
        sys.executable, "-P", "-m", "glmd.engine.ranks",
        f"--lead={hosts.ips[0]}:{settings.rank_port}", f"--rank={number}", f"--model={folder}",
        f"--timeout={settings.rank_timeout}", f"--log-level={settings.log_level}",
        f"--ip={hosts.ips[number]}",
        *([f"--budget={budget:d}"] if budget else []),
    ]  # fmt: skip
    while True:
        with subprocess.Popen(command, stdin=subprocess.PIPE) as worker:  # noqa: S603
            worker.wait()
        time.sleep(RESTART_DELAY)
