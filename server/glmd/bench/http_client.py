"""HTTP client and servers of the HTTP benchmark."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from glmd.bench.scenarios import TEMPLATE_SETTINGS, ClientScript, Scenario
from glmd.errors import EngineUnavailable, SettingsError

CLIENT_TIMEOUT = httpx.Timeout(900.0, connect=60.0)
"""Seconds; a CPU may take minutes for what a GPU does in one second."""

START_TIMEOUT = 600.0
"""Seconds to start a server; loading 20 GB from a slow disk takes minutes."""

_TEXT_KEYS = ("content", "reasoning_content", "reasoning")


@dataclass(frozen=True, slots=True)
class BenchServer:
    """A server: a command that starts it, or the URL of one that runs.

    Attributes:
        command: in which `{model}` and `{port}` stand for the checkpoint's folder and a free port.
            (): the server runs.
        url: without `/v1`. "": that of the command's port.
        model: name of the model in requests. None: the first in `/v1/models`.
    """

    name: str
    command: tuple[str, ...] = ()
    url: str = ""
    model: str | None = None


GLMD = BenchServer("glmd", (sys.executable, "-m", "glmd", "serve", "{model}", "--port", "{port}"))
MLX_LM = BenchServer(
    "mlx_lm.server",
    (sys.executable, "-m", "mlx_lm", "server", "--model", "{model}", "--port", "{port}"),
    model="default_model",
)


def parse_servers(texts: Sequence[str]) -> list[BenchServer]:
    """Read values of `--against`: `mlx_lm`, URLs and commands.

    A command is named after its program, or after the module of `python -m`.

    Raises:
        SettingsError: a command is empty, has an open quote, or has no `{port}`.
    """
    servers: list[BenchServer] = []
    for text in texts:
        server = _parse_server(text.strip())
        same = sum(each.name.partition(" ")[0] == server.name for each in (GLMD, *servers))
        servers.append(replace(server, name=f"{server.name} {same + 1}") if same else server)
    return servers


def _parse_server(text: str) -> BenchServer:
    if text == "mlx_lm":
        return MLX_LM
    if text.startswith(("http://", "https://")):
        url = text.rstrip("/").removesuffix("/v1")
        return BenchServer(url.partition("://")[2], url=url)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise SettingsError(f"--against: {text!r} is no command: {error}.") from None
    if not any("{port}" in word for word in words):
        raise SettingsError(
            f"--against: {text!r} is not mlx_lm, a URL or a command. Write {{port}} where a command"
            " takes the port to listen on, and {model} for the checkpoint's folder."
        )
    name = words[words.index("-m") + 1] if "-m" in words[:-1] else Path(words[0]).name
    return BenchServer(name, tuple(words))


@contextmanager
def running(server: BenchServer, folder: Path, log: Path) -> Iterator[tuple[str, str]]:
    """Run a server, unless it runs already; yield its URL and model name.

    The server and what it started are stopped at the end.

    Raises:
        SettingsError: the command cannot be started.
        EngineUnavailable: the server exited, or did not become ready.
    """
    if not server.command:
        _wait_until_ready(server.url, server, None, log)
        yield server.url, _served_model(server.url, server)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        word.replace("{model}", str(folder)).replace("{port}", str(port)) for word in server.command
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GLMD_")}
    environment["GLMD_DISK_CACHE"] = "0"  # A run must not find what an earlier one computed.
    with log.open("ab") as out:
        try:
            process = subprocess.Popen(  # noqa: S603
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                process_group=0,  # so that what a wrapper started is stopped, too
            )
        except OSError as error:
            raise SettingsError(f"--against: {server.name} cannot be started: {error}.") from error
        try:
            _wait_until_ready(url, server, process, log)
            yield url, _served_model(url, server)
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group: ask, and kill what is left."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):  # It is killed with its group.
        process.wait(timeout=60)
    with suppress(ProcessLookupError):  # The group is empty.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _served_model(url: str, server: BenchServer) -> str:
    if server.model is not None:
        return server.model
    answer = httpx.get(f"{url}/v1/models", timeout=10)
    answer.raise_for_status()
    return str(answer.json()["data"][0]["id"])


def _wait_until_ready(
    url: str, server: BenchServer, process: subprocess.Popen[bytes] | None, log: Path
) -> None:
    """Wait until a server answers `/health`, or `/v1/models` if it has no `/health`."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            raise EngineUnavailable(
                f"{server.name} exited with status {process.returncode}. See {log}."
            )
        try:
            status = httpx.get(f"{url}/health", timeout=10).status_code
            if status == httpx.codes.NOT_FOUND:
                status = httpx.get(f"{url}/v1/models", timeout=10).status_code
            if status == httpx.codes.OK:
                return
        except httpx.TransportError as error:
            if process is None:
                raise EngineUnavailable(f"No server answers at {url}: {error}.") from error
            # not listening yet
        time.sleep(0.2)
    raise EngineUnavailable(f"{server.name} was not ready within {START_TIMEOUT:g} s. See {log}.")


@dataclass(slots=True)
class StreamedAnswer:
    """One streamed answer. Times are seconds of one monotonic clock.

    Attributes:
        arrivals: arrival of each chunk with text or a tool call.
        error: description of the failure. None: the answer is complete.
        message: the answer as an assistant message for the next request.
    """

    sent: float
    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None
    message: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Recording:
    """All answers of one run of a scenario.

    Attributes:
        scenario: of one run; those of other runs have other texts.
        answers: answers by conversation.
        seconds: time from the first request to the last byte.
    """

    scenario: Scenario
    answers: list[list[StreamedAnswer]]
    seconds: float


async def play(url: str, model: str, scenario: Scenario) -> Recording:
    """Run all conversations of a scenario at the same time, on own connections."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=CLIENT_TIMEOUT, limits=limits) as client:
        start = time.perf_counter()
        answers = await asyncio.gather(
            *(_converse(client, model, each) for each in scenario.conversations)
        )
        return Recording(scenario, list(answers), time.perf_counter() - start)


async def _converse(
    client: httpx.AsyncClient, model: str, conversation: ClientScript
) -> list[StreamedAnswer]:
    messages: list[dict[str, Any]] = []
    if conversation.system is not None:
        messages.append({"role": "system", "content": conversation.system})
    answers: list[StreamedAnswer] = []
    for text in conversation.turns:
        calls = messages[-1].get("tool_calls") if messages else None
        if calls:
            messages += [
                {"role": "tool", "tool_call_id": call["id"], "content": text} for call in calls
            ]
        else:
            messages.append({"role": "user", "content": text})
        body: dict[str, Any] = {
            "model": model,
            "messages": messages,
            "max_tokens": conversation.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "chat_template_kwargs": TEMPLATE_SETTINGS,
        }
        if conversation.tools:
            body["tools"] = conversation.tools
        answer = StreamedAnswer(time.perf_counter())
        answers.append(answer)
        # A failed request is counted and does not end the benchmark.
        try:
            await _ask(client, body, answer)
        except httpx.HTTPStatusError as error:
            answer.error = f"HTTP {error.response.status_code}: {error.response.text[:200]}"
        except (httpx.HTTPError, ValueError, KeyError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        if answer.error is not None:
            break
        messages.append(answer.message)
    return answers


async def _ask(client: httpx.AsyncClient, body: dict[str, Any], answer: StreamedAnswer) -> None:
    """Send one request and read its stream into `answer`."""
    message = _Message()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            await response.aread()
            response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ValueError(str(chunk["error"]))
            if usage := chunk.get("usage"):
                details = usage.get("prompt_tokens_details") or {}
                answer.prompt_tokens = usage["prompt_tokens"]
                answer.completion_tokens = usage["completion_tokens"]
                answer.cached_tokens = details.get("cached_tokens", 0)
            for choice in chunk["choices"]:
                if message.add(choice["delta"]):
                    answer.arrivals.append(time.perf_counter())
    if not answer.completion_tokens:
        raise ValueError("The stream ended without usage.")
    answer.message = message.build()


class _Message:
    """Assistant message built from deltas."""

    def __init__(self) -> None:
        self._content = ""
        self._reasoning = ""
        self._calls: dict[int, dict[str, Any]] = {}

    def add(self, delta: dict[str, Any]) -> bool:
        """Add a delta; return whether it contained text or a tool call."""
        self._content += delta.get("content") or ""
        self._reasoning += delta.get("reasoning_content") or delta.get("reasoning") or ""
        calls = delta.get("tool_calls") or []
        for part in calls:
            index = part.get("index", len(self._calls))
            call = self._calls.setdefault(
                index,
                {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
            )
            call["id"] += part.get("id") or ""
            for key, text in part["function"].items():
                call["function"][key] += text or ""
        return bool(calls) or any(delta.get(key) for key in _TEXT_KEYS)

    def build(self) -> dict[str, Any]:
        """Return the message."""
        message: dict[str, Any] = {"role": "assistant", "content": self._content}
        if self._reasoning:
            message["reasoning_content"] = self._reasoning
        if self._calls:
            message["tool_calls"] = [self._calls[i] for i in sorted(self._calls)]
        return message
