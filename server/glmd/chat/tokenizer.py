"""Text to token ids and back, where no text can become a control token by accident.

A control token is any *added* token of tokenizer.json (`<|user|>`, `</think>`, `<arg_value>`, …).
The underlying tokenizer is used for plain text only; control ids come from the chat template,
which marks the tags that it writes itself (see `glmd.chat.template`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models

from glmd.chat.special_tokens import SpecialTokens
from glmd.errors import CheckpointError
from glmd.ipc import TokenArray
from glmd.utils.lru import LRUCache

Piece = str | int
"""A stretch of plain text, or the id of one control token."""

LONG = 256
"""Characters of a text from which on it is worth remembering its ids: BPE takes 0.6 s for a
million characters, finding them takes 0.2 ms."""
REMEMBERED = 8_000_000
"""Characters of such texts remembered in all: about ten full contexts, 40 MB."""


def _byte_of_char() -> dict[str, int]:
    """GPT-2's bytes-to-characters table, inverted (`bytes_to_unicode`, openai/gpt-2 encoder.py).

    Printable Latin-1 characters stand for themselves, the other bytes, in order, for U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


class Tokenizer:
    """A byte-level BPE tokenizer with GLM's tags.

    Attributes:
        controls: every added token, spelling to id.
        spellings: the same, id to spelling.
        special: the ids of those that are marked special and are no part of an assistant's turn:
            role tags, `<|endoftext|>`, ….
        tags: the ids of the tags that structure a conversation.
        vocab_size: number of ids, added tokens included.
    """

    def __init__(self, backend: tokenizers.Tokenizer, file: str) -> None:
        """Take over `backend`: from here on it encodes plain text only.

        Raises:
            CheckpointError: not byte-level BPE, or a tag is missing.
        """
        if not isinstance(backend.model, models.BPE) or not isinstance(
            backend.decoder, decoders.ByteLevel
        ):
            raise CheckpointError(f"{file}: not a byte-level BPE tokenizer as GLM's is", file=file)
        added = backend.get_added_tokens_decoder()
        self.controls: Mapping[str, int] = {token.content: id for id, token in added.items()}
        self.spellings: Mapping[int, str] = {id: name for name, id in self.controls.items()}
        self.tags = SpecialTokens.find(self.controls, file)
        marked = frozenset(id for id, token in added.items() if token.special)
        self.special = marked - self.tags.parts | self.tags.roles
        self.vocab_size: int = backend.get_vocab_size()
        self._backend = backend
        self._texts: LRUCache[str, TokenArray] = LRUCache(REMEMBERED)
        self._bytes = {id: name.encode() for id, name in self.spellings.items()}
        self._byte_of_char = _byte_of_char()
        # The library finds added tokens in text unless they are special and this flag is set.
        backend.add_special_tokens(
            [AddedToken(name, special=True, normalized=False) for name in self.controls]
        )
        backend.encode_special_tokens = True
        if not set(self.encode(" ".join(self.controls))).isdisjoint(self.controls.values()):
            raise CheckpointError(
                f"{file}: a control token can be spelled by plain text", file=file
            )

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `folder/tokenizer.json`.

        Raises:
            CheckpointError: the file is missing, damaged, or not a GLM-4.7 tokenizer.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file", file=str(file))
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file}: {error}", file=str(file)) from error
        return cls(backend, str(file))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text: a control token's spelling in it stays text.

        Lone surrogates, which JSON can carry but UTF-8 cannot, become U+FFFD.
        """
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except TypeError:
            clean = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            encoding = self._backend.encode(clean, add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids

    def encode_rendered(self, pieces: Iterable[Piece]) -> TokenArray:
        """Token ids of a rendered template (`Rendered.pieces`): text as text, tags as ids. [n]

        Long texts are remembered: a client sends its whole conversation again with each turn.
        """
        ids: list[int] = []
        chunks: list[TokenArray] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            elif len(piece) < LONG:
                ids += self.encode(piece)
            else:
                chunks += (np.array(ids, np.int32), self._encode_long(piece))
                ids = []
        return np.concatenate([*chunks, np.array(ids, np.int32)])

    def _encode_long(self, text: str) -> TokenArray:
        known = self._texts.get(text)
        if known is None:
            known = np.array(self.encode(text), np.int32)
            self._texts.put(text, known, len(text))
        return known

    def encode_markup(self, text: str) -> TokenArray:
        """Token ids of text in which spellings of control tokens *are* control tokens. [n]

        For raw prompts (`/v1/completions`, `/tokenize`), whose author writes the template by hand.
        """
        return self.encode_rendered(
            self.controls.get(piece, piece) for piece in self._any_control.split(text)
        )

    @cached_property
    def _any_control(self) -> re.Pattern[str]:
        longest_first = sorted(self.controls, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, control tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that token `id` stands for; none for an id that pads the vocabulary."""
        known = self._bytes.get(id)
        if known is None:
            name: str | None = self._backend.id_to_token(id)
            known = bytes(map(self._byte_of_char.__getitem__, name)) if name else b""
            self._bytes[id] = known
        return known

    def token_id(self, name: str) -> int:
        """The id of a control token.

        Raises:
            CheckpointError: there is none of that name.
        """
        try:
            return self.controls[name]
        except KeyError:
            raise CheckpointError(f"the tokenizer has no control token {name}") from None
