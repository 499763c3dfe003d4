"""The engine process: one loop around `Engine.step`, spoken to over one ZeroMQ socket.

`glmd.engine_client.process` starts it as `python -m glmd.engine.main`. All array work happens on
the main thread, because MLX streams are thread-local. The only other thread waits for the end
of stdin, which the parent holds open for as long as it lives.
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

from glmd.errors import GlmdError
from glmd.ipc import (
    AbortRequest,
    EngineFailed,
    EngineReady,
    EngineRequest,
    EngineStats,
    FromEngine,
    LoadProgress,
    ModelInfo,
    SequenceOutput,
    SetLogLevel,
    Shutdown,
    StepOutputs,
    ToEngine,
    decode_to_engine,
    encode,
)
from glmd.utils import gc as heap
from glmd.utils.logfile import LogFile
from glmd.utils.logging import configure

log = logging.getLogger("glmd.engine")

EXIT_TOLD = 3
"""Exit code after `EngineFailed` was sent: the parent waits for that message. A process that ends
with any other code but 0 said nothing."""

STATS_INTERVAL = 1.0
PROGRESS_INTERVAL = 0.1


class StepEngine(Protocol):
    """What the loop needs of an engine; `glmd.engine.core.Engine` is the one that ships."""

    @property
    def info(self) -> ModelInfo: ...
    @property
    def has_work(self) -> bool: ...
    def submit(self, request: EngineRequest) -> None: ...
    def cancel(self, id: str, index: int | None = None) -> None: ...
    def step(self) -> list[SequenceOutput]: ...
    def stats(self) -> EngineStats: ...
    def close(self) -> None: ...


class Channel:
    """The engine's end of the socket. Sending never blocks: the parent reads all the time."""

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.connect(endpoint)

    def send(self, message: FromEngine) -> None:
        self._socket.send(encode(message))

    def receive(self, timeout: float | None) -> ToEngine | None:
        """The next message; None after `timeout` seconds without one (None: wait for ever).

        What is no message is left out: that its sender errs is no reason to end all requests.
        """
        while self._socket.poll(None if timeout is None else round(timeout * 1000)):
            data = self._socket.recv()
            try:
                message: ToEngine = decode_to_engine(data)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                log.error("Left out %d bytes that are no message: %s", len(data), error)
            else:
                return message
        return None

    def close(self) -> None:
        """Hand what was sent to the operating system, and close."""
        self._socket.close(linger=5000)
        self._context.term()


def serve(engine: StepEngine, channel: Channel) -> None:
    """Take messages and step until told to shut down.

    Raises whatever `Engine.step` raises: the state of a step that failed half-way is unknown,
    and a new process is cheap.
    """
    channel.send(EngineReady(engine.info))
    next_stats = time.monotonic()
    stats_due = True
    while True:
        if engine.has_work:
            timeout: float | None = 0.0
        elif stats_due:
            timeout = max(0.0, next_stats - time.monotonic())
        else:
            timeout = None
        while (message := channel.receive(timeout)) is not None:
            match message:
                case EngineRequest():
                    engine.submit(message)
                case AbortRequest(id, index):
                    engine.cancel(id, index)
                case SetLogLevel(level):
                    logging.getLogger("glmd").setLevel(level)
                case Shutdown():
                    return
            stats_due = True
            timeout = 0.0
        if engine.has_work:
            outputs = engine.step()
            if outputs:
                channel.send(StepOutputs(outputs))
            stats_due = True
        now = time.monotonic()
        if stats_due and now >= next_stats:
            channel.send(engine.stats())
            next_stats = now + STATS_INTERVAL
            stats_due = engine.has_work


def progress_reporter(channel: Channel) -> Callable[[int, int], None]:
    """Callback (done bytes, total bytes) that sends `LoadProgress`, at a bounded rate."""
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_INTERVAL or done >= total:
            last = now
            channel.send(LoadProgress(done, total))

    return report


def exit_with_parent(folder: Path) -> None:
    """Wait for the end of stdin, then remove the socket's folder and leave at once.

    The parent never writes to that pipe. Its end comes when the parent closes it or dies, by
    whatever cause, on macOS and Linux alike. `os._exit`, because the main thread may be deep in
    a step, and nothing in this process is worth saving.
    """
    while os.read(sys.stdin.fileno(), 4096):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def run(endpoint: str, model: Path, module: str, config: dict[str, Any]) -> int:
    """Load the engine of `module` and serve it over `endpoint`; returns the exit code."""
    channel = Channel(endpoint)
    try:
        implementation = importlib.import_module(module)
        engine: StepEngine = implementation.load_engine(
            model,
            msgspec.convert(config, implementation.EngineConfig),
            progress_reporter(channel),
        )
        heap.freeze_gc_heap()
        serve(engine, channel)
        engine.close()  # Not after an error: there is no telling what that would meet.
    except GlmdError as error:
        channel.send(EngineFailed(error.message))
        return EXIT_TOLD
    except Exception as error:
        log.exception("The engine stops after an error.")
        channel.send(
            EngineFailed(f"The engine stopped after an error: {type(error).__name__}: {error}")
        )
        return EXIT_TOLD
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
    parser.add_argument("--log-file", type=Path, help="what stderr is, if it is a log file")
    options = parser.parse_args(arguments)
    if options.log_file is not None:
        LogFile(options.log_file, limit=None).follow()
    configure(options.log_level, options.log_format)
    folder = Path(options.endpoint.removeprefix("ipc://")).parent
    threading.Thread(target=exit_with_parent, args=(folder,), daemon=True).start()
    return run(options.endpoint, options.model, options.engine, msgspec.json.decode(options.config))


if __name__ == "__main__":
    sys.exit(main())
