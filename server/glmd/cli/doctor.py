"""`glmd doctor`: check that this machine can run glmd."""

from __future__ import annotations

import dataclasses
import json
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import psutil
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from glmd import __version__
from glmd.cli.daemon import ServerProcess, base_url, describe_exit, find_manager, get_health
from glmd.cli.serve import ConfigOption, HostOption, ModelArgument, PortOption
from glmd.config import Settings
from glmd.config_sources import load_with_origins
from glmd.errors import CheckpointError, ServiceError, SettingsError
from glmd.utils.files import free_bytes
from glmd.utils.mlx_environment import find_openblas
from glmd.utils.text import gib

if TYPE_CHECKING:
    from glmd.checkpoint.config import ModelConfig
    from glmd.checkpoint.stored import StoredWeights

Verdict = Literal["ok", "warning", "problem"]

STYLES: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}

MLX_TIMEOUT = 120.0
"""Seconds. A cold import of MLX takes ten on a slow disk."""

OLDEST_MACOS = 14
"""Minimum version for MLX's wheels."""

WIRED_MACOS = 15
"""Minimum version for keeping weights wired (`mx.set_wired_limit`)."""

FEW_FILES = 1024
"""A connection is an open file. The default on macOS is 256."""

DOWNLOAD_BYTES = 23_000_000_000
"""The 8/5-bit checkpoint with its MTP layer, plus a margin."""

SYSCTL = "/usr/sbin/sysctl"

SYSTEM_BYTES = 4 * 2**30
"""Minimum memory for macOS and its programs, below which they are swapped out."""

MEGABYTE = 2**20
"""Unit of iogpu.wired_limit_mb."""

ITEM_BYTES = 2
"""Bytes of an activation in bfloat16."""

FASTER_DTYPE = 1.1
"""Ratio of times from which on the other dtype is worth a setting. Below, it is noise."""

REINSTALL = "Install glmd again (`pip install --force-reinstall mlx`)."


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check.

    Attributes:
        verdict: "problem": glmd cannot serve; "warning": glmd can serve, with a drawback.
        found: what the check found.
        advice: the remedy; None: nothing to do.
    """

    name: str
    verdict: Verdict
    found: str
    advice: str | None = None


def doctor(
    model: ModelArgument = None,
    host: HostOption = None,
    port: PortOption = None,
    config: ConfigOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that this machine can run glmd, and how to fix what is missing.

    Takes settings as `glmd serve` does. Exit code 1 if glmd cannot serve.

    Example: glmd doctor ./GLM-4.7-Flash-5bit-mlx
    """
    findings = examine({"model": model, "host": host, "port": port}, config)
    verdict = max((finding.verdict for finding in findings), key=list(STYLES).index)
    if as_json:
        listed = [dataclasses.asdict(finding) for finding in findings]
        typer.echo(json.dumps({"verdict": verdict, "findings": listed}, indent=2))
    else:
        table = Table(show_header=False, box=None, padding=(0, 1, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in findings:
            style = STYLES[finding.verdict]
            text = Text(finding.found)
            if finding.advice:
                text.append(f"\n→ {finding.advice}", style)
            table.add_row(Text(finding.verdict, style), finding.name, text)
        Console().print(table)
    if verdict == "problem":
        raise typer.Exit(1)


def examine(flags: Mapping[str, Any], config: Path | None = None) -> list[Finding]:
    """Run all checks; arguments as of `glmd.config_sources.load`."""
    settings, settings_finding = check_settings(flags, config)
    report, device_finding = check_device()
    budget = settings.memory_budget or (report["budget"] if report else None)
    return [
        check_versions(),
        check_system(),
        device_finding,
        *check_blas(report),
        *check_dtype(report, settings.dtype),
        settings_finding,
        check_memory(budget),
        check_model(settings.model, budget if report else None, settings.engine_config),
        check_port(settings.host, settings.port),
        check_service(),
        check_open_files(),
    ]


def check_versions() -> Finding:
    names = [f"glmd {__version__}", f"Python {platform.python_version()}"]
    for package in ("mlx", "mlx-lm"):
        try:
            names.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            return Finding(
                "versions", "problem", f"{package} is not installed", "Install glmd again with pip."
            )
    return Finding("versions", "ok", ", ".join(names))


def check_system() -> Finding:
    found = partial(Finding, "system")
    if sys.platform != "darwin":
        return found("ok", f"{platform.system()} {platform.release()}, {platform.machine()}")
    name = f"macOS {platform.mac_ver()[0]}, {platform.machine()}"
    if platform.machine() != "arm64":
        return found(
            "problem",
            name,
            "This Python is built for Intel; MLX needs a Python for arm64"
            " (`brew install python`, or from python.org).",
        )
    major = int(platform.mac_ver()[0].split(".")[0])
    if major < OLDEST_MACOS:
        return found("problem", name, f"MLX needs macOS {OLDEST_MACOS}; update macOS.")
    if major < WIRED_MACOS:
        return found(
            "warning",
            name,
            f"Before macOS {WIRED_MACOS}, weights cannot be wired, and answers stall when weights"
            " are paged out; update macOS, or keep memory free.",
        )
    return found("ok", name)


def check_device() -> tuple[Mapping[str, Any] | None, Finding]:
    """Compute with MLX in another process; returns its report, None if it failed, too."""
    found = partial(Finding, "device")
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "glmd.engine.check_mlx"],
            capture_output=True, text=True, timeout=MLX_TIMEOUT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, found(
            "problem", f"MLX does not respond within {MLX_TIMEOUT:.0f} s", "Restart the machine."
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [describe_exit(done.returncode)])[-1]
        return None, found("problem", f"MLX does not work: {last}", REINSTALL)
    report = json.loads(done.stdout.splitlines()[-1])
    if report["wrong_bits"]:
        bits = " and ".join(map(str, report["wrong_bits"]))
        return report, found("problem", f"MLX computes wrong {bits}-bit products", REINSTALL)
    if not report["gpu"]:
        return report, found(
            "warning",
            report["device"],
            "Without a GPU the full model is slow; glmd is made for Apple silicon.",
        )
    return report, found("ok", report["device"])


def check_blas(report: Mapping[str, Any] | None) -> list[Finding]:
    """Check that MLX on a Linux CPU multiplies with OpenBLAS.

    Other devices do not need a BLAS.
    """
    if sys.platform != "linux" or report is None or report["gpu"]:
        return []
    library = find_openblas()
    if library is not None:
        return [Finding("blas", "ok", str(library))]
    return [
        Finding(
            "blas",
            "warning",
            "MLX's wheel for Linux contains the slow reference BLAS; OpenBLAS is not installed",
            "Install OpenBLAS for faster prefill: sudo apt install libopenblas0"
            " (Fedora and Arch: openblas).",
        )
    ]


def check_dtype(report: Mapping[str, Any] | None, setting: str) -> list[Finding]:
    """Compare products in bfloat16 and float16 on a GPU with the setting `dtype`.

    Older chips compute bfloat16 by way of float32.
    """
    if report is None:
        return []
    times: Mapping[str, Mapping[str, float]] = report["dtypes"]
    text = "; ".join(
        f"{kind} {found['bfloat16']:.2f} ms in bfloat16, {found['float16']:.2f} in float16"
        for kind, found in times.items()
    )
    if not report["gpu"]:
        return [Finding("dtype", "ok", f"{text}; glmd computes in float32 without a GPU")]
    # The mean of ratios, so that no kind of product counts more for taking longer.
    ratios = [found["bfloat16"] / found["float16"] for found in times.values()]
    ratio = statistics.geometric_mean(ratios)
    present = "float16" if setting == "float16" else "bfloat16"
    gain = ratio if present == "bfloat16" else 1 / ratio
    if gain < FASTER_DTYPE:
        return [Finding("dtype", "ok", text)]
    other = "float16" if present == "bfloat16" else "auto"
    return [
        Finding(
            "dtype",
            "warning",
            text,
            f"Set dtype = {other} for products in {1 / gain:.0%} of the time"
            f" (`glmd serve --dtype {other}`).",
        )
    ]


def check_settings(flags: Mapping[str, Any], config: Path | None) -> tuple[Settings, Finding]:
    """Load the settings; returns the defaults if that fails."""
    found = partial(Finding, "settings")
    try:
        loaded = load_with_origins(flags, config)
    except SettingsError as error:
        return Settings.model_validate({}), found("problem", error.message, "Correct this setting.")
    return loaded.settings, found("ok", str(loaded.file or "no configuration file"))


def check_memory(budget: int | None) -> Finding:
    """Check the memory budget in bytes; None: not known without MLX."""
    memory = psutil.virtual_memory()
    text = f"{gib(memory.total)} GiB, {gib(memory.available)} available"
    if budget is not None:
        text += f"; glmd uses up to {gib(budget)}"
    wired = wired_limit()
    if wired is not None:
        share = f"{wired:,} MB" if wired else "macOS's default"
        text += f"; limit of the GPU (iogpu.wired_limit_mb): {share}"
    if budget is not None and budget > memory.total:
        return Finding("memory", "problem", text, "Set memory_budget below the total memory.")
    if wired and wired * MEGABYTE > memory.total - SYSTEM_BYTES:
        return Finding(
            "memory", "warning", text,
            f"Leave {gib(SYSTEM_BYTES)} GiB to the rest of the system:"
            f" sudo sysctl iogpu.wired_limit_mb={(memory.total - SYSTEM_BYTES) // MEGABYTE}",
        )  # fmt: skip
    return Finding("memory", "ok", text)


def wired_limit() -> int | None:
    """Return the MB that the GPU may wire, 0 for the default; None: unknown."""
    if sys.platform != "darwin":
        return None
    done = subprocess.run(  # noqa: S603
        [SYSCTL, "-n", "iogpu.wired_limit_mb"], capture_output=True, text=True, check=False
    )
    text = done.stdout.strip()
    return int(text) if text.isdecimal() else None


def check_model(
    name: str | None, budget: int | None, engine: Mapping[str, Any] = MappingProxyType({})
) -> Finding:
    """Check that the model is complete and fits the engine's memory plan.

    Args:
        budget: bytes for weights, KV and working memory; None: MLX does not load.
        engine: fields of `EngineConfig`.
    """
    from huggingface_hub import constants

    from glmd.chat.template_process import TemplateProcess
    from glmd.chat.tokenizer import Tokenizer
    from glmd.checkpoint.config import load_config
    from glmd.checkpoint.hub import DEMO, RECOMMENDED, cached_folder, full_name
    from glmd.convert.inspect import inspect

    found = partial(Finding, "model")
    if name is None and cached_folder(RECOMMENDED) is not None:
        name = RECOMMENDED
    folder = DEMO if name is None else local_folder(full_name(name))
    if folder is None:
        free = free_bytes(Path(constants.HF_HUB_CACHE))
        text = f"{name} is not downloaded"
        if free < DOWNLOAD_BYTES:
            return found(
                "problem", f"{text}, and the disk has {gib(free)} GiB free",
                f"Free {gib(DOWNLOAD_BYTES)} GiB, or set HF_HOME to a folder on another disk.",
            )  # fmt: skip
        advice = f"The first start downloads it. Download it now: glmd pull {name}"
        return found("warning", text, advice)
    ranks = engine.get("ranks", 1)
    try:
        config = load_config(folder)
        stored = inspect(folder).stored
        if stored is None:
            raise CheckpointError(f"{folder}: no model*.safetensors")
        TemplateProcess.load(folder, Tokenizer.load(folder).controls).close()
        part, count = part_of_rank(folder, config, ranks) if ranks != 1 else (None, 1)
    except (CheckpointError, SettingsError) as error:
        remedy = "Download or convert the model again."
        if isinstance(error, SettingsError):
            remedy = "Change the setting, or leave it out."
        return found("problem", error.message, remedy)
    main_bytes, mtp_bytes = stored.main_bytes, stored.mtp_bytes
    text = f"{name or 'bundled demo'}, {gib(main_bytes + mtp_bytes)} GiB of weights"
    if part is not None:
        config = part.config
        main_bytes, mtp_bytes = (
            sum(tensor.nbytes for tensor in tensors.values()) for tensors in (part.main, part.mtp)
        )
        text += f", {gib(main_bytes + mtp_bytes)} GiB on each of {count} ranks"
        if isinstance(ranks, int) and budget is not None:
            budget //= count  # All are on this machine.
    notes = " ".join(filter(None, (*stored.warnings, stored.no_drafts))) or None
    verdict: Verdict = "warning" if stored.warnings else "ok"
    if budget is None:
        return found(verdict, text, notes)
    from glmd.engine.config import EngineConfig
    from glmd.engine.memory import plan_memory

    try:
        plan = plan_memory(
            folder, config, EngineConfig(**engine), budget,
            weights=main_bytes, mtp_weights=mtp_bytes, item=ITEM_BYTES,
        )  # fmt: skip
    except CheckpointError:
        return found(
            "problem", f"{text}, memory budget {gib(budget)} GiB",
            "Convert with fewer bits, or close other programs. On a Mac with more memory, raise the"
            " limit of the GPU: sudo sysctl iogpu.wired_limit_mb=N",
        )  # fmt: skip
    room = f"room for at most {plan.kv_tokens:,} tokens of KV cache in {plan.kv_bits} bit"
    return found(verdict, f"{text}, {room}", notes)


def part_of_rank(folder: Path, config: ModelConfig, ranks: int | str) -> tuple[StoredWeights, int]:
    """Return one rank's part of a checkpoint, and the number of ranks.

    Args:
        ranks: see `EngineConfig`.

    Raises:
        SettingsError: there is no such file of hosts, or the checkpoint cannot be divided.
    """
    from glmd.checkpoint.shard import shard_weights
    from glmd.checkpoint.stored import read_weights
    from glmd.engine.ranks.hosts import Hosts

    count = len(Hosts.of(ranks))
    return shard_weights(read_weights(folder, config), 0, count), count


def local_folder(name: str) -> Path | None:
    """Return the local folder of a model; None: a repo id that is not downloaded."""
    from huggingface_hub import try_to_load_from_cache

    from glmd.checkpoint.hub import lm_studio_folder

    path = Path(name).expanduser()
    if path.exists() or name.count("/") != 1:
        return path
    cached = try_to_load_from_cache(name, "config.json")
    return Path(cached).parent if isinstance(cached, str) else lm_studio_folder(name)


def check_port(host: str, port: int) -> Finding:
    from glmd.api.sockets import listen

    found = partial(Finding, "port")
    text = f"{host} port {port}"
    try:
        for opened in listen(host, port):
            opened.close()
    except SettingsError as error:
        health = get_health(base_url(host, port))
        if health is not None:
            return found("ok", f"{text} serves {health.get('model')} through glmd")
        return found(
            "problem",
            error.message,
            "Choose another with --port, or stop the program that uses it.",
        )
    return found("ok", f"{text} is free")


def check_service() -> Finding:
    found = partial(Finding, "service")
    try:
        manager = find_manager()
    except ServiceError:
        return found("ok", "no supported service manager on this system")
    try:
        state = manager.state()
    except ServiceError as error:
        return found("warning", error.message, "Needed for `glmd service` only.")
    if not state.installed:
        return found("ok", "not installed")
    server = ServerProcess.find(state.pid) if state.pid is not None else None
    if server is None:
        text = f"installed, but not running: {describe_exit(state.last_exit)}"
        return found("warning", text, "glmd service logs, then glmd service start")
    status = (server.health or {}).get("status", "starting")
    text = f"{status} at {server.url}" if server.url else status
    if status == "failed":
        return found("problem", text, "glmd service logs")
    return found("ok", text)


def check_open_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return Finding("open files", "ok", "unlimited")
    if soft < FEW_FILES:
        return Finding(
            "open files", "warning", f"{soft:,} in this shell",
            "Each connection needs one. Run `ulimit -n 8192` before `glmd serve`; the service has"
            " its own limit.",
        )  # fmt: skip
    return Finding("open files", "ok", f"{soft:,}")
