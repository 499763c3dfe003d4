"""Remembered assistant turns: the exact ids that the model generated, for when a turn returns.

A client sends an assistant turn back as text, most often without its reasoning, with whitespace
trimmed and arguments re-serialised. Rendered and tokenised anew it would differ from what the
model wrote: the model would lose its thinking, and all that follows would be computed again.
So a turn is found by what the client saw of it *and* by all ids before it, which no other
conversation shares unless it is the same so far.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from glmd.chat.messages import AssistantMessage
from glmd.ipc import TokenArray
from glmd.utils.lru import LRUCache

if TYPE_CHECKING:
    from glmd.chat.prompt import Prompt

ENTRY_SIZE = 128
"""What an entry costs beside its ids, in ids of 4 bytes: 0.5 kB as measured."""
VARIANTS = 8
"""Turns kept that look the same after the same ids (`n` > 1, an answer generated anew) but were
thought differently: the newest."""


@dataclass(frozen=True, slots=True)
class GeneratedTurn:
    """A generated turn: what the client saw of it, and the ids behind it."""

    seen: AssistantMessage
    tokens: TokenArray
    """Generated ids, without the end token. [n]"""
    closing: tuple[int, ...] = ()
    """What they lack to be a turn like any other: `</think>` where the reasoning was cut."""


@dataclass(frozen=True, slots=True)
class RememberedTurn:
    """The ids that stand after `<|assistant|>`: prompted ones, such as `<think>`, included."""

    reasoning: bytes
    """Digest of the reasoning that the client saw."""
    tokens: TokenArray
    closing: tuple[int, ...]


class TurnTokenCache:
    """A bounded memory of turns, least recently used ones forgotten first.

    Not safe for use by several threads.
    """

    def __init__(self, max_tokens: int = 4_000_000) -> None:
        """Remember turns of `max_tokens` ids in all (4 bytes each), overhead included."""
        self._turns: LRUCache[bytes, tuple[RememberedTurn, ...]] = LRUCache(max_tokens)

    def remember(self, prompt: Prompt, turn: GeneratedTurn | None) -> None:
        """Keep `turn`, generated from `prompt`; None, a broken answer's, is ignored."""
        if turn is None:
            return
        seen = AssistantMessage(
            prompt.content + turn.seen.text,
            prompt.reasoning + (turn.seen.reasoning or ""),
            turn.seen.calls,
        )
        remembered = RememberedTurn(
            _digest((seen.reasoning or "").strip()),
            np.concatenate([prompt.tokens[prompt.turn_start :], turn.tokens]),
            turn.closing,
        )
        key = _key(prompt.turn_key, seen)
        others = [
            other
            for other in self._turns.get(key) or ()
            if not np.array_equal(other.tokens, remembered.tokens)
        ]
        variants = (*others, remembered)[-VARIANTS:]
        size = sum(len(variant.tokens) + ENTRY_SIZE for variant in variants)
        self._turns.put(key, variants, size)

    def find(self, turn_key: bytes, message: AssistantMessage) -> RememberedTurn | None:
        """The turn that a client returns as `message` after the ids behind `turn_key`.

        If it sends the reasoning too, it must be that of the turn.
        """
        variants = self._turns.get(_key(turn_key, message)) or ()
        reasoning = (message.reasoning or "").strip()
        wanted = _digest(reasoning)
        for variant in reversed(variants):
            if not reasoning or variant.reasoning == wanted:
                return variant
        return None


def _key(turn_key: bytes, message: AssistantMessage) -> bytes:
    """Digest of a place and of what stands there, however it was serialised."""
    calls = [[call.name, call.arguments] for call in message.calls]
    seen = json.loads(
        json.dumps([message.text.strip(), calls]), parse_int=_number, parse_float=_number
    )
    return _digest(json.dumps(seen, sort_keys=True), turn_key)


def _digest(text: str, before: bytes = b"") -> bytes:
    return blake2b(before + text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _number(text: str) -> float:
    """A number as it survives any client: JavaScript knows one kind, and writes -0 as 0."""
    return float(text) + 0.0
