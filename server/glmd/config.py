"""Every setting of the server, once: its type, its default, its limits and what it means.

A setting comes from, in this order: a command-line flag, the environment (`GLMD_PORT`), the
configuration file (TOML), its default.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import BeforeValidator, ByteSize, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as SourceError

from glmd.errors import SettingsError
from glmd.profiles import BUILT_IN, Profile, ProfileName
from glmd.utils.suggest import did_you_mean

PREFIX = "GLMD_"

CONFIG_VARIABLE = "GLMD_CONFIG"
"""Names the configuration file; not a setting itself."""


def split_commas(value: object) -> object:
    """`a,b` as the environment spells a list; anything else as it is."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


Effort = Literal["minimal", "low", "medium", "high", "xhigh", "max"]

EFFORT_BUDGETS: dict[Effort, int] = {"minimal": 512, "low": 1024, "medium": 8192, "high": 24576}
"""Tokens of reasoning by effort. Google publishes the last three for Gemini, which takes OpenAI's
efforts for thinking budgets (https://ai.google.dev/gemini-api/docs/openai), and nobody else any:
GLM was not trained on efforts, so what they mean is for the server to say."""


def split_budgets(value: object) -> object:
    """`low=2048,high=16384`, or a table, over `EFFORT_BUDGETS`."""
    if isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        value = {name.strip(): tokens.strip() for name, _, tokens in pairs}
    return {**EFFORT_BUDGETS, **value} if isinstance(value, dict) else value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)]
Budget = Annotated[int, Field(ge=0)]
Budgets = Annotated[dict[Effort, Budget], NoDecode, BeforeValidator(split_budgets)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseSettings):
    """The settings of `glmd serve`. Made by `load`, which knows where values come from."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    # What is served
    model: str | None = Field(
        None, description="Checkpoint folder or Hugging Face repo id; none: the bundled demo."
    )
    aliases: Names = Field(
        (), description="More names that the model answers to, such as gpt-4o or claude-*."
    )

    # HTTP
    host: str = Field("127.0.0.1", description="Address or host name to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0: any free one.")
    api_key: SecretStr | None = Field(
        None,
        min_length=1,
        description="Key that clients must send, as `Authorization: Bearer` or `x-api-key`.",
    )
    api_key_file: Path | None = Field(
        None, description="File with more keys, one per line, that only you can read."
    )
    allow_unauthenticated: bool = Field(
        False, description="Listen without a key even where other machines can reach it."
    )
    allowed_hosts: Names = Field(
        (),
        description="More names that clients may call the server by (in `Host`), such as"
        " llm.example.org or *.example.org.",
    )
    cors_origins: Names = Field(
        (),
        description="Sites whose pages may use the server, such as http://localhost:3000;"
        " none: its own page alone.",
    )
    max_body: ByteSize = Field(
        ByteSize(32 * 2**20), ge=1024, description="Largest request body, such as 32MiB."
    )
    keep_alive: float = Field(
        10.0, gt=0, description="Seconds of silence after which a stream shows that it lives."
    )
    drain_timeout: float = Field(
        30.0, ge=0, description="Seconds that running requests get to end at shutdown."
    )

    # Overload
    header_timeout: float = Field(
        20.0, gt=0, description="Seconds in which a connection must have sent a request's head."
    )
    body_timeout: float = Field(
        60.0, gt=0, description="Seconds in which a request's body must have arrived."
    )
    reader_timeout: float = Field(
        60.0, gt=0, description="Seconds for which a client may read nothing of its answer."
    )
    max_queue: int = Field(
        1024,
        ge=1,
        description="Most answers that may wait for their turn; one client alone gets half of it.",
    )
    max_queue_tokens: int = Field(
        4_000_000, ge=1, description="Most prompt tokens that may wait for their turn."
    )
    queue_timeout: float | None = Field(
        None, gt=0, description="Seconds a request may wait for its turn; none: no limit."
    )
    first_token_timeout: float | None = Field(
        None, gt=0, description="Seconds until a request's first token; none: no limit."
    )
    request_timeout: float | None = Field(
        None, gt=0, description="Seconds until a request is done; none: no limit."
    )

    # Engine
    max_context: int | None = Field(
        None, ge=1, description="Longest prompt plus answer, in tokens; none: the checkpoint's."
    )
    max_running: int | None = Field(
        None, ge=1, description="Most sequences in one step; none: the engine's default."
    )
    max_step_tokens: int | None = Field(
        None, ge=1, description="Most token rows in one step; none: the engine's default."
    )
    mtp: Literal["off", "auto", "1", "2", "3"] = Field(
        "auto",
        description="MTP drafts per step; auto: as measurement decides; off: no MTP layer.",
    )
    memory_budget: ByteSize | None = Field(
        None, ge=1, description="Bytes for weights, KV and transients; none: from the device."
    )

    # Thinking, for requests that do not say
    enable_thinking: bool = Field(True, description="Think before answering.")
    clear_thinking: bool = Field(
        False, description="Drop the reasoning of earlier turns from the prompt."
    )

    effort_budgets: Budgets = Field(
        EFFORT_BUDGETS,
        description="Tokens of reasoning that each reasoning_effort allows, such as"
        " low=2048,high=16384; none is named for an effort: any number.",
    )

    turn_memory: int = Field(
        4_000_000,
        ge=0,
        description="Tokens of generated turns that are kept, so that a turn which comes back"
        " keeps its reasoning and its place in the cache; 0: none.",
    )

    response_store: ByteSize = Field(
        ByteSize(256 * 2**20),
        ge=0,
        description="Responses (of /v1/responses) that are kept, so that others may go on from them"
        " and clients retrieve them, such as 256MiB; 0: none.",
    )

    # Sampling, for requests that do not say; none: the checkpoint's generation_config.json,
    # else what the model card recommends
    temperature: float | None = Field(None, ge=0, le=2, description="Default temperature.")
    top_p: Probability | None = Field(None, gt=0, description="Default top_p.")
    top_k: int | None = Field(None, ge=0, description="Default top_k; 0: off.")
    min_p: Probability | None = Field(None, description="Default min_p.")
    max_tokens: int | None = Field(
        None, ge=1, description="Default limit of an answer's tokens; none: the context's."
    )

    profile: str | None = Field(
        None, description="Profile of requests that name none, such as card, general or tools."
    )
    profiles: dict[ProfileName, Profile] = Field(
        {},
        description="More profiles, each a table `[profiles.NAME]` of the file; in the environment"
        " an object in JSON.",
    )

    log_file: Path | None = Field(
        None,
        description="File to write the log to, instead of stderr; begun anew when it is renamed,"
        " and beyond 10 MB.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Least severe log lines to write."
    )
    log_format: Literal["auto", "text", "json"] = Field(
        "auto", description="Form of log lines; auto: text on a terminal, else JSON."
    )
    tracing: bool = Field(
        False,
        description="Send OpenTelemetry spans, as the OTEL_… variables say; wants glmd[otel].",
    )
    slow_request: float = Field(
        30.0,
        ge=0,
        description="Seconds without a token after which the log says where a request's time went;"
        " 0: never.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` hands over, so that one place decides which source wins."""
        return (init_settings,)

    @property
    def all_profiles(self) -> dict[str, Profile]:
        """The built-in profiles, and those defined here, which win."""
        return {**BUILT_IN, **self.profiles}

    @property
    def engine_config(self) -> dict[str, int | str]:
        """The fields of the engine's configuration that are set here."""
        names = ("max_context", "max_running", "max_step_tokens", "memory_budget")
        limits = {name: int(value) for name in names if (value := getattr(self, name)) is not None}
        return {**limits, "mtp": DRAFTS[self.mtp]}


DRAFTS: dict[str, int | str] = {"off": 0, "auto": "auto", "1": 1, "2": 2, "3": 3}
"""`Settings.mtp` as the engine knows it."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and where they come from.

    Attributes:
        settings: the values.
        file: the configuration file that was read; None: there is none.
        origins: of each setting that is not at its default, as its source spells it:
            `--port`, `GLMD_PORT`, `/path/to/config.toml: port`.
    """

    settings: Settings
    file: Path | None
    origins: Mapping[str, str]


def load(flags: Mapping[str, Any], config: Path | None = None) -> Settings:
    """The settings from flags, environment and configuration file; see `load_with_origins`."""
    return load_with_origins(flags, config).settings


def load_with_origins(flags: Mapping[str, Any], config: Path | None = None) -> Loaded:
    """The settings from flags, environment and configuration file.

    Args:
        flags: settings given on the command line; None means not given.
        config: the configuration file; None: the one `find_config` finds.

    Raises:
        SettingsError: a key is unknown or a value is bad, in one line that says where.
    """
    config = config or find_config()
    known = Settings.model_fields.keys()
    from_file = {} if config is None else read_toml(config)
    refuse_unknown(from_file, known, place=f"{config}: ")
    refuse_unknown_in_profiles(from_file.get("profiles"), place=f"{config}: ")
    variables = [name for name in os.environ if name.upper().startswith(PREFIX)]
    refuse_unknown(variables, [CONFIG_VARIABLE, *(PREFIX + name.upper() for name in known)])
    layers = [
        (f"{config}: ", from_file),
        (PREFIX, read_environment()),
        ("--", {name: value for name, value in flags.items() if value is not None}),
    ]
    values = {name: value for _, layer in layers for name, value in layer.items()}
    origins = {name: spell(place, name) for place, layer in layers for name in layer}
    try:
        settings = Settings(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name, *inner = (str(part) for part in first["loc"] if part != "[key]")
        where = ".".join([origins[name], *inner])
        raise SettingsError(f"{where}: {first['msg']}.") from error
    if settings.profile is not None and settings.profile not in settings.all_profiles:
        raise SettingsError(
            f"{origins['profile']}: There is no profile {settings.profile}"
            f"{did_you_mean(settings.profile, settings.all_profiles)}"
        )
    return Loaded(settings, config, origins)


def find_config() -> Path | None:
    """The file that `GLMD_CONFIG` names, else the first of `default_configs()` that is there."""
    if os.environ.get(CONFIG_VARIABLE):
        return Path(os.environ[CONFIG_VARIABLE]).expanduser()
    return next((path for path in default_configs() if path.is_file()), None)


def read_environment() -> dict[str, Any]:
    """The settings that the environment holds, as far as it holds any.

    Raises:
        SettingsError: one that must be JSON is not.
    """
    try:
        return EnvSettingsSource(Settings)()
    except SourceError as error:
        name = next((each for each in Settings.model_fields if f'"{each}"' in str(error)), "")
        raise SettingsError(f"{spell(PREFIX, name)}: This must be an object in JSON.") from error


def spell(place: str, name: str) -> str:
    """A setting's name as its source spells it: `--max-body`, `GLMD_MAX_BODY`, `file: max_body`."""
    if place == "--":
        return place + name.replace("_", "-")
    return place + (name.upper() if place == PREFIX else name)


def default_configs() -> list[Path]:
    """Where a configuration file is looked for: ~/.config first, then the platform's own place."""
    base = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return [base / "glmd" / "config.toml", platformdirs.user_config_path("glmd") / "config.toml"]


def read_toml(path: Path) -> dict[str, Any]:
    """The top-level table of a TOML file.

    Raises:
        SettingsError: the file cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}.") from error
    except ValueError as error:
        raise SettingsError(f"{path}: {error}.") from error


def refuse_unknown(
    names: Iterable[str], known: Iterable[str], place: str = "", kind: str = "setting"
) -> None:
    """Raise a SettingsError that names the nearest known name, if one of `names` is not known."""
    known = list(known)
    for name in names:
        if name not in known:
            hint = did_you_mean(name.replace("-", "_"), known)
            raise SettingsError(f"{place}There is no {kind} {name}{hint}")


def refuse_unknown_in_profiles(profiles: object, place: str) -> None:
    """The same for the tables `[profiles.NAME]`; what is no table is left to validation."""
    tables = profiles if isinstance(profiles, dict) else {}
    for name, table in tables.items():
        if isinstance(table, dict):
            refuse_unknown(
                table, Profile.model_fields, f"{place}profiles.{name}: ", "setting of a profile"
            )
