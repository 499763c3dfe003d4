"""Client of the engine process: supervises it and multiplexes requests.

Token ids only: text, templates and JSON belong to the layers above.
"""

from __future__ import annotations

import asyncio
import logging
import signal
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
from glmd.engine_client.output_collector import OutputCollector, output_error
from glmd.engine_client.process import EngineProcess, EngineProcessConfig
from glmd.errors import EngineUnavailable, GlmdError
from glmd.ipc import (
    EXIT_RANK_LOST,
    EXIT_REPORTED,
    AbortRequest,
    EngineFailed,
    EngineReady,
    EngineRequest,
    EngineStats,
    LoadProgress,
    LogLevelName,
    ModelInfo,
    Ping,
    Pong,
    SequenceOutput,
    SetLogLevel,
    StepOutputs,
    count_tokens,
)
from glmd.utils.clock import loop_time
from glmd.utils.memory import exit_if_out_of_memory
from glmd.utils.text import gb

log = logging.getLogger("glmd.engine_client")

EngineState = Literal["loading", "ready", "restarting", "unloaded", "failed", "stopped"]
"""`unloaded`: the next request starts the engine. `failed` is final: the engine refused its
checkpoint, or never became ready."""

Condition = Literal[EngineState, "stalled"]

BUFFER_TOKENS = 16_384
"""Unread tokens above which a request fails."""

MAX_FIRST_STARTS = 3
"""Crashes during loading after which an engine that was never ready is given up."""

MIN_RESTART_DELAY, MAX_RESTART_DELAY = 0.25, 30.0
"""Seconds before a restart: doubled each time, reset by a run longer than `STABLE_AFTER`."""

STABLE_AFTER = 60.0

FAILURE_TIMEOUT = 5.0
"""Seconds to wait for the `EngineFailed` message of a process that exited after sending it."""

PING_INTERVAL = 1.0

STALLED_AFTER = 3.0
"""Seconds without a message from a ready engine after which it counts as stalled: a step takes at
most one or two."""

HANG_TIMEOUT = 120.0

LOADING_FACTOR = 5
"""An engine may be silent for this many times longer while it loads from a slow disk."""

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
        hang_timeout: seconds without a message from the engine after which it is restarted; longer
            than any step. 0: never.
        idle_unload: seconds without a request after which the engine process ends, and its memory
            is free. The next request starts the engine and waits for it. None: never.
        process: the first process, started already. None: `start` starts it.

    Attributes:
        state: state of the engine; `wait_for` waits for a change.
        progress: loading progress. None: not loading.
        info: the served model. None until the engine has been ready once.
        stats: latest counters of the engine.
        stalled: the engine is ready, but has not answered for `STALLED_AFTER`.
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
        hang_timeout: float = HANG_TIMEOUT,
        idle_unload: float | None = None,
        process: EngineProcess | None = None,
    ) -> None:
        self.state: EngineState = "stopped"
        self.progress: LoadProgress | None = None
        self.info: ModelInfo | None = None
        self.stats = EngineStats()
        self.stalled = False
        self.failure: str | None = None
        self.restarts = 0
        self.queue = queue or AdmissionQueue()
        self._config = config
        self._context = zmq.asyncio.Context()
        self._buffer_tokens = buffer_tokens
        self._state_changed = asyncio.Event()
        self._hang_timeout = hang_timeout
        self._heard_at = 0.0
        self._answered = True
        self._idle_unload = idle_unload
        self._idle = asyncio.Event()  # set while there are no requests
        self._idle.set()
        self._idle_since = 0.0
        self._wanted = asyncio.Event()
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
    def condition(self) -> Condition:
        """The state, or `stalled`."""
        return "stalled" if self.stalled else self.state

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

    @property
    def accepts_requests(self) -> bool:
        """Whether requests are processed now, or when the unloaded engine is ready again."""
        reloading = self.state == "loading" and self.info is not None
        return reloading or self.state in ("ready", "unloaded")

    def require_available(self) -> None:
        """Raise EngineUnavailable with the reason unless the engine accepts requests."""
        if not self.accepts_requests:
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
        self.require_available()
        if request.id in self._requests:
            raise ValueError(f"id: a request {request.id!r} is already in flight")
        ticket = self.queue.admit_or_reject(request.client, request.n, count_tokens(request.prompt))
        timers = TimeoutTimers(timeouts, lambda phase: self._expire(request.id, phase, timeouts))
        collector = OutputCollector(request.n, self._buffer_tokens)
        self._requests[request.id] = InFlight(collector, ticket, timers)
        self._idle.clear()
        process = None
        try:
            async with self._crash_guard.track(request) as tracked:
                await self._load(collector)
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
            if not self._requests:
                self._idle_since = loop_time()
                self._idle.set()
            timers.stop()
            self.queue.release(ticket)
            if process is not None and not collector.finished:
                process.send(AbortRequest(request.id))

    async def _load(self, collector: OutputCollector) -> None:
        """Wait until the engine is ready; start it if it was unloaded.

        Raises:
            EngineUnavailable: the engine cannot be started.
            GlmdError: the request ended meanwhile, as by a timeout.
        """
        if self._process is not None and self.state == "ready":
            return
        self._wanted.set()
        ended = asyncio.ensure_future(collector.get())
        changed = asyncio.ensure_future(self.wait_for("ready", "restarting", "failed", "stopped"))
        try:
            await asyncio.wait([ended, changed], return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                ended.result()
        finally:
            ended.cancel()
            changed.cancel()
        self.require_available()

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
            started_at = loop_time()
            try:
                reported = await self._run_process()
            except Exception as error:
                exit_if_out_of_memory(error)
                # An undecodable message, for example. The process has been stopped: restart it.
                log.exception("Engine connection failed: error=%s", type(error).__name__)
                self.failure = f"The engine connection failed: {type(error).__name__}: {error}."
                reported = False
            if self.state == "unloaded":
                await self._wanted.wait()
                self._set_state("loading")
                starts = 0
                continue
            if self.info is None and (reported or starts == MAX_FIRST_STARTS):
                self._set_state("failed")
                return
            if loop_time() - started_at > STABLE_AFTER:
                delay = MIN_RESTART_DELAY
            log.error("Engine restarting: delay_s=%.2g reason=%s", delay, self.failure)
            self._set_state("restarting")
            self.restarts += 1
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_RESTART_DELAY)

    async def _run_process(self) -> bool:
        """Run one engine process until it exits.

        Return whether it reported the reason itself.
        """
        self.failure = None
        try:
            process = self._started_process or EngineProcess.start(self._config)
        except OSError as error:
            self.failure = f"The engine process cannot be started: {error}."
            return False
        self._started_process = None
        process.connect(self._context)
        self._process = process
        self._wanted.clear()
        self.progress = LoadProgress(0, 0)
        listener = asyncio.create_task(self._listen(process), name="engine listener")
        exited = asyncio.create_task(process.exit_code(), name="engine exit")
        idle = asyncio.create_task(self._until_idle(), name="engine idle")
        hung = asyncio.create_task(self._until_hung(process), name="engine hung")
        tasks = (listener, exited, idle, hung)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if hung.done() and not (listener.done() or exited.done()):
                self.failure = f"The engine did not answer for {hung.result():g} s."
                return False
            if idle.done():
                log.info("Engine unloaded: idle_s=%g", self._idle_unload)
                self.stats = EngineStats()
                return False
            if exited.done() and exited.result() == EXIT_REPORTED:
                await asyncio.wait([listener], timeout=FAILURE_TIMEOUT)
            if listener.done():
                self.failure = listener.result()
                return True
            self.failure = f"The engine process exited ({describe_exit_code(exited.result())})."
            return False
        finally:
            listening = self.progress is None and not self.stalled
            self.stalled = False
            self._process = None
            if self.state == "ready":
                self._set_state("restarting")
                self._crash_guard.engine_died()
            if self.state != "unloaded":  # then requests wait for the next process
                self._fail_requests("The engine stopped while it was processing this request.")
            for task in tasks:
                task.cancel()
            await process.stop(listening=listening)

    async def _until_hung(self, process: EngineProcess) -> float:
        """Wait until the engine has sent nothing for too long; return the seconds."""
        self._heard_at, self._answered = loop_time(), True
        while True:
            if self._answered:
                self._answered = False
                process.send(Ping())
            await asyncio.sleep(PING_INTERVAL)
            silent = loop_time() - self._heard_at
            stalled = self.state == "ready" and silent > STALLED_AFTER
            if stalled and not self.stalled:
                log.warning("Engine does not answer: pid=%d silent_s=%.1f", process.pid, silent)
            elif self.stalled and not stalled:
                log.info("Engine answers again")
            self.stalled = stalled
            limit = self._hang_timeout * (1 if self.state == "ready" else LOADING_FACTOR)
            if 0 < limit < silent:
                return silent

    async def _until_idle(self) -> None:
        """Wait until the engine has had no request for `idle_unload` seconds.

        Set the state.
        """
        if self._idle_unload is None:
            await asyncio.Event().wait()
            return
        await self.wait_for("ready")
        self._idle_since = loop_time()
        while True:
            await self._idle.wait()
            due = self._idle_since + self._idle_unload
            if (left := due - loop_time()) <= 0:
                self._set_state("unloaded")  # before another request can arrive
                return
            await asyncio.sleep(left)

    async def _listen(self, process: EngineProcess) -> str:
        """Handle messages until the engine reports its failure; return the failure."""
        while True:
            message = await process.receive()
            self._heard_at = loop_time()
            match message:
                case Pong():
                    self._answered = True
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
        f" kv_bits={model.kv_bits}"
        f" mtp={'yes' if model.has_mtp else 'left out' if model.mtp_left_out else 'no'}"
    )


def describe_exit_code(code: int) -> str:
    """Return `exit code 1`, or `signal SIGKILL` for a negative code."""
    if code == EXIT_RANK_LOST:
        return "it lost one of its ranks; see the log"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
