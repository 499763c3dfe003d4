"""Client of the engine process: supervises it and multiplexes requests over its socket.

Token ids only: text, templates and JSON belong to the layers above. Each request's outputs are
buffered between the socket and their reader.
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

from glmd.engine_client.admission import (
    NO_TIMEOUTS,
    AdmissionQueue,
    Phase,
    RequestTimeouts,
    Ticket,
    TimeoutTimers,
)
from glmd.engine_client.crash_guard import CrashGuard
from glmd.engine_client.process import EngineProcess, EngineProcessConfig
from glmd.errors import EngineError, EngineUnavailable, GlmdError, InvalidRequest, Overloaded
from glmd.ipc import (
    EXIT_REPORTED,
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
from glmd.utils.text import gb

log = logging.getLogger("glmd.engine_client")

EngineState = Literal["loading", "ready", "restarting", "failed", "stopped"]
"""`failed` is final: the engine refused its checkpoint, or never became ready."""

BUFFER_TOKENS = 16_384
"""Unread tokens above which a request fails."""

MAX_FIRST_STARTS = 3
"""Crashes during loading after which an engine that was never ready is given up."""

MIN_RESTART_DELAY, MAX_RESTART_DELAY = 0.25, 30.0
"""Seconds before a restart: doubled each time, reset by a run longer than `STABLE_AFTER`."""

STABLE_AFTER = 60.0

FAILURE_TIMEOUT = 5.0
"""Seconds to wait for the `EngineFailed` message of a process that exited after sending it."""

UNAVAILABLE = {
    "loading": "The model is still loading. Retry later.",
    "restarting": "The engine is restarting. Retry later.",
    "stopped": "The server is shutting down.",
}


@dataclass(frozen=True, slots=True)
class InFlight:
    """A request that has not ended."""

    collector: OutputCollector
    ticket: Ticket
    timers: TimeoutTimers


class EngineClient:
    """Starts, supervises and restarts the engine process, and sends requests to it.

    Args:
        config: start parameters of the process.
        queue: bounds on waiting requests. None: no bounds.
        buffer_tokens: unread tokens above which a request fails.
        process: the first process, started already. None: `start` starts it.

    Attributes:
        state: state of the engine; `wait_for` waits for a change.
        progress: loading progress. None: not loading.
        info: the served model. None until the engine has been ready once.
        stats: latest counters of the engine.
        failure: reason of the engine's latest exit.
        restarts: number of restarts.
        queue: admission control.
    """

    def __init__(
        self,
        config: EngineProcessConfig,
        *,
        queue: AdmissionQueue | None = None,
        buffer_tokens: int = BUFFER_TOKENS,
        process: EngineProcess | None = None,
    ) -> None:
        self.state: EngineState = "stopped"
        self.progress: LoadProgress | None = None
        self.info: ModelInfo | None = None
        self.stats = EngineStats()
        self.failure: str | None = None
        self.restarts = 0
        self.queue = queue or AdmissionQueue()
        self._config = config
        self._context = zmq.asyncio.Context()
        self._buffer_tokens = buffer_tokens
        self._state_changed = asyncio.Event()
        self._requests: dict[str, InFlight] = {}
        self._crash_guard = CrashGuard()
        self._process: EngineProcess | None = None
        self._started_process = process
        self._supervision: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the running engine process. None: no process runs."""
        return None if self._process is None else self._process.pid

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    async def start(self) -> None:
        """Start the engine in the background; see `state` and `wait_for`."""
        self._set_state("loading")
        self._supervision = asyncio.create_task(self._supervise(), name="engine supervision")

    async def close(self) -> None:
        """Stop the engine process; requests in flight fail. The state `failed` remains."""
        if self.state != "failed":
            self._set_state("stopped")
        self.abandon()
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.wait([self._supervision])
        self._context.destroy(linger=0)

    async def wait_for(self, *states: EngineState) -> EngineState:
        """Wait until the engine is in one of `states`."""
        while self.state not in states:
            await self._state_changed.wait()
        return self.state

    def require_ready(self) -> None:
        """Raise EngineUnavailable with the reason unless the engine is ready."""
        if self.state != "ready":
            reason = UNAVAILABLE.get(self.state) or self.failure
            raise EngineUnavailable(reason or "The engine is not running.")

    async def generate(
        self, request: EngineRequest, timeouts: RequestTimeouts = NO_TIMEOUTS
    ) -> AsyncGenerator[SequenceOutput, None]:
        """Send a request and yield its outputs until all of its sequences have ended.

        Outputs that arrive while the reader is busy are merged. Closing the generator early
        (`contextlib.aclosing`) aborts the request.

        Raises:
            InvalidRequest: the engine rejected a field of the request.
            Overloaded: the queue is full, the queue timeout expired, or the reader is too slow.
            DeadlineExceeded: another timeout expired.
            EngineUnavailable: the engine is not ready, or exited meanwhile.
            RequestQuarantined: the engine crashed repeatedly on this request.
            EngineError: the engine failed on this request alone.
        """
        self.require_ready()
        if request.id in self._requests:
            raise ValueError(f"id: a request {request.id!r} is already in flight")
        ticket = self.queue.admit_or_reject(request.client, request.n, count_tokens(request.prompt))
        timers = TimeoutTimers(timeouts, lambda phase: self._expire(request.id, phase, timeouts))
        collector = OutputCollector(request.n, self._buffer_tokens)
        self._requests[request.id] = InFlight(collector, ticket, timers)
        process = None
        try:
            async with self._crash_guard.track(request) as tracked:
                self.require_ready()
                process = self._process
                assert process is not None
                process.send(request)
                while not collector.finished:
                    for output in await collector.get():
                        if output.finish_reason == "error":
                            raise output_error(output)
                        self._crash_guard.advance(tracked, len(output.tokens))
                        yield output
                self._crash_guard.clear(tracked)
        finally:
            del self._requests[request.id]
            timers.stop()
            self.queue.release(ticket)
            if process is not None and not collector.finished:
                process.send(AbortRequest(request.id))

    def cancel(self, id: str, index: int) -> None:
        """Abort one sequence of a request in flight; its outputs are dropped."""
        request = self._requests.get(id)
        if request is not None and request.collector.end(index):
            self._send(AbortRequest(id, index))

    def abort(self, id: str, error: GlmdError) -> None:
        """End a request in flight by raising `error` in its reader."""
        request = self._requests.get(id)
        if request is not None:
            request.collector.fail(error)

    def set_log_level(self, level: LogLevelName) -> None:
        """Set the log level of this engine process and of later ones."""
        self._config = replace(self._config, log_level=level)
        self._send(SetLogLevel(level))

    def abandon(self) -> None:
        """Fail all requests in flight because the server shuts down."""
        self._fail_requests("The server is shutting down.")

    async def _supervise(self) -> None:
        """Run engine processes one after another, until one reports a final failure."""
        delay = MIN_RESTART_DELAY
        starts = 0
        while True:
            starts += 1
            started_at = time.monotonic()
            try:
                reported = await self._run_process()
            except Exception as error:
                # An undecodable message, for example. The process has been stopped: restart it.
                log.exception("Engine connection failed: error=%s", type(error).__name__)
                self.failure = f"The engine connection failed: {type(error).__name__}: {error}."
                reported = False
            if self.info is None and (reported or starts == MAX_FIRST_STARTS):
                self._set_state("failed")
                return
            if time.monotonic() - started_at > STABLE_AFTER:
                delay = MIN_RESTART_DELAY
            log.error("Engine restarting: delay_s=%.2g reason=%s", delay, self.failure)
            self._set_state("restarting")
            self.restarts += 1
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_RESTART_DELAY)

    async def _run_process(self) -> bool:
        """Run one engine process until it exits; return whether it reported the reason itself."""
        self.failure = None
        try:
            process = self._started_process or EngineProcess.start(self._config)
        except OSError as error:
            self.failure = f"The engine process cannot be started: {error}."
            return False
        self._started_process = None
        process.connect(self._context)
        self._process = process
        self.progress = LoadProgress(0, 0)
        listener = asyncio.create_task(self._listen(process), name="engine listener")
        exited = asyncio.create_task(process.exit_code(), name="engine exit")
        try:
            await asyncio.wait([listener, exited], return_when=asyncio.FIRST_COMPLETED)
            if exited.done() and exited.result() == EXIT_REPORTED:
                await asyncio.wait([listener], timeout=FAILURE_TIMEOUT)
            if listener.done():
                self.failure = listener.result()
                return True
            self.failure = f"The engine process exited ({describe_exit_code(exited.result())})."
            return False
        finally:
            listening = self.progress is None
            self._process = None
            if self.state == "ready":
                self._set_state("restarting")
                self._crash_guard.engine_died()
            self._fail_requests("The engine stopped while it was processing this request.")
            listener.cancel()
            exited.cancel()
            await process.stop(listening=listening)

    async def _listen(self, process: EngineProcess) -> str:
        """Handle messages until the engine reports its failure; return the failure."""
        while True:
            message = await process.receive()
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
                    self._set_state("ready")
                    log.info("Engine ready: %s", describe_model(model))
                case EngineFailed(failure):
                    return failure

    def _deliver(self, output: SequenceOutput) -> None:
        request = self._requests.get(output.id)
        if request is None:
            return
        if output.admitted:
            self.queue.mark_admitted(request.ticket)
            request.timers.reached("queue")
        if output.tokens:
            request.timers.reached("first_token")
        request.collector.put(output)
        if not request.collector.running:
            request.timers.stop()
        if request.collector.failed:
            # Free the row now: a slow reader may notice much later.
            self._send(AbortRequest(output.id))

    def _expire(self, id: str, phase: Phase, timeouts: RequestTimeouts) -> None:
        """Fail a request whose timeout expired, whatever its reader is doing."""
        error = timeouts.error(phase, self.queue.retry_after())
        self._crash_guard.withdraw(id, error)
        self._requests[id].collector.fail(error)
        self._send(AbortRequest(id))

    def _send(self, message: AbortRequest | SetLogLevel) -> None:
        if self._process is not None:
            self._process.send(message)

    def _set_state(self, state: EngineState) -> None:
        self.state = state
        self._state_changed.set()
        self._state_changed = asyncio.Event()

    def _fail_requests(self, message: str) -> None:
        self._crash_guard.fail_waiting(message)
        for request in self._requests.values():
            request.timers.stop()
            request.collector.fail(EngineUnavailable(message))


def describe_model(model: ModelInfo) -> str:
    """Summarize the served model for the log."""
    return (
        f"weights_gb={gb(model.weight_bytes)} bits_per_weight={model.bits_per_weight:.3f}"
        f" device={model.device!r} max_context={model.max_context}"
        f" mtp={'yes' if model.has_mtp else 'no'}"
    )


def describe_exit_code(code: int) -> str:
    """Return `exit code 1`, or `signal SIGKILL` for a negative code."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


class OutputCollector:
    """Unread outputs of one request, merged to at most one per sequence.

    Args:
        n: sequences of the request.
        limit: unread tokens above which an unfinished request fails with `Overloaded`.
    """

    def __init__(self, n: int, limit: int) -> None:
        self._running = set(range(n))
        self._limit = limit
        self._unread: dict[int, SequenceOutput] = {}
        self._unread_tokens = 0
        self._error: GlmdError | None = None
        self._changed = asyncio.Event()

    @property
    def finished(self) -> bool:
        """Whether all sequences have ended and all outputs have been read."""
        return not self._running and not self._unread

    @property
    def running(self) -> bool:
        """Whether more outputs can arrive."""
        return bool(self._running) and not self.failed

    @property
    def failed(self) -> bool:
        """Whether the request failed before all of its sequences ended."""
        return self._error is not None

    def put(self, output: SequenceOutput) -> None:
        """Add an output; merge it into the sequence's unread output, if there is one."""
        if output.index not in self._running or self._error is not None:
            return
        if output.finish_reason is not None:
            self._running.discard(output.index)
        unread = self._unread.get(output.index)
        if unread is None:
            self._unread[output.index] = output
        else:
            merge(unread, output)
        self._unread_tokens += len(output.tokens)
        # Complete answers are delivered whatever their size: no more output can pile up.
        if self._running and self._unread_tokens > self._limit:
            self._unread.clear()
            self.fail(Overloaded(f"The client reads too slowly: {self._limit} tokens are unread."))
        self._changed.set()

    def end(self, index: int) -> bool:
        """Drop one sequence and its unread output; return whether it was running."""
        unread = self._unread.pop(index, None)
        if unread is not None:
            self._unread_tokens -= len(unread.tokens)
        running = index in self._running
        self._running.discard(index)
        self._changed.set()
        return running

    def fail(self, error: GlmdError) -> None:
        """Raise `error` in the reader after the unread outputs, unless all sequences ended."""
        if self._running and self._error is None:
            self._error = error
            self._changed.set()

    async def get(self) -> list[SequenceOutput]:
        """Wait for outputs; return and remove all unread ones.

        Raises:
            GlmdError: the error passed to `fail`.
        """
        await self._changed.wait()
        if self._error is not None and not self._unread:
            raise self._error
        if self._error is None:
            self._changed.clear()
        outputs = list(self._unread.values())
        self._unread.clear()
        self._unread_tokens = 0
        return outputs


def merge(earlier: SequenceOutput, later: SequenceOutput) -> None:
    """Append the next output of the same sequence to `earlier`."""
    earlier.tokens += later.tokens
    if later.logprobs is not None:
        earlier.logprobs = (earlier.logprobs or []) + later.logprobs
    earlier.finish_reason = later.finish_reason
    earlier.error = later.error
    earlier.error_kind = later.error_kind
    earlier.error_param = later.error_param
    earlier.prompt_tokens = earlier.prompt_tokens or later.prompt_tokens
    earlier.cached_tokens = earlier.cached_tokens or later.cached_tokens
    earlier.admitted = earlier.admitted or later.admitted
    earlier.cache_match = earlier.cache_match or later.cache_match
    earlier.computed_tokens = later.computed_tokens or earlier.computed_tokens
    earlier.drafted += later.drafted
    earlier.accepted += later.accepted


def output_error(output: SequenceOutput) -> GlmdError:
    """Return the exception for an output with finish reason "error"."""
    message = output.error or "The engine ended the request with an error."
    match output.error_kind:
        case "invalid_request":
            return InvalidRequest(message, param=output.error_param)
        case "overloaded":
            return Overloaded(message)
        case _:
            return EngineError(message)
