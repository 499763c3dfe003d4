"""KV events: what a listener knows equals what the tree stores, and the format on the wire."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kv_listener import Listener

from glmd.errors import SettingsError
from glmd.kv_cache import kv_events
from glmd.kv_cache.blocks import BLOCK_TOKENS, ROOT_HASH, block_hash
from glmd.kv_cache.kv_events import KVEventPublisher
from glmd.kv_cache.node import Keys, Lease
from glmd.kv_cache.prefix_tree import PrefixTree


@dataclass(frozen=True)
class Rows:
    """A segment without contents."""

    count: int

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes(self) -> int:
        return 100 * self.count

    def slice(self, start: int, end: int) -> Rows:
        return Rows(end - start)

    def head(self, end: int) -> Rows:
        return Rows(end)

    def joins(self, other: Rows) -> bool:
        return True

    def concat(self, *others: Rows) -> Rows:
        return Rows(self.count + sum(map(len, others)))


ANY_PORT = "tcp://127.0.0.1:*"


def bound(socket: zmq.Socket[bytes] | None) -> str:
    """The endpoint of a socket."""
    assert socket is not None
    return str(socket.get_string(zmq.LAST_ENDPOINT))


def pairs(tokens: list[int]) -> Keys:
    """Keys of all tokens but the last, as with an MTP layer."""
    ids = np.array(tokens, np.int64)
    return ids[:-1] << 32 | ids[1:]


def cached_blocks(tree: PrefixTree[Rows], *, paired: bool) -> set[tuple[int, ...]]:
    """Every prefix of whole blocks that the tree stores without a salt, walked from scratch."""
    found = set()
    for node in tree.nodes():
        salt, pieces = node.prefix()
        keys = np.concatenate(pieces)
        ids = tuple((keys >> 32 if paired else keys).tolist())
        ends = range(BLOCK_TOKENS, len(ids) + 1, BLOCK_TOKENS)
        found |= {ids[:end] for end in ends if not salt}
    return found


class Wire:
    """A publisher with a listener, in this process."""

    def __init__(self, *, paired: bool) -> None:
        self.publisher = KVEventPublisher(ANY_PORT, ANY_PORT)
        self.listener = Listener(bound(self.publisher._pub), bound(self.publisher._replay))
        self.publisher.start(paired_keys=paired)

    def settle(self) -> None:
        """Wait until the listener has what was sent so far, by asking for all of it."""
        self.listener.catch_up()

    def close(self) -> None:
        self.publisher.close()
        self.listener.close()


class ListenerAgainstTree(RuleBasedStateMachine):
    """A listener's view equals the tree after any changes."""

    tokens = st.lists(st.sampled_from([0, 1, 1, 1]), min_size=1, max_size=40)
    which = st.integers(0, 10**6)
    paired = False

    def __init__(self) -> None:
        super().__init__()
        self.wire = Wire(paired=self.paired)
        self.tree: PrefixTree[Rows] = PrefixTree(64)
        self.tree.observer = self.wire.publisher
        self.leases: list[Lease[Rows]] = []

    def teardown(self) -> None:
        self.wire.close()

    @rule(salt=st.sampled_from(["", "", "", "a"]), tokens=tokens, twice=st.booleans())
    def store(self, salt: str, tokens: list[int], twice: bool) -> None:
        tokens = [1] * 20 + tokens
        keys = pairs(tokens) if self.paired else np.array(tokens, np.int32)
        lease = self.tree.acquire(salt)
        for part in np.array_split(keys, 3 if twice else 1):
            self.tree.insert(lease, part, Rows(len(part)))
        self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(which=which)
    def release(self, which: int) -> None:
        self.tree.release(self.leases.pop(which % len(self.leases)))

    @rule(count=st.integers(1, 60))
    def evict(self, count: int) -> None:
        self.tree.evict(100 * count)

    @rule()
    def reset(self) -> None:
        self.tree.reset()
        self.leases = []

    @invariant()
    def listener_knows_what_is_cached(self) -> None:
        self.wire.settle()
        assert self.wire.listener.blocks == cached_blocks(self.tree, paired=self.paired)


@pytest.mark.parametrize("kept", [1 << 20, 500], ids=["replayed", "snapshots"])
@pytest.mark.parametrize("paired", [False, True], ids=["ids", "pairs"])
def test_a_listener_knows_what_the_tree_stores(
    paired: bool, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ListenerAgainstTree, "paired", paired)
    monkeypatch.setattr(kv_events, "REPLAY_BYTES", kept)
    monkeypatch.setattr(kv_events, "MAX_EVENTS", 3)
    ListenerAgainstTree.TestCase.settings = settings(
        max_examples=8, stateful_step_count=30, deadline=None
    )
    ListenerAgainstTree.TestCase().runTest()


def test_hashes_are_those_of_vllm() -> None:
    """As `hashlib.sha256(cbor2.dumps(…, canonical=True))` computes them."""
    assert ROOT_HASH.hex() == "4e1195df020de59e0d65a33a4279f1183e7ae4e5d980e309f8b55adff2e61c3e"
    ids = [0, 1, 23, 24, 255, 256, 65535, 65536, 154879, 5, 6, 7, 8, 9, 10, 11]
    first = block_hash(ROOT_HASH, ids)
    assert first.hex() == "03fa18e1ba38fff785517418e92c3630aa87832494664778f0c01683399781b5"
    second = block_hash(first, list(range(16)))
    assert second.hex() == "b2a8bd98bda8f063b55806fdf36e41b7a291a21beda517cf4f45ae832207e1af"


@contextmanager
def subscribed() -> Iterator[tuple[KVEventPublisher, Any]]:
    """A publisher and a socket that gets its messages."""
    context = zmq.Context()
    socket = context.socket(zmq.SUB)
    socket.subscribe(b"")
    publisher = KVEventPublisher(ANY_PORT)
    socket.connect(bound(publisher._pub))
    # A subscription has arrived when an event does: events before it are lost, as with vLLM.
    publisher.start(paired_keys=False)
    while not socket.poll(20):
        publisher.cleared()
    while socket.poll(200):
        socket.recv_multipart()
    yield publisher, socket
    publisher.close()
    context.destroy(linger=0)


def test_messages_are_those_of_vllm() -> None:
    with subscribed() as (publisher, socket):
        tree: PrefixTree[Rows] = PrefixTree()
        tree.observer = publisher
        lease = tree.acquire()
        tree.insert(lease, np.arange(40, dtype=np.int32), Rows(40))
        topic, first, payload = socket.recv_multipart()
        assert topic == b""
        ts, events, rank = msgspec.msgpack.decode(payload)
        assert isinstance(ts, float)
        assert rank == 0
        hashes = [block_hash(ROOT_HASH, list(range(16)))]
        hashes.append(block_hash(hashes[0], list(range(16, 32))))
        stored = {
            "type": "BlockStored",
            "block_hashes": hashes,
            "parent_block_hash": None,
            "token_ids": list(range(32)),
            "block_size": 16,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
        }
        assert events == [stored]
        tree.insert(lease, np.arange(40, 50, dtype=np.int32), Rows(10))
        _, second, payload = socket.recv_multipart()
        assert int.from_bytes(second, "big") == int.from_bytes(first, "big") + 1
        (event,) = msgspec.msgpack.decode(payload)[1]
        third = block_hash(hashes[1], list(range(32, 48)))
        assert event == stored | {
            "block_hashes": [third],
            "parent_block_hash": hashes[1],
            "token_ids": list(range(32, 48)),
        }
        tree.release(lease)
        tree.clear()
        removed: list[bytes] = []
        while len(removed) < 3:
            for event in msgspec.msgpack.decode(socket.recv_multipart()[2])[1]:
                removed += event.pop("block_hashes")
                assert event == {"type": "BlockRemoved", "medium": "GPU"}
        assert removed == [third, *hashes[::-1]]
        publisher.cleared()
        (event,) = msgspec.msgpack.decode(socket.recv_multipart()[2])[1]
        assert event == {"type": "AllBlocksCleared"}


def test_an_endpoint_that_is_taken_is_named() -> None:
    first = KVEventPublisher(ANY_PORT)
    taken = bound(first._pub)
    with pytest.raises(SettingsError, match=f"kv_events: {taken} cannot be bound"):
        KVEventPublisher(taken)
    with pytest.raises(SettingsError, match="kv_events_replay: nonsense cannot be bound"):
        KVEventPublisher(ANY_PORT, "nonsense")
    first.start(paired_keys=False)
    first.close()
