"""`glmd chat`: a conversation in the terminal."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from glmd.errors import SettingsError

if TYPE_CHECKING:
    from glmd.config import Settings


def chat(
    prompt: Annotated[
        str | None,
        typer.Argument(help="One question, answered alone.", show_default=False),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Of a running server. Default: where the settings have it listen."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Start a server of this folder or hub id for the conversation.",
            show_default=False,
        ),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Start a server of the demo.")] = False,
    profile: Annotated[
        str | None, typer.Option(help="Profile of the server.", show_default=False)
    ] = None,
    system: Annotated[str, typer.Option(help="System prompt.", show_default=False)] = "",
    think: Annotated[
        bool | None, typer.Option("--think/--no-think", help="Think before answering, or not.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Configuration file, TOML.", show_default=False)
    ] = None,
) -> None:
    """Talk to a running server, or to one that is started for it.

    The key comes from the settings (GLMD_API_KEY). In a pipe, what comes in is one question, and
    what goes out is the answer alone: `echo hi | glmd chat`.
    """
    from glmd.cli.chat.client import ChatClient
    from glmd.cli.chat.screen import answer_once, converse, say
    from glmd.cli.chat.session import Session
    from glmd.config import load

    settings = load({}, config)
    if (url is not None) + (model is not None) + demo > 1:
        raise SettingsError("--url, --model and --demo exclude each other.")
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    if not sys.stdin.isatty():
        prompt = "\n\n".join(filter(None, (prompt, sys.stdin.read().strip())))
        if not prompt:
            raise SettingsError("There is no question: neither an argument nor anything on stdin.")
    # A server of our own wants the key too: it may know others that we cannot.
    key = key_of(settings) or (secrets.token_urlsafe() if model or demo else None)
    with served(url or f"http://{host}:{settings.port}", model, demo, config, key) as base:
        client = ChatClient(base.rstrip("/").removesuffix("/v1"), key)
        parameters: dict[str, Any] = {} if profile is None else {"profile": profile}
        session = Session(client, system=system, thinking=think, parameters=parameters)
        try:
            if prompt is not None:
                answer_once(session, prompt)
                return
            with suppress(ImportError):  # line editing and history, where Python has them
                import readline  # noqa: F401
            console = Console(highlight=False)
            (name, *_) = (each["id"] for each in client.models())
            say(console, f"{name} at {client.url}. /help lists commands, Ctrl-D leaves.", "note")
            converse(session, console)
        finally:
            client.close()


def key_of(settings: Settings) -> str | None:
    """A key that a server with these settings takes, as far as they hold one."""
    from glmd.api.auth import read_private

    if settings.api_key is not None:
        return settings.api_key.get_secret_value()
    if settings.api_key_file is None:
        return None
    lines = read_private(settings.api_key_file.expanduser()).splitlines()
    return next((line.strip() for line in lines if line.strip() and line[0] != "#"), None)


@contextmanager
def served(
    url: str, model: str | None, demo: bool, config: Path | None, key: str | None
) -> Iterator[str]:
    """The URL of the server to talk to, which lives as long as the block if it is ours."""
    if key is None or (model is None and not demo):
        yield url
        return
    from glmd.checkpoint.hub import DEMO
    from glmd.cli.chat.server import own_server

    arguments = [str(DEMO) if model is None else model]
    if config is not None:
        arguments += ["--config", str(config)]
    status = Console(stderr=True).status("Starting")

    def progress(health: dict[str, Any]) -> None:
        if loading := health.get("loading"):
            done, total = (loading[name] / 2**30 for name in ("done_bytes", "total_bytes"))
            status.update(f"Loading {health['model']}: {done:.1f} of {total:.1f} GiB")

    with ExitStack() as stack:
        with status:
            base = stack.enter_context(own_server(arguments, key, progress))
        yield base
