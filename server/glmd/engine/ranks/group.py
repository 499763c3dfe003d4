"""Rank 0's side of a group of ranks: start, plans, and the end of all when one fails."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn, TypeVar

import mlx.core as mx
import msgspec

from glmd.checkpoint.shard import check_ranks, digest_weights
from glmd.checkpoint.stored import StoredWeights
from glmd.engine import memory
from glmd.engine.config import EngineConfig
from glmd.engine.ranks import plan
from glmd.engine.ranks.hosts import LOCAL, Hosts, free_address, join
from glmd.engine.ranks.link import Link, start_heartbeat, start_reader
from glmd.errors import SettingsError
from glmd.ipc import EXIT_RANK_LOST
from glmd.model.loader import LoadedModel

log = logging.getLogger("glmd.engine")

VERSION = f"glmd {version('glmd')}, MLX {version('mlx')}"

ANNOUNCE_INTERVAL = 10.0
"""Seconds between two log lines that name the ranks that are missing."""

PLAN_TIMEOUT = 60.0
"""Seconds after which a rank that lives but launches no plan counts as lost: longer than a step,
and shorter than `hang_timeout` of the server."""

STOP_TIMEOUT = 2.0
"""Seconds that local ranks have to exit, of the three that the engine has."""

M = TypeVar("M", bound=plan.Message)


@dataclass(slots=True)
class _Rank:
    """Another rank, as rank 0 sees it.

    Attributes:
        inbox: messages of the start; a string: why the connection ended.
        sent, acknowledged: numbers of the latest plans.
        waits_since: when the latest acknowledgement came, or the first plan after it was sent.
    """

    link: Link
    hello: plan.Hello
    inbox: queue.SimpleQueue[plan.FromRank | str] = field(default_factory=queue.SimpleQueue)
    sent: int = 0
    acknowledged: int = 0
    waits_since: float = 0.0


class RankGroup:
    """The other ranks, which repeat what is recorded here.

    Attributes:
        budget: bytes of memory that each rank may use: the smallest rank's.
        collectives: MLX's group, after `join`.
        latency, bandwidth: of a sum over the ranks, measured at the start: seconds, bytes/s.
    """

    def __init__(
        self, config: EngineConfig, stored: StoredWeights, on_wait: Callable[[], None]
    ) -> None:
        """Start local ranks, and wait until all have introduced themselves.

        Args:
            on_wait: called again and again meanwhile.

        Raises:
            SettingsError: the model cannot be divided, or a rank cannot take part.
        """
        hosts = self._hosts = Hosts.of(config.ranks)
        check_ranks(stored, len(hosts))
        self.collectives: mx.distributed.Group
        self.latency = self.bandwidth = 0.0
        self._weights = digest_weights(stored)
        self._timeout = config.rank_timeout
        self._operations: deque[plan.Operation] = deque()
        self._numbers = itertools.count(1)
        self._plans = itertools.count(1)
        self._ranks: dict[int, _Rank] = {}
        self._links: list[Link] = []
        self._children: list[subprocess.Popen[bytes]] = []
        self._started = self._closed = False
        self._ending = threading.Lock()
        start_heartbeat(self._links)
        address = hosts.ips[0], 0 if hosts.local else config.rank_port
        try:
            with socket.create_server(address) as door:
                if hosts.local:
                    self._start_local(stored.folder, len(hosts), door.getsockname()[1])
                self._wait_for_all(door, on_wait)
        except OSError as error:
            self.close()
            raise SettingsError(f"ranks: {hosts.ips[0]}: {error.strerror or error}.") from error
        except BaseException:
            self.close()
            raise
        own = config.memory_budget or memory.default_budget()
        others = [rank.hello.budget for rank in self._ranks.values()]
        self.budget = min(own, *others)
        if hosts.local:  # They share this machine's memory.
            self.budget = config.memory_budget or own // len(hosts)

    # -- start --------------------------------------------------------------------------------

    def _start_local(self, folder: Path, count: int, port: int) -> None:
        for rank in range(1, count):
            command = [
                sys.executable, "-P", "-m", "glmd.engine.ranks", f"--lead={LOCAL}:{port}",
                f"--rank={rank}", f"--model={folder}", f"--timeout={self._timeout}",
            ]  # fmt: skip
            self._children.append(subprocess.Popen(command, stdin=subprocess.PIPE))  # noqa: S603

    def _wait_for_all(self, door: socket.socket, on_wait: Callable[[], None]) -> None:
        door.settimeout(1.0)
        announced = time.monotonic()
        while missing := set(range(1, len(self._hosts))) - set(self._ranks):
            on_wait()
            for child in self._children:
                if (code := child.poll()) is not None:
                    if code < 0:
                        self._end(f"a rank was ended by signal {-code}")
                    raise SettingsError("ranks: a rank did not start. See the log.")
            if time.monotonic() - announced > ANNOUNCE_INTERVAL:
                announced = time.monotonic()
                log.info("Waiting for ranks: missing=%s", sorted(missing))
            try:
                connection, address = door.accept()
            except TimeoutError:
                continue
            link = Link(connection, self._timeout)
            try:
                hello = plan.decode_from_rank(link.receive())
            except (EOFError, OSError, msgspec.MsgspecError) as error:
                hello = plan.Failed(str(error))
            if not isinstance(hello, plan.Hello) or hello.rank not in missing:
                log.warning("Connection refused, no missing rank: %s %s", address[0], hello)
                link.close()
                continue
            self._check(hello)
            rank = self._ranks[hello.rank] = _Rank(link, hello)
            self._links.append(link)
            start_reader(link, partial(self._receive, rank), partial(self._lost, rank))

    @staticmethod
    def _check(hello: plan.Hello) -> None:
        if hello.version != VERSION:
            raise SettingsError(
                f"ranks: rank {hello.rank} has {hello.version}, rank 0 {VERSION}. Install the same."
            )
        device = memory.device_name()
        if hello.device != device:
            # Their sums would differ in the last bits, and so the experts that they choose.
            raise SettingsError(
                f"ranks: rank {hello.rank} is an {hello.device}, rank 0 an {device}. Use machines"
                " with the same chip."
            )

    def _expect(self, number: int, kind: type[M]) -> M:
        """Wait for a message of the start.

        Raises:
            SettingsError: the rank reports that it cannot take part.
        """
        message = self._ranks[number].inbox.get()
        if isinstance(message, str):
            self._end(f"rank {number}: {message}")
        if isinstance(message, plan.Failed):
            raise SettingsError(f"ranks: rank {number}: {message.message}")
        assert isinstance(message, kind)
        return message

    def join(self, dtype: str, *, mtp: bool) -> mx.distributed.Group:
        """Let all ranks load their parts, and join their collectives.

        Args:
            dtype, mtp: see `load_model`.

        Raises:
            SettingsError: a rank cannot take part.
        """
        ranks = [self._ranks[number] for number in sorted(self._ranks)]
        own = free_address(self._hosts.ips[0])
        addresses = [own, *(rank.hello.address for rank in ranks)]
        start = plan.Start(addresses, self._hosts.rdma, dtype, mtp, self.budget, self._weights)
        for rank in ranks:
            self._send(rank, start)
        for number in self._ranks:
            self._expect(number, plan.Ready)
        self._started = True
        self.collectives = join(0, addresses, self._hosts.rdma)
        return self.collectives

    def warm_up(self, model: LoadedModel) -> None:
        """Warm up all ranks, once they have loaded their parts, and measure their link."""
        for number in self._ranks:
            self._expect(number, plan.Loaded)
        self.record(plan.WarmUp())
        self.flush()
        model.warm_up()
        self.latency, self.bandwidth = measure_link(self.collectives)
        log.info(
            "Ranks ready: ranks=%d latency_us=%.0f bandwidth_gb=%.2g",
            self.size,
            1e6 * self.latency,
            self.bandwidth / 1e9,
        )

    @property
    def size(self) -> int:
        return 1 + len(self._ranks)

    # -- plans --------------------------------------------------------------------------------

    def new_number(self) -> int:
        """A number for a segment."""
        return next(self._numbers)

    def record(self, operation: plan.Operation) -> None:
        """Add an operation to the next plan."""
        self._operations.append(operation)

    def flush(self, digest_step: int = 0, digest: int | None = None) -> None:
        """Send the recorded operations."""
        operations = []
        while self._operations:
            operations.append(self._operations.popleft())
        if not operations or self._closed:
            return
        step = 0 if digest is None else digest_step
        message = plan.Plan(next(self._plans), operations, step, digest or 0)
        for rank in self._ranks.values():
            if rank.acknowledged == rank.sent:
                rank.waits_since = time.monotonic()
            rank.sent = message.number
            self._send(rank, message)

    def _send(self, rank: _Rank, message: plan.FromLead) -> None:
        try:
            rank.link.send(message)
        except OSError as error:
            self._end(f"rank {rank.hello.rank}: {error}")

    # -- end ----------------------------------------------------------------------------------

    def _receive(self, rank: _Rank, data: bytes) -> None:
        message = plan.decode_from_rank(data)
        match message:
            case plan.Heartbeat():
                waited = time.monotonic() - rank.waits_since
                if rank.acknowledged < rank.sent and waited > PLAN_TIMEOUT:
                    self._end(f"rank {rank.hello.rank}: no plan was executed for {waited:.0f} s")
            case plan.Acknowledge(number):
                rank.waits_since = time.monotonic()
                rank.acknowledged = number
            case plan.Failed(reason) if self._started:
                self._end(f"rank {rank.hello.rank}: {reason}")
            case _:
                rank.inbox.put(message)

    def _lost(self, rank: _Rank, why: str) -> None:
        if not self._started:
            rank.inbox.put(why)  # After what it may have said.
        elif not self._closed:
            self._end(f"rank {rank.hello.rank}: {why}")

    def _end(self, reason: str) -> NoReturn:
        """End all ranks and this process, whose main thread may wait in a collective for ever."""
        with self._ending:
            log.error("Rank lost, ending all ranks: %s", reason)
            self._kill_children()
            os._exit(EXIT_RANK_LOST)

    def _kill_children(self) -> None:
        for child in self._children:
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGKILL)  # A stopped process, too.

    def close(self) -> None:
        """Let the other ranks exit."""
        self._closed = True
        for rank in self._ranks.values():
            with suppress(OSError):
                rank.link.send(plan.Stop())
        deadline = time.monotonic() + STOP_TIMEOUT
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
        self._kill_children()
        for child in self._children:
            child.wait()


PROBES, PROBE_BYTES = 8, 1 << 20
"""Sums of one number, and bytes of a large one, to measure a link with."""


def measure_link(group: mx.distributed.Group) -> tuple[float, float]:
    """Latency of a sum over the ranks, in seconds, and the bytes of a large one per second."""

    def seconds(count: int) -> float:
        x = mx.zeros(count)
        mx.eval(x)
        taken = []
        for _ in range(PROBES):
            start = time.perf_counter()
            mx.eval(mx.distributed.all_sum(x, group=group))
            taken.append(time.perf_counter() - start)
        return min(taken)

    latency, large = seconds(1), seconds(PROBE_BYTES // 4)
    return latency, PROBE_BYTES / max(large - latency, 1e-9)
