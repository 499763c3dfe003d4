"""Sources of the settings: flags, environment and configuration file.

In order of precedence: command-line flag, environment variable (`GLMD_PORT`), configuration file
(TOML), default.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource
from pydantic_settings import SettingsError as SourceError

from glmd.config import CONFIG_VARIABLE, PREFIX, Profile, Settings
from glmd.errors import SettingsError
from glmd.utils.text import did_you_mean


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings with the origin of their values.

    Attributes:
        file: the configuration file that was read; None: no file was found.
        origins: name in its source of each setting that is set: `--port`, `GLMD_PORT` or
            `/path/to/config.toml: port`.
    """

    settings: Settings
    file: Path | None
    origins: Mapping[str, str]


def load(
    flags: Mapping[str, Any],
    config: Path | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Settings:
    """Read the settings; arguments and errors as of `load_with_origins`.

    Args:
        defaults: settings in place of the built-in defaults.
    """
    loaded = load_with_origins(flags, config)
    update = {name: value for name, value in (defaults or {}).items() if name not in loaded.origins}
    return loaded.settings.model_copy(update=update)


def load_with_origins(flags: Mapping[str, Any], config: Path | None = None) -> LoadedSettings:
    """Read the settings from flags, environment and configuration file.

    Args:
        flags: settings of the command line; None as a value: not given.
        config: the configuration file; None: the result of `find_config`.

    Raises:
        SettingsError: unknown name or invalid value, in one line that names its source.
    """
    config = config or find_config()
    known = Settings.model_fields.keys()
    from_file = {} if config is None else read_toml(config)
    reject_unknown(from_file, known, f"{config}: ")
    reject_unknown_in_profiles(from_file.get("profiles"), f"{config}: ")
    variables = [name for name in os.environ if name.upper().startswith(PREFIX)]
    reject_unknown(variables, [CONFIG_VARIABLE, *(PREFIX + name.upper() for name in known)])
    sources = [
        (f"{config}: ", from_file),
        (PREFIX, read_environment()),
        ("--", {name: value for name, value in flags.items() if value is not None}),
    ]
    values = {name: value for _, source in sources for name, value in source.items()}
    origins = {name: spell(prefix, name) for prefix, source in sources for name in source}
    try:
        settings = Settings(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name, *inner = (str(part) for part in first["loc"] if part != "[key]")
        where = ".".join([origins[name], *inner])
        problem = first["msg"].removeprefix("Value error, ").rstrip(".")
        raise SettingsError(f"{where}: {problem}.") from error
    if settings.profile is not None:
        reject_unknown(
            [settings.profile], settings.all_profiles, f"{origins['profile']}: ", "profile"
        )
    return LoadedSettings(settings, config, origins)


def find_config() -> Path | None:
    """Return the file of `GLMD_CONFIG`, else the first existing default file."""
    if os.environ.get(CONFIG_VARIABLE):
        return Path(os.environ[CONFIG_VARIABLE]).expanduser()
    return next((path for path in default_configs() if path.is_file()), None)


def default_configs() -> list[Path]:
    """List the default files: below ~/.config, then in the platform's folder."""
    base = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return [base / "glmd" / "config.toml", platformdirs.user_config_path("glmd") / "config.toml"]


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        SettingsError: the file cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}.") from error
    except ValueError as error:
        raise SettingsError(f"{path}: {error}.") from error


def read_environment() -> dict[str, Any]:
    """Read the settings in the environment.

    Raises:
        SettingsError: a variable must hold JSON and does not.
    """
    try:
        return EnvSettingsSource(Settings)()
    except SourceError as error:
        name = next((name for name in Settings.model_fields if f'"{name}"' in str(error)), "")
        raise SettingsError(f"{spell(PREFIX, name)}: Must be a JSON object.") from error


def spell(prefix: str, name: str) -> str:
    """Spell a setting: `--max-body`, `GLMD_MAX_BODY` or `FILE: max_body`."""
    if prefix == "--":
        return prefix + name.replace("_", "-")
    return prefix + (name.upper() if prefix == PREFIX else name)


def reject_unknown(
    names: Iterable[str], known: Iterable[str], prefix: str = "", kind: str = "setting"
) -> None:
    """Raise a SettingsError for the first unknown name, with a similar known name."""
    known = list(known)
    for name in names:
        if name not in known:
            hint = did_you_mean(name.replace("-", "_"), known)
            raise SettingsError(f"{prefix}Unknown {kind} {name}{hint}")


def reject_unknown_in_profiles(profiles: object, prefix: str) -> None:
    """Apply `reject_unknown` to the tables `[profiles.NAME]`."""
    tables = profiles if isinstance(profiles, dict) else {}
    for name, table in tables.items():
        if isinstance(table, dict):
            reject_unknown(
                table, Profile.model_fields, f"{prefix}profiles.{name}: ", "profile setting"
            )
