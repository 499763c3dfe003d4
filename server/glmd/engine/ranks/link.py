"""Connection between rank 0 and another rank: messages over TCP, each preceded by its length.

Either side sends a heartbeat every second from a thread of its own. A collective never reports that
another rank is gone, so a side that hears nothing for too long ends its process.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import msgspec

from glmd.engine.ranks.plan import Heartbeat, Message, encode

HEARTBEAT_INTERVAL = 1.0

MAX_MESSAGE = 1 << 30


class Link:
    """One end of a connection.

    Args:
        timeout: seconds without a message after which `receive` fails.
    """

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(timeout)
        self._socket = connection
        self._sending = threading.Lock()

    @property
    def local_address(self) -> str:
        """IP address of this end."""
        address: str = self._socket.getsockname()[0]
        return address

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            OSError: the connection has ended, or the other end reads nothing.
        """
        data = encode(message)
        with self._sending:
            self._socket.sendall(len(data).to_bytes(4, "little") + data)

    def receive(self) -> bytes:
        """Wait for the next message.

        Raises:
            EOFError: the connection has ended.
            OSError: it failed, or nothing came in time.
        """
        length = int.from_bytes(self._read(4), "little")
        if length > MAX_MESSAGE:
            raise OSError(f"a message of {length} bytes")
        return self._read(length)

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            if not part:
                raise EOFError("the connection has ended")
            data += part
        return bytes(data)

    def close(self) -> None:
        self._socket.close()


def start_heartbeat(links: list[Link]) -> None:
    """Send heartbeats over the links until the process ends. A link may be added later."""

    def run() -> None:
        while True:
            for link in list(links):
                try:
                    link.send(Heartbeat())
                except OSError:
                    links.remove(link)  # The thread that reads has noticed.
            time.sleep(HEARTBEAT_INTERVAL)

    threading.Thread(target=run, name="rank heartbeat", daemon=True).start()


def start_reader(
    link: Link, on_message: Callable[[bytes], None], on_lost: Callable[[str], None]
) -> None:
    """Read messages in a thread until the connection ends, and then report why."""

    def run() -> None:
        try:
            while True:
                on_message(link.receive())
        except TimeoutError:
            on_lost("it did not answer in time")
        except (EOFError, OSError, msgspec.MsgspecError) as error:
            on_lost(str(error))

    threading.Thread(target=run, name="rank reader", daemon=True).start()
