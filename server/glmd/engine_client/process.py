"""One incarnation of the engine process: started, spoken to, waited for, and cleaned up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.asyncio

from glmd.ipc import FromEngine, Shutdown, ToEngine, decode_from_engine, encode
from glmd.utils.logging import LogFormat

log = logging.getLogger("glmd.supervisor")

MAX_SOCKET_PATH = 100
"""Bytes of a Unix socket's path that macOS (104) and Linux (108) both take."""

SHUTDOWN_PATIENCE = 3.0
"""Seconds the engine gets to finish its step, and then again to obey SIGTERM."""


@dataclass(frozen=True, slots=True)
class EngineProcessConfig:
    """What an engine process is started with."""

    model: Path
    """The checkpoint's folder."""
    config: Mapping[str, int | float | str] = field(default_factory=dict)
    """The fields of `EngineConfig` that are not left at their defaults."""
    engine: str = "glmd.engine.core"
    """The module that offers `EngineConfig` and `load_engine`."""
    log_level: str = "INFO"
    log_format: LogFormat = "text"
    log_file: Path | None = None
    """Behind stderr, where the process begins it anew once it is renamed; None: no file."""


class EngineProcess:
    """A running engine process and our end of its socket.

    The socket lives in a folder of its own that only this user may enter. The child holds the
    reading end of a pipe; when this process dies by whatever cause, the pipe ends, and the
    child removes that folder and exits.
    """

    def __init__(
        self, process: asyncio.subprocess.Process, socket: zmq.asyncio.Socket, folder: Path
    ) -> None:
        self._process = process
        self._socket = socket
        self._folder = folder

    @classmethod
    async def start(
        cls, launch: EngineProcessConfig, context: zmq.asyncio.Context
    ) -> EngineProcess:
        """Start the process; it connects, and says `EngineReady`, in its own time."""
        folder = socket_folder()
        endpoint = f"ipc://{folder}/engine"
        socket = context.socket(zmq.PAIR)
        socket.set_hwm(0)
        socket.linger = 0
        try:
            socket.bind(endpoint)
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # a file in the working directory must not shadow a module
                "-m",
                "glmd.engine.main",
                f"--endpoint={endpoint}",
                f"--model={launch.model}",
                f"--engine={launch.engine}",
                f"--config={json.dumps(dict(launch.config))}",
                f"--log-level={launch.log_level}",
                f"--log-format={launch.log_format}",
                *([f"--log-file={launch.log_file}"] if launch.log_file else []),
                stdin=asyncio.subprocess.PIPE,
                process_group=0,  # Ctrl-C in a terminal is for the server alone
            )
        except BaseException:
            socket.close()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        log.debug("Started engine process %d.", process.pid)
        return cls(process, socket, folder)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def receive(self) -> FromEngine:
        message: FromEngine = decode_from_engine(await self._socket.recv())
        return message

    def send(self, message: ToEngine) -> None:
        """Hand a message to the socket, without waiting.

        There is no high-water mark, so this blocks on nothing; to a process that has died it
        goes nowhere.
        """
        if not self._socket.closed:
            self._socket.send(encode(message))

    async def exit_code(self) -> int:
        """Wait for the end of the process; negative: the signal that killed it."""
        return await self._process.wait()

    async def stop(self, *, listening: bool) -> None:
        """End the process and remove what it leaves.

        Args:
            listening: it is in its loop, and will see a `Shutdown` after the present step.
        """
        try:
            if listening:
                self.send(Shutdown())
            if not listening or not await self._ends_within(SHUTDOWN_PATIENCE):
                self._signal_end()
                if not await self._ends_within(SHUTDOWN_PATIENCE):
                    log.warning("Killing engine process %d: it does not end.", self.pid)
                    self._signal_end(kill=True)
                    await self._process.wait()
        finally:
            self._signal_end(kill=True)
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._socket.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _ends_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _signal_end(self, *, kill: bool = False) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                if kill:
                    self._process.kill()
                else:
                    self._process.terminate()


def socket_folder() -> Path:
    """A new folder with mode 0700 whose path leaves room for a socket's name."""
    folder = tempfile.mkdtemp(prefix="glmd-")
    if len(folder) + len("/engine") > MAX_SOCKET_PATH:
        shutil.rmtree(folder)
        folder = tempfile.mkdtemp(prefix="glmd-", dir="/tmp")
    return Path(folder)
