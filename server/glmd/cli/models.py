"""`glmd pull`, `glmd list` and `glmd remove`: models on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from glmd.errors import CheckpointError, ModelNotFound
from glmd.utils.files import free_bytes
from glmd.utils.text import gb, gib

if TYPE_CHECKING:
    from glmd.checkpoint.config import ModelConfig

DEFAULT_MODEL = "glm-4.7-flash"
"""Short name of the recommended conversion."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model of the GLM-4.7-Flash architecture on this machine.

    Attributes:
        name: as `glmd serve` takes it.
        place: cache or program that the files belong to.
        nbytes: on disk.
        bits_per_weight: of the stored weights; None: it cannot be served.
        mtp: whether there is an MTP layer for drafts.
        problem: why it cannot be served; None: it can.
    """

    name: str
    place: str
    folder: str
    nbytes: int
    bits_per_weight: float | None
    mtp: bool
    problem: str | None


def pull(
    model: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL]",
            help="Hugging Face repo id, or a short name: glm-4.7-flash is the recommended 8/5-bit"
            " conversion.",
        ),
    ] = DEFAULT_MODEL,
    force: Annotated[
        bool, typer.Option("--force", help="Download a model that does not fit in memory here.")
    ] = False,
) -> None:
    """Download a model to the Hugging Face cache; run it again to resume or to update.

    Size, disk and memory are checked before the weights are downloaded.

    Example: glmd pull glm-4.7-flash
    """
    from huggingface_hub import constants

    from glmd.checkpoint.hub import download, full_name, look_up

    name = full_name(model)
    if Path(name).expanduser().exists():
        raise ModelNotFound(f"{model} is a local folder: there is nothing to download.")
    found = look_up(name)
    cache = Path(constants.HF_HUB_CACHE)
    drafts = "with" if found.mtp_bytes or found.config.mtp else "without"
    typer.echo(f"{found.repo}: {gb(found.nbytes)} GB, {drafts} the MTP layer for drafts")
    typer.echo(
        f"  disk: {gb(found.missing)} GB to download to {cache}, {gb(free_bytes(cache))} GB free"
    )
    fits, memory = describe_memory(found.weight_bytes, found.mtp_bytes, found.config)
    typer.echo(f"  memory: {memory}")
    if not fits and not force:
        raise CheckpointError(
            f"{found.repo} does not fit in the memory of this machine. Pass --force to download it"
            " for another machine."
        )
    folder = download(found)
    typer.echo(f"Complete: {folder}\nServe it with `glmd serve {model}`.")


def describe_memory(weights: int, mtp_weights: int, config: ModelConfig) -> tuple[bool, str]:
    """Return whether a model fits in this machine's memory, and a sentence about it."""
    from glmd.engine.config import EngineConfig
    from glmd.engine.memory import default_budget, device_name, plan_memory

    budget = default_budget()
    total = gib(weights + mtp_weights)
    text = f"{total} GiB of weights; {device_name()} has {gib(budget)} GiB for them"
    try:
        plan = plan_memory(
            Path(), config, EngineConfig(), budget,
            weights=weights, mtp_weights=mtp_weights, item=2,
        )  # fmt: skip
    except CheckpointError:
        return False, f"{text}, which is too little"
    return True, f"{text}, with room for {plan.kv_tokens:,} tokens"


def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models on this machine that glmd can serve, with their place and size.

    Looks in the Hugging Face cache and in LM Studio's folder, and names Ollama's files.

    Example: glmd list
    """
    models = sorted(find_models(), key=lambda each: (each.problem is not None, each.name))
    if as_json:
        typer.echo(json.dumps([asdict(each) for each in models], indent=2))
        return
    if not models:
        typer.echo("No models. `glmd pull` downloads the recommended one.")
        return
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("Model", "Place"):
        table.add_column(name, overflow="fold")
    for name in ("GB", "Bits per\nweight"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("MTP")
    table.add_column("", overflow="fold")
    for each in models:
        bits = "" if each.bits_per_weight is None else f"{each.bits_per_weight:.3f}"
        mtp = "yes" if each.mtp else "no"
        table.add_row(
            each.name, each.place, gb(each.nbytes), bits,
            "" if each.bits_per_weight is None else mtp, each.problem or "",
        )  # fmt: skip
    Console().print(table)


def find_models() -> Iterator[LocalModel]:
    """Find models of this architecture in the caches of this machine."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    from glmd.checkpoint.hub import LM_STUDIO, cached_folder

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        repos = frozenset()
    for repo in repos:
        if repo.repo_type != "model" or not repo.revisions:
            continue
        newest = max(repo.revisions, key=lambda revision: revision.last_modified)
        folder = cached_folder(repo.repo_id) or newest.snapshot_path
        yield from _describe(repo.repo_id, "Hugging Face cache", folder, repo.size_on_disk)
    for base in (Path.home() / folder for folder in LM_STUDIO):
        for file in sorted(base.glob("*/*/config.json")):
            name = str(file.parent.relative_to(base))
            size = sum(each.stat().st_size for each in file.parent.glob("*.safetensors"))
            yield from _describe(name, "LM Studio", file.parent, size)
        for file in sorted(base.glob("*/*/*.gguf")):
            if "glm-4.7-flash" in file.name.lower():
                yield _unreadable(str(file.relative_to(base)), "LM Studio", file.parent, "GGUF")
    ollama = Path.home() / ".ollama/models/manifests/registry.ollama.ai/library"
    for file in sorted(ollama.glob("glm-4.7-flash*/*")):
        yield _unreadable(f"{file.parent.name}:{file.name}", "Ollama", file, "Ollama's own format")


def _describe(name: str, place: str, folder: Path, nbytes: int) -> Iterator[LocalModel]:
    from glmd.checkpoint.config import load_config
    from glmd.convert.inspect import inspect

    try:
        load_config(folder)
    except CheckpointError:
        return  # Another architecture, or only a tokenizer was downloaded.
    try:
        found = inspect(folder)
    except CheckpointError as error:
        yield LocalModel(name, place, str(folder), nbytes, None, False, error.message)
        return
    stored = found.stored
    if stored is None:
        problem = "not downloaded completely; `glmd pull` resumes"
        yield LocalModel(name, place, str(folder), nbytes, None, False, problem)
        return
    bits = 8 * stored.main_bytes / found.main.parameters
    yield LocalModel(name, place, str(folder), nbytes, bits, stored.mtp_bytes > 0, None)


def remove(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Name of the model in `glmd list`.")
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a model from the Hugging Face cache.

    Example: glmd remove glm-4.7-flash
    """
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    from glmd.checkpoint.hub import full_name

    name = full_name(model)
    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
        repo = next((r for r in cache.repos if (r.repo_type, r.repo_id) == ("model", name)), None)
    except CacheNotFound:
        repo = None
    if repo is None:
        other = next((each for each in find_models() if each.name == name), None)
        if other is not None:
            raise ModelNotFound(f"{name} belongs to {other.place}: remove it there.")
        raise ModelNotFound(f"{name} is not in the Hugging Face cache. `glmd list` has the names.")
    if not yes:
        typer.confirm(f"Remove {name} ({gb(repo.size_on_disk)} GB)?", abort=True)
    cache.delete_revisions(*(revision.commit_hash for revision in repo.revisions)).execute()
    typer.echo(f"Removed {name}: {gb(repo.size_on_disk)} GB freed.")


def _unreadable(name: str, place: str, folder: Path, form: str) -> LocalModel:
    problem = f"{form}, which glmd does not read"
    return LocalModel(name, place, str(folder), 0, None, False, problem)
