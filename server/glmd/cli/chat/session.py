"""A conversation with its settings, and the commands that change them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmd.cli.chat.client import ChatClient
from glmd.errors import GlmdError
from glmd.utils.suggest import did_you_mean

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
"""What `/set` sets. Whether a value is in range, the server says."""


class Mistake(GlmdError):
    """A command that cannot be done."""


class Leave(Exception):
    """The user goes."""


@dataclass
class Session:
    """One conversation.

    Attributes:
        model: what the server is asked for.
        system: the system prompt; "": none.
        thinking: what requests say of it; None: nothing.
        parameters: what they say of sampling and limits.
        turns: messages of user and assistant.
        pending: what to say next without asking the user, who wants an answer anew.
    """

    client: ChatClient
    model: str = "default"
    system: str = ""
    thinking: bool | None = None
    parameters: dict[str, float | int | str] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)
    pending: str | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    @property
    def body(self) -> dict[str, Any]:
        """The next request."""
        thinking = {} if self.thinking is None else {"enable_thinking": self.thinking}
        return {"model": self.model, "messages": self.messages, **thinking, **self.parameters}


@dataclass(frozen=True, slots=True)
class Command:
    """`/name arguments`.

    Attributes:
        usage: the arguments, for `/help`.
        job: what it does, in a few words.
        run: does it, and returns what to print.
    """

    usage: str
    job: str
    run: Callable[[Session, str], str]


def run_command(session: Session, line: str) -> str:
    """Do what a line that begins with `/` says; returns what to print.

    Raises:
        Mistake: there is no such command, or it cannot be done.
        Leave: it was `/exit`.
    """
    name, _, argument = line[1:].partition(" ")
    if name not in COMMANDS:
        raise Mistake(
            f"There is no /{name}{did_you_mean(name, COMMANDS)} /help lists what there is."
        )
    return COMMANDS[name].run(session, argument.strip())


def think(session: Session, argument: str) -> str:
    choices: dict[str, bool | None] = {"on": True, "off": False, "auto": None}
    if argument not in choices:
        raise Mistake("/think takes on, off or auto (as the server has it).")
    session.thinking = choices[argument]
    return f"Thinking: {argument}."


def clear(session: Session, _: str) -> str:
    session.turns.clear()
    return "Begun anew."


def system(session: Session, argument: str) -> str:
    session.system = argument
    return "System prompt set." if argument else "No system prompt."


def model(session: Session, argument: str) -> str:
    if argument:
        session.client.check_model(argument)
        session.model = argument
        return f"Model: {argument}."
    lines = [f"Model: {session.model}. There are:"]
    for each in session.client.models():
        lines.append(f"  {each['id']}")
        lines += [f"  {each['id']}:{name}" for name in each.get("profiles", ())]
    return "\n".join(dict.fromkeys(lines))


def set_parameter(session: Session, argument: str) -> str:
    if not argument:
        said = (f"{name} {value}" for name, value in session.parameters.items())
        return "\n".join(said) or f"Nothing is set. There are: {', '.join(PARAMETERS)}."
    name, _, text = argument.partition(" ")
    if name not in PARAMETERS:
        raise Mistake(f"There is no parameter {name}{did_you_mean(name, PARAMETERS)}")
    if not text.strip():
        session.parameters.pop(name, None)
        return f"{name}: as the server has it."
    try:
        session.parameters[name] = PARAMETERS[name](text.strip())
    except ValueError:
        raise Mistake(f"{name} must be a number, not {text.strip()!r}.") from None
    return f"{name}: {session.parameters[name]}."


def save(session: Session, argument: str) -> str:
    if len(names := shlex.split(argument)) != 1:
        raise Mistake("/save takes one file name; .json keeps all, anything else is Markdown.")
    file = Path(names[0]).expanduser()
    if file.suffix == ".json":
        kept = {"model": session.model, "messages": session.messages}
        text = json.dumps(kept, ensure_ascii=False, indent=2) + "\n"
    else:
        text = "\n".join(f"## {turn['role']}\n\n{turn['content']}\n" for turn in session.messages)
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise Mistake(f"{file} is there already.") from None
    except OSError as error:
        raise Mistake(f"{file}: {error.strerror}.") from None
    return f"Written: {file}."


def retry(session: Session, _: str) -> str:
    if session.turns and session.turns[-1]["role"] == "assistant":
        session.turns.pop()
    if not session.turns:
        raise Mistake("Nothing was asked yet.")
    session.pending = session.turns.pop()["content"]
    return ""


def show_help(_: Session, __: str) -> str:
    width = max(len(f"{name} {each.usage}") for name, each in COMMANDS.items())
    lines = [f"/{f'{name} {each.usage}':{width}}  {each.job}" for name, each in COMMANDS.items()]
    return "\n".join(
        [*lines, '"""', "  begins and ends a message of several lines.",
         "Ctrl-C stops the answer, Ctrl-D leaves."]
    )  # fmt: skip


def leave(_: Session, __: str) -> str:
    raise Leave


COMMANDS: dict[str, Command] = {
    "help": Command("", "this list", show_help),
    "think": Command("on|off|auto", "think before answering, or not", think),
    "system": Command("[TEXT]", "set the system prompt, or have none", system),
    "set": Command("[NAME [VALUE]]", "set a parameter (temperature …), or unset it", set_parameter),
    "model": Command("[NAME]", "ask another model or profile, or list them", model),
    "retry": Command("", "have the last answer anew", retry),
    "clear": Command("", "begin a new conversation", clear),
    "save": Command("FILE", "write the conversation to a file, .json or Markdown", save),
    "exit": Command("", "leave", leave),
}  # fmt: skip
