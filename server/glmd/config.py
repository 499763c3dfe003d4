"""The server's settings: types, defaults, limits and descriptions.

`glmd.config_sources` reads them from flags, environment and configuration file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import platformdirs
import psutil
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from glmd.utils.files import free_bytes

PREFIX = "GLMD_"

CONFIG_VARIABLE = "GLMD_CONFIG"
"""Environment variable with the path of the configuration file; not a setting."""

ProfileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
"""Follows the model name and a colon in a request, as in `default:tools`."""


class Profile(BaseModel):
    """Named defaults for sampling and thinking, which a request can choose.

    None: the value that applies without a profile.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, description="0: off.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="1: off.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    max_tokens: int | None = Field(None, ge=1)
    enable_thinking: bool | None = None
    clear_thinking: bool | None = None
    aliases: tuple[str, ...] = Field(
        (), description="Model names that choose the profile, such as claude-haiku-*."
    )

    @property
    def values(self) -> dict[str, Any]:
        """The defaults that the profile sets."""
        return self.model_dump(exclude_none=True, exclude={"aliases"})


BUILT_IN: Mapping[str, Profile] = {
    name: Profile.model_validate(values)
    for name, values in {
        "card": {"temperature": 0.2, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
        "general": {"temperature": 1.0, "top_k": 0, "top_p": 0.95, "min_p": 0.0},
        "tools": {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    }.items()
}
"""Profiles that exist unless the settings redefine them. `card`: the card of the mixed 8/5-bit
model (https://huggingface.co/leonsarmiento/GLM-4.7-Flash-5bit-mlx); `general` and `tools`: the
model's authors (https://huggingface.co/zai-org/GLM-4.7-Flash)."""

Effort = Literal["minimal", "low", "medium", "high", "xhigh", "max"]

EFFORT_BUDGETS: dict[Effort, int] = {"minimal": 512, "low": 1024, "medium": 8192, "high": 24576}
"""Reasoning token limit of each effort. GLM was not trained on efforts; the last three are
Gemini's (https://ai.google.dev/gemini-api/docs/openai), the only published mapping."""


def split_commas(value: object) -> object:
    """Split `a,b`, the form of a list in the environment."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def split_budgets(value: object) -> object:
    """Split `low=2048,high=16384`; efforts that are left out keep their default."""
    if isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        value = {name.strip(): tokens.strip() for name, _, tokens in pairs}
    return {**EFFORT_BUDGETS, **value} if isinstance(value, dict) else value


def read_base_url(value: str) -> str:
    """Read the base URL of a server, without a slash at the end."""
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise ValueError("write a URL such as http://mac-2.local:8000")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError("write the URL without a path")
    return f"{parts.scheme}://{parts.netloc}"


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)]
BaseUrl = Annotated[str, AfterValidator(read_base_url)]
BaseUrls = Annotated[tuple[BaseUrl, ...], NoDecode, BeforeValidator(split_commas)]
Budget = Annotated[int, Field(ge=0)]


def read_memory(value: Any) -> Any:
    """Read an amount of memory: with a unit (`24GiB`) or as a share (`75%`)."""
    if not isinstance(value, str | int) or isinstance(value, bool):
        return value
    text = str(value).strip()
    if text.endswith("%"):
        try:
            share = float(text[:-1])
        except ValueError:
            share = 0
        if not 0 < share <= 100:
            raise ValueError(f"{text} is not a share between 0% and 100%")
        return int(psutil.virtual_memory().total * share / 100)
    if text.isdecimal() and int(text) < LEAST_MEMORY:
        raise ValueError(f"{text} means {text} bytes. Write {text}GiB, or a share such as 75%")
    return text


SERVICE_DEFAULTS: Mapping[str, Any] = {"idle_unload": 60.0}
"""Defaults of a server that runs in the background all day."""

LEAST_MEMORY = 1 << 20
"""Bytes below which a number without a unit is a mistake."""

Memory = Annotated[ByteSize, BeforeValidator(read_memory)]
Budgets = Annotated[dict[Effort, Budget], NoDecode, BeforeValidator(split_budgets)]
Probability = Annotated[float, Field(ge=0, le=1)]

DRAFTS: dict[str, int | str] = {"off": 0, "auto": "auto", "1": 1, "2": 2, "3": 3}
"""Values of `Settings.mtp`, and what each is in the engine's configuration."""


MAX_DISK_CACHE = 32 << 30
"""Bytes that the disk cache takes by default at most: 600k tokens of GLM-4.7-Flash."""


class Settings(BaseSettings):
    """Settings of `glmd serve`. Create them with `load`, which reads all sources."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    # Model
    model: str | None = Field(
        None,
        description="Checkpoint folder, Hugging Face repo id, or short name (glm-4.7-flash, demo)."
        " Default: glm-4.7-flash if `glmd pull` has downloaded it, else the bundled demo model.",
    )
    aliases: Names = Field(
        (), description="Additional model names to accept, such as gpt-4o or claude-*."
    )

    # HTTP
    host: str = Field("127.0.0.1", description="Address or host name to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 chooses a free port.")
    api_key: SecretStr | None = Field(
        None,
        min_length=1,
        description="API key that clients must send, as `Authorization: Bearer` or `x-api-key`.",
    )
    api_key_file: Path | None = Field(
        None,
        description="File with additional API keys, one per line, readable by its owner only.",
    )
    allow_unauthenticated: bool = Field(
        False, description="Listen on a non-loopback address without an API key."
    )
    allowed_hosts: Names = Field(
        (),
        description="Additional `Host` headers to accept, such as llm.example.org or"
        " *.example.org.",
    )
    cors_origins: Names = Field(
        (),
        description="Web origins that may call the server, such as http://localhost:3000."
        " Default: only the server's own page.",
    )
    max_body: ByteSize = Field(
        ByteSize(32 * 2**20), ge=1024, description="Maximum size of a request body, such as 32MiB."
    )
    keep_alive: float = Field(10.0, gt=0, description="SSE keep-alive interval, in seconds.")
    drain_timeout: float = Field(
        30.0, ge=0, description="Time for running requests to finish at shutdown, in seconds."
    )

    # Limits
    header_timeout: float = Field(
        20.0, gt=0, description="Time limit for receiving the headers of a request, in seconds."
    )
    body_timeout: float = Field(
        60.0, gt=0, description="Time limit for receiving the body of a request, in seconds."
    )
    reader_timeout: float = Field(
        60.0,
        gt=0,
        description="Disconnect a client that reads nothing of its response for this time, in"
        " seconds.",
    )
    max_queue: int = Field(
        1024,
        ge=1,
        description="Maximum number of queued sequences; a single client may queue half of it.",
    )
    max_queue_tokens: int = Field(
        4_000_000, ge=1, description="Maximum number of queued prompt tokens."
    )
    queue_timeout: float | None = Field(
        None, gt=0, description="Time limit in the queue, in seconds. Default: no limit."
    )
    first_token_timeout: float | None = Field(
        None, gt=0, description="Time limit to the first token, in seconds. Default: no limit."
    )
    request_timeout: float | None = Field(
        None, gt=0, description="Time limit for a whole request, in seconds. Default: no limit."
    )

    # Engine
    max_context: int | None = Field(
        None,
        ge=1,
        description="Maximum length of prompt plus output, in tokens. Default: the checkpoint's.",
    )
    max_running: int | None = Field(
        None, ge=1, description="Maximum number of sequences in a step. Default: 32."
    )
    max_step_tokens: int | None = Field(
        None,
        ge=1,
        description="Maximum number of token rows in a step. Default: 2048, or less where memory"
        " is short.",
    )
    min_stream_rate: float = Field(
        10.0,
        gt=0,
        description="Tokens per second that each stream keeps on average while prompts are"
        " computed; a slow device gives prompts a quarter of the time.",
    )
    max_gap: float = Field(
        0.25,
        gt=0,
        description="Longest time between two tokens of a stream while prompts are computed, in"
        " seconds.",
    )
    mtp: Literal["off", "auto", "1", "2", "3"] = Field(
        "auto",
        description="MTP drafts per step; auto follows the measured gain and leaves the MTP layer"
        " out where memory is short, off does not load it.",
    )
    kv_bits: Literal["auto", "16", "8", "4"] = Field(
        "auto",
        description="Bits of a value in the KV cache, 16 being the model's precision; auto is 16 if"
        " 65,536 tokens fit in memory, else 8.",
    )
    dtype: Literal["auto", "bfloat16", "float16"] = Field(
        "auto",
        description="Data type of activations, KV cache and unquantised weights; auto is bfloat16,"
        " in which the model was trained, or float32 without a GPU.",
    )
    mla_kernel: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Decode attention in a Metal kernel of glmd's own; auto uses it if a trial at"
        " load finds it right and not slower than MLX's, on does not compare times.",
    )
    experts_kernel: Literal["auto", "on", "off"] = Field(
        "auto",
        description="The same for the routed experts of up to 63 rows. auto uses the kernel for"
        " those numbers of rows for which it is not slower.",
    )
    memory_budget: Memory | None = Field(
        None,
        ge=1,
        description="Memory for weights, KV cache and activations, such as 20GiB, or 75% of this"
        " machine's. Default: derived from the device.",
    )
    idle_unload: Annotated[
        Annotated[float, Field(gt=0)] | None,
        BeforeValidator(lambda value: None if value == "off" else value),
    ] = Field(
        None,
        description="Minutes without a request after which the engine process ends and its memory"
        " is free; the next request starts it again and waits. The background service uses"
        f" {SERVICE_DEFAULTS['idle_unload']:g} unless this is set; off is never.",
    )
    disk_cache: ByteSize | None = Field(
        None,
        ge=0,
        description="Disk space for KV, generated turns and stored responses that survive a"
        " restart, such as 32GiB; 0 turns it off. Default: a quarter of what is free, at most"
        " 32 GiB.",
    )
    disk_cache_folder: Path | None = Field(
        None,
        description="Folder of the disk cache, used by one server at a time. Default: glmd/kv in"
        " the user's folder for caches.",
    )
    kv_events: str | None = Field(
        None,
        description="ZeroMQ endpoint to bind, such as tcp://127.0.0.1:5557, at which the token ids"
        " that are cached are published for routers, in vLLM's format and without a key. Default:"
        " nowhere.",
    )
    kv_events_replay: str | None = Field(
        None,
        description="ZeroMQ endpoint to bind, such as tcp://127.0.0.1:5558, from which routers get"
        " events of `kv_events` that they missed. Default: none.",
    )
    ranks: int | Path = Field(
        1,
        description="Processes among which the model is divided: their number, all on this machine,"
        " or a file of hosts as for mlx.launch. On the other hosts run `glmd rank`.",
    )
    rank_port: int = Field(
        32322,
        ge=1,
        le=65535,
        description="Port of the first host at which the other ranks report. Keep it and the links"
        " of the ranks to machines that you trust: they have no keys.",
    )
    rank_timeout: float = Field(
        10.0,
        gt=1,
        description="Restart all ranks when one has sent nothing for this time, in seconds.",
    )
    hang_timeout: float = Field(
        120.0,
        ge=0,
        description="Restart an engine that has not answered for this time, in seconds, and five"
        " times as long while it loads; 0 never does, for a debugger.",
    )
    prevent_sleep: bool = Field(
        True, description="On macOS, prevent idle sleep of the Mac while requests run."
    )

    # Thinking
    enable_thinking: bool = Field(
        True,
        description="Think before answering, in requests that do not set it. Lines at the head of"
        " the chat template can set another default.",
    )
    clear_thinking: bool = Field(
        False,
        description="Leave the reasoning of earlier turns out of the prompt, in requests that do"
        " not set it. Lines at the head of the chat template can set another default.",
    )
    effort_budgets: Budgets = Field(
        EFFORT_BUDGETS,
        description="Reasoning token limit of each reasoning_effort, such as low=2048,high=16384;"
        " an effort that is not listed has no limit.",
    )
    reasoning_alias: bool = Field(
        False,
        description="Write the reasoning of chat completions also as `reasoning`, vLLM's newer name"
        " of `reasoning_content`.",
    )
    turn_memory: int = Field(
        4_000_000,
        ge=0,
        description="Tokens of generated turns to keep, so that turns that clients send back keep"
        " their reasoning and stay cached; 0 keeps none.",
    )
    response_store: ByteSize = Field(
        ByteSize(256 * 2**20),
        ge=0,
        description="Memory, and size on disk, of the stored responses of /v1/responses, such as"
        " 256MiB; 0 stores none.",
    )

    peers: BaseUrls = Field(
        (),
        description="Base URLs of other servers with the same model and keys, such as"
        " http://mac-2.local:8000. A stored response that is not found here is asked for there,"
        " with the client's key.",
    )

    # Sampling; None: the checkpoint's generation_config.json, else the model card's
    temperature: float | None = Field(
        None, ge=0, le=2, description="Default temperature of requests."
    )
    top_p: Probability | None = Field(None, gt=0, description="Default top_p of requests.")
    top_k: int | None = Field(None, ge=0, description="Default top_k of requests; 0 turns it off.")
    min_p: Probability | None = Field(None, description="Default min_p of requests.")
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Default max_tokens of requests. Default: what the context leaves.",
    )
    profile: str | None = Field(
        None, description="Default profile of requests, such as card, general or tools."
    )
    profiles: dict[ProfileName, Profile] = Field(
        {},
        description="Additional profiles: tables `[profiles.NAME]` in the file, a JSON object in"
        " the environment.",
    )

    # Logging
    log_file: Path | None = Field(
        None,
        description="Log to this file instead of stderr; rotated at 10 MB, and reopened when it is"
        " renamed.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="Minimum level of log lines."
    )
    log_format: Literal["auto", "text", "json"] = Field(
        "auto", description="Format of log lines; auto is text on a terminal, else JSON."
    )
    tracing: bool = Field(
        False,
        description="Export OpenTelemetry spans as the OTEL_… variables say; needs glmd[otel].",
    )
    slow_request: float = Field(
        30.0,
        ge=0,
        description="Log the times of a request's phases if it gets no token for this time, in"
        " seconds; 0 turns it off.",
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
        """Take values from `load` only: merging here would lose the origin of each value."""
        return (init_settings,)

    @property
    def all_profiles(self) -> dict[str, Profile]:
        """Built-in profiles, overridden by those of the settings."""
        return {**BUILT_IN, **self.profiles}

    @property
    def disk_cache_place(self) -> tuple[Path, int]:
        """Folder and capacity of the disk cache in bytes; 0: there is none.

        Looks at the disk: the default depends on its free space, and the cache's own counts as
        free.
        """
        folder = self.disk_cache_folder or platformdirs.user_cache_path("glmd") / "kv"
        folder = folder.expanduser().absolute()
        capacity = self.disk_cache
        if capacity is None and self.ranks != 1:
            capacity = ByteSize(0)  # The KV of ranks is not saved.
        if capacity is None:
            kept = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            capacity = ByteSize(min(MAX_DISK_CACHE, (free_bytes(folder) + kept) // 4))
        return folder, int(capacity)

    @property
    def engine_config(self) -> dict[str, float | str]:
        """Fields of the engine's configuration that the settings set."""
        names = ("max_context", "max_running", "max_step_tokens", "memory_budget")
        limits = {name: int(value) for name in names if (value := getattr(self, name)) is not None}
        endpoints = {"kv_events": self.kv_events, "kv_events_replay": self.kv_events_replay}
        return {
            **limits,
            **{name: value for name, value in endpoints.items() if value is not None},
            "min_stream_rate": self.min_stream_rate,
            "max_gap": self.max_gap,
            "mtp": DRAFTS[self.mtp],
            "dtype": self.dtype,
            "kv_bits": self.kv_bits if self.kv_bits == "auto" else int(self.kv_bits),
            "mla_kernel": self.mla_kernel,
            "experts_kernel": self.experts_kernel,
            "ranks": self.ranks if isinstance(self.ranks, int) else str(self.ranks.absolute()),
            "rank_port": self.rank_port,
            "rank_timeout": self.rank_timeout,
        }
