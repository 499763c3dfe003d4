"""Resolving a model's name to a local folder, downloading it if needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, snapshot_download

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

from glmd.checkpoint.config import load_config
from glmd.checkpoint.weights import list_tensors
from glmd.errors import CheckpointError, ModelNotFound

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


def resolve_model(model: str) -> Path:
    """Return the local folder of a model, after downloading it if needed.

    A repository that is complete in the local cache is used without a request to the hub, so a
    start needs no connection; `hf download` updates it. A download shows a progress bar and
    resumes an earlier one. config.json is downloaded and checked before the weights.

    Args:
        model: a folder, or a Hugging Face repository id (`owner/name`).

    Raises:
        ModelNotFound: there is neither, or the download fails.
        CheckpointError: the model is not supported.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelNotFound(f"{model} is a file, not the folder of a model.")
    _check_id(model)
    cached = _cached(model)
    if cached is not None:
        return cached
    _fetch_config(model)
    with _explain_errors(model):
        return Path(_snapshot(model))


def resolve_config(model: str) -> Path:
    """Return the path of a model's configuration, without downloading weights.

    Args:
        model: a folder, a config.json, or a Hugging Face repository id.

    Returns:
        a folder with the complete model, or a config.json.

    Raises:
        ModelNotFound, CheckpointError: as `resolve_model`.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    _check_id(model)
    return _cached(model) or _fetch_config(model)


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


def _cached(repo: str) -> Path | None:
    try:
        folder = Path(_snapshot(repo, local_files_only=True))
        list_tensors(folder)
    except (LocalEntryNotFoundError, CheckpointError):
        return None  # Missing or incomplete; a download completes it.
    return folder


def _snapshot(repo: str, *, local_files_only: bool = False) -> str:
    return snapshot_download(
        repo,
        allow_patterns=list(ALLOW),
        ignore_patterns=list(IGNORE),
        local_files_only=local_files_only,
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
