"""Settings that editors and agents need for this server."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomlkit
import yaml

MODEL = "default"
"""Name that the server accepts for whatever model it serves."""

TITLE = "GLM-4.7-Flash"

MAX_OUTPUT_TOKENS = 32_768
"""Limit of one answer for clients that ask for a number, and that plan prompts around it."""

TIMEOUT_MS = 600_000
"""Milliseconds without an event that clients wait: a long prompt on a busy server."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A running server, as a client needs it.

    Attributes:
        url: without a path.
        api_key: None: the server asks for none.
        context_length: tokens of prompt and answer together.
    """

    url: str
    api_key: str | None
    context_length: int

    @property
    def key(self) -> str:
        """The API key; else any text, as many clients insist on one."""
        return self.api_key or "none"

    @property
    def openai(self) -> str:
        """Base URL for clients of OpenAI's API."""
        return f"{self.url}/v1"

    @property
    def max_output_tokens(self) -> int:
        """Tokens of one answer, which leave most of the context to prompts."""
        return min(MAX_OUTPUT_TOKENS, self.context_length // 4)


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings of one client for one server.

    Attributes:
        environment: variables for the program, which `--launch` sets.
        command: the program and its arguments; empty: it has no command.
        file: configuration file, relative to the home folder; its suffix gives the format.
        content: to be merged into `file`.
        configure: command that writes the client's own configuration, in place of `file`.
        steps: what to enter, for programs that are set up in a window.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    file: str | None = None
    content: Mapping[str, Any] = field(default_factory=dict)
    configure: tuple[str, ...] = ()
    steps: str | None = None


@dataclass(frozen=True, slots=True)
class Client:
    """A program that talks to the server.

    Attributes:
        notes: what users should know, as Markdown.
    """

    name: str
    title: str
    setup: Callable[[Endpoint], Setup]
    notes: tuple[str, ...] = ()


def claude(server: Endpoint) -> Setup:
    names = ("", "DEFAULT_OPUS_", "DEFAULT_SONNET_", "DEFAULT_HAIKU_")
    environment = {
        "ANTHROPIC_BASE_URL": server.url,
        "ANTHROPIC_AUTH_TOKEN": server.key,
        **{f"ANTHROPIC_{name}MODEL": MODEL for name in names},
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(server.context_length),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    return Setup(environment, ("claude",), ".claude/settings.json", {"env": environment})


def codex(server: Endpoint) -> Setup:
    provider: dict[str, Any] = {
        "name": "glmd",
        "base_url": server.openai,
        "wire_api": "responses",
        "stream_idle_timeout_ms": TIMEOUT_MS,
    }
    environment = {}
    if server.api_key is not None:
        provider["env_key"] = "GLMD_API_KEY"
        environment["GLMD_API_KEY"] = server.api_key
    general = {
        "model": MODEL,
        "model_provider": "glmd",
        "model_context_window": server.context_length,
        "model_reasoning_effort": "high",
    }
    options = general | {f"model_providers.glmd.{name}": value for name, value in provider.items()}
    arguments = (
        word for name, value in options.items() for word in ("-c", f"{name}={json.dumps(value)}")
    )
    content = general | {"model_providers": {"glmd": provider}}
    return Setup(environment, ("codex", *arguments), ".codex/config.toml", content)


def opencode(server: Endpoint) -> Setup:
    model = {
        "name": TITLE,
        "reasoning": True,
        "tool_call": True,
        "limit": {"context": server.context_length, "output": server.max_output_tokens},
    }
    content = {
        "$schema": "https://opencode.ai/config.json",
        "provider": {
            "glmd": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "glmd",
                "options": {
                    "baseURL": server.openai,
                    "apiKey": server.key,
                    "includeUsage": True,
                },
                "models": {MODEL: model},
            }
        },
        "model": f"glmd/{MODEL}",
    }
    environment = {"OPENCODE_CONFIG_CONTENT": json.dumps(content)}
    return Setup(environment, ("opencode",), ".config/opencode/opencode.json", content)


def qwen(server: Endpoint) -> Setup:
    environment = {
        "OPENAI_BASE_URL": server.openai,
        "OPENAI_API_KEY": server.key,
        "OPENAI_MODEL": MODEL,
    }
    content = {
        "security": {
            "auth": {
                "selectedType": "openai",
                "baseUrl": server.openai,
                "apiKey": server.key,
            }
        },
        "model": {
            "name": MODEL,
            "generationConfig": {
                "contextWindowSize": server.context_length,
                "timeout": TIMEOUT_MS,
            },
        },
    }
    command = ("qwen", "--auth-type", "openai")
    return Setup(environment, command, ".qwen/settings.json", content)


def aider(server: Endpoint) -> Setup:
    environment = {"OPENAI_API_BASE": server.openai, "OPENAI_API_KEY": server.key}
    model = f"openai/{MODEL}"
    content = {
        "model": model,
        "openai-api-base": server.openai,
        "openai-api-key": server.key,
        "show-model-warnings": False,
    }
    command = ("aider", "--model", model, "--no-show-model-warnings")
    return Setup(environment, command, ".aider.conf.yml", content)


def continue_dev(server: Endpoint) -> Setup:
    model = {
        "name": TITLE,
        "provider": "openai",
        "model": MODEL,
        "apiBase": server.openai,
        "apiKey": server.key,
        "roles": ["chat", "edit", "apply"],
        "capabilities": ["tool_use"],
        "defaultCompletionOptions": {
            "contextLength": server.context_length,
            "maxTokens": min(16_384, server.max_output_tokens),
        },
    }
    content = {"name": "Local", "version": "0.0.1", "schema": "v1", "models": [model]}
    return Setup(command=("cn",), file=".continue/config.yaml", content=content)


def zed(server: Endpoint) -> Setup:
    model = {
        "name": MODEL,
        "display_name": TITLE,
        "max_tokens": server.context_length,
        "max_output_tokens": server.max_output_tokens,
        "capabilities": {
            "tools": True,
            "images": False,
            "parallel_tool_calls": True,
            "prompt_cache_key": False,
        },
    }
    provider = {"api_url": server.openai, "available_models": [model]}
    content = {"language_models": {"openai_compatible": {"glmd": provider}}}
    environment = {"GLMD_API_KEY": server.key}
    return Setup(environment, ("zed",), ".config/zed/settings.json", content)


def cline(server: Endpoint) -> Setup:
    return Setup(
        command=("cline",),
        configure=(
            "cline", "auth", "--provider", "openai-compatible", "--baseurl", server.openai,
            "--apikey", server.key, "--modelid", MODEL,
        ),
        steps=f"In VS Code: Settings → API Provider *OpenAI Compatible*: Base URL {server.openai},"
        f" API Key {server.key}, Model ID {MODEL}. In the model configuration set the context"
        f" window to {server.context_length} and turn image support off. Leave *R1 format* off."
        " Roo Code and Kilo Code have the same fields.",
    )  # fmt: skip


def goose(server: Endpoint) -> Setup:
    environment = {
        "GOOSE_PROVIDER": "openai",
        "GOOSE_MODEL": MODEL,
        "GOOSE_CONTEXT_LIMIT": str(server.context_length),
        "OPENAI_HOST": server.url,
        "OPENAI_API_KEY": server.key,
    }
    content = {name: value for name, value in environment.items() if name != "OPENAI_API_KEY"}
    return Setup(environment, ("goose", "session"), ".config/goose/config.yaml", content)


def open_webui(server: Endpoint) -> Setup:
    environment = {"OPENAI_API_BASE_URL": server.openai, "OPENAI_API_KEY": server.key}
    return Setup(
        environment,
        ("open-webui", "serve"),
        steps="In the browser: Admin Panel → Settings → Connections → OpenAI API → Add:"
        f" URL {server.openai}, key {server.key}. From within Docker the host is"
        " host.docker.internal, with the server on `--host 0.0.0.0` and an API key. Set *Function"
        " Calling* to *Native* in the model's advanced parameters.",
    )


CLIENTS: tuple[Client, ...] = (
    Client("claude", "Claude Code", claude),
    Client("codex", "Codex", codex),
    Client("opencode", "opencode", opencode),
    Client("qwen", "Qwen Code", qwen),
    Client("aider", "aider", aider),
    Client("continue", "Continue", continue_dev),
    Client("zed", "Zed", zed),
    Client("cline", "Cline", cline),
    Client("goose", "goose", goose),
    Client("open-webui", "Open WebUI", open_webui),
)


def describe(setup: Setup) -> str:
    """Format the settings for a person to copy."""
    return "\n\n".join(f"{title}\n{text}".strip() for title, text, _ in describe_parts(setup))


def describe_parts(setup: Setup) -> Iterator[tuple[str, str, str]]:
    """Yield parts of a client's settings: heading, text, and language of the text."""
    if setup.steps is not None:
        yield "", setup.steps, ""
    if setup.configure:
        yield "", shlex.join(setup.configure), "sh"
    if setup.file is not None:
        suffix = Path(setup.file).suffix
        language = {".yml": "yaml"}.get(suffix, suffix[1:])
        yield f"# ~/{setup.file}", dump(setup.content, suffix).rstrip(), language
    in_file = json.dumps(setup.content)
    exports = [
        f"export {name}={shlex.quote(value)}"
        for name, value in setup.environment.items()
        if setup.file is None or (name.endswith("_KEY") and value not in in_file)
    ]
    if exports:
        yield "", "\n".join(exports), "sh"


def dump(content: Mapping[str, Any], suffix: str) -> str:
    """Format a mapping as JSON, TOML or YAML, by a file's suffix."""
    if suffix == ".json":
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if suffix == ".toml":
        return tomlkit.dumps(content)
    return str(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))
