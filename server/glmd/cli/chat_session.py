"""The conversation of `glmd chat`: HTTP client, state, and `/commands`."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from glmd.errors import GlmdError, ServerRefused
from glmd.utils.text import did_you_mean

PARAMETERS: dict[str, Callable[[str], float | int | str]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "max_tokens": int,
    "thinking_budget": int,
    "profile": str,
}
"""Request parameters of `/set`. The server checks their range."""


QUOTES = '"""'
"""Begin and end a message of several lines."""

CONNECT_TIMEOUT = 5.0
"""Seconds to connect."""

READ_TIMEOUT = 300.0
"""Seconds without a byte; streams send a keep-alive every few seconds (setting `keep_alive`)."""


@dataclass(slots=True)
class ChatReply:
    """An answer, filled as it arrives.

    Attributes:
        finish: `finish_reason`; None: unfinished.
        usage: `usage` of the finished answer.
        first: seconds from the request to the first text; None: no text yet.
        last: seconds from the request to the last text.
    """

    reasoning: str = ""
    content: str = ""
    finish: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    first: float | None = None
    last: float = 0.0

    @property
    def message(self) -> dict[str, str]:
        """The answer as a message of the next request."""
        message = {"role": "assistant", "content": self.content}
        return message | ({"reasoning_content": self.reasoning} if self.reasoning else {})


class ChatClient:
    """Client of a server with OpenAI's API.

    Args:
        url: base URL, with or without `/v1`.
        key: API key; None: not sent.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT),
            trust_env=False,  # proxies of the environment are not for a server nearby
        )

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """Return the list of `/v1/models`.

        Raises:
            ServerRefused: an error, or no response.
        """
        listed: list[dict[str, Any]] = self._get("/v1/models")["data"]
        return listed

    def check_model(self, name: str) -> None:
        """Raise ServerRefused unless the server has a model of this name."""
        self._get(f"/v1/models/{name}")

    def _get(self, path: str) -> dict[str, Any]:
        try:
            response = self._http.get(path)
        except httpx.TransportError as error:
            raise self._failure(error) from error
        if response.is_error:
            raise refusal(response)
        body: dict[str, Any] = response.json()
        return body

    def answer(
        self, body: Mapping[str, Any], reply: ChatReply
    ) -> Generator[tuple[str, str], None, None]:
        """Yield (kind, text) pieces of an answer, and add them to `reply`.

        Kinds are "reasoning" and "content".

        Closing the generator, or an interrupt, cancels the request.

        Raises:
            ServerRefused: an error, a broken connection, or no response.
        """
        sent = time.monotonic()
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    raise refusal(response)
                for line in response.iter_lines():
                    data = line.removeprefix("data: ")
                    if data in (line, "[DONE]"):
                        continue
                    for piece in read_chunk(json.loads(data), reply):
                        reply.last = time.monotonic() - sent
                        reply.first = reply.last if reply.first is None else reply.first
                        yield piece
        except httpx.TransportError as error:
            raise self._failure(error) from error

    def _failure(self, error: httpx.TransportError) -> ServerRefused:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return ServerRefused(
                f"No server at {self.url}. Start one with `glmd serve`, or let this command start"
                " one with --model."
            )
        return ServerRefused(f"The connection to {self.url} broke ({error}).")


def read_chunk(chunk: Mapping[str, Any], reply: ChatReply) -> list[tuple[str, str]]:
    """Add a chunk of a stream to `reply`; returns its pieces.

    Raises:
        ServerRefused: the chunk is an error.
    """
    if "error" in chunk:
        raise ServerRefused(chunk["error"]["message"])
    pieces = []
    reply.usage = chunk.get("usage") or reply.usage
    for choice in chunk["choices"]:
        delta = choice["delta"]
        if text := delta.get("reasoning_content"):
            reply.reasoning += text
            pieces.append(("reasoning", text))
        if text := delta.get("content"):
            reply.content += text
            pieces.append(("content", text))
        reply.finish = choice["finish_reason"] or reply.finish
    return pieces


def refusal(response: httpx.Response) -> ServerRefused:
    """Return the error for an error response."""
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"{response.url} responded {response.status_code} {response.reason_phrase}."
    if response.status_code == httpx.codes.UNAUTHORIZED:
        message += " Set GLMD_API_KEY."
    return ServerRefused(message)


class CommandError(GlmdError):
    """An unknown command, or a command that cannot be done."""


@dataclass
class ChatSession:
    """One conversation.

    Attributes:
        model: model name in requests.
        system: system prompt; "": none.
        thinking: `enable_thinking` of requests; None: not sent.
        markdown: format answers on a terminal.
        parameters: other parameters of requests.
        messages: messages of user and assistant.
        retry: question to ask again without a prompt; None: prompt.
    """

    client: ChatClient
    model: str = "default"
    system: str = ""
    thinking: bool | None = None
    markdown: bool = True
    parameters: dict[str, float | int | str] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    retry: str | None = None

    @property
    def all_messages(self) -> list[dict[str, str]]:
        """The messages, after the system prompt."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    @property
    def body(self) -> dict[str, Any]:
        """The next request."""
        thinking = {} if self.thinking is None else {"enable_thinking": self.thinking}
        return {"model": self.model, "messages": self.all_messages, **thinking, **self.parameters}


def run_command(session: ChatSession, line: str) -> str:
    """Run a line that begins with `/`; returns the text to print.

    Raises:
        CommandError: unknown command or bad argument.
        EOFError: the command was `/exit`.
    """
    name, _, argument = line[1:].partition(" ")
    if name not in COMMANDS:
        raise CommandError(f"Unknown command /{name}{did_you_mean(name, COMMANDS)} See /help.")
    return COMMANDS[name][2](session, argument.strip())


def think(session: ChatSession, argument: str) -> str:
    choices: dict[str, bool | None] = {"on": True, "off": False, "auto": None}
    if argument not in choices:
        raise CommandError("/think: on, off or auto (the server's setting).")
    session.thinking = choices[argument]
    return f"Thinking: {argument}."


def markdown(session: ChatSession, argument: str) -> str:
    if argument not in ("on", "off"):
        raise CommandError("/markdown: on or off (the text as it is).")
    session.markdown = argument == "on"
    return f"Markdown: {argument}."


def clear(session: ChatSession, _: str) -> str:
    session.messages.clear()
    return "New conversation."


def system(session: ChatSession, argument: str) -> str:
    session.system = argument
    return "System prompt set." if argument else "System prompt removed."


def model(session: ChatSession, argument: str) -> str:
    if argument:
        session.client.check_model(argument)
        session.model = argument
        return f"Model: {argument}."
    lines = [f"Model: {session.model}. Available:"]
    for each in session.client.models():
        lines.append(f"  {each['id']}")
        lines += [f"  {each['id']}:{name}" for name in each.get("profiles", ())]
    return "\n".join(dict.fromkeys(lines))


def set_parameter(session: ChatSession, argument: str) -> str:
    if not argument:
        shown = "\n".join(f"{name} {value}" for name, value in session.parameters.items())
        return shown or f"No parameter is set. Available: {', '.join(PARAMETERS)}."
    name, _, text = argument.partition(" ")
    if name not in PARAMETERS:
        raise CommandError(f"Unknown parameter {name}{did_you_mean(name, PARAMETERS)}")
    if not text.strip():
        session.parameters.pop(name, None)
        return f"{name}: the server's default."
    try:
        session.parameters[name] = PARAMETERS[name](text.strip())
    except ValueError:
        raise CommandError(f"{name}: must be a number, not {text.strip()!r}.") from None
    return f"{name}: {session.parameters[name]}."


def save(session: ChatSession, argument: str) -> str:
    if len(names := shlex.split(argument)) != 1:
        raise CommandError("/save: one file name, .json for JSON, anything else for Markdown.")
    file = Path(names[0]).expanduser()
    messages = session.all_messages
    if file.suffix == ".json":
        saved = {"model": session.model, "messages": messages}
        text = json.dumps(saved, ensure_ascii=False, indent=2) + "\n"
    else:
        text = "\n".join(f"## {each['role']}\n\n{each['content']}\n" for each in messages)
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise CommandError(f"{file} exists and was not changed.") from None
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}.") from None
    return f"Wrote {file}."


def retry(session: ChatSession, _: str) -> str:
    if session.messages and session.messages[-1]["role"] == "assistant":
        session.messages.pop()
    if not session.messages:
        raise CommandError("/retry: no question yet.")
    session.retry = session.messages.pop()["content"]
    return ""


def show_help(_: ChatSession, __: str) -> str:
    rows = [(f"/{name} {usage}", text) for name, (usage, text, _) in COMMANDS.items()]
    rows += [
        ("Alt-Enter", "begin a new line"),
        (QUOTES, "begin and end a message of several lines"),
        ("Ctrl-C", "stop the answer"),
        ("Ctrl-D", "exit"),
    ]
    width = max(len(head) for head, _ in rows)
    return "\n".join(f"{head:{width}}  {text}" for head, text in rows)


def leave(_: ChatSession, __: str) -> str:
    raise EOFError


COMMANDS: dict[str, tuple[str, str, Callable[[ChatSession, str], str]]] = {
    "help": ("", "list the commands", show_help),
    "think": ("on|off|auto", "turn thinking on or off", think),
    "system": ("[TEXT]", "set or remove the system prompt", system),
    "set": ("[NAME [VALUE]]", "set or reset a parameter, such as temperature", set_parameter),
    "model": ("[NAME]", "choose a model or profile, or list them", model),
    "retry": ("", "generate the last answer again", retry),
    "markdown": ("on|off", "format answers, or show their text as it is", markdown),
    "clear": ("", "start a new conversation", clear),
    "save": ("FILE", "save the conversation as .json or Markdown", save),
    "exit": ("", "exit", leave),
    "quit": ("", "exit", leave),
}
"""Commands by name: arguments, description, and function."""
