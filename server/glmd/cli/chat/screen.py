"""What the terminal shows and reads: reasoning dimmed, answers as they come."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

from rich.console import Console

from glmd.cli.chat.client import Piece, Reply
from glmd.cli.chat.session import Leave, Session, run_command
from glmd.errors import GlmdError, ServerRefused

PROMPT = "> "

BLOCK = '"""'

CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Left out of what is shown: an answer must not move the cursor or rename the window."""

STYLES = {"reasoning": "dim", "content": "", "note": "dim italic", "error": "red"}


def converse(session: Session, console: Console) -> None:
    """Ask and answer until the user leaves."""
    # A shell that starts us in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        try:
            text = session.pending or read_message()
            session.pending = None
            if text.startswith("/"):
                say(console, run_command(session, text), "note")
            elif text:
                answer(session, text, console)
        except GlmdError as error:
            say(console, error.message, "error")
        except KeyboardInterrupt:  # at the prompt: what was typed is dropped
            console.print()
        except (EOFError, Leave):
            return


def read_message() -> str:
    """One line, or the lines between two lines of three quotes."""
    text = input(PROMPT).strip()
    if not text.startswith(BLOCK):
        return text
    lines = [text.removeprefix(BLOCK)]
    while not lines[-1].rstrip().endswith(BLOCK):
        lines.append(input())
    lines[-1] = lines[-1].rstrip().removesuffix(BLOCK)
    return "\n".join(lines).strip()


def answer(session: Session, text: str, console: Console) -> None:
    """Ask, and show the answer as it comes. Ctrl-C stops it; what has come is kept.

    Raises:
        ServerRefused: there is no answer; the question is forgotten, too.
    """
    session.turns.append({"role": "user", "content": text})
    reply = Reply()
    pieces = session.client.answer(session.body, reply)
    try:
        show(pieces, console)
    except KeyboardInterrupt:
        reply.finish = "stopped"
    except ServerRefused:
        session.turns.pop()
        raise
    finally:
        pieces.close()
        console.out("", style="")
    if reply.content or reply.reasoning:
        session.turns.append(reply.message)
    else:
        session.turns.pop()
    say(console, summary(reply), "note")


def show(pieces: Iterator[Piece], console: Console) -> None:
    """Print pieces as they come, with a blank line where the answer itself begins."""
    kind = None
    for piece in pieces:
        if kind not in (None, piece.kind):
            console.out("\n", style="")
        text = piece.text if kind == piece.kind else piece.text.lstrip("\n")
        kind = piece.kind
        console.out(text.translate(CONTROLS), style=STYLES[kind], highlight=False, end="")
        console.file.flush()


def summary(reply: Reply) -> str:
    """What the answer took, in one line."""
    if reply.finish == "stopped":
        return "Stopped."
    usage = reply.usage
    tokens = usage.get("completion_tokens", 0)
    parts = [f"{tokens} tokens"]
    if reply.first is not None and reply.last > reply.first and tokens > 1:
        parts.append(f"{(tokens - 1) / (reply.last - reply.first):.1f} per second")
        parts.append(f"the first after {reply.first:.2f} s")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    if cached is not None:
        parts.append(f"{cached} of {usage['prompt_tokens']} prompt tokens cached")
    if reply.finish == "length":
        parts.append("cut at its limit")
    return ", ".join(parts) + "."


def say(console: Console, text: str, style: str) -> None:
    if text:
        console.out(text.translate(CONTROLS), style=STYLES[style], highlight=False)


def answer_once(session: Session, text: str) -> None:
    """Write the answer to one question, and nothing else, to stdout.

    Raises:
        ServerRefused: there is none, or not all of it.
    """
    session.turns.append({"role": "user", "content": text})
    reply = Reply()
    for piece in session.client.answer(session.body, reply):
        if piece.kind == "content":
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    if not reply.content.endswith("\n"):
        sys.stdout.write("\n")
    if reply.finish == "length":
        raise ServerRefused("The answer was cut at its limit of tokens.")
