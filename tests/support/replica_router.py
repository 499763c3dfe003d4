"""A small router in the place of a real one: by KV events, with retries on other replicas."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
from kv_listener import Listener

LOAD_TOKENS = 400
"""Cached tokens that outweigh one more request in flight."""


@dataclass(eq=False)
class Replica:
    """A server as the router sees it."""

    url: str
    listener: Listener
    in_flight: int = 0
    served: int = 0
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=60)


class Lost(Exception):
    """A replica broke off an answer that had begun, which cannot be retried."""

    def __init__(self, replica: Replica) -> None:
        super().__init__(replica.url)
        self.replica = replica


class Router:
    """Sends each request to the replica with the longest cached prefix, less its load."""

    def __init__(self, replicas: list[Replica]) -> None:
        self.replicas = replicas
        self._lock = threading.Lock()

    def tokens(self, body: dict[str, Any]) -> list[int]:
        """The token ids of a prompt."""
        asked = {name: body[name] for name in ("messages", "enable_thinking")}
        for replica in list(self.replicas):
            try:
                ids: list[int] = replica.http.post("/tokenize", json=asked).json()["tokens"]
            except httpx.TransportError:
                continue
            return ids
        raise AssertionError("no replica answers")

    def _take(self, ids: list[int], tried: set[Replica]) -> Replica:
        with self._lock:
            left = [replica for replica in self.replicas if replica not in tried]
            for replica in left:
                replica.listener.receive()

            def score(replica: Replica) -> tuple[int, int]:
                matched = replica.listener.matched(ids)
                return matched - LOAD_TOKENS * replica.in_flight, -replica.served

            best = max(left, key=score)
            best.in_flight += 1
            best.served += 1
            return best

    def stream(self, body: dict[str, Any]) -> Iterator[tuple[Replica, str]]:
        """The lines of a streamed answer, with who sent them.

        Raises:
            Lost: the answer had begun.
        """
        ids, tried, begun = self.tokens(body), set[Replica](), False
        headers = {"x-request-id": uuid.uuid4().hex}
        sent = body | {"stream": True, "stream_options": {"include_usage": True}}
        while True:
            replica = self._take(ids, tried)
            try:
                path = "/v1/chat/completions"
                with replica.http.stream("POST", path, json=sent, headers=headers) as answer:
                    assert answer.status_code == 200
                    for line in answer.iter_lines():
                        begun = True
                        yield replica, line
                return
            except httpx.TransportError as error:
                tried.add(replica)
                if begun:
                    raise Lost(replica) from error
            finally:
                with self._lock:
                    replica.in_flight -= 1
