"""One engine process and the API process's end of its socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.asyncio

from glmd.ipc import FromEngine, Shutdown, ToEngine, decode_from_engine, encode
from glmd.utils.logging import LogFormat

log = logging.getLogger("glmd.engine_client")

MAX_SOCKET_PATH = 100
"""Bytes of a Unix socket's path; the limits are 104 on macOS and 108 on Linux."""

STOP_TIMEOUT = 3.0
"""Seconds to wait after `Shutdown`, and again after SIGTERM."""

SAVE_TIMEOUT = 12.0
"""Seconds more after `Shutdown` for an engine with a disk cache, which saves its KV for at most
ten."""


@dataclass(frozen=True, slots=True)
class EngineProcessConfig:
    """Start parameters of the engine process.

    Attributes:
        model: folder of the checkpoint.
        config: fields of `EngineConfig` that differ from their defaults.
        engine: module with `EngineConfig` and `load_engine`.
        log_file: file behind stderr; the process reopens a renamed file. None: stderr is no file.
    """

    model: Path
    config: Mapping[str, int | float | str] = field(default_factory=dict)
    engine: str = "glmd.engine.core"
    log_level: str = "INFO"
    log_format: LogFormat = "text"
    log_file: Path | None = None


class EngineProcess:
    """A running engine process and its socket.

    `start` needs no event loop, so that the process can load the model while this process is still
    importing the API. `connect` must be called in the event loop before the other methods.

    The socket is in a new folder that only this user may enter. The child holds the reading end of
    a pipe: when this process ends for any reason, the child sees the end of the pipe, removes the
    folder and exits.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], folder: Path, *, save_timeout: float = 0.0
    ) -> None:
        """
        Args:
            save_timeout: seconds that the process may take to save its state at the end.
        """
        self._process = process
        self._save_timeout = save_timeout
        self._folder = folder
        self._socket: zmq.asyncio.Socket
        self._exited: asyncio.Future[int]

    @classmethod
    def start(cls, config: EngineProcessConfig) -> EngineProcess:
        """Start the process without waiting for `EngineReady`.

        Raises:
            OSError: the process cannot be started.
        """
        folder = socket_folder()
        try:
            process = subprocess.Popen(  # noqa: S603
                [
                    sys.executable,
                    "-P",  # a file in the working directory must not shadow a module
                    "-m",
                    "glmd.engine.main",
                    f"--endpoint={endpoint(folder)}",
                    f"--model={config.model}",
                    f"--engine={config.engine}",
                    f"--config={json.dumps(dict(config.config))}",
                    f"--log-level={config.log_level}",
                    f"--log-format={config.log_format}",
                    *([f"--log-file={config.log_file}"] if config.log_file else []),
                ],
                # MLX's compiler on CPUs writes there, and fails if TMPDIR is no folder.
                env={**os.environ, "TMPDIR": str(folder.parent)},
                stdin=subprocess.PIPE,
                process_group=0,  # Ctrl-C in a terminal is for the server alone
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        log.debug("Engine process started: pid=%d", process.pid)
        save_timeout = SAVE_TIMEOUT if config.config.get("disk_cache") else 0.0
        return cls(process, folder, save_timeout=save_timeout)

    def connect(self, context: zmq.asyncio.Context) -> None:
        """Open this end of the socket, and watch for the exit of the process."""
        self._socket = context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._socket.bind(endpoint(self._folder))
        loop = asyncio.get_running_loop()
        self._exited = loop.create_future()
        threading.Thread(
            target=self._watch_exit, args=(loop,), name="engine exit", daemon=True
        ).start()

    def _watch_exit(self, loop: asyncio.AbstractEventLoop) -> None:
        code = self._process.wait()
        with contextlib.suppress(RuntimeError):  # The loop was closed before the process exited.
            loop.call_soon_threadsafe(self._exited.set_result, code)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def receive(self) -> FromEngine:
        """Wait for the next message.

        Raises:
            msgspec.DecodeError, UnicodeDecodeError: the bytes are not a message.
        """
        message: FromEngine = decode_from_engine(await self._socket.recv())
        return message

    def send(self, message: ToEngine) -> None:
        """Send a message without blocking; messages to a dead process are lost."""
        if not self._socket.closed:
            self._socket.send(encode(message))

    async def exit_code(self) -> int:
        """Wait for the process to exit.

        A negative code is the signal that killed the process.
        """
        return await asyncio.shield(self._exited)

    async def stop(self, *, listening: bool) -> None:
        """Stop the process and remove its socket.

        Args:
            listening: the process reads messages, so try `Shutdown` before SIGTERM.
        """
        try:
            if listening:
                self.send(Shutdown())
            timeout = STOP_TIMEOUT + self._save_timeout
            if not listening or not await self._exits_within(timeout):
                self._signal()
                if not await self._exits_within(STOP_TIMEOUT):
                    log.warning("Killing the engine process: pid=%d", self.pid)
                    self._signal(kill=True)
                    await self.exit_code()
        finally:
            self._socket.close()
            self.kill()

    def kill(self) -> None:
        """Kill the process if it runs, and remove its folder. Needs no event loop."""
        self._signal(kill=True)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _exits_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self.exit_code(), seconds)
        except TimeoutError:
            return False
        return True

    def _signal(self, *, kill: bool = False) -> None:
        """Send SIGTERM or SIGKILL unless the process has exited."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                if kill:
                    self._process.kill()
                else:
                    self._process.terminate()


def socket_folder() -> Path:
    """Create a folder with mode 0700 whose path leaves room for the socket's name.

    Raises:
        OSError: it cannot be created.
    """
    try:
        folder = tempfile.mkdtemp(prefix="glmd-")
    except OSError as error:
        raise OSError(f"no folder for its socket: {error}. Set TMPDIR to one with room") from error
    if len(folder) + len("/engine") > MAX_SOCKET_PATH:
        shutil.rmtree(folder)
        folder = tempfile.mkdtemp(prefix="glmd-", dir="/tmp")
    return Path(folder)


def endpoint(folder: Path) -> str:
    """ZeroMQ address of the socket in a socket folder."""
    return f"ipc://{folder}/engine"
