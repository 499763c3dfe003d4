"""The API process's side of the engine: requests go in, outputs come back, and it stays up.

One supervision task starts the engine process, hands its outputs to the readers, and when the
process dies fails what was in flight and starts another one. No text here: token ids only.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Literal

import zmq.asyncio

from glmd.engine.main import EXIT_REPORTED
from glmd.engine_client.admission import AdmissionQueue, Ticket
from glmd.engine_client.crash_guard import CrashGuard
from glmd.engine_client.output_collector import OutputCollector, error_of
from glmd.engine_client.process import EngineProcess, EngineProcessConfig
from glmd.engine_client.timeouts import Phase, RequestTimeouts, TimeoutTimers
from glmd.errors import EngineUnavailable, GlmdError
from glmd.ipc import (
    AbortRequest,
    EngineFailed,
    EngineReady,
    EngineRequest,
    EngineStats,
    LoadProgress,
    LogLevelName,
    ModelInfo,
    SequenceOutput,
    SetLogLevel,
    StepOutputs,
    count_tokens,
)

log = logging.getLogger("glmd.supervisor")

EngineState = Literal["loading", "ready", "restarting", "failed", "stopped"]
"""`failed` is final: the engine refused its checkpoint, or never came up."""

NO_DEADLINES = RequestTimeouts()

BUFFER_TOKENS = 16_384
"""Tokens that one request may have waiting for its reader before it is cancelled."""

FIRST_STARTS = 3
"""Starts without a word before an engine that was never ready is given up."""

SHORTEST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Seconds before a restart: doubled each time, back to the shortest after a long life."""

LONG_LIFE = 60.0

LAST_WORDS = 5.0
"""Seconds to wait for the `EngineFailed` of a process that has exited after sending it."""

UNAVAILABLE = {
    "loading": "The model is still loading; try again in a moment.",
    "restarting": "The engine is restarting; try again in a moment.",
    "stopped": "The server is shutting down.",
}


@dataclass(frozen=True, slots=True)
class InFlight:
    """A request that has not ended."""

    stream: OutputCollector
    place: Ticket
    alarms: TimeoutTimers


class EngineClient:
    """Starts and supervises the engine process, and multiplexes requests over its socket.

    Attributes:
        state: where the engine stands; `wait_for` waits for a change.
        progress: bytes of weights loaded, until ready.
        info: what the engine serves, once it has been ready.
        stats: the engine's latest counters.
        failure: why the engine last died or refused to start.
        restarts: how often the engine was started again.
        queue: what waits for its turn.
    """

    def __init__(
        self,
        launch: EngineProcessConfig,
        *,
        queue: AdmissionQueue | None = None,
        buffer_tokens: int = BUFFER_TOKENS,
    ) -> None:
        """
        Args:
            queue: bounds what may wait; None: nothing does.
            buffer_tokens: that one request may have waiting for its reader.
        """
        self.state: EngineState = "stopped"
        self.progress: LoadProgress | None = None
        self.info: ModelInfo | None = None
        self.stats = EngineStats()
        self.failure: str | None = None
        self.restarts = 0
        self.queue = queue or AdmissionQueue()
        self._launch = launch
        self._context = zmq.asyncio.Context()
        self._buffer_tokens = buffer_tokens
        self._changed = asyncio.Event()
        self._requests: dict[str, InFlight] = {}
        self._suspects = CrashGuard()
        self._process: EngineProcess | None = None
        self._supervision: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The engine process that runs now."""
        return None if self._process is None else self._process.pid

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    async def start(self) -> None:
        """Start the engine in the background; `state` and `wait_for` tell how it goes."""
        self._enter("loading")
        self._supervision = asyncio.create_task(self._supervise(), name="engine supervision")

    async def close(self) -> None:
        """End the engine process; requests in flight fail. What has `failed` stays so."""
        if self.state != "failed":
            self._enter("stopped")
        self.abandon()
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.wait([self._supervision])
        self._context.destroy(linger=0)

    async def wait_for(self, *states: EngineState) -> EngineState:
        """Wait until the engine is in one of `states`."""
        while self.state not in states:
            await self._changed.wait()
        return self.state

    def require_ready(self) -> None:
        """Raise EngineUnavailable, with the reason, unless requests are taken."""
        if self.state != "ready":
            reason = UNAVAILABLE.get(self.state) or self.failure
            raise EngineUnavailable(reason or "The engine is not running.")

    async def generate(
        self, request: EngineRequest, deadlines: RequestTimeouts = NO_DEADLINES
    ) -> AsyncGenerator[SequenceOutput, None]:
        """Send a request and yield its outputs until each of its sequences has finished.

        Outputs that pile up while the reader is busy arrive as one. Closing the generator
        early (`contextlib.aclosing`) cancels what still runs.

        Raises:
            InvalidRequest: the engine cannot honour the request.
            Overloaded: there is no room, its turn did not come in time, or the reader fell too
                far behind.
            DeadlineExceeded: it took longer than it may.
            EngineUnavailable: the engine is not ready, or died meanwhile.
            CrashesEngine: the engine died on this request more than once.
            EngineError: the engine failed on this request alone.
        """
        self.require_ready()
        if request.id in self._requests:
            raise ValueError(f"a request with the id {request.id!r} is in flight already")
        place = self.queue.admit_or_reject(request.client, request.n, count_tokens(request.prompt))
        alarms = TimeoutTimers(deadlines, lambda phase: self._expire(request.id, phase, deadlines))
        stream = OutputCollector(request.n, self._buffer_tokens)
        self._requests[request.id] = InFlight(stream, place, alarms)
        process = None
        try:
            async with self._suspects.track(request) as case:
                self.require_ready()
                process = self._process
                assert process is not None
                process.send(request)
                while not stream.finished:
                    for output in await stream.get():
                        if output.finish_reason == "error":
                            raise error_of(output)
                        self._suspects.advance(case, len(output.tokens))
                        yield output
                self._suspects.clear(case)
        finally:
            del self._requests[request.id]
            alarms.stop()
            self.queue.release(place)
            if process is not None and not stream.finished:
                process.send(AbortRequest(request.id))

    def cancel(self, id: str, index: int) -> None:
        """End one sequence of a request in flight; its reader gets no more of it."""
        request = self._requests.get(id)
        if request is not None and request.stream.end(index) and self._process is not None:
            self._process.send(AbortRequest(id, index))

    def abort(self, id: str, error: GlmdError) -> None:
        """End a request in flight; its reader finds `error`."""
        request = self._requests.get(id)
        if request is not None:
            request.stream.fail(error)

    def set_log_level(self, level: LogLevelName) -> None:
        """Have this engine process, and those after it, log from `level` on."""
        self._launch = replace(self._launch, log_level=level)
        if self._process is not None:
            self._process.send(SetLogLevel(level))

    def abandon(self) -> None:
        """Fail what is in flight, because the server ends."""
        self._fail_streams("The server is shutting down.")

    async def _supervise(self) -> None:
        pause = SHORTEST_PAUSE
        starts = 0
        while True:
            starts += 1
            born = time.monotonic()
            told = await self._live()
            if self.info is None and (told or starts == FIRST_STARTS):
                self._enter("failed")  # The server ends with `failure` as its last word.
                return
            if time.monotonic() - born > LONG_LIFE:
                pause = SHORTEST_PAUSE
            log.error("%s Starting it again in %.2g s.", self.failure, pause)
            self._enter("restarting")
            self.restarts += 1
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _live(self) -> bool:
        """One life of the engine process, to its end; true if it said why it ended."""
        self.failure = None
        try:
            process = await EngineProcess.start(self._launch, self._context)
        except OSError as error:
            self.failure = f"The engine process cannot be started: {error}."
            return False
        self._process = process
        self.progress = LoadProgress(0, 0)
        listener = asyncio.create_task(self._listen(process), name="engine listener")
        exited = asyncio.create_task(process.exit_code(), name="engine exit")
        try:
            await asyncio.wait([listener, exited], return_when=asyncio.FIRST_COMPLETED)
            if exited.done() and exited.result() == EXIT_REPORTED:
                await asyncio.wait([listener], timeout=LAST_WORDS)
            if listener.done():
                self.failure = listener.result()
                return True
            self.failure = (
                f"The engine process ended unexpectedly ({describe_exit(exited.result())})."
            )
            return False
        finally:
            listening = self.progress is None
            self._process = None
            if self.state == "ready":
                self._enter("restarting")
                self._suspects.engine_died()
            self._fail_streams("The engine stopped while it worked on this request.")
            listener.cancel()
            exited.cancel()
            await process.stop(listening=listening)

    async def _listen(self, process: EngineProcess) -> str:
        """Handle messages until the engine says that it failed; returns what it says."""
        while True:
            message = await process.receive()
            if isinstance(message, EngineFailed):
                return message.message
            self._handle(message)

    def _handle(self, message: StepOutputs | EngineStats | LoadProgress | EngineReady) -> None:
        match message:
            case StepOutputs(outputs):
                for output in outputs:
                    self._deliver(output)
            case EngineStats():
                self.stats = message
            case LoadProgress():
                self.progress = message
            case EngineReady(model):
                self.info = model
                self.progress = None
                self._enter("ready")
                log.info("Ready: %s", describe_model(model))

    def _deliver(self, output: SequenceOutput) -> None:
        request = self._requests.get(output.id)
        if request is None:
            return
        if output.admitted:
            self.queue.leave(request.place)
            request.alarms.reached("queue")
        if output.tokens:
            request.alarms.reached("first_token")
        stream = request.stream
        stream.put(output)
        if not stream.running:
            request.alarms.stop()
        if stream.failed and self._process is not None:
            # Its reader is too far behind to be waited for: the row is free now, not when it comes.
            self._process.send(AbortRequest(output.id))

    def _expire(self, id: str, phase: Phase, deadlines: RequestTimeouts) -> None:
        """Give a request up whose deadline has passed, whatever its reader is doing."""
        error = deadlines.error(phase, self.queue.retry_after())
        self._suspects.withdraw(id, error)
        self._requests[id].stream.fail(error)
        if self._process is not None:
            self._process.send(AbortRequest(id))

    def _enter(self, state: EngineState) -> None:
        self.state = state
        self._changed.set()
        self._changed = asyncio.Event()

    def _fail_streams(self, message: str) -> None:
        self._suspects.fail_waiting(message)
        for request in self._requests.values():
            request.alarms.stop()
            request.stream.fail(EngineUnavailable(message))


def describe_model(model: ModelInfo) -> str:
    """What is served, in one line for the log."""
    return (
        f"{model.weight_bytes / 1e9:.2f} GB of weights at {model.bits_per_weight:.3f} bits on"
        f" {model.device}, context {model.max_context} tokens,"
        f" {'MTP drafts' if model.has_mtp else 'no MTP layer, so no drafts'}."
    )


def describe_exit(code: int) -> str:
    """An exit code in words: `signal SIGKILL`, `exit code 1`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
