"""Token ids of generated assistant turns, for when a client sends a turn back.

Clients send an assistant turn back as text, usually without its reasoning, with whitespace trimmed
and arguments serialized differently. Rendered and tokenized again, the turn would differ from the
generated ids: the model would lose its reasoning, and the KV cache would miss from that turn on. A
turn is therefore found by its owner, by the text that the client saw and by all ids before the
turn, which only the same conversation shares. It holds ids that the model generated, and none that
a client wrote: otherwise one client's words could become the thoughts of another's model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b

import msgspec
import numpy as np

from glmd.chat.types import AssistantMessage, Prompt
from glmd.ipc import TokenArray, pack_tokens, unpack_tokens
from glmd.utils.disk_lru import DiskLRU
from glmd.utils.lru import LRUCache

VARIANTS = 8
"""Number of turns kept per key: same prompt and same visible text (`n` > 1, a regenerated answer)
with different reasoning. The newest are kept."""


@dataclass(frozen=True, slots=True)
class GeneratedTurn:
    """A generated turn: the text that the client saw, and the generated ids.

    Attributes:
        seen: text, reasoning and calls as the client received them.
        tokens: generated ids without the end token. int32, shape [n].
        closing: ids that complete the turn, such as `</think>` where the reasoning was cut.
    """

    seen: AssistantMessage
    tokens: TokenArray
    closing: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CachedTurn:
    """Token ids after `<|assistant|>`.

    Attributes:
        reasoning: digest of the reasoning that the client saw.
        tokens: ids of the prompt after `<|assistant|>`, such as `<think>`, and generated ids.
        closing: as of `GeneratedTurn`.
    """

    reasoning: bytes
    tokens: TokenArray
    closing: tuple[int, ...]


class TurnTokenCache:
    """LRU cache of generated turns, in memory and perhaps in a file. Not thread-safe."""

    def __init__(
        self,
        max_tokens: int = 4_000_000,
        *,
        stored: DiskLRU | None = None,
        tokenizer: bytes = b"",
    ) -> None:
        """
        Args:
            max_tokens: capacity in ids of 4 bytes, overhead included.
            stored: where turns survive the process; None: nowhere.
            tokenizer: names the tokenizer. Turns that were stored under another are not found.
        """
        self._turns: LRUCache[bytes, tuple[CachedTurn, ...]] = LRUCache(4 * max_tokens)
        self._stored = stored
        self._tokenizer = tokenizer

    def close(self) -> None:
        """Close the file of stored turns."""
        if self._stored is not None:
            self._stored.close()

    def remember(self, prompt: Prompt, turn: GeneratedTurn | None) -> None:
        """Add `turn`, generated from `prompt`, unless the client wrote its beginning.

        The text that a client sees does not tell what it wrote as the turn's reasoning.

        Args:
            turn: from `ChatOutputProcessor.turn`; None: nothing to cache.
        """
        if turn is None or prompt.prefilled:
            return
        seen = AssistantMessage(
            prompt.content + turn.seen.text,
            prompt.reasoning + (turn.seen.reasoning or ""),
            turn.seen.calls,
        )
        cached = CachedTurn(
            _reasoning_digest(seen),
            np.concatenate([prompt.tokens[prompt.turn_start :], turn.tokens]),
            turn.closing,
        )
        key = _key(prompt.turn_key, seen)
        others = [
            other
            for other in self._variants(key)
            if not np.array_equal(other.tokens, cached.tokens)
        ]
        variants = (*others, cached)[-VARIANTS:]
        self._turns.put(key, variants)
        if self._stored is not None:
            self._stored.put(self._stored_key(key), _encode(variants))

    def find(self, turn_key: bytes, message: AssistantMessage) -> CachedTurn | None:
        """The cached turn that a client sends back as `message`, if any.

        If the message has reasoning, it must be the turn's reasoning. Reasoning at the beginning of
        the text may as well be text of the turn, of which the client left the reasoning out.
        """
        if message.sent_text is not None:
            as_sent = AssistantMessage(message.sent_text, calls=message.calls)
            if (turn := self.find(turn_key, as_sent)) is not None:
                return turn
        digest = _reasoning_digest(message)
        unknown = not (message.reasoning or "").strip()
        for variant in reversed(self._variants(_key(turn_key, message))):
            if unknown or variant.reasoning == digest:
                return variant
        return None

    def _variants(self, key: bytes) -> tuple[CachedTurn, ...]:
        variants = self._turns.get(key)
        if variants is None and self._stored is not None:
            encoded = self._stored.get(self._stored_key(key))
            if encoded is not None:
                variants = _decode(encoded)
                self._turns.put(key, variants)
        return variants or ()

    def _stored_key(self, key: bytes) -> bytes:
        return blake2b(key, key=self._tokenizer, digest_size=16).digest()


def _encode(variants: tuple[CachedTurn, ...]) -> bytes:
    packed = [(turn.reasoning, pack_tokens(turn.tokens), turn.closing) for turn in variants]
    return msgspec.msgpack.encode(packed)


def _decode(encoded: bytes) -> tuple[CachedTurn, ...]:
    packed = msgspec.msgpack.decode(encoded, type=list[tuple[bytes, bytes, tuple[int, ...]]])
    return tuple(
        CachedTurn(reasoning, unpack_tokens(tokens), closing)
        for reasoning, tokens, closing in packed
    )


def _key(turn_key: bytes, message: AssistantMessage) -> bytes:
    """Digest of `turn_key` and of a message's text and calls, however serialized."""
    calls = [[call.name, call.arguments] for call in message.calls]
    seen = json.loads(
        json.dumps([message.text.strip(), calls]), parse_int=_number, parse_float=_number
    )
    return _digest(json.dumps(seen, sort_keys=True), turn_key)


def _reasoning_digest(message: AssistantMessage) -> bytes:
    """Digest of a message's reasoning, with whitespace normalised."""
    return _digest(" ".join((message.reasoning or "").split()))


def _digest(text: str, prefix: bytes = b"") -> bytes:
    return blake2b(prefix + text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _number(text: str) -> float:
    """A number as a JavaScript client sends it back: one number type, and 0 for -0."""
    return float(text) + 0.0
