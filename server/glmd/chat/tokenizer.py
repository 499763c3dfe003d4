"""Text to token ids and back. Text never becomes a control token by accident.

A control token is any *added* token of tokenizer.json (`<|user|>`, `</think>`, `<arg_value>`, …).
The library's tokenizer encodes plain text only. Ids of control tokens come from the chat template,
which marks the tokens that it writes (`glmd.chat.template`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, fields
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models

from glmd.errors import CheckpointError
from glmd.ipc import TokenArray
from glmd.utils.lru import LRUCache

MIN_CACHED_CHARS = 256
"""Characters of the shortest text whose ids are cached. BPE takes 0.6 s for a million characters, a
look-up 0.2 ms."""
CACHE_BYTES = 8 << 20
"""Memory of cached ids: about ten full contexts, or fifty conversations of an agent."""

STEP_CHARS = 1 << 16
"""Characters of a text that are encoded at a time: at most 0.2 s."""
STEP_IDS = 8192
"""Ids of short texts that are returned at a time."""

CUT = re.compile(r"\n(?=\S)|[^\W\d_](?=[ ,.;:\u3001\u3002\uff0c][^\W\d_])")
"""End of a step: a line break before text, or a letter before one space or mark and a letter.

Byte-level BPE merges no bytes across these places, because its pre-tokenizer ends a word there, in
GLM's form (`\\p{L}+`, `\\s*[\\r\\n]+`) as in all others in use. Where there is none, a step ends
after twice its length, and the ids on either side may differ from those of the whole text."""


def _byte_of_char() -> dict[str, int]:
    """GPT-2's bytes-to-characters table, inverted.

    See `bytes_to_unicode` in openai/gpt-2, src/encoder.py. Printable Latin-1 characters stand for
    themselves, the other bytes, in order, for U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


class Tokenizer:
    """A byte-level BPE tokenizer with GLM's control tokens.

    Attributes:
        controls: id of each added token, by spelling.
        spellings: spelling of each added token, by id.
        special_tokens: ids of the tokens that structure a conversation.
        special: ids of the tokens that are marked special and cannot occur inside an assistant's
            turn: role tokens, `<|endoftext|>`, ….
        vocab_size: number of ids, added tokens included.
    """

    def __init__(self, backend: tokenizers.Tokenizer, file: str) -> None:
        """Take over `backend`, which then encodes plain text only.

        Raises:
            CheckpointError: not byte-level BPE, or a special token is missing.
        """
        if not isinstance(backend.model, models.BPE) or not isinstance(
            backend.decoder, decoders.ByteLevel
        ):
            raise CheckpointError(
                f"{file}: not a byte-level BPE tokenizer, as GLM-4.7's is.", file=file
            )
        # Those of the call before the file was saved, which would cut and pad every text.
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self.controls: Mapping[str, int] = {token.content: id for id, token in added.items()}
        self.spellings: Mapping[int, str] = {id: name for name, id in self.controls.items()}
        self.special_tokens = SpecialTokens.find(self.controls, file)
        marked = frozenset(id for id, token in added.items() if token.special)
        self.special = marked - self.special_tokens.in_turn | self.special_tokens.roles
        self.vocab_size: int = backend.get_vocab_size()
        self._backend = backend
        self._encoded: LRUCache[bytes, TokenArray] = LRUCache(CACHE_BYTES)
        self._bytes = {id: name.encode() for id, name in self.spellings.items()}
        self._byte_of_char = _byte_of_char()
        # The library finds added tokens in text unless they are special and this flag is set.
        backend.add_special_tokens(
            [AddedToken(name, special=True, normalized=False) for name in self.controls]
        )
        backend.encode_special_tokens = True
        if not set(self.encode(" ".join(self.controls))).isdisjoint(self.controls.values()):
            raise CheckpointError(f"{file}: plain text encodes to a control token.", file=file)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `folder/tokenizer.json`.

        Raises:
            CheckpointError: the file is missing, damaged, or not a GLM-4.7 tokenizer.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{file}: no such file. Take the model's own: `hf download zai-org/GLM-4.7-Flash"
                f" tokenizer.json --local-dir {folder}`.",
                file=str(file),
            )
        try:
            text = file.read_bytes().decode("utf-8-sig")
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file}: {error}", file=str(file)) from error
        return cls(backend, str(file))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text. The spelling of a control token stays text.

        Lone surrogates, which JSON can carry but UTF-8 cannot, become U+FFFD.
        """
        # `encode_batch_fast` releases the GIL, `encode` does not: 1 MiB of text takes a second.
        try:
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        except TypeError:
            clean = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            (encoding,) = self._backend.encode_batch_fast([clean], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def encode_rendered(self, pieces: Iterable[Piece]) -> TokenArray:
        """Token ids of a rendered template. int32, shape [n]."""
        return np.concatenate(list(self.encode_steps(pieces)))

    def encode_steps(self, pieces: Iterable[Piece]) -> Iterator[TokenArray]:
        """Token ids of a rendered template, in steps of bounded work. int32, shapes [n_i].

        The ids of long texts are cached: a client sends its whole conversation with each request.
        """
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            elif len(piece) < MIN_CACHED_CHARS:
                ids += self.encode(piece)
            else:
                yield np.array(ids, np.int32)
                ids = []
                yield from map(self._encode_cached, cut_text(piece))
            if len(ids) >= STEP_IDS:
                yield np.array(ids, np.int32)
                ids = []
        yield np.array(ids, np.int32)

    def _encode_cached(self, text: str) -> TokenArray:
        key = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        ids = self._encoded.get(key)
        if ids is None:
            ids = np.array(self.encode(text), np.int32)
            self._encoded.put(key, ids)
        return ids

    def encode_markup(self, text: str) -> TokenArray:
        """Token ids of text in which spellings of control tokens *are* control tokens.

        For raw prompts (`/v1/completions`, `/tokenize`), written in the template's format.

        Returns: int32, shape [n].
        """
        return self.encode_rendered(self.split_markup(text))

    def split_markup(self, text: str) -> Iterator[Piece]:
        """Text and the control tokens that it spells, in order."""
        margin = max(map(len, self.controls))
        start = position = 0
        while position < len(text):
            # A search holds the GIL. A spelling that begins in this step may end in the next.
            end = position + STEP_CHARS
            found = self._any_control.search(text, position, end + margin)
            if found is None or found.start() >= end:
                position = end
                continue
            if found.start() > start:
                yield text[start : found.start()]
            yield self.controls[found[0]]
            start = position = found.end()
        if start < len(text):
            yield text[start:]

    @cached_property
    def _any_control(self) -> re.Pattern[str]:
        longest_first = sorted(self.controls, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token of text."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=False)))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, control tokens spelled out. Invalid UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """Bytes of a token; b"" for an id that only pads the vocabulary."""
        known = self._bytes.get(id)
        if known is None:
            name: str | None = self._backend.id_to_token(id)
            if name is None:
                return b""  # Not kept: a request may name any id.
            known = self._bytes[id] = bytes(map(self._byte_of_char.__getitem__, name))
        return known


def cut_text(text: str) -> Iterator[str]:
    """Parts of a text of about `STEP_CHARS` characters that end at a `CUT` if any.

    Where a part ends depends only on the text before, so a longer text has the same first parts.
    """
    start = 0
    while len(text) - start > STEP_CHARS:
        earliest, latest = start + STEP_CHARS, start + 2 * STEP_CHARS
        cut = CUT.search(text, earliest, latest)
        end = cut.end() if cut is not None else latest
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def utf8_size(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


Piece = str | int
"""Part of a rendered prompt: plain text, or the id of one control token."""


def _spelled(spelling: str) -> Any:
    return field(metadata={"spelling": spelling})


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the tokens that structure a conversation."""

    system: int = _spelled("<|system|>")
    user: int = _spelled("<|user|>")
    assistant: int = _spelled("<|assistant|>")
    observation: int = _spelled("<|observation|>")
    think: int = _spelled("<think>")
    end_think: int = _spelled("</think>")
    tool_call: int = _spelled("<tool_call>")
    end_tool_call: int = _spelled("</tool_call>")
    arg_key: int = _spelled("<arg_key>")
    end_arg_key: int = _spelled("</arg_key>")
    arg_value: int = _spelled("<arg_value>")
    end_arg_value: int = _spelled("</arg_value>")

    @classmethod
    def find(cls, controls: Mapping[str, int], file: str) -> SpecialTokens:
        """Look the tokens up.

        Args:
            controls: id of each added token of the tokenizer, by spelling.
            file: the tokenizer's file, for errors.

        Raises:
            CheckpointError: a token is missing.
        """
        missing = [spelling for spelling in SPELLINGS.values() if spelling not in controls]
        if missing:
            raise CheckpointError(
                f"{file}: missing control tokens: {', '.join(missing)}.",
                file=file,
            )
        return cls(**{name: controls[spelling] for name, spelling in SPELLINGS.items()})

    @property
    def roles(self) -> frozenset[int]:
        """Tokens that start a turn."""
        return frozenset((self.system, self.user, self.assistant, self.observation))

    @property
    def in_turn(self) -> frozenset[int]:
        """Tokens inside an assistant's turn."""
        return frozenset(astuple(self)) - self.roles


SPELLINGS: Mapping[str, str] = {
    each.name: each.metadata["spelling"] for each in fields(SpecialTokens)
}
