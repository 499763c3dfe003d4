"""Resolving a model's name to a local folder, downloading it if needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    DryRunFileInfo,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)

# HTTPError is httpx's in huggingface_hub 1 and httpx2's in 2; imported from here, it is either.
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from glmd.checkpoint.chat_template import read_template
from glmd.checkpoint.config import ModelConfig, load_config
from glmd.checkpoint.stored import mtp_files, read_mtp_source, read_weights
from glmd.checkpoint.weights import INDEX_NAME, read_index
from glmd.errors import CheckpointError, ModelNotFound
from glmd.utils.files import check_room
from glmd.utils.text import gb

log = logging.getLogger(__name__)

ALLOW = (
    "*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md", "LICENSE*",
    "model*.safetensors", "mtp.safetensors",
)  # fmt: skip
"""Files of a repository to download. mlx-lm's list lacks mtp.safetensors."""

IGNORE = ("*/*",)
"""Subfolders often hold other formats of the same weights."""

DEMO = Path(__file__).parents[1] / "demo"
"""The demo checkpoint in the package."""

RECOMMENDED = "leonsarmiento/GLM-4.7-Flash-5bit-mlx"
"""Repository of the mixed 8/5-bit conversion."""

SHORT_NAMES = {"glm-4.7-flash": RECOMMENDED, "demo": str(DEMO)}

LM_STUDIO = (Path(".lmstudio/models"), Path(".cache/lm-studio/models"))
"""Folders of LM Studio's models in the home folder: of today's and of older versions."""

TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer."""


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model on the hub, known from its config.json and file list.

    Attributes:
        nbytes: of all files that glmd uses.
        missing: bytes of those that are not in the local cache.
        weight_bytes: of the main model's weights.
        mtp_bytes: of mtp.safetensors; 0: there is none.
    """

    repo: str
    config: ModelConfig
    nbytes: int
    missing: int
    weight_bytes: int
    mtp_bytes: int


def full_name(model: str) -> str:
    """Return the repository or folder of a short name, and any other name unchanged."""
    return SHORT_NAMES.get(model.lower(), model)


def resolve_model(model: str, *, for_serving: bool = False) -> Path:
    """Return the local folder of a model, after downloading it if needed.

    A repository that is complete in the local cache, or among LM Studio's models, is used without
    a request to the hub, so a start needs no connection; `glmd pull` updates it. A download shows
    a progress bar and resumes an earlier one. config.json is downloaded and checked before the
    weights.

    Args:
        model: a folder, a short name, or a Hugging Face repository id (`owner/name`).
        for_serving: refuse to download a model that is not quantised.

    Raises:
        ModelNotFound: there is neither, or the download fails.
        CheckpointError: the model is not supported, or the disk has too little room.
    """
    model = full_name(model)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        remedy = "Convert the BF16 model with `glmd convert zai-org/GLM-4.7-Flash OUT`."
        gguf = f" glmd does not read GGUF. {remedy}" if folder.suffix == ".gguf" else ""
        raise ModelNotFound(f"{model} is a file, not the folder of a model.{gguf}")
    _check_id(model)
    found = cached_folder(model) or lm_studio_folder(model)
    if found is not None:
        return found
    try:
        remote = look_up(model)
        if for_serving:
            check_quantized(remote)
        return download(remote)
    except ModelNotFound as error:
        without_mtp, missing = _cached(model)
        if without_mtp is None:
            raise
        log.warning("%s: %s is missing, and cannot be downloaded. %s", model, missing, error)
        return without_mtp


def resolve_mtp(model: str, check: Callable[[ModelConfig], object]) -> Path:
    """Return a folder with a model's MTP layer, downloading only that layer's files.

    Of a repository whose weights have an index, only the files of `mtp_files` are downloaded.

    Args:
        check: called with the model's configuration before weights are downloaded; may raise.

    Raises:
        ModelNotFound, CheckpointError: as `resolve_model`, or there is no MTP layer.
    """
    model = full_name(model)
    if Path(model).expanduser().exists():
        return resolve_model(model)
    _check_id(model)
    for found in (_snapshot(model), lm_studio_folder(model)):
        if found is None:
            continue
        try:
            read_mtp_source(found, load_config(found))
            return found
        except CheckpointError as error:
            log.debug("MTP layer not found: folder=%s", found, exc_info=error)
    _probe(model)
    config = load_config(_fetch_config(model))
    check(config)
    with _explain_errors(model):
        try:
            index = Path(hf_hub_download(model, INDEX_NAME))
        except RemoteEntryNotFoundError:
            return download(look_up(model))
    weight_map = read_index(index.parent)
    assert weight_map is not None
    names = ["config.json", INDEX_NAME, *mtp_files(config, weight_map, model)]
    with _explain_errors(model):
        plan = _download(model, names, dry_run=True)
    return _complete(model, sum(file.file_size or 0 for file in plan if file.will_download), names)


def resolve_config(model: str) -> Path:
    """Return the path of a model's configuration, without downloading weights.

    Args:
        model: a folder, a config.json, or a Hugging Face repository id.

    Returns:
        a folder with the complete model, or a config.json.

    Raises:
        ModelNotFound, CheckpointError: as `resolve_model`.
    """
    model = full_name(model)
    path = Path(model).expanduser()
    if path.exists():
        return path
    _check_id(model)
    found = cached_folder(model) or lm_studio_folder(model)
    if found is None:
        _probe(model)
        found = _fetch_config(model)
    return found


def look_up(repo: str) -> RemoteModel:
    """Read a model's config.json and file list on the hub; downloads no weights.

    Raises:
        ModelNotFound: the repository cannot be read.
        CheckpointError: the model is not supported.
    """
    _check_id(repo)
    _probe(repo)
    config = load_config(_fetch_config(repo))
    with _explain_errors(repo):
        plan: list[DryRunFileInfo] = _download(repo, dry_run=True)
    sizes = {file.filename: file.file_size or 0 for file in plan}
    weights = {name: size for name, size in sizes.items() if name.endswith(".safetensors")}
    mtp_bytes = weights.pop("mtp.safetensors", 0)
    return RemoteModel(
        repo=repo,
        config=config,
        nbytes=sum(sizes.values()),
        missing=sum(sizes[file.filename] for file in plan if file.will_download),
        weight_bytes=sum(weights.values()),
        mtp_bytes=mtp_bytes,
    )


def check_quantized(model: RemoteModel) -> None:
    """Check that a model is quantised, before it is downloaded to be served.

    Raises:
        CheckpointError: it is not; the message has the commands to use.
    """
    if model.config.quantization is None:
        name = model.repo.partition("/")[2]
        raise CheckpointError(
            f"{model.repo} is not quantised: {gb(model.nbytes)} GB to download, and as much memory"
            f" to serve. Use the recommended conversion instead (`glmd pull`, then `glmd serve"
            f" glm-4.7-flash`), or make your own: `glmd convert {model.repo} ./{name}-mixed-8-5`."
            f" To serve it as it is, download it first: `glmd pull {model.repo}`."
        )


def download(model: RemoteModel) -> Path:
    """Download what is missing of a model, and return its folder.

    Raises:
        ModelNotFound: the download fails.
        CheckpointError: the disk has too little room.
    """
    return _complete(model.repo, model.missing)


def _complete(repo: str, missing: int, names: Sequence[str] = ALLOW) -> Path:
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    check_room(cache / repo.replace("/", "--"), missing)
    with _explain_errors(repo):
        return Path(_download(repo, names))


def cached_folder(repo: str) -> Path | None:
    """Return a repository's folder in the local cache.

    None: missing or incomplete there.
    """
    folder, missing = _cached(repo)
    return folder if missing is None else None


def lm_studio_folder(repo: str) -> Path | None:
    """Return a repository's folder among LM Studio's models.

    None: missing or not complete.
    """
    for folder in LM_STUDIO:
        found = Path.home() / folder / repo
        if found.is_dir():
            try:
                _missing_mtp(found)
            except CheckpointError:
                continue
            return found
    return None


def _probe(repo: str) -> None:
    """Ask the hub for a repository, so that a wrong name fails at once."""
    if constants.HF_HUB_OFFLINE:
        raise ModelNotFound(
            f"{repo} is not downloaded, or not completely, and HF_HUB_OFFLINE is set."
        )
    with _explain_errors(repo):
        try:
            HfApi(endpoint=constants.ENDPOINT).model_info(repo, timeout=TIMEOUT)
        except HfHubHTTPError:
            raise
        except HTTPError as error:
            log.debug("hub not reached: repo=%s", repo, exc_info=error)
            host = constants.ENDPOINT.removeprefix("https://")
            raise ModelNotFound(
                f"{repo} is not downloaded, or not completely, and {host} cannot be reached."
            ) from None


def _check_id(model: str) -> None:
    try:
        validate_repo_id(model)
        valid = model.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ModelNotFound(
            f"There is no folder {model}, and it is not a Hugging Face repository id (owner/name)."
        )


def _cached(repo: str) -> tuple[Path | None, str | None]:
    """The local snapshot of a repository, and a missing file that is optional.

    None as the first: there is none that can be served. A download completes either.
    """
    folder = _snapshot(repo)
    if folder is None:
        return None, None
    try:
        return folder, _missing_mtp(folder)
    except CheckpointError as error:
        log.debug("model not cached: repo=%s", repo, exc_info=error)
        return None, None


def _snapshot(repo: str) -> Path | None:
    """The folder of a repository in the local cache, complete or not."""
    found = try_to_load_from_cache(repo, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _missing_mtp(folder: Path) -> str | None:
    """The file of the MTP layer, if it is missing.

    Raises:
        CheckpointError: the folder cannot be served.
    """
    config = load_config(folder)
    read_weights(folder, config)
    read_template(folder)
    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(f"{folder / 'tokenizer.json'}: no such file", file=str(folder))
    file = config.mtp.file if config.mtp is not None else None
    return None if file is None or (folder / file).exists() else file


def _download(repo: str, names: Sequence[str] = ALLOW, **options: Any) -> Any:
    return snapshot_download(
        repo, allow_patterns=list(names), ignore_patterns=list(IGNORE), **options
    )


def _fetch_config(repo: str) -> Path:
    with _explain_errors(repo):
        config = Path(hf_hub_download(repo, "config.json"))
    load_config(config)
    return config


@contextmanager
def _explain_errors(repo: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into `ModelNotFound`."""
    host = constants.ENDPOINT.removeprefix("https://")
    try:
        yield
    except GatedRepoError:
        raise ModelNotFound(
            f"{repo} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then log in with"
            " `hf auth login` or set HF_TOKEN."
        ) from None
    except RepositoryNotFoundError:
        raise _no_repository(repo, host) from None
    except RemoteEntryNotFoundError:
        raise ModelNotFound(f"{repo} on {host} has no config.json, so it is no model.") from None
    except LocalEntryNotFoundError as error:
        log.debug("model not cached: repo=%s", repo, exc_info=error)
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{host} cannot be reached"
        raise ModelNotFound(f"{repo} is not downloaded, or not completely, and {why}.") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:  # The hub's answer to a bad token, and for a private repository.
            raise _no_repository(repo, host) from None
        raise ModelNotFound(f"{repo} cannot be downloaded: {host} answered {status}.") from error
    except HTTPError as error:
        raise ModelNotFound(
            f"The download of {repo} from {host} was interrupted ({error}). Run it again to resume."
        ) from error
    except OSError as error:
        raise ModelNotFound(f"{repo} cannot be downloaded: {error.strerror or error}.") from error


def _no_repository(repo: str, host: str) -> ModelNotFound:
    return ModelNotFound(
        f"There is no folder {repo}, and no accessible repository of that name on {host}. If it is"
        " private, log in with `hf auth login` or set HF_TOKEN."
    )
