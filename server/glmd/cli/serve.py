"""`glmd serve`: run the server."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from glmd.config import CONFIG_VARIABLE, SERVICE_DEFAULTS, Settings
from glmd.config_sources import load
from glmd.errors import SettingsError
from glmd.utils.logging import choose_format, configure

if TYPE_CHECKING:
    from glmd.engine_client.process import EngineProcess, EngineProcessConfig
    from glmd.utils.logging import LogFile

log = logging.getLogger("glmd")

DISK_FILE = "conversations.sqlite"
"""File in the disk cache's folder with generated turns and stored responses."""


def describe_setting(name: str) -> str:
    """Describe a setting and its default, for `--help`."""
    field = Settings.model_fields[name]
    default = "" if field.default in (None, (), False) else f" Default: {field.default}."
    return f"{field.description}{default}"


def flag(name: str, *spellings: str) -> Any:
    """Define the command-line flag of a setting, with its choices if any."""
    kind = Settings.model_fields[name].annotation
    choices = "|".join(get_args(kind)) if get_origin(kind) is Literal else None
    return typer.Option(
        *spellings, help=describe_setting(name), show_default=False, metavar=choices
    )


ModelArgument = Annotated[
    str | None, typer.Argument(help=describe_setting("model"), show_default=False)
]
HostOption = Annotated[str | None, flag("host")]
PortOption = Annotated[int | None, flag("port")]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help=f"Configuration file (TOML). Default: {CONFIG_VARIABLE}, else"
        " ~/.config/glmd/config.toml.",
        show_default=False,
    ),
]


def serve(
    model: ModelArgument = None,
    host: HostOption = None,
    port: PortOption = None,
    api_key: Annotated[str | None, flag("api_key")] = None,
    api_key_file: Annotated[Path | None, flag("api_key_file")] = None,
    allow_unauthenticated: Annotated[
        bool | None, flag("allow_unauthenticated", "--allow-unauthenticated")
    ] = None,
    alias: Annotated[list[str] | None, flag("aliases", "--alias")] = None,
    max_context: Annotated[int | None, flag("max_context")] = None,
    max_running: Annotated[int | None, flag("max_running")] = None,
    mtp: Annotated[str | None, flag("mtp")] = None,
    dtype: Annotated[str | None, flag("dtype")] = None,
    kv_bits: Annotated[str | None, flag("kv_bits")] = None,
    memory_budget: Annotated[str | None, flag("memory_budget")] = None,
    ranks: Annotated[str | None, flag("ranks")] = None,
    log_file: Annotated[Path | None, flag("log_file")] = None,
    log_level: Annotated[str | None, flag("log_level")] = None,
    config: ConfigOption = None,
    service: Annotated[
        bool, typer.Option("--service", hidden=True, help="Use the defaults of the service.")
    ] = False,
) -> None:
    """Serve a checkpoint through the OpenAI and Anthropic APIs.

    Every setting can also be set in the environment (GLMD_PORT) or in the configuration file;
    `glmd config show` lists all settings.

    Example: glmd serve leonsarmiento/GLM-4.7-Flash-5bit-mlx --port 8001
    """
    flags = flags_of(locals())
    defaults = SERVICE_DEFAULTS if service else None
    settings = load(flags, config, defaults)
    log_file = settings.log_file and settings.log_file.expanduser().absolute()
    opened = write_log_to(log_file) if log_file is not None else None
    log_format = choose_format(settings.log_format, sys.stderr)
    configure(settings.log_level, log_format)

    # Imported late, so that `glmd --help` and errors in the settings take no second.
    from glmd.api.auth import ApiKeyStore, default_store, require_key_on_public_bind
    from glmd.api.sockets import base_url, listen, raise_file_limit
    from glmd.engine_client.process import EngineProcessConfig

    keys = ApiKeyStore.of(settings, default_store())
    require_key_on_public_bind(settings, keys)  # before any download
    name, folder = find_model(settings)
    raise_file_limit()
    sockets = listen(settings.host, settings.port)  # before any weights are loaded
    # The page and the chat wait for the model.
    log.info("Chat page: %s/ (or try: glmd chat)", base_url(settings.host, sockets))

    def reload() -> Settings:
        if opened is not None:
            opened.refresh()
        return load(flags, config, defaults)

    disk_folder, disk_cache = settings.disk_cache_place
    disk_file = disk_folder / DISK_FILE if disk_cache else None
    launch = EngineProcessConfig(
        folder,
        {**settings.engine_config, "disk_cache": disk_cache, "disk_cache_folder": str(disk_folder)},
        log_level=settings.log_level,
        log_format=log_format,
        log_file=log_file,
    )
    with start_engine(launch) as process:
        from glmd.api.server import run
        from glmd.api.state import AppState, ServedModel

        served = ServedModel.of(name, folder, settings.aliases)
        run(AppState(settings, served, launch, keys, process, disk_file), sockets, reload)


@contextmanager
def start_engine(config: EngineProcessConfig) -> Iterator[EngineProcess | None]:
    """Start the engine process, to load the model while the API is imported.

    The process is killed at the end of the context if it still runs then, as after an error before
    the server took it over. Yields None if it cannot be started: the server tries again.
    """
    from glmd.engine_client.process import EngineProcess

    try:
        process = EngineProcess.start(config)
    except OSError:
        yield None
        return
    try:
        yield process
    finally:
        process.kill()


def write_log_to(file: Path) -> LogFile:
    """Redirect stdout and stderr to a file.

    Raises:
        SettingsError: the file cannot be opened.
    """
    from glmd.utils.logging import LogFile

    opened = LogFile(file)
    try:
        opened.open()
    except OSError as error:
        raise SettingsError(f"log_file: {file}: {error.strerror}.") from error
    opened.follow()
    return opened


def flags_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Select the settings among the parameters of `serve`; None as a value: not given."""
    flags = {name: value for name, value in given.items() if name in Settings.model_fields}
    return flags | {"aliases": given["alias"] or None}


def find_model(settings: Settings) -> tuple[str, Path]:
    """Return the name and the folder of the model to serve; download it if necessary.

    Raises:
        ModelNotFound: no such folder or repository.
        CheckpointError: a checkpoint of another architecture.
    """
    from glmd.checkpoint.config import load_config
    from glmd.checkpoint.hub import DEMO, RECOMMENDED, cached_folder, full_name, resolve_model

    if settings.model is None and cached_folder(RECOMMENDED) is None:
        log.warning(
            "No model given: serving the bundled demo, a tiny model of the GLM-4.7-Flash"
            " architecture with almost no knowledge. `glmd pull` downloads the recommended model."
        )
        return "glmd-demo", DEMO
    name = full_name(settings.model or RECOMMENDED)
    if name == str(DEMO):
        return "glmd-demo", DEMO
    folder = resolve_model(name, for_serving=True)
    load_config(folder)  # The engine would reject another architecture seconds later.
    is_path = folder == Path(name).expanduser()
    return folder.resolve().name if is_path else name, folder
