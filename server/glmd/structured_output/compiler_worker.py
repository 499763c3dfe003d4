"""A process that turns what answers have to be into grammars, and tries each out.

A process of its own, so that a schema may take what time it likes, up to a limit at which the
process is ended: llguidance's own limits do not bound time (a `multipleOf` of 1,000,003 takes it
18 s), and a thread cannot be ended. It reads and writes msgpack, each message behind its length
(4 bytes, little-endian), on stdin and stdout.
"""

from __future__ import annotations

import signal
import sys
from typing import BinaryIO

import msgspec

from glmd.chat.special_tokens import SpecialTokens
from glmd.errors import InvalidRequest
from glmd.structured_output.backend import GrammarError, byte_tokenizer, make_matcher
from glmd.structured_output.build import Built, build
from glmd.structured_output.protocol import Answer, Compiled, Refused, Setup, encode
from glmd.structured_output.spec import OutputSpec


class Checker:
    """Builds grammars and has llguidance compile them once."""

    def __init__(self, setup: Setup) -> None:
        self._tags = SpecialTokens.find(setup.controls, "the tokenizer")
        # Which ids end a sequence decides nothing about whether a grammar can be kept.
        self._tokenizer = byte_tokenizer(setup.controls, (self._tags.user,))

    def answer(self, structure: OutputSpec) -> Answer:
        try:
            built = self._build(structure)
        except InvalidRequest as error:
            return Refused(error.message, error.param, error.code)
        return Compiled(built.text, built.relaxed)

    def _build(self, structure: OutputSpec) -> Built:
        built = build(structure, self._tags)
        try:
            matcher = make_matcher(self._tokenizer, built.text)
        except GrammarError as error:
            raise self._blame(structure, error) from error
        matcher.compute_bitmask()
        if matcher.is_error():
            raise self._blame(structure, GrammarError(matcher.get_error()))
        return built

    def _blame(self, structure: OutputSpec, error: GrammarError) -> InvalidRequest:
        """Name the part of a structure that llguidance refuses."""
        param = getattr(structure.format, "param", None)
        if structure.tools and structure.format is not None:
            try:
                self._build(msgspec.structs.replace(structure, format=None))
            except InvalidRequest as refused:
                return refused
        elif structure.tools:
            for tool in structure.tools:
                param = tool.param
                if len(structure.tools) > 1:
                    try:
                        self._build(msgspec.structs.replace(structure, tools=(tool,)))
                    except InvalidRequest as refused:
                        return refused
            if len(structure.tools) > 1:
                param = "tools"
        reason = error.message.partition("; following special tokens")[0]
        reason = " ".join(reason.partition("\n<")[0].split())[:300]
        return InvalidRequest(f"{param} cannot be enforced: {reason}", param=param)


def serve(incoming: BinaryIO, outgoing: BinaryIO) -> None:
    """Answer the `Setup` with nothing, once ready, and then every `OutputSpec`."""
    setup = _read(incoming)
    if setup is None:
        return
    checker = Checker(msgspec.msgpack.decode(setup, type=Setup))
    _write(outgoing, b"")
    decode = msgspec.msgpack.Decoder(OutputSpec).decode
    while (data := _read(incoming)) is not None:
        _write(outgoing, encode(checker.answer(decode(data))))


def _read(incoming: BinaryIO) -> bytes | None:
    header = incoming.read(4)
    return incoming.read(int.from_bytes(header, "little")) if len(header) == 4 else None


def _write(outgoing: BinaryIO, data: bytes) -> None:
    outgoing.write(len(data).to_bytes(4, "little") + data)
    outgoing.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for its owner
    serve(sys.stdin.buffer, sys.stdout.buffer)
