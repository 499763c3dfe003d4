"""Printed answers of `glmd chat`: dim reasoning, Markdown, a summary."""

from __future__ import annotations

from collections.abc import Iterator

from markdown_it import MarkdownIt
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from glmd.cli.chat_session import ChatReply

CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Removed from output: an answer must not move the cursor or rename the window."""

STYLES = {"reasoning": "dim", "content": "", "note": "dim italic", "error": "red"}

CODE_THEME = "ansi_dark"
"""Colours of the terminal's own palette, which suit light and dark backgrounds."""

REFRESHES_PER_SECOND = 12

BLOCKS = MarkdownIt().enable("table")


def say(console: Console, text: str, style: str) -> None:
    if text:
        console.out(text.translate(CONTROLS), style=STYLES[style], highlight=False)


def print_pieces(pieces: Iterator[tuple[str, str]], console: Console, *, markdown: bool) -> None:
    """Print pieces as they arrive, with a blank line between reasoning and content.

    Args:
        markdown: format the content as Markdown, if the console is a terminal.
    """
    written: MarkdownPrinter | None = None
    previous = None
    try:
        for kind, text in pieces:
            if previous not in (None, kind):
                console.out("\n", style="")
            shown = text if kind == previous else text.lstrip("\n")
            shown = shown.translate(CONTROLS)
            previous = kind
            if kind == "content" and markdown and console.is_terminal:
                written = written or MarkdownPrinter(console)
                written.append(shown)
            else:
                console.out(shown, style=STYLES[kind], highlight=False, end="")
                console.file.flush()
    finally:
        if written is not None:
            written.close()


class MarkdownPrinter:
    """Prints Markdown while it is generated.

    A block (paragraph, list, table, code) is formatted when the next block begins. The source of
    the last block is shown meanwhile, and replaced in place.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pending = ""
        self._printed = False
        self._live = Live(
            get_renderable=self._preview,
            console=console,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def append(self, text: str) -> None:
        self._pending += text
        if "\n" not in text:
            return  # A block begins with a line.
        done, self._pending = split_blocks(self._pending)
        self._print(done)

    def close(self) -> None:
        """Print the last block; the console is as before."""
        done, self._pending = self._pending, ""
        self._live.stop()
        self._print(done)

    def _print(self, text: str) -> None:
        if not text.strip():
            return
        if self._printed:
            self._console.print()
        self._printed = True
        self._console.print(Markdown(text, code_theme=CODE_THEME))

    def _preview(self) -> Text:
        """The end of the last block: a live region must not be higher than the terminal."""
        width, height = self._console.size
        lines = Text(self._pending.strip("\n")[-width * height :]).wrap(self._console, width)
        return Text("\n").join(lines[-max(1, height - 2) :])


def split_blocks(text: str) -> tuple[str, str]:
    """Split Markdown before its last top-level block, which may go on."""
    starts = [token.map[0] for token in BLOCKS.parse(text) if token.level == 0 and token.map]
    if len(starts) < 2:
        return "", text
    lines = text.splitlines(keepends=True)
    return "".join(lines[: starts[-1]]), "".join(lines[starts[-1] :])


def summarize(reply: ChatReply) -> str:
    """Summarise tokens, speed and cache use of an answer in one line."""
    if reply.finish == "stopped":
        return "Stopped."
    usage = reply.usage
    tokens = usage.get("completion_tokens", 0)
    parts = [f"{tokens} tokens"]
    if reply.first is not None and reply.last > reply.first and tokens > 1:
        parts.append(f"{(tokens - 1) / (reply.last - reply.first):.1f} per second")
        parts.append(f"first token after {reply.first:.2f} s")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    if cached is not None:
        parts.append(f"{cached} of {usage['prompt_tokens']} prompt tokens cached")
    if reply.finish == "length":
        parts.append("cut at the token limit")
    return ", ".join(parts) + "."
