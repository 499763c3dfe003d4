"""KV events: which blocks are cached, published for routers in vLLM's format.

A thread derives the blocks from what the tree stores and removes, so that a step only hands over
references to keys. Events are sent by a PUB socket as [topic, sequence number, batch]. Who has
missed some asks the replay socket (ROUTER) for [first sequence number], and gets
[sequence number, batch] repeatedly, and at the end [-1, nothing].
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from glmd.errors import SettingsError
from glmd.kv_cache.blocks import AllBlocksCleared, BlockIndex, KVEvent
from glmd.kv_cache.node import Keys

log = logging.getLogger(__name__)

MAX_EVENTS = 1024
"""Events in a batch. vllm-router accepts 4,096."""

REPLAY_BYTES = 64 << 20
"""Size of the latest batches, which are sent again on request. A listener that asks for older ones
gets all cached blocks instead."""

SEND_QUEUE = 100_000
"""Batches that wait for a slow listener; it misses further ones. vLLM's default."""

CLOSE_SECONDS = 2.0
"""Time for the last events to be sent."""

END = (-1).to_bytes(8, "big", signed=True)
"""Sequence number after a replay."""


class EventBatch(msgspec.Struct, array_like=True, gc=False):
    """Events that happened in this order, at a Unix time."""

    ts: float
    events: list[KVEvent]
    data_parallel_rank: int = 0


@dataclass(frozen=True, slots=True)
class _Change:
    """A change of the tree; no pieces: everything was removed."""

    kind: Literal["store", "remove"]
    pieces: list[Keys]
    start: int


class KVEventPublisher:
    """Publishes the blocks of a tree, as its `glmd.kv_cache.node.TreeObserver`.

    Prefixes with a cache salt are not published: their tokens are meant to stay unknown to others.

    Args:
        endpoint: of the PUB socket, such as `tcp://127.0.0.1:5557`; it is bound.
        replay_endpoint: of the ROUTER socket; None: there is none.

    Raises:
        SettingsError: an endpoint cannot be bound.
    """

    def __init__(self, endpoint: str, replay_endpoint: str | None = None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._changes: deque[_Change] = deque()
        self._index = BlockIndex()
        self._encode = msgspec.msgpack.Encoder().encode
        self._sent = 0
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_bytes = 0
        self._paired_keys = False
        self._failed = False
        try:
            self._pub = self._bind(zmq.PUB, "kv_events", endpoint)
            self._replay: zmq.Socket[bytes] | None = None
            if replay_endpoint is not None:
                self._replay = self._bind(zmq.ROUTER, "kv_events_replay", replay_endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        # Wakes the thread; an empty message ends it.
        self._signal = self._context.socket(zmq.PAIR)
        self._signal.set_hwm(0)
        self._signal.bind("inproc://changes")
        self._wake = self._context.socket(zmq.PAIR)
        self._wake.set_hwm(0)
        self._wake.connect("inproc://changes")
        self._thread = threading.Thread(target=self._run, name="kv events", daemon=True)

    @classmethod
    def of(cls, endpoint: str | None, replay_endpoint: str | None) -> KVEventPublisher | None:
        """The publisher of a configuration; None: it has no endpoint."""
        return None if endpoint is None else cls(endpoint, replay_endpoint)

    def _bind(self, kind: int, setting: str, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(SEND_QUEUE)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise SettingsError(
                f"{setting}: {endpoint} cannot be bound: {error.strerror}. Name a free address of"
                " this machine, such as tcp://127.0.0.1:5557."
            ) from error
        return socket

    def start(self, *, paired_keys: bool) -> None:
        """Begin to publish.

        Args:
            paired_keys: a key holds a token's id in its upper half, and the next one's below.
        """
        self._paired_keys = paired_keys
        self._thread.start()
        self.cleared()  # For listeners of an engine that ran here before.

    # -- on the engine's thread -----------------------------------------------------------------

    def changed(
        self, kind: Literal["store", "remove"], salt: str, pieces: list[Keys], start: int
    ) -> None:
        if not salt:
            self._put(_Change(kind, pieces, start))

    def cleared(self) -> None:
        self._put(_Change("remove", [], 0))

    def _put(self, change: _Change) -> None:
        if not self._failed:
            self._changes.append(change)
            self._signal.send(b"+")

    def close(self) -> None:
        """Publish that nothing is cached, and close the sockets."""
        self.cleared()
        self._signal.send(b"")
        self._thread.join()
        self._context.destroy(linger=int(1000 * CLOSE_SECONDS))

    # -- on the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake, zmq.POLLIN)
        if self._replay is not None:
            poller.register(self._replay, zmq.POLLIN)
        try:
            running = True
            while running:
                ready = dict(poller.poll())
                if self._wake in ready:
                    running = self._publish()
                if self._replay is not None and self._replay in ready:
                    self._answer(self._replay)
        except Exception:
            # Routers lose their hints, and answers go on.
            self._failed = True
            self._changes.clear()
            log.exception("KV events stopped by an unexpected error")
        finally:
            self._pub.close(linger=int(1000 * CLOSE_SECONDS))

    def _publish(self) -> bool:
        """Send the changes so far; returns whether there may be more."""
        running = True
        while self._wake.poll(0):
            running = bool(self._wake.recv()) and running
        events = [self._apply(self._changes.popleft()) for _ in range(len(self._changes))]
        for payload in self._batches(event for event in events if event is not None):
            self._pub.send_multipart((b"", self._sent.to_bytes(8, "big"), payload))
            self._kept.append((self._sent, payload))
            self._kept_bytes += len(payload)
            self._sent += 1
        while self._kept_bytes > REPLAY_BYTES:
            self._kept_bytes -= len(self._kept.popleft()[1])
        return running

    def _apply(self, change: _Change) -> KVEvent | None:
        if not change.pieces:
            return self._index.clear()
        keys = np.concatenate(change.pieces)
        ids: npt.NDArray[np.int32] = (keys >> 32 if self._paired_keys else keys).astype(np.int32)
        update = self._index.store if change.kind == "store" else self._index.remove
        return update(ids, change.start)

    def _answer(self, replay: zmq.Socket[bytes]) -> None:
        """Send the batches that a listener asks for."""
        *address, asked = replay.recv_multipart()
        if len(address) != 2 or len(asked) != 8:
            log.warning("KV events: replay request ignored: frames=%d", len(address) + 1)
            return
        first = int.from_bytes(asked, "big")
        kept: Iterator[tuple[int, bytes]] = (each for each in self._kept if each[0] >= first)
        if first < self._sent and (not self._kept or self._kept[0][0] > first):
            kept = self._snapshot()
        for number, payload in kept:
            replay.send_multipart((*address, number.to_bytes(8, "big"), payload))
        replay.send_multipart((*address, END, b""))

    def _snapshot(self) -> Iterator[tuple[int, bytes]]:
        """Batches with all cached blocks, in place of the latest ones."""
        batches = self._batches([AllBlocksCleared(), *self._index.snapshot()])
        for number, payload in enumerate(batches, self._sent - len(batches)):
            yield max(number, 0), payload

    def _batches(self, events: Iterable[KVEvent]) -> list[bytes]:
        """Events in batches, encoded."""
        left, now = list(events), time.time()
        return [
            self._encode(EventBatch(now, left[start : start + MAX_EVENTS]))
            for start in range(0, len(left), MAX_EVENTS)
        ]
