"""The setting `ranks`: a number of processes on this machine, or a file of hosts.

The file is that of `mlx.launch`, which `mlx.distributed_config` writes: a list of hosts, or an
object with `hosts`. Of each host `ips` is read, and `rdma` if there is one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import msgspec

from glmd.errors import SettingsError

LOCAL = "127.0.0.1"

JOIN_TIMEOUT = 30
"""Seconds for all ranks to join, which takes one."""

RDMADevices = list[str | list[str] | None]
"""A host's devices towards each host."""


class Host(msgspec.Struct, frozen=True):
    """One host of the file."""

    ips: list[str]
    rdma: RDMADevices = []


class _HostFile(msgspec.Struct, frozen=True):
    hosts: list[Host]


@dataclass(frozen=True, slots=True)
class Hosts:
    """Where the ranks are.

    Attributes:
        ips: of each rank.
        rdma: of each rank, the RDMA device towards each other; None: the ring over TCP is used.
        local: rank 0 starts the others itself.
    """

    ips: list[str]
    rdma: list[RDMADevices] | None = None
    local: bool = False

    def __len__(self) -> int:
        return len(self.ips)

    @classmethod
    def of(cls, setting: int | str) -> Hosts:
        """Read the setting.

        Raises:
            SettingsError: the file cannot be read, or is no file of hosts.
        """
        if isinstance(setting, int):
            return cls([LOCAL] * setting, local=True)
        try:
            raw = json.loads(Path(setting).expanduser().read_bytes())
            found = msgspec.convert({"hosts": raw} if isinstance(raw, list) else raw, _HostFile)
        except (OSError, ValueError, msgspec.ValidationError) as error:
            raise SettingsError(f"ranks: {setting}: {error}") from error
        hosts = found.hosts
        if len(hosts) < 2 or not all(host.ips for host in hosts):
            raise SettingsError(f"ranks: {setting}: name two hosts or more, each with `ips`.")
        rdma = [host.rdma for host in hosts] if all(host.rdma for host in hosts) else None
        return cls([host.ips[0] for host in hosts], rdma)


def free_address(ip: str) -> str:
    """An address `ip:port` with a port that is free."""
    with socket.socket() as probe:
        probe.bind((ip, 0))
        return f"{ip}:{probe.getsockname()[1]}"


def join(rank: int, addresses: list[str], rdma: list[RDMADevices] | None) -> mx.distributed.Group:
    """Join the collectives of all ranks, which wait for one another.

    MLX waits for ever where a rank has died since, and lets no thread of this process run (0.32).
    So a signal ends the process.

    Args:
        addresses: of all ranks, `ip:port`.
    """
    signal.alarm(JOIN_TIMEOUT)
    try:
        return _join(rank, addresses, rdma)
    finally:
        signal.alarm(0)


def _join(rank: int, addresses: list[str], rdma: list[RDMADevices] | None) -> mx.distributed.Group:
    content = [[address] for address in addresses] if rdma is None else rdma
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(content, file)
        file.flush()
        os.environ["MLX_RANK"] = str(rank)
        if rdma is None:
            os.environ["MLX_HOSTFILE"] = file.name
            return mx.distributed.init(strict=True, backend="ring")
        if len(addresses) > 2:
            # Each rank of JACCL's mesh adds in the order in which the others' parts arrive.
            os.environ["MLX_JACCL_RING"] = "1"
        os.environ["MLX_IBV_DEVICES"] = file.name
        os.environ["MLX_JACCL_COORDINATOR"] = addresses[0]
        return mx.distributed.init(strict=True, backend="jaccl")
