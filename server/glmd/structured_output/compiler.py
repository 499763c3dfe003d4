"""Grammars on demand: off the event loop, within limits, and each compiled once."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from glmd.chat.special_tokens import SpecialTokens
from glmd.errors import InvalidRequest
from glmd.ipc import GrammarSpec
from glmd.structured_output.protocol import Answer, Compiled, Refused, Setup, decode_answer, encode
from glmd.structured_output.spec import OutputSpec
from glmd.utils.lru import LRUCache

log = logging.getLogger(__name__)

MAX_SECONDS = 2.0
"""For one grammar. An agent's 20 tools take 0.03 s."""
MAX_BYTES = 1 << 20
"""Of schemas and tools, as msgpack."""
CACHE_BYTES = 16 << 20


class GrammarCompiler:
    """Turns what answers have to be into grammars for the engine.

    The work is done one request after the other by a process that is started when it is first
    needed. For one event loop.
    """

    def __init__(
        self,
        controls: Mapping[str, int],
        *,
        max_seconds: float = MAX_SECONDS,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """
        Args:
            controls: the tokenizer's control tokens, ids by name (`Tokenizer.controls`).
        """
        self._tags = SpecialTokens.find(controls, "the tokenizer")
        self._setup = encode(Setup(dict(controls)))
        self._max_seconds = max_seconds
        self._known: LRUCache[bytes, Answer] = LRUCache(cache_bytes)
        self._under_way: dict[bytes, asyncio.Task[Answer]] = {}
        self._turn = asyncio.Lock()
        self._worker: asyncio.subprocess.Process | None = None

    async def compile(self, structure: OutputSpec, *, in_reasoning: bool) -> GrammarSpec | None:
        """The grammar of an answer, or None if anything goes.

        Args:
            in_reasoning: the answer begins inside `<think>`, where nothing is required.

        Raises:
            InvalidRequest: names the field or the keyword that is malformed, cannot be enforced,
                or takes too long to compile.
        """
        free = structure.calls == "free"
        if structure.format is None and structure.calls == "none":
            return None
        if free and not any(tool.enforced for tool in structure.tools):
            return None
        answer = await self._answer(structure)
        if isinstance(answer, Refused):
            raise InvalidRequest(answer.message, param=answer.param, code=answer.code)
        after: tuple[int, ...] = (self._tags.end_think,) if in_reasoning else ()
        if free:
            after = (self._tags.tool_call,)
        return GrammarSpec(grammar=answer.grammar, after=after, required=not free)

    async def close(self) -> None:
        """End the worker."""
        for task in list(self._under_way.values()):
            task.cancel()
        await self._end_worker()

    async def _answer(self, structure: OutputSpec) -> Answer:
        try:
            data = encode(structure)
        except UnicodeEncodeError:
            raise InvalidRequest(
                f"{_param(structure)} holds half of a surrogate pair, which is no text.",
                param=_param(structure),
            ) from None
        if len(data) > MAX_BYTES:
            raise InvalidRequest(
                f"{_param(structure)} is larger than {MAX_BYTES >> 20} MiB.",
                param=_param(structure),
            )
        key = blake2b(data, digest_size=16).digest()
        known = self._known.get(key)
        if known is not None:
            return known
        task = self._under_way.get(key)
        if task is None:
            task = asyncio.create_task(self._compile(structure, data))
            self._under_way[key] = task
            task.add_done_callback(lambda done: self._keep(key, done))
        # Others may wait for it too, and the next request may ask for the same.
        return await asyncio.shield(task)

    def _keep(self, key: bytes, task: asyncio.Task[Answer]) -> None:
        del self._under_way[key]
        if task.cancelled() or task.exception() is not None:
            return
        answer = task.result()
        text = answer.grammar if isinstance(answer, Compiled) else answer.message
        self._known.put(key, answer, len(text))

    async def _compile(self, structure: OutputSpec, data: bytes) -> Answer:
        async with self._turn:
            try:
                answer: Answer = decode_answer(await self._ask(data))
            except TimeoutError:
                answer = _refusal(structure, f"takes more than {self._max_seconds:g} s to compile")
            except (asyncio.IncompleteReadError, ConnectionError):
                log.warning("The grammar worker ended over %s.", _param(structure))
                answer = _refusal(structure, "is more than the grammar compiler can take")
        if isinstance(answer, Compiled) and answer.relaxed:
            log.info("Keywords not enforced: %s.", _count(answer.relaxed))
        return answer

    async def _ask(self, data: bytes) -> bytes:
        """The worker's answer. If none comes, the worker ends."""
        worker = await self._ready_worker()
        try:
            async with asyncio.timeout(self._max_seconds):
                await _send(worker, data)
                return await _receive(worker)
        except BaseException:
            await self._end_worker()
            raise

    async def _ready_worker(self) -> asyncio.subprocess.Process:
        """The worker, started if there is none that lives."""
        if self._worker is None or self._worker.returncode is not None:
            self._worker = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "glmd.structured_output.compiler_worker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            try:
                await _send(self._worker, self._setup)
                await _receive(self._worker)
            except (asyncio.IncompleteReadError, ConnectionError):
                await self._end_worker()
                raise RuntimeError("The grammar worker does not start.") from None
        return self._worker

    async def _end_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        if worker.returncode is None:
            worker.kill()
        await worker.wait()


def _param(structure: OutputSpec) -> str:
    """The client's name of what a structure was read from."""
    param: str | None = getattr(structure.format, "param", None)
    return param or "tools"


def _count(params: Sequence[str]) -> str:
    """How many keywords, and in which fields. What stands between a field and a keyword are names
    and patterns of the client's, which are part of its prompt and so not for the log."""
    counts = Counter(param.partition(".")[0] for param in params)
    return ", ".join(f"{count} in {field}" for field, count in counts.items())


def _refusal(structure: OutputSpec, why: str) -> Refused:
    param = _param(structure)
    return Refused(f"{param} {why}.", param, None)


async def _send(worker: asyncio.subprocess.Process, data: bytes) -> None:
    assert worker.stdin is not None
    worker.stdin.write(len(data).to_bytes(4, "little") + data)
    await worker.stdin.drain()


async def _receive(worker: asyncio.subprocess.Process) -> bytes:
    assert worker.stdout is not None
    header = await worker.stdout.readexactly(4)
    return await worker.stdout.readexactly(int.from_bytes(header, "little"))
