"""A listener of KV events: the blocks of one server, as a router keeps them."""

from __future__ import annotations

import msgspec
import zmq

END = (-1).to_bytes(8, "big", signed=True)


class Listener:
    """Subscribes to a server's KV events, and asks for those that it missed.

    Attributes:
        blocks: the token ids of every cached prefix of whole blocks.
    """

    def __init__(self, endpoint: str, replay: str) -> None:
        self._context = zmq.Context()
        self._events = self._context.socket(zmq.SUB)
        self._events.subscribe(b"")
        self._events.reconnect_ivl = 20
        self._events.connect(endpoint)
        self._replay_endpoint = replay
        self._next = 0
        self._prefixes: dict[bytes, tuple[int, ...]] = {}

    @property
    def blocks(self) -> set[tuple[int, ...]]:
        return set(self._prefixes.values())

    def matched(self, ids: list[int], block_size: int = 16) -> int:
        """Tokens of a prompt that are cached, in whole blocks."""
        blocks, end = self.blocks, 0
        while tuple(ids[: end + block_size]) in blocks:
            end += block_size
        return end

    def receive(self) -> None:
        """Apply what has arrived."""
        while self._events.poll(0):
            _, number, payload = self._events.recv_multipart()
            at = int.from_bytes(number, "big")
            if at > self._next:
                self.catch_up()
            elif at < self._next and at < 2:
                self._next = 0  # The server has started again.
            self._apply(at, payload)

    def catch_up(self, seconds: float = 5.0) -> None:
        """Ask for everything that has not arrived."""
        dealer = self._context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.setsockopt(zmq.RCVTIMEO, int(1000 * seconds))
        dealer.connect(self._replay_endpoint)
        dealer.send_multipart((b"", self._next.to_bytes(8, "big")))
        while True:
            _, number, payload = dealer.recv_multipart()
            if number == END:
                break
            self._apply(int.from_bytes(number, "big"), payload)
        dealer.close()

    def _apply(self, number: int, payload: bytes) -> None:
        if number < self._next:
            return
        self._next = number + 1
        _, events, _ = msgspec.msgpack.decode(payload)
        for event in events:
            match event["type"]:
                case "AllBlocksCleared":
                    self._prefixes.clear()
                case "BlockRemoved":
                    for each in event["block_hashes"]:
                        del self._prefixes[each]
                case "BlockStored":
                    parent = event["parent_block_hash"]
                    prefix = () if parent is None else self._prefixes[parent]
                    size = event["block_size"]
                    assert len(event["token_ids"]) == size * len(event["block_hashes"])
                    for index, each in enumerate(event["block_hashes"]):
                        ids = event["token_ids"][index * size : (index + 1) * size]
                        prefix = (*prefix, *ids)
                        assert each not in self._prefixes, "stored twice"
                        self._prefixes[each] = prefix

    def close(self) -> None:
        self._context.destroy(linger=0)
