"""What the HTTP benchmark's clients say, as data: conversations of random words and set lengths."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from glmd.bench.workloads import SEED
from glmd.ipc import TokenArray

TEMPLATE_SETTINGS = {"enable_thinking": False, "clear_thinking": False}
"""Without thinking, whatever is generated is content, and comes back whole with the next turn."""

_WORDS = [
    "north", "river", "table", "seven", "green", "window", "letter", "morning", "paper", "stone",
    "bridge", "garden", "yellow", "market", "forty", "animal", "copper", "winter", "small", "round",
    "quick", "simple", "early", "answer", "number", "castle", "music", "forest", "silver", "summer",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Conversation:
    """One client: sends a turn, reads the whole answer, sends the next turn.

    Attributes:
        turns: what the user says. If the answer before was a call of tools, the text goes back as
            the tools' result instead.
        max_tokens: of each answer.
    """

    turns: tuple[str, ...]
    max_tokens: int
    system: str | None = None
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Scenario:
    """Conversations that begin at the same moment."""

    name: str
    conversations: tuple[Conversation, ...]


def first_prompt(tokenizer: Any, talk: Conversation) -> TokenArray:
    """The token ids of a conversation's first turn.

    Args:
        tokenizer: the checkpoint's, of transformers.
    """
    system = [] if talk.system is None else [{"role": "system", "content": talk.system}]
    ids = tokenizer.apply_chat_template(
        [*system, {"role": "user", "content": talk.turns[0]}],
        tools=list(talk.tools) or None,
        add_generation_prompt=True,
        return_dict=False,
        **TEMPLATE_SETTINGS,
    )
    return np.array(ids, np.int32)


class Writer:
    """Writes random text of a given number of tokens.

    Args:
        folder: the checkpoint whose tokenizer counts.
        scale: factor on all lengths.
        seed: two writers with different seeds share no prompt longer than a template's head.
    """

    def __init__(self, folder: Path, scale: float, seed: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._scale = scale
        self._random = random.Random(SEED + seed)  # noqa: S311

    def text(self, tokens: int) -> str:
        """Words that make up about `tokens`, scaled, but at least 8."""
        wanted = max(8, round(tokens * self._scale))
        words: list[str] = []
        while (have := self._count(" ".join(words))) < wanted:
            words += self._random.choices(_WORDS, k=max(1, (wanted - have) // 4))
        return " ".join(words)

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


def uniform(writer: Writer, streams: int) -> Scenario:
    """Streams of equal length."""
    return Scenario(
        f"{streams} uniform", tuple(Conversation((writer.text(256),), 64) for _ in range(streams))
    )


def ragged(writer: Writer, streams: int) -> Scenario:
    """Every eighth prompt is sixteen times as long as the others, answers are of mixed length."""
    return Scenario(
        f"{streams} ragged",
        tuple(
            Conversation((writer.text(1600 if i % 8 == 0 else 100),), (32, 64, 96)[i % 3])
            for i in range(streams)
        ),
    )


def burst(writer: Writer, connections: int = 200) -> Scenario:
    """As many connections at the same moment, each for a few tokens."""
    return Scenario(
        f"burst of {connections}",
        tuple(Conversation((writer.text(8),), 4) for _ in range(connections)),
    )


def agents(writer: Writer, *, count: int = 4, turns: int = 6) -> Scenario:
    """Agents with one system prompt and set of tools, about 2k tokens, and growing histories."""
    system = writer.text(1700)
    tools = tuple(_tool(name, writer.text(40)) for name in ("search", "read_file", "write_file"))
    return Scenario(
        f"{count} agents × {turns} turns",
        tuple(
            Conversation(
                tuple(writer.text(60) for _ in range(turns)), 48, system=system, tools=tools
            )
            for _ in range(count)
        ),
    )


def _tool(name: str, description: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"what": {"type": "string"}, "limit": {"type": "integer"}},
        "required": ["what"],
    }
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}
