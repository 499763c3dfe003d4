"""What a GrammarCompiler and its worker say to each other, beside `OutputSpec`."""

from __future__ import annotations

import msgspec


class Setup(msgspec.Struct, frozen=True):
    """The first message to the worker."""

    controls: dict[str, int]
    """The checkpoint's control tokens, ids by name."""


class Compiled(msgspec.Struct, tag="compiled", frozen=True):
    grammar: str
    relaxed: tuple[str, ...]
    """Keywords of schemas that the grammar does not enforce."""


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """An InvalidRequest."""

    message: str
    param: str | None
    code: str | None


Answer = Compiled | Refused

encode = msgspec.msgpack.Encoder().encode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
