"""Scenarios of the HTTP benchmark: conversations of random words."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from glmd.bench.workloads import SEED
from glmd.ipc import TokenArray

TEMPLATE_SETTINGS = {"enable_thinking": False, "clear_thinking": False}
"""Without thinking all output is content, which the next request contains unchanged."""

MAX_TOKENS = 64
"""Length of an answer in the uniform scenarios."""

_WORDS = [
    "north", "river", "table", "seven", "green", "window", "letter", "morning", "paper", "stone",
    "bridge", "garden", "yellow", "market", "forty", "animal", "copper", "winter", "small", "round",
    "quick", "simple", "early", "answer", "number", "castle", "music", "forest", "silver", "summer",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class ClientScript:
    """Turns of one client, each sent after the complete answer to the one before.

    Attributes:
        turns: user messages. After tool calls the text is sent as the tools' results instead.
        max_tokens: length limit of each answer.
    """

    turns: tuple[str, ...]
    max_tokens: int
    system: str | None = None
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Scenario:
    """Conversations that start at the same time."""

    name: str
    conversations: tuple[ClientScript, ...]


def first_prompt(tokenizer: Any, conversation: ClientScript) -> TokenArray:
    """Return the token ids of a conversation's first request.

    Args:
        tokenizer: the checkpoint's tokenizer in transformers.
    """
    system = conversation.system
    ids = tokenizer.apply_chat_template(
        [
            *([] if system is None else [{"role": "system", "content": system}]),
            {"role": "user", "content": conversation.turns[0]},
        ],
        tools=list(conversation.tools) or None,
        add_generation_prompt=True,
        return_dict=False,
        **TEMPLATE_SETTINGS,
    )
    return np.array(ids, np.int32)


class Writer:
    """Generator of random text with a given number of tokens.

    Args:
        folder: checkpoint whose tokenizer counts.
        scale: factor on all lengths.
        seed: texts of different seeds have no long common prefix.
    """

    def __init__(self, folder: Path, scale: float, seed: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._scale = scale
        self._random = random.Random(SEED + seed)  # noqa: S311

    def text(self, tokens: int) -> str:
        """Return words of about `tokens` tokens, scaled, at least 8."""
        wanted = max(8, round(tokens * self._scale))
        words: list[str] = []
        while (have := self._count(" ".join(words))) < wanted:
            words += self._random.choices(_WORDS, k=max(1, (wanted - have) // 4))
        return " ".join(words)

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


def all_scenarios(writer: Writer, max_tokens: int = MAX_TOKENS) -> Iterator[Scenario]:
    """Yield the scenarios of docs/benchmarks.md, in order.

    Args:
        max_tokens: length of uniform answers; ragged ones are half, once and 1.5 times as long.
    """
    for streams in (1, 4, 8, 16, 32):
        yield uniform(writer, streams, max_tokens)
    for streams in (4, 8, 16, 32):
        yield ragged(writer, streams, max_tokens)
    yield burst(writer)
    yield agents(writer)


def uniform(writer: Writer, streams: int, max_tokens: int = MAX_TOKENS) -> Scenario:
    """Streams of equal length."""
    return Scenario(
        f"{streams} uniform",
        tuple(ClientScript((writer.text(256),), max_tokens) for _ in range(streams)),
    )


def ragged(writer: Writer, streams: int, max_tokens: int = MAX_TOKENS) -> Scenario:
    """Answers of mixed length.

    Every eighth prompt is sixteen times as long as the others.
    """
    return Scenario(
        f"{streams} ragged",
        tuple(
            ClientScript(
                (writer.text(1600 if i % 8 == 0 else 100),), max(1, max_tokens * (1 + i % 3) // 2)
            )
            for i in range(streams)
        ),
    )


def burst(writer: Writer) -> Scenario:
    """Two hundred connections at the same time, each for four tokens."""
    return Scenario("burst of 200", tuple(ClientScript((writer.text(8),), 4) for _ in range(200)))


def agents(writer: Writer, *, count: int = 4, turns: int = 6) -> Scenario:
    """Agents with a common system prompt and tools (2k tokens), growing histories."""
    system = writer.text(1700)
    tools = tuple(_tool(name, writer.text(40)) for name in ("search", "read_file", "write_file"))
    return Scenario(
        f"{count} agents × {turns} turns",
        tuple(
            ClientScript(
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
