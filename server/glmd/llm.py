"""The engine as a library, without HTTP.

    from glmd import LLM

    llm = LLM("leonsarmiento/GLM-4.7-Flash-5bit-mlx")
    print(llm.chat([{"role": "user", "content": "Hello"}]).text)

Everything given in one call is batched; what one call computed, the next one finds cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from glmd.chat.events import (
    ContentDelta,
    Event,
    Finished,
    FinishReason,
    ReasoningDelta,
    TokenInfo,
    ToolCallDelta,
    ToolCallStart,
)
from glmd.chat.messages import read_messages, read_tools
from glmd.chat.output_processor import ChatOutputProcessor, CompletionOutputProcessor
from glmd.chat.prompt import build_prompt
from glmd.chat.template import ChatTemplate
from glmd.chat.tokenizer import Tokenizer
from glmd.chat.turn_cache import TurnTokenCache
from glmd.chat.types import Conversation, Prompt, Tool
from glmd.checkpoint.generation_config import sampling_defaults
from glmd.checkpoint.hub import DEMO, resolve_model
from glmd.engine.config import EngineConfig
from glmd.engine.core import Engine, load_engine
from glmd.errors import GlmdError, InvalidRequest
from glmd.ipc import EngineRequest, SamplingParams, SequenceOutput, pack_tokens

Messages = Sequence[Mapping[str, Any]]


@dataclass(slots=True)
class Call:
    """A tool call of an answer."""

    id: str
    name: str
    arguments: str = ""
    """JSON text."""


@dataclass(slots=True)
class Completion:
    """One continuation of one prompt.

    Attributes:
        text: what was generated; of a chat, the answer without reasoning and calls.
        tokens: generated ids.
        finish_reason: why it ended.
        logprobs: one per token of text and reasoning, if they were asked for.
        cached_tokens: prompt tokens that needed no computing.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: list[Call] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenInfo] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def add(self, event: Event) -> None:
        """Fold one event of the answer in."""
        match event:
            case ReasoningDelta(text, infos):
                self.reasoning += text
                self.logprobs += infos
            case ContentDelta(text, infos):
                self.text += text
                self.logprobs += infos
            case ToolCallStart(_, id, name):
                self.tool_calls.append(Call(id, name))
            case ToolCallDelta(index, arguments):
                self.tool_calls[index].arguments += arguments
            case Finished(reason):
                self.finish_reason = reason


@dataclass(slots=True)
class _Running:
    """One sequence on its way."""

    reader: ChatOutputProcessor | CompletionOutputProcessor
    completion: Completion
    prompt: Prompt | None


class _Batch:
    """Requests that run together; iterating steps the engine and yields what comes of it."""

    def __init__(self, engine: Engine, turns: TurnTokenCache) -> None:
        self._engine = engine
        self._turns = turns
        self._running: dict[tuple[str, int], _Running] = {}

    def add(self, request: EngineRequest, readers: Sequence[_Running]) -> None:
        for index, running in enumerate(readers):
            self._running[request.id, index] = running
        self._engine.submit(request)

    def events(self) -> Iterator[tuple[_Running, Event]]:
        """Run to the end. Whoever stops iterating cancels what is left."""
        try:
            while self._running:
                for output in self._engine.step():
                    yield from self._take(output)
        finally:
            for id, index in list(self._running):
                self._engine.cancel(id, index)
            if self._running:
                self._engine.step()  # hands out the farewells, which are for no one

    def _take(self, output: SequenceOutput) -> Iterator[tuple[_Running, Event]]:
        if output.finish_reason == "error":
            kind = InvalidRequest if output.error_kind == "invalid_request" else GlmdError
            raise kind(output.error or "The engine gave no reason.")
        running = self._running.get((output.id, output.index))
        if running is None:
            return
        completion = running.completion
        completion.tokens += output.tokens
        completion.prompt_tokens += output.prompt_tokens
        completion.cached_tokens += output.cached_tokens
        for event in running.reader.feed(output):
            completion.add(event)
            yield running, event
        if running.reader.finished:
            del self._running[output.id, output.index]
            if running.reader.stopped:
                self._engine.cancel(output.id, output.index)
            if running.prompt is not None and isinstance(running.reader, ChatOutputProcessor):
                self._turns.remember(running.prompt, running.reader.turn())


class LLM:
    """GLM-4.7-Flash in this process. Not thread-safe: use it from the thread that made it.

    Args:
        model: a checkpoint folder or a Hugging Face repo id; None: the bundled demo.
        config: limits of the engine, as keywords of `EngineConfig`.

    Raises:
        CheckpointError, ModelNotFound: there is no such model, or it cannot be served.

    Attributes:
        engine: the engine, for its `info` and `stats()`.
        tokenizer: text to token ids and back.
        defaults: sampling where a call does not say: the checkpoint's generation_config.json,
            else what the model card recommends.
    """

    def __init__(self, model: str | Path | None = None, **config: Any) -> None:
        folder = DEMO if model is None else resolve_model(str(model))
        self.tokenizer = Tokenizer.load(folder)
        self.template = ChatTemplate.load(folder, self.tokenizer.controls)
        self.defaults = sampling_defaults(folder)
        self.engine = load_engine(folder, EngineConfig(**config), lambda done, total: None)
        self._turns = TurnTokenCache()
        self._ids = count()

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        *,
        progress: bool = False,
        **options: Any,
    ) -> list[Completion]:
        """Continue raw prompts, all in one batch.

        Args:
            prompts: text, in which tags such as `<|user|>` count as tags, or token ids; one
                string stands for a list of one.
            progress: show a progress bar.
            options: `max_tokens`, `min_tokens`, `ignore_eos`, `stop`, `stop_token_ids`, `n`, and
                the fields of `SamplingParams`.

        Returns:
            `n` completions per prompt, in order.

        Raises:
            InvalidRequest: an option or a prompt cannot be honoured.
        """
        options, stop = self._options(options)
        batch = _Batch(self.engine, self._turns)
        results = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            ids = self.tokenizer.encode_markup(prompt) if isinstance(prompt, str) else prompt
            request = EngineRequest(id=str(next(self._ids)), prompt=pack_tokens(ids), **options)
            readers = [
                _Running(CompletionOutputProcessor(self.tokenizer, stop=stop), Completion(), None)
                for _ in range(request.n)
            ]
            batch.add(request, readers)
            results += [reader.completion for reader in readers]
        self._finish(batch, len(results), progress)
        return results

    def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Completion:
        """Answer one conversation. See `chat_batch`; `n` is 1."""
        return self.chat_batch([messages], tools=tools, template=template, **options)[0]

    def chat_batch(
        self,
        conversations: Iterable[Messages],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: Mapping[str, Any] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> list[Completion]:
        """Answer conversations, all in one batch.

        Args:
            conversations: each a list of messages in OpenAI's shape.
            tools: in OpenAI's shape; the model may call them.
            template: variables of the chat template: `enable_thinking`, `clear_thinking`, ….
            progress, options: as for `generate`.

        Returns:
            `n` completions per conversation, in order.

        Raises:
            InvalidRequest: a message, tool or option cannot be honoured.
        """
        options, stop = self._options(options)
        batch = _Batch(self.engine, self._turns)
        results = []
        offered = read_tools(tools)
        for messages in conversations:
            request, readers = self._chat_request(messages, offered, template, options, stop)
            batch.add(request, readers)
            results += [reader.completion for reader in readers]
        self._finish(batch, len(results), progress)
        return results

    def stream(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[Event]:
        """Answer one conversation event by event; closing the iterator cancels.

        Args: as for `chat_batch`, without `n`.
        """
        if options.get("n", 1) != 1:
            raise InvalidRequest("stream gives one answer: n must be 1.", param="n")
        options, stop = self._options(options)
        batch = _Batch(self.engine, self._turns)
        batch.add(*self._chat_request(messages, read_tools(tools), template, options, stop))
        return (event for _, event in batch.events())

    def close(self) -> None:
        """Free the model's memory."""
        self.engine.close()

    # -- inside ---------------------------------------------------------------------------

    def _chat_request(
        self,
        messages: Messages,
        tools: Sequence[Tool],
        template: Mapping[str, Any] | None,
        options: dict[str, Any],
        stop: Sequence[str],
    ) -> tuple[EngineRequest, list[_Running]]:
        conversation = Conversation(
            read_messages(messages), tools=tools, template_kwargs=template or {}
        )
        prompt = build_prompt(
            conversation, tokenizer=self.tokenizer, template=self.template, turn_cache=self._turns
        )
        request = EngineRequest(
            id=str(next(self._ids)), prompt=pack_tokens(prompt.tokens), **options
        )
        readers = [
            _Running(
                ChatOutputProcessor(self.tokenizer, prompt, tools=tools, stop=stop),
                Completion(),
                prompt,
            )
            for _ in range(request.n)
        ]
        return request, readers

    def _options(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], Sequence[str]]:
        """Fields of `EngineRequest` from a call's options, and the stop strings."""
        rest = dict(options)
        stop = rest.pop("stop", ())
        given = {name: rest.pop(name) for name in SAMPLING_FIELDS if name in rest}
        if unknown := rest.keys() - REQUEST_FIELDS:
            name = min(unknown)
            raise InvalidRequest(f"There is no option {name!r}.", param=name)
        rest["sampling"] = msgspec.structs.replace(self.defaults, **given)
        return rest, [stop] if isinstance(stop, str) else stop

    def _finish(self, batch: _Batch, total: int, progress: bool) -> None:
        with _progress_bar(total, progress) as advance:
            for _, event in batch.events():
                if isinstance(event, Finished):
                    advance()


SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__)
REQUEST_FIELDS = frozenset(
    {"max_tokens", "min_tokens", "ignore_eos", "stop_token_ids", "n", "priority", "cache_salt"}
)


@contextmanager
def _progress_bar(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    columns = TextColumn("Generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
