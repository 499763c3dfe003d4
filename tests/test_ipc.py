"""Decoding of messages in the engine process."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from glmd.engine.main import Channel
from glmd.ipc import AbortRequest, EngineRequest, decode_to_engine, encode, pack_tokens

VALID = encode(EngineRequest(id="a", prompt=pack_tokens([1, 2]), stop_token_ids=(3,)))


@given(st.binary(max_size=60), st.integers(0, len(VALID)))
def test_any_bytes_are_a_message_or_raise_a_decode_error(junk: bytes, at: int) -> None:
    for data in (junk, VALID[:at] + junk + VALID[at + len(junk) :]):
        try:
            message = decode_to_engine(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
        assert not isinstance(message, EngineRequest) or len(message.prompt) % 4 == 0


def test_a_prompt_with_incomplete_int32_is_rejected() -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_to_engine(
            VALID.replace(b"\xc4\x08", b"\xc4\x07").replace(b"\x02\0\0\0", b"\x02\0\0")
        )


def test_the_engine_skips_undecodable_messages(tmp_path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.PAIR) as ours:
        ours.bind(f"ipc://{tmp_path}/engine")
        channel = Channel(f"ipc://{tmp_path}/engine")
        try:
            for data in (b"", b"\xc1", b"\xff" * 1000, VALID[:-1], encode(AbortRequest("a"))):
                ours.send(data)
            assert channel.receive(10) == AbortRequest("a")
        finally:
            channel.close()
