"""`glmd serve`: the server."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glmd.config import CONFIG_VARIABLE, Settings, load
from glmd.errors import SettingsError
from glmd.utils.logging import choose_format, configure

if TYPE_CHECKING:
    from glmd.api.state import ServedModel
    from glmd.utils.logfile import LogFile

log = logging.getLogger("glmd")


def flag(name: str, *spellings: str) -> Any:
    """The command-line flag of a setting, explained by the setting itself."""
    field = Settings.model_fields[name]
    # In parentheses: brackets would be markup to the library that prints the help.
    default = "" if field.default in (None, (), False) else f" (default: {field.default})"
    return typer.Option(*spellings, help=f"{field.description}{default}", show_default=False)


def serve(
    model: Annotated[
        str | None,
        typer.Argument(help=Settings.model_fields["model"].description, show_default=False),
    ] = None,
    host: Annotated[str | None, flag("host")] = None,
    port: Annotated[int | None, flag("port")] = None,
    api_key: Annotated[str | None, flag("api_key")] = None,
    api_key_file: Annotated[Path | None, flag("api_key_file")] = None,
    allow_unauthenticated: Annotated[
        bool | None, flag("allow_unauthenticated", "--allow-unauthenticated")
    ] = None,
    alias: Annotated[list[str] | None, flag("aliases", "--alias")] = None,
    max_context: Annotated[int | None, flag("max_context")] = None,
    max_running: Annotated[int | None, flag("max_running")] = None,
    mtp: Annotated[str | None, flag("mtp")] = None,
    memory_budget: Annotated[str | None, flag("memory_budget")] = None,
    log_file: Annotated[Path | None, flag("log_file")] = None,
    log_level: Annotated[str | None, flag("log_level")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help=f"Configuration file, TOML (or {CONFIG_VARIABLE}).", show_default=False),
    ] = None,
) -> None:
    """Serve a checkpoint through the OpenAI API.

    Every setting can also be given as GLMD_… in the environment, or in the configuration file.
    """
    flags = flags_of(locals())
    settings = load(flags, config)
    log_file = settings.log_file and settings.log_file.expanduser().absolute()
    opened = write_log_to(log_file) if log_file is not None else None
    log_format = choose_format(settings.log_format, sys.stderr)
    configure(settings.log_level, log_format)

    # Imported here, so that `glmd --help` and a mistake in the settings are answered at once.
    from glmd.api.access import require_key_on_public_bind
    from glmd.api.auth import ApiKeyStore, default_store
    from glmd.api.server import run
    from glmd.api.state import AppState
    from glmd.engine_client.process import EngineProcessConfig

    keys = ApiKeyStore.of(settings, default_store())
    require_key_on_public_bind(settings, keys)  # Before anything is downloaded.
    served = find_model(settings)

    def read_anew() -> Settings:
        if opened is not None:
            opened.refresh()
        return load(flags, config)

    launch = EngineProcessConfig(
        served.folder,
        settings.engine_config,
        log_level=settings.log_level,
        log_format=log_format,
        log_file=log_file,
    )
    run(AppState(settings, served, launch, keys), read_anew)


def write_log_to(file: Path) -> LogFile:
    """Have stdout and stderr end in a file from now on.

    Raises:
        SettingsError: it cannot be opened.
    """
    from glmd.utils.logfile import LogFile

    opened = LogFile(file)
    try:
        opened.open()
    except OSError as error:
        raise SettingsError(f"log_file: {file}: {error.strerror}.") from error
    opened.follow()
    return opened


def flags_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among the parameters of `serve`; None: not given."""
    flags = {name: value for name, value in given.items() if name in Settings.model_fields}
    return flags | {"aliases": given["alias"] or None}


def find_model(settings: Settings) -> ServedModel:
    """The model that the settings name, downloaded if it must be; without one, the demo.

    Raises:
        ModelNotFound: there is no such folder or repository.
        CheckpointError: it holds another kind of model.
    """
    from glmd.api.state import ServedModel
    from glmd.checkpoint.config import load_config
    from glmd.checkpoint.hub import DEMO, resolve_model

    name = settings.model
    if name is None:
        log.warning(
            "No model was named, so this is the bundled demo: GLM-4.7-Flash's architecture, but"
            " tiny, and it knows next to nothing. Name a folder or a Hugging Face repository."
        )
        return ServedModel.of("glmd-demo", DEMO, settings.aliases)
    folder = resolve_model(name)
    load_config(folder)  # The engine would refuse another model, too, but seconds later.
    is_path = folder == Path(name).expanduser()
    return ServedModel.of(folder.resolve().name if is_path else name, folder, settings.aliases)
