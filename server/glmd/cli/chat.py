"""`glmd chat`: a conversation in the terminal, or one answer in a pipe."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import platformdirs
import typer
from rich.console import Console

from glmd.cli.chat_output import print_pieces, say, summarize
from glmd.cli.chat_session import (
    COMMANDS,
    PARAMETERS,
    QUOTES,
    ChatClient,
    ChatReply,
    ChatSession,
    run_command,
)
from glmd.cli.daemon import ServerProcess, base_url, loading_progress
from glmd.cli.serve import ConfigOption
from glmd.config import Settings
from glmd.config_sources import load
from glmd.errors import GlmdError, ServerRefused, SettingsError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

POLL = 0.1
"""Seconds between two looks at a server that starts."""

STOP_TIMEOUT = 60.0
"""Seconds from SIGTERM to SIGKILL for a server that this command started."""

ARGUMENTS = {"think": ("on", "off", "auto"), "markdown": ("on", "off"), "set": tuple(PARAMETERS)}
"""First arguments of commands, for completion."""

LEAVE = frozenset({"exit", "quit"})
"""Messages that end the conversation, as in other programs' prompts."""


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="Answer this question and exit.", show_default=False)
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="URL of a running server. Default: host and port of the settings.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Start a server of this folder or repo id for the conversation.",
            show_default=False,
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Start a server of the bundled demo model.")
    ] = False,
    profile: Annotated[
        str | None,
        typer.Option(help="Profile of the requests, such as tools.", show_default=False),
    ] = None,
    system: Annotated[str, typer.Option(help="System prompt.", show_default=False)] = "",
    think: Annotated[
        bool | None,
        typer.Option(
            "--think/--no-think", help="Think before answering. Default: the server's setting."
        ),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Chat with a running server, or with a server started for the conversation.

    The API key is that of the settings (GLMD_API_KEY). Input from a pipe is one question, and only
    the answer is printed.

    Example: git diff | glmd chat "Write a commit message for this."
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # not ignored, as by nohup
            signal.signal(number, exit_on_signal)
    settings = load({}, config)
    if (url is not None) + (model is not None) + demo > 1:
        raise SettingsError("--url, --model and --demo cannot be combined.")
    if not sys.stdin.isatty():
        prompt = "\n\n".join(filter(None, (prompt, sys.stdin.read().strip())))
        if not prompt:
            raise SettingsError("No question: pass an argument or pipe in a text.")
    key = find_key(settings)
    with ExitStack() as stack:
        if model is not None or demo:
            # The server may require a key that is stored as a hash only, so it gets another.
            key = key or secrets.token_urlsafe()
            url = stack.enter_context(own_server(model, config, key))
        client = ChatClient(url or base_url(settings.host, settings.port), key)
        stack.enter_context(closing(client))
        session = ChatSession(client, system=system, thinking=think)
        if profile is not None:
            session.parameters["profile"] = profile
        if prompt is not None:
            answer_once(session, prompt)
        else:
            converse(session)


def find_key(settings: Settings) -> str | None:
    """Return an API key of the settings; None if they hold none."""
    from glmd.api.auth import read_private

    if settings.api_key is not None:
        return settings.api_key.get_secret_value()
    if settings.api_key_file is None:
        return None
    lines = map(str.strip, read_private(settings.api_key_file.expanduser()).splitlines())
    return next((line for line in lines if line and line[0] != "#"), None)


# -- A server for one conversation -------------------------------------------------------------


@contextmanager
def own_server(model: str | None, config: Path | None, key: str) -> Iterator[str]:
    """Run `glmd serve` on a free port; yields its URL once the model is ready.

    Args:
        model: folder or repo id; None: the demo model.
        key: API key of the server, in addition to those of the settings.

    Raises:
        ServerRefused: the server does not start; with the last line of its log.
    """
    from glmd.checkpoint.hub import DEMO

    command = [sys.executable, "-P", "-m", "glmd", "serve", model or str(DEMO)]
    command += ["--host", "127.0.0.1", "--port", "0"]
    if config is not None:
        command += ["--config", str(config)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,  # Ctrl-C stops an answer, not the server
            env={**os.environ, "GLMD_API_KEY": key},
        )
        try:
            with Console(stderr=True).status("Starting") as status:
                while (url := ready_url(server.pid, status.update)) is None:
                    if server.poll() is not None:
                        log.seek(0)
                        last = log.read().decode(errors="replace").strip().splitlines()[-1:]
                        raise ServerRefused(f"The server did not start: {' '.join(last)}")
                    time.sleep(POLL)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def ready_url(pid: int, progress: Callable[[str], None]) -> str | None:
    """Return the URL of a server whose model is ready; None before."""
    server = ServerProcess.find(pid)
    if server is None or server.health is None:
        return None
    if line := loading_progress(server.health):
        progress(line)
    return server.url if server.health["status"] == "ready" else None


def exit_on_signal(number: int, _: object) -> None:
    """Exit through `finally` blocks, which restore the terminal and end the server."""
    raise SystemExit(128 + number)


# -- Terminal ----------------------------------------------------------------------------------


def converse(session: ChatSession) -> None:
    """Read messages and print answers until the user leaves."""
    console = Console(highlight=False)
    name = session.client.models()[0]["id"]
    say(
        console,
        f"{name} at {session.client.url}. /help lists commands, exit or Ctrl-D ends.",
        "note",
    )
    # A shell that starts this process in the background ignores SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    reader = line_editor()
    while True:
        try:
            text = session.retry or unquote(reader.prompt())
            session.retry = None
            if text in LEAVE:
                return
            if text.startswith("/"):
                say(console, run_command(session, text), "note")
            elif text:
                print_answer(session, text, console)
        except GlmdError as error:
            say(console, error.message, "error")
        except KeyboardInterrupt:  # at the prompt
            continue
        except EOFError:
            return


def line_editor() -> PromptSession[str]:
    """Create the prompt, with keys to send, begin a line and complete commands.

    Messages of earlier conversations are recalled from a file that only the user can read.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        text = buffer.text.strip()
        if text.startswith(QUOTES) and (text == QUOTES or not text.endswith(QUOTES)):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    class CommandCompleter(Completer):
        """Completes a command, and its first argument."""

        def get_completions(
            self, document: Document, complete_event: CompleteEvent
        ) -> Iterable[Completion]:
            text = document.text_before_cursor
            if not text.startswith("/"):
                return
            name, space, argument = text.partition(" ")
            if name == "/save" and space:
                yield from PathCompleter(expanduser=True).get_completions(
                    Document(argument), complete_event
                )
                return
            choices = ARGUMENTS.get(name[1:], ()) if space else [f"/{each}" for each in COMMANDS]
            word = argument if space else name
            yield from (Completion(each, -len(word)) for each in choices if each.startswith(word))

    session: PromptSession[str] = PromptSession(
        [("bold", "> ")],
        multiline=True,
        enable_suspend=True,
        key_bindings=keys,
        completer=CommandCompleter(),
        history=FileHistory(history_file()),
        complete_while_typing=Condition(lambda: session.default_buffer.text.startswith("/")),
    )
    return session


def history_file() -> Path:
    """Return the file of earlier messages, created for the user alone.

    Raises:
        SettingsError: it cannot be written.
    """
    file = Path(platformdirs.user_state_path("glmd")) / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        with file.open("a"):
            return file
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}. Make it writable for yourself.") from error


def unquote(text: str) -> str:
    """Remove surrounding blanks, and the three quotes around a message."""
    return text.strip().removeprefix(QUOTES).removesuffix(QUOTES).strip()


def print_answer(session: ChatSession, text: str, console: Console) -> None:
    """Ask and print the answer as it arrives; Ctrl-C stops it and keeps its text.

    Raises:
        ServerRefused: no answer; the question is removed from the conversation.
    """
    session.messages.append({"role": "user", "content": text})
    reply = ChatReply()
    pieces = session.client.answer(session.body, reply)
    try:
        print_pieces(pieces, console, markdown=session.markdown)
    except KeyboardInterrupt:
        reply.finish = "stopped"
    except ServerRefused:
        session.messages.pop()
        raise
    finally:
        pieces.close()
        console.out("", style="")
    if reply.content or reply.reasoning:
        session.messages.append(reply.message)
    else:
        session.messages.pop()
    say(console, summarize(reply), "note")


def answer_once(session: ChatSession, text: str) -> None:
    """Write the answer to one question to stdout, and nothing else.

    Formatted on a terminal.

    Raises:
        ServerRefused: no answer, or an answer cut at the token limit.
    """
    session.messages.append({"role": "user", "content": text})
    reply = ChatReply()
    pieces = (
        piece for piece in session.client.answer(session.body, reply) if piece[0] == "content"
    )
    if sys.stdout.isatty():
        print_pieces(pieces, Console(highlight=False), markdown=session.markdown)
    else:
        for _, piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        if not reply.content.endswith("\n"):
            sys.stdout.write("\n")
    if reply.finish == "length":
        raise ServerRefused("The answer was cut at the token limit.")
