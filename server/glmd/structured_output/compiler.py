"""Compile output specs to grammars in a worker process that can be killed.

A process, because llguidance limits neither time nor stack: `multipleOf: 1000003` takes 5 s to
18 s, and a Lark grammar of 4,000 chained rules (60 kB) overflows the stack, which ends the process.
The engine compiles a grammar only after the worker has.

The worker is given the tokenizer's control tokens, and then answers each `OutputSpec` with
`CompiledGrammar` or `Refusal`, all in JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import msgspec
from llguidance import LLTokenizer, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from glmd.chat.tokenizer import SpecialTokens
from glmd.errors import InvalidRequest, Overloaded
from glmd.ipc import GrammarSpec
from glmd.structured_output.backend import GrammarError, byte_tokenizer, make_matcher
from glmd.structured_output.json_schema import JsonSchemaCompiler
from glmd.structured_output.request import (
    AnswerFormat,
    Choice,
    Grammar,
    JsonObject,
    JsonSchema,
    OutputSpec,
    Regex,
)
from glmd.structured_output.string_terminals import quote
from glmd.structured_output.tool_grammar import CallGrammar
from glmd.utils.lru import LRUCache
from glmd.utils.worker import Worker, WorkerError

log = logging.getLogger(__name__)

MAX_SECONDS = 2.0
"""CPU time to compile one grammar. An agent's 20 tools take 0.02 s."""
MAX_BYTES = 1 << 20
"""Size of an output spec (schemas and tools) as JSON."""
CACHE_BYTES = 16 << 20

_MAX_WORKER_BYTES = 1 << 30
_WORKER_STACK = 4 << 20
"""Half of a thread's stack in the engine, so that a grammar which the worker survives is safe
there."""

_LEXEME_OPTION = re.compile(r"\[[^\]\n]*\b(max_tokens|temperature|stop)\s*=")


class CompiledGrammar(msgspec.Struct, tag="compiled", frozen=True):
    """A grammar in llguidance's JSON form.

    Attributes:
        relaxed: paths of schema keywords that the grammar does not enforce.
    """

    text: str
    relaxed: tuple[str, ...]


class Refusal(msgspec.Struct, tag="refused", frozen=True):
    """An `InvalidRequest` that the worker raised."""

    message: str
    param: str | None
    code: str | None = None


_decode_spec = msgspec.json.Decoder(OutputSpec).decode
_decode_result = msgspec.json.Decoder(CompiledGrammar | Refusal).decode


class GrammarCompiler:
    """Compiles grammars for one event loop: one at a time, within limits, and cached.

    Refusals for time and for worker processes that died are not cached: another attempt may do.
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
            controls: ids of the tokenizer's control tokens by name (`Tokenizer.controls`).
        """
        self._controls = dict(controls)
        self._tags = SpecialTokens.find(controls, "the tokenizer")
        self._max_seconds = max_seconds
        self._cache: LRUCache[bytes, CompiledGrammar | Refusal] = LRUCache(cache_bytes)
        self._running: dict[bytes, asyncio.Future[CompiledGrammar | Refusal]] = {}
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._worker = Worker(
            f"{__name__}:make_answer",
            seconds=max_seconds,
            setup=msgspec.json.encode(self._controls),
        )

    async def compile(self, spec: OutputSpec, *, in_reasoning: bool) -> GrammarSpec | None:
        """Return the grammar of an answer, or None if the spec constrains nothing.

        Args:
            in_reasoning: the answer begins inside `<think>`, where the grammar does not apply.

        Raises:
            InvalidRequest: a field or keyword is malformed, cannot be enforced, or takes too long
                to compile; names the field.
        """
        free = spec.calls == "free"
        if spec.format is None and spec.calls == "none":
            return None
        if free and not any(tool.enforced for tool in spec.tools):
            return None
        result = await self._compile_once(spec)
        if isinstance(result, Refusal):
            raise InvalidRequest(result.message, param=result.param, code=result.code)
        after: tuple[int, ...] = (self._tags.end_think,) if in_reasoning else ()
        if free:
            after = (self._tags.tool_call,)
        return GrammarSpec(grammar=result.text, after=after, required=not free)

    async def close(self) -> None:
        """Stop the worker."""
        self._worker.close()
        self._thread.shutdown(cancel_futures=True)

    async def _compile_once(self, spec: OutputSpec) -> CompiledGrammar | Refusal:
        """Return a cached result, or join or start a compilation."""
        data = await asyncio.to_thread(_encode, spec)
        key = blake2b(data, digest_size=16).digest()
        cached = self._cache.get(key)
        if cached is not None:
            return cached
        task = self._running.get(key)
        if task is None:
            loop = asyncio.get_running_loop()
            task = loop.run_in_executor(self._thread, self._compile, spec, data)
            self._running[key] = task
            task.add_done_callback(lambda done: self._store(key, done))
        # A client that disconnects does not cancel the task: other clients may wait for its result.
        return await asyncio.shield(task)

    def _store(self, key: bytes, task: asyncio.Future[CompiledGrammar | Refusal]) -> None:
        del self._running[key]
        if task.cancelled() or task.exception() is not None:
            return
        result = task.result()
        self._cache.put(key, result)

    def _compile(self, spec: OutputSpec, data: bytes) -> CompiledGrammar | Refusal:
        """Have the worker compile a grammar.

        Raises:
            InvalidRequest: the grammar exceeds a limit, or crashes the worker.
            Overloaded: workers were killed or stopped from outside.
        """
        param = _param(spec)
        try:
            answer = self._worker.ask(data, max_bytes=_MAX_WORKER_BYTES)
        except WorkerError as error:
            log.warning("grammar worker killed: reason=%s field=%s", error.reason, param)
            if error.reason == "gone":
                message = "The grammar could not be compiled. Try again later."
                raise Overloaded(message) from error
            message = f"{param} is more than the grammar compiler can take."
            if error.reason == "time":
                message = f"{param} takes more than {self._max_seconds:g} s to compile."
            raise InvalidRequest(message, param=param) from error
        result: CompiledGrammar | Refusal = _decode_result(answer)
        if isinstance(result, CompiledGrammar) and result.relaxed:
            log.info("schema keywords not enforced: %s", _count_by_field(result.relaxed))
        return result


def _encode(spec: OutputSpec) -> bytes:
    """Encode a spec as one line of JSON.

    Raises:
        InvalidRequest: a value is not JSON, or the spec is too large.
    """
    param = _param(spec)
    too_large = InvalidRequest(f"{param} is larger than {MAX_BYTES >> 20} MiB.", param=param)
    if _is_larger(msgspec.to_builtins(spec), MAX_BYTES):
        raise too_large
    try:
        # Unlike msgspec, json refuses NaN instead of writing null.
        text = json.dumps(msgspec.to_builtins(spec), ensure_ascii=False, allow_nan=False)
        data = text.encode()
    except UnicodeEncodeError:
        message = f"{param} contains an unpaired surrogate, which is not valid text."
        raise InvalidRequest(message, param=param) from None
    except ValueError:
        message = f"{param} contains NaN or Infinity, which is not JSON."
        raise InvalidRequest(message, param=param) from None
    if len(data) > MAX_BYTES:
        raise too_large
    return data


def _is_larger(value: object, limit: int) -> bool:
    """Whether a value is larger than `limit` as JSON, by its texts and lists.

    Writing JSON holds the GIL for as long as it takes, this does not.
    """
    size, rest = 0, [value]
    while rest and size <= limit:
        each = rest.pop()
        if isinstance(each, dict):
            rest += each
            rest += each.values()
        elif isinstance(each, list | tuple):
            rest += each
        size += len(each) if isinstance(each, str) else 1
    return size > limit


def _param(spec: OutputSpec) -> str:
    """Return the client's name of the field that a spec was read from."""
    return getattr(spec.format, "param", None) or "tools"


def _count_by_field(params: Sequence[str]) -> str:
    """Count paths by request field.

    The rest of a path belongs to the prompt and is not logged.
    """
    counts = Counter(param.partition(".")[0] for param in params)
    return ", ".join(f"{field}={count}" for field, count in counts.items())


# -- in the worker ------------------------------------------------------------------------


def make_answer() -> Callable[[bytes], bytes]:
    """Make the worker's answers: first to the control tokens, then to specs."""
    threading.stack_size(_WORKER_STACK)
    thread = ThreadPoolExecutor(1)
    context: tuple[SpecialTokens, LLTokenizer] | None = None

    def answer(data: bytes) -> bytes:
        nonlocal context
        if context is None:
            controls = msgspec.json.decode(data, type=dict[str, int])
            tags = SpecialTokens.find(controls, "the tokenizer")
            # Which ids end a sequence does not matter for whether a grammar compiles.
            context = tags, byte_tokenizer(controls, (tags.user,))
            return b""
        result = _compile_checked(_decode_spec(data), *context)
        return msgspec.json.encode(result)

    return lambda data: thread.submit(answer, data).result()


def _compile_checked(
    spec: OutputSpec, tags: SpecialTokens, tokenizer: LLTokenizer
) -> CompiledGrammar | Refusal:
    """Build a grammar and have llguidance compile it once."""
    try:
        grammar = build_grammar(spec, tags)
    except InvalidRequest as error:
        return Refusal(error.message, error.param, error.code)
    try:
        matcher = make_matcher(tokenizer, grammar.text)
        matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
    except GrammarError as error:
        for part in _parts(spec):  # find the part of the spec that llguidance refuses
            refusal = _compile_checked(part, tags, tokenizer)
            if isinstance(refusal, Refusal):
                return refusal
        param = spec.tools[0].param if len(spec.tools) == 1 and not spec.format else _param(spec)
        reason = error.message.partition("; following special tokens")[0]
        reason = " ".join(reason.partition("\n<")[0].split())[:300]
        return Refusal(f"{param} cannot be enforced: {reason}", param)
    return grammar


def _parts(spec: OutputSpec) -> list[OutputSpec]:
    """Return smaller specs, one for each tool and the format.

    None if there is only one part.
    """
    if not spec.tools or (len(spec.tools) == 1 and spec.format is None):
        return []
    return [msgspec.structs.replace(spec, format=None, tools=(tool,)) for tool in spec.tools]


def build_grammar(spec: OutputSpec, tags: SpecialTokens) -> CompiledGrammar:
    """Write the grammar of an answer.

    The grammar starts at the first token of the content or, with `calls` "free", after the first
    `<tool_call>`. llguidance may still refuse it.

    Raises:
        InvalidRequest: a field or keyword is malformed or cannot be enforced; names the field.
    """
    parts: list[dict[str, Any]] = []
    relaxed: list[str] = []
    rules: list[str] = []
    starts: list[str] = []
    if spec.format is not None:
        answer = _format_grammar(spec.format, relaxed)
        starts.append("@answer")
        parts.append({"name": "answer", **answer})
    if spec.calls != "none":
        calls = CallGrammar(tags)
        rules = calls.rules(spec.tools, parallel=spec.parallel, begun=spec.calls == "free")
        starts.append("calls")
        relaxed += calls.relaxed
    lark = "\n".join([f"start: {' | '.join(starts)}", *rules])
    text = json.dumps({"grammars": [{"lark_grammar": lark}, *parts]})
    return CompiledGrammar(text, tuple(relaxed))


def _format_grammar(form: AnswerFormat, relaxed: list[str]) -> dict[str, Any]:
    """Return the grammar of the content.

    Add the keywords that it does not enforce to `relaxed`.
    """
    match form:
        case JsonObject():
            return {"json_schema": JsonSchemaCompiler({}, strict=True).document({"type": "object"})}
        case JsonSchema():
            compiler = JsonSchemaCompiler(form.schema, strict=form.strict)
            schema = compiler.compile(form.schema, form.param)
            relaxed += compiler.relaxed
            return {"json_schema": compiler.document(schema, whitespace=form.whitespace)}
        case Regex():
            return {"lark_grammar": f"start: TEXT\nTEXT: /{regex_to_lark(form.pattern, '')}/"}
        case Choice():
            options = " | ".join(map(quote, form.options))
            return {"lark_grammar": f"start: TEXT\nTEXT: {options}"}
        case Grammar():
            return {"lark_grammar": _to_lark(form)}


def _to_lark(grammar: Grammar) -> str:
    option = _LEXEME_OPTION.search(grammar.text)
    if option is not None:
        raise InvalidRequest(
            f"{grammar.param} uses {option[1]}=, which is not supported because drafts are "
            "verified several tokens at a time.",
            param=grammar.param,
        )
    try:
        return any_to_lark(grammar.text)
    except Exception as error:  # the converter raises bare Exception
        raise InvalidRequest(f"{grammar.param}: {error}", param=grammar.param) from error
