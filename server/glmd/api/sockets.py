"""Listening sockets and the limit of open files.

Imports no FastAPI, which takes a second.
"""

from __future__ import annotations

import errno
import resource
import socket
from typing import Any

import psutil

from glmd.errors import SettingsError

BACKLOG = 2048
"""Connections that the kernel holds until they are accepted."""

SEND_BUFFER = 128 * 1024
"""Bytes of a response that the kernel buffers. Its default of 4 MB would hide for minutes that a
client has stopped reading a stream."""

MAX_FILES = 8192
"""Open files to ask for; macOS refuses more than 10,240."""

RESERVED_FILES = 128
"""Files for the engine's pipes and sockets, including a restart."""

NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def listen(host: str, port: int) -> list[socket.socket]:
    """Listen on every address of `host` that this machine has.

    Raises:
        SettingsError: the host is unknown, or the port is in use or not permitted.
    """
    sockets: list[socket.socket] = []
    unavailable: OSError | None = None
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in dict.fromkeys(addresses):
            # With port 0, the other addresses use the port that the first address got.
            bound_port = port or (sockets[0].getsockname()[1] if sockets else 0)
            try:
                sockets.append(_bind(family, (address[0], bound_port, *address[2:])))
            except OSError as error:
                if error.errno not in NO_SUCH_ADDRESS:
                    raise
                unavailable = error  # `localhost` may name ::1 on a machine without IPv6.
        if not sockets:
            raise unavailable or OSError(errno.EADDRNOTAVAIL, "No such address")
    except OSError as error:
        for opened in sockets:
            opened.close()
        reason = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            reason += f" by {describe_listener(port)}. Choose another with --port, or stop it"
        elif error.errno in NO_SUCH_ADDRESS:
            reason += ". Choose an address of this machine with --host, such as ::1 without IPv4"
        raise SettingsError(f"Cannot listen on {host} port {port}: {reason}.") from error
    return sockets


def describe_listener(port: int) -> str:
    """Name the process that listens on a port, if the system tells this user."""
    for process in psutil.process_iter(["name", "pid", "cmdline"]):
        try:
            connections = process.net_connections("tcp")
        except (psutil.Error, OSError):
            continue  # of another user, or gone
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections):
            command = process.info["cmdline"] or [process.info["name"]]
            named = "glmd" if "glmd" in " ".join(command[:4]) else process.info["name"]
            return f"{named} (process {process.info['pid']})"
    return "a process of another user"


def _bind(family: int, address: tuple[Any, ...]) -> socket.socket:
    # asyncio sets TCP_NODELAY only on sockets whose protocol is IPPROTO_TCP. Without TCP_NODELAY, a
    # response in two writes waits 40 ms for the client's delayed acknowledgement.
    opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(address)
        opened.listen(BACKLOG)
    except OSError:
        opened.close()
        raise
    return opened


def base_url(host: str, sockets: list[socket.socket]) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{sockets[0].getsockname()[1]}"


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard limit, at most to `MAX_FILES`.

    Raises:
        SettingsError: the hard limit leaves too few for connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < 2 * RESERVED_FILES:
        raise SettingsError(
            f"This process may open {wanted} files, and needs {2 * RESERVED_FILES}. Raise the hard"
            " limit (ulimit -Hn)."
        )


def connection_limit() -> int:
    """Number of connections that the limit of open files allows."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (MAX_FILES if soft == resource.RLIM_INFINITY else soft) - RESERVED_FILES
