"""Whether this machine can serve, and what to do where not: `glmd doctor` without printing."""

from __future__ import annotations

import json
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil
from huggingface_hub import constants, try_to_load_from_cache

from glmd import __version__
from glmd.api.server import listen
from glmd.checkpoint.config import ModelConfig, load_config
from glmd.checkpoint.hub import DEMO
from glmd.cli.daemon.detect import find_manager
from glmd.cli.daemon.health import ask, describe_exit, look
from glmd.config import Settings, find_config, load
from glmd.convert.inspect import inspect
from glmd.errors import CheckpointError, ServiceError, SettingsError
from glmd.utils.units import gib

Verdict = Literal["ok", "warning", "problem"]

PROBE_TIMEOUT = 120.0
"""Seconds. A cold import of MLX takes ten on a slow disk; a GPU that hangs takes forever."""

OLDEST_MACOS = 14
"""MLX's wheels need it."""

WIRED_MACOS = 15
"""From here on, weights can be kept wired (`mx.set_wired_limit`)."""

FEW_FILES = 1024
"""A connection is an open file. macOS gives a shell 256."""

DOWNLOAD_BYTES = 23_000_000_000
"""The 8/5-bit checkpoint with its MTP layer, and some."""

SYSCTL = "/usr/sbin/sysctl"

REST = 4 * 2**30
"""Bytes that macOS and its programs need at least; with less they are swapped out."""

MEGABYTE = 2**20
"""What the kernel means by MB in iogpu.wired_limit_mb."""

KV_BYTES = 2
"""Bytes of one value of KV in bfloat16."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        verdict: "problem": glmd will not serve; "warning": it will, but less well.
        found: what is there, for people.
        advice: what to do; None: nothing.
    """

    name: str
    verdict: Verdict
    found: str
    advice: str | None = None


@dataclass(frozen=True, slots=True)
class Patient:
    """What is examined: the settings of a server, and what MLX says of the machine.

    Attributes:
        settings: as `glmd serve` would have them.
        probe: the report of `glmd.engine.check_mlx`; None: there is none.
    """

    settings: Settings
    probe: Mapping[str, Any] | None = None


def examine(flags: Mapping[str, Any], config: Path | None = None) -> list[Finding]:
    """Look at everything, one finding each.

    Args:
        flags: settings as for `glmd.config.load`.
        config: likewise.
    """
    settings, first = check_settings(flags, config)
    report, device = check_device()
    patient = Patient(settings, report)
    checks: list[Callable[[Patient], Finding]] = [
        check_memory, check_model, check_port, check_service, check_open_files
    ]  # fmt: skip
    return [
        check_versions(), check_system(), device, first, *(check(patient) for check in checks)
    ]  # fmt: skip


def check_versions() -> Finding:
    found = partial(Finding, "versions")
    named = [f"glmd {__version__}", f"Python {platform.python_version()}"]
    for package in ("mlx", "mlx-lm"):
        try:
            named.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            return found("problem", f"{package} is not installed", "Install glmd again with pip.")
    return found("ok", ", ".join(named))


def check_system() -> Finding:
    found = partial(Finding, "system")
    if sys.platform != "darwin":
        return found("ok", f"{platform.system()} {platform.release()}, {platform.machine()}")
    name = f"macOS {platform.mac_ver()[0]}, {platform.machine()}"
    if platform.machine() != "arm64":
        return found(
            "problem",
            name,
            "This Python is built for Intel; MLX needs one for arm64"
            " (`brew install python`, or from python.org).",
        )
    major = int(platform.mac_ver()[0].split(".")[0])
    if major < OLDEST_MACOS:
        return found("problem", name, f"MLX needs macOS {OLDEST_MACOS}; update macOS.")
    if major < WIRED_MACOS:
        return found(
            "warning",
            name,
            f"Before macOS {WIRED_MACOS} weights cannot be kept wired, and answers stall when"
            " they are paged out; update macOS, or keep memory free.",
        )
    return found("ok", name)


def check_device() -> tuple[Mapping[str, Any] | None, Finding]:
    """Have MLX compute something elsewhere; its report, if there is one, and the finding."""
    found = partial(Finding, "device")
    reinstall = "Install glmd again (`pip install --force-reinstall mlx`)."
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "glmd.engine.check_mlx"],
            capture_output=True, text=True, timeout=PROBE_TIMEOUT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, found(
            "problem", f"MLX has not answered in {PROBE_TIMEOUT:.0f} s", "Restart the machine."
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [describe_exit(done.returncode)])[-1]
        return None, found("problem", f"MLX does not work: {last}", reinstall)
    report = json.loads(done.stdout.splitlines()[-1])
    if report["wrong_bits"]:
        bits = " and ".join(map(str, report["wrong_bits"]))
        return report, found("problem", f"MLX computes {bits}-bit products wrongly", reinstall)
    if not report["gpu"]:
        return report, found(
            "warning",
            report["device"],
            "Without a GPU the full model is slow; glmd is made for Apple silicon.",
        )
    return report, found("ok", report["device"])


def check_settings(flags: Mapping[str, Any], config: Path | None) -> tuple[Settings, Finding]:
    """The settings, or the defaults where they are not sound, and the finding."""
    try:
        settings = load(flags, config)
    except SettingsError as error:
        finding = Finding("settings", "problem", error.message, "Correct it where it is named.")
        return Settings.model_validate({}), finding
    file = config or find_config()
    return settings, Finding("settings", "ok", str(file or "no configuration file"))


def check_memory(patient: Patient) -> Finding:
    memory = psutil.virtual_memory()
    text = f"{gib(memory.total)} GiB, of which {gib(memory.available)} are available"
    budget = memory_budget(patient)
    if budget is not None:
        text += f"; glmd takes up to {gib(budget)}"
    wired = wired_limit()
    if wired is not None:
        share = f"{wired:,} MB" if wired else "macOS's default"
        text += f"; the GPU's share (iogpu.wired_limit_mb) is {share}"
    if budget is not None and budget > memory.total:
        return Finding("memory", "problem", text, "Set memory_budget to less than there is.")
    if wired and wired * MEGABYTE > memory.total - REST:
        return Finding(
            "memory", "warning", text,
            f"Leave {gib(REST)} GiB to the rest of the system:"
            f" sudo sysctl iogpu.wired_limit_mb={(memory.total - REST) // MEGABYTE}",
        )  # fmt: skip
    return Finding("memory", "ok", text)


def wired_limit() -> int | None:
    """MB that the GPU may keep wired, 0 for macOS's default; None: this system has no limit."""
    if sys.platform != "darwin":
        return None
    done = subprocess.run(  # noqa: S603
        [SYSCTL, "-n", "iogpu.wired_limit_mb"], capture_output=True, text=True, check=False
    )
    said = done.stdout.strip()
    return int(said) if said.isdecimal() else None


def memory_budget(patient: Patient) -> int | None:
    """Bytes that the engine would allow itself; None: not known without MLX."""
    if patient.settings.memory_budget is not None:
        return int(patient.settings.memory_budget)
    return int(patient.probe["budget"]) if patient.probe else None


def check_model(patient: Patient) -> Finding:
    name = patient.settings.model
    folder = DEMO if name is None else local_folder(name)
    found = partial(Finding, "model")
    if folder is None:
        free = shutil.disk_usage(existing(Path(constants.HF_HUB_CACHE))).free
        text = f"{name} is not downloaded"
        if free < DOWNLOAD_BYTES:
            return found(
                "problem", f"{text}, and {gib(free)} GiB of the disk are free",
                f"Make room for {gib(DOWNLOAD_BYTES)} GiB, or set HF_HOME to another disk.",
            )  # fmt: skip
        return found("warning", text, f"The first start will; or: hf download {name}")
    try:
        config = load_config(folder)
        stored = inspect(folder).stored
        if stored is None:
            raise CheckpointError(f"{folder}: no model*.safetensors")
    except CheckpointError as error:
        return found("problem", error.message, "Download or convert the model again.")
    return fit(f"{name or 'the demo'}, ", stored.main_bytes + stored.mtp_bytes, config, patient)


def local_folder(name: str) -> Path | None:
    """Where a model lies on this machine; None: nowhere yet. Asks no hub."""
    path = Path(name).expanduser()
    if path.exists() or name.count("/") != 1:
        return path
    cached = try_to_load_from_cache(name, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def fit(name: str, weights: int, config: ModelConfig, patient: Patient) -> Finding:
    """Whether the weights fit the budget, and how many tokens of KV beside them, at most."""
    text = f"{name}{gib(weights)} GiB of weights"
    budget = memory_budget(patient)
    if budget is None:
        return Finding("model", "ok", text)
    layers = config.num_hidden_layers + (1 if config.mtp else 0)
    per_token = (config.kv_lora_rank + config.qk_rope_head_dim) * layers * KV_BYTES
    tokens = (budget - weights) // per_token
    if tokens <= 0:
        return Finding(
            "model", "problem", f"{text}, but a budget of {gib(budget)} GiB",
            "Convert with fewer bits, close what uses memory, or, on a Mac with memory to spare,"
            " raise the GPU's share: sudo sysctl iogpu.wired_limit_mb=N",
        )  # fmt: skip
    return Finding("model", "ok", f"{text}, and room for at most {tokens:,} tokens beside them")


def check_port(patient: Patient) -> Finding:
    host, port = patient.settings.host, patient.settings.port
    text = f"{host} port {port}"
    try:
        for opened in listen(host, port):
            opened.close()
    except SettingsError as error:
        health = ask(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        if health is not None:
            return Finding("port", "ok", f"{text}: glmd serves {health.get('model')} there")
        return Finding(
            "port", "problem", error.message, "Choose another with --port, or end what uses it."
        )
    return Finding("port", "ok", f"{text} is free")


def check_service(patient: Patient) -> Finding:
    found = partial(Finding, "service")
    try:
        manager = find_manager()
    except ServiceError:
        return found("ok", "this system has no service manager that glmd speaks to")
    try:
        state = manager.state()
    except ServiceError as error:
        return found("warning", error.message, "Only `glmd service` needs this.")
    if not state.installed:
        return found("ok", "not installed")
    server = look(state.pid) if state.pid is not None else None
    if server is not None:
        status = (server.health or {}).get("status", "starting")
        text = f"{status} at {server.url}" if server.url else status
        if status == "failed":
            return found("problem", text, "glmd service logs")
        return found("ok", text)
    text = f"installed, but not running: {describe_exit(state.last_exit)}"
    return found("warning", text, "glmd service logs, then glmd service start")


def check_open_files(patient: Patient) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        return Finding(
            "open files", "warning", f"{text} in this shell",
            "Each connection is one: `ulimit -n 8192` before `glmd serve` (the service has more).",
        )  # fmt: skip
    return Finding("open files", "ok", text)


def worst(findings: list[Finding]) -> Verdict:
    """The verdict on all."""
    order: tuple[Verdict, ...] = ("problem", "warning", "ok")
    return next(v for v in order if v == "ok" or any(f.verdict == v for f in findings))
