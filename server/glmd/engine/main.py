"""The engine process: a loop around `Engine.step` and a socket to the API process.

`glmd.engine_client.process` starts it as `python -m glmd.engine.main`. All array work happens on
the main thread, because MLX streams are thread-local. A second thread waits for the end of stdin,
which the parent process holds open until it ends.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq

from glmd import ipc
from glmd.errors import GlmdError
from glmd.ipc import EXIT_REPORTED
from glmd.utils.logging import LogFile, configure
from glmd.utils.memory import freeze_gc_heap
from glmd.utils.mlx_environment import MAX_STEP_TOKENS, prepare_mlx

log = logging.getLogger("glmd.engine")

STATS_INTERVAL = 1.0
"""Seconds between two `EngineStats`."""

RECONNECT_MS = 10
"""Milliseconds between attempts to connect: the parent process may open its end later."""

PROGRESS_INTERVAL = 0.1
"""Seconds between two `LoadProgress`."""


class StepEngine(Protocol):
    """Interface of an engine for the loop, such as `glmd.engine.core.Engine`."""

    @property
    def info(self) -> ipc.ModelInfo: ...
    @property
    def has_work(self) -> bool: ...
    def submit(self, request: ipc.EngineRequest) -> None: ...
    def cancel(self, id: str, index: int | None = None) -> None: ...
    def step(self) -> list[ipc.SequenceOutput]: ...
    def stats(self) -> ipc.EngineStats: ...
    def close(self) -> None: ...


class Channel:
    """The engine's end of the socket.

    Sends never block: the parent process always reads.
    """

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.reconnect_ivl = RECONNECT_MS
        self._socket.connect(endpoint)

    def send(self, message: ipc.FromEngine) -> None:
        self._socket.send(ipc.encode(message))

    def receive(self, timeout: float | None) -> ipc.ToEngine | None:
        """Return the next message; skip and log undecodable ones.

        Args:
            timeout: seconds after which to return None; None: wait without limit.
        """
        while self._socket.poll(None if timeout is None else round(timeout * 1000)):
            data = self._socket.recv()
            try:
                message: ipc.ToEngine = ipc.decode_to_engine(data)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                log.error("Undecodable message skipped: bytes=%d error=%s", len(data), error)
            else:
                return message
        return None

    def close(self) -> None:
        """Close the socket after handing sent messages to the operating system."""
        self._socket.close(linger=5000)
        self._context.term()


def serve(engine: StepEngine, channel: Channel) -> None:
    """Handle messages and step until `Shutdown`.

    Raises:
        Exception: whatever `Engine.step` raises. A step that failed leaves the engine in an unknown
            state, and a new process is cheap.
    """
    channel.send(ipc.EngineReady(engine.info))
    next_stats = time.monotonic()
    stats_due = True
    while True:
        timeout = max(0.0, next_stats - time.monotonic()) if stats_due else None
        if engine.has_work:
            timeout = 0.0
        while (message := channel.receive(timeout)) is not None:
            timeout = 0.0
            match message:
                case ipc.Ping():
                    channel.send(ipc.Pong())
                    continue
                case ipc.EngineRequest():
                    engine.submit(message)
                case ipc.AbortRequest(id, index):
                    engine.cancel(id, index)
                case ipc.SetLogLevel(level):
                    logging.getLogger("glmd").setLevel(level)
                case ipc.Shutdown():
                    return
            stats_due = True
        if engine.has_work:
            outputs = engine.step()
            if outputs:
                channel.send(ipc.StepOutputs(outputs))
            stats_due = True
        now = time.monotonic()
        if stats_due and now >= next_stats:
            channel.send(engine.stats())
            next_stats = now + STATS_INTERVAL
            stats_due = engine.has_work


def progress_reporter(channel: Channel) -> Callable[[int, int], None]:
    """Return a rate-limited callback (bytes done, bytes total) for `LoadProgress`."""
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_INTERVAL or done >= total:
            last = now
            channel.send(ipc.LoadProgress(done, total))

    return report


def exit_with_parent(folder: Path) -> None:
    """Wait for the end of stdin, then remove the socket's folder and exit.

    The parent never writes to the pipe, which ends when the parent closes it or dies. `os._exit`,
    because the main thread may be within a step, and nothing in this process needs saving.
    """
    while os.read(sys.stdin.fileno(), 4096):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def run(endpoint: str, model: Path, module: str, config: dict[str, Any]) -> int:
    """Load the engine of `module` and serve it over `endpoint`; returns the exit code."""
    channel = Channel(endpoint)
    prepare_mlx(config.get("memory_budget"), config.get("max_step_tokens", MAX_STEP_TOKENS))
    try:
        implementation = importlib.import_module(module)
        engine: StepEngine = implementation.load_engine(
            model,
            msgspec.convert(config, implementation.EngineConfig),
            progress_reporter(channel),
        )
        freeze_gc_heap()
        serve(engine, channel)
        engine.close()  # Not after an error, which leaves the engine in an unknown state.
    except GlmdError as error:
        channel.send(ipc.EngineFailed(error.message))
        return EXIT_REPORTED
    except Exception as error:
        log.exception("Engine stopped by an unexpected error")
        message = f"The engine stopped after an error: {type(error).__name__}: {error}"
        channel.send(ipc.EngineFailed(message))
        return EXIT_REPORTED
    else:
        return 0
    finally:
        channel.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="glmd.engine.main", description=__doc__)
    parser.add_argument("--endpoint", required=True, help="ipc:// address to connect to")
    parser.add_argument("--model", required=True, type=Path, help="checkpoint folder")
    parser.add_argument("--engine", required=True, help="module with EngineConfig and load_engine")
    parser.add_argument("--config", default="{}", help="fields of EngineConfig as JSON")
    parser.add_argument("--log-level", default="INFO")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.add_argument("--log-file", type=Path, help="log file that stderr is redirected to")
    options = parser.parse_args(arguments)
    if options.log_file is not None:
        LogFile(options.log_file, limit=None).follow()
    configure(options.log_level, options.log_format)
    folder = Path(options.endpoint.removeprefix("ipc://")).parent
    threading.Thread(target=exit_with_parent, args=(folder,), daemon=True).start()
    return run(options.endpoint, options.model, options.engine, msgspec.json.decode(options.config))


if __name__ == "__main__":
    sys.exit(main())
