"""Offline API: the engine as a library, without HTTP.

    from glmd import LLM

    llm = LLM("leonsarmiento/GLM-4.7-Flash-5bit-mlx")
    print(llm.chat([{"role": "user", "content": "Hello"}]).text)

All prompts of one call run as one batch. Prefixes stay cached between calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from glmd.chat.history import HistoryReader
from glmd.chat.messages import read_messages
from glmd.chat.output_processor import ChatOutputProcessor, CompletionOutputProcessor
from glmd.chat.prompt import build_prompt
from glmd.chat.template import ChatTemplate
from glmd.chat.tokenizer import Tokenizer
from glmd.chat.tools import read_tools
from glmd.chat.turn_cache import TurnTokenCache
from glmd.chat.types import (
    ContentDelta,
    Conversation,
    Event,
    Finished,
    FinishReason,
    Prompt,
    ReasoningDelta,
    TokenInfo,
    Tool,
    ToolCallDelta,
    ToolCallStart,
)
from glmd.checkpoint.config import sampling_defaults
from glmd.checkpoint.hub import DEMO, resolve_model
from glmd.engine.config import EngineConfig
from glmd.engine.core import Engine, load_engine
from glmd.engine_client.output_collector import output_error
from glmd.errors import InvalidRequest, SettingsError
from glmd.ipc import EngineRequest, SamplingParams, SequenceOutput, pack_tokens
from glmd.utils.text import did_you_mean

Messages = Sequence[Mapping[str, Any]]

SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__)
REQUEST_FIELDS = frozenset(
    {"max_tokens", "min_tokens", "ignore_eos", "stop_token_ids", "n", "priority", "cache_salt"}
)


@dataclass(slots=True)
class ToolCallOutput:
    """A generated tool call. `arguments` is JSON text."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class CompletionOutput:
    """One continuation of one prompt.

    Attributes:
        text: generated text; for a chat, the content without reasoning and tool calls.
        tokens: generated token ids.
        finish_reason: None until the continuation has ended.
        logprobs: one entry per token of text and reasoning, if requested.
        cached_tokens: prompt tokens read from the cache.
    """

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallOutput] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenInfo] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def add(self, event: Event) -> None:
        """Append one event of the output."""
        match event:
            case ReasoningDelta(text, infos):
                self.reasoning += text
                self.logprobs += infos
            case ContentDelta(text, infos):
                self.text += text
                self.logprobs += infos
            case ToolCallStart(_, id, name):
                self.tool_calls.append(ToolCallOutput(id, name))
            case ToolCallDelta(index, arguments):
                self.tool_calls[index].arguments += arguments
            case Finished(reason):
                self.finish_reason = reason


@dataclass(slots=True)
class _SequenceState:
    """A running sequence. `prompt` is None for a raw completion."""

    processor: ChatOutputProcessor | CompletionOutputProcessor
    completion: CompletionOutput
    prompt: Prompt | None


class _Batch:
    """Requests that run together; iterating over `events` steps the engine."""

    def __init__(self, engine: Engine, turns: TurnTokenCache) -> None:
        self._engine = engine
        self._turns = turns
        self._running: dict[tuple[str, int], _SequenceState] = {}

    def add(self, request: EngineRequest, sequences: Sequence[_SequenceState]) -> None:
        for index, sequence in enumerate(sequences):
            self._running[request.id, index] = sequence
        self._engine.submit(request)

    def events(self) -> Iterator[Event]:
        """Run all requests and yield their events. Closing the iterator cancels the rest."""
        try:
            while self._running:
                for output in self._engine.step():
                    yield from self._process(output)
        finally:
            for id, index in list(self._running):
                self._engine.cancel(id, index)
            if self._running:
                self._engine.step()  # drops the final outputs of the cancelled sequences

    def _process(self, output: SequenceOutput) -> Iterator[Event]:
        if output.finish_reason == "error":
            raise output_error(output)
        sequence = self._running.get((output.id, output.index))
        if sequence is None:
            return
        completion = sequence.completion
        completion.tokens += output.tokens
        completion.prompt_tokens += output.prompt_tokens
        completion.cached_tokens += output.cached_tokens
        for event in sequence.processor.feed(output):
            completion.add(event)
            yield event
        if sequence.processor.finished:
            del self._running[output.id, output.index]
            if sequence.processor.stopped:
                self._engine.cancel(output.id, output.index)
            if sequence.prompt is not None and isinstance(sequence.processor, ChatOutputProcessor):
                self._turns.remember(sequence.prompt, sequence.processor.turn())


class LLM:
    """GLM-4.7-Flash in this process.

    Not thread-safe: use it in the thread that created it.

    Args:
        model: a checkpoint folder or a Hugging Face repo id. None: the bundled demo.
        config: keyword arguments of `EngineConfig`.

    Raises:
        ModelNotFound: no such folder or repository exists.
        CheckpointError: the checkpoint is damaged or unsupported.
        SettingsError: a setting is invalid, or not for this class.

    Attributes:
        engine: the engine, for its `info` and `stats()`.
        tokenizer: the checkpoint's tokenizer.
        defaults: default sampling parameters, from the checkpoint's generation_config.json or
            else the model card.
    """

    def __init__(self, model: str | Path | None = None, **config: Any) -> None:
        if config.get("ranks", 1) != 1:
            raise SettingsError("ranks: only `glmd serve` has ranks, whose loss ends the process.")
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
    ) -> list[CompletionOutput]:
        """Continue raw prompts in one batch.

        Args:
            prompts: texts or token ids. Special tokens such as `<|user|>` are recognized in
                texts. A string is a list of one.
            progress: show a progress bar.
            options: `max_tokens`, `min_tokens`, `ignore_eos`, `stop`, `stop_token_ids`, `n`, and
                the fields of `SamplingParams`.

        Returns:
            `n` completions per prompt, in order.

        Raises:
            InvalidRequest: an option or a prompt is invalid.
        """
        options, stop = self._options(options)
        batch = _Batch(self.engine, self._turns)
        results = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            ids = self.tokenizer.encode_markup(prompt) if isinstance(prompt, str) else prompt
            request = EngineRequest(id=str(next(self._ids)), prompt=pack_tokens(ids), **options)
            sequences = [
                _SequenceState(
                    CompletionOutputProcessor(self.tokenizer, stop=stop), CompletionOutput(), None
                )
                for _ in range(request.n)
            ]
            batch.add(request, sequences)
            results += [sequence.completion for sequence in sequences]
        self._finish(batch, len(results), progress)
        return results

    def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> CompletionOutput:
        """Answer one conversation, with one completion; see `chat_batch`."""
        return self.chat_batch([messages], tools=tools, template=template, **options)[0]

    def chat_batch(
        self,
        conversations: Iterable[Messages],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: Mapping[str, Any] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> list[CompletionOutput]:
        """Answer conversations in one batch.

        Args:
            conversations: lists of messages in OpenAI's format.
            tools: tools in OpenAI's format. None: no tools.
            template: variables of the chat template, such as `enable_thinking`.
            progress, options: as for `generate`.

        Returns:
            `n` completions per conversation, in order.

        Raises:
            InvalidRequest: a message, tool or option is invalid.
        """
        options, stop = self._options(options)
        batch = _Batch(self.engine, self._turns)
        results = []
        offered = read_tools(tools)
        for messages in conversations:
            request, sequences = self._chat_request(messages, offered, template, options, stop)
            batch.add(request, sequences)
            results += [sequence.completion for sequence in sequences]
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
        """Answer one conversation and yield events.

        Closing the iterator cancels the request.

        Args: as for `chat_batch`, without `n`.
        """
        if options.get("n", 1) != 1:
            raise InvalidRequest("n: must be 1 for a stream.", param="n")
        options, stop = self._options(options)
        batch = _Batch(self.engine, self._turns)
        batch.add(*self._chat_request(messages, read_tools(tools), template, options, stop))
        return batch.events()

    def close(self) -> None:
        """Free the model's memory."""
        self.engine.close()

    def _chat_request(
        self,
        messages: Messages,
        tools: Sequence[Tool],
        template: Mapping[str, Any] | None,
        options: dict[str, Any],
        stop: Sequence[str],
    ) -> tuple[EngineRequest, list[_SequenceState]]:
        reader = HistoryReader(tools)
        conversation = Conversation(
            read_messages(messages, reader),
            tools=list(reader.tools.values()),
            template_kwargs=template or {},
        )
        prompt = build_prompt(
            conversation, tokenizer=self.tokenizer, template=self.template, turn_cache=self._turns
        )
        request = EngineRequest(
            id=str(next(self._ids)), prompt=pack_tokens(prompt.tokens), **options
        )
        sequences = [
            _SequenceState(
                ChatOutputProcessor(self.tokenizer, prompt, tools=tools, stop=stop),
                CompletionOutput(),
                prompt,
            )
            for _ in range(request.n)
        ]
        return request, sequences

    def _options(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], Sequence[str]]:
        """Convert options to fields of `EngineRequest`; also return the stop strings."""
        rest = dict(options)
        stop = rest.pop("stop", ())
        given = {name: rest.pop(name) for name in SAMPLING_FIELDS if name in rest}
        if unknown := rest.keys() - REQUEST_FIELDS:
            name = min(unknown)
            raise InvalidRequest(
                f"{name}: unknown option{did_you_mean(name, REQUEST_FIELDS | SAMPLING_FIELDS)}",
                param=name,
            )
        rest["sampling"] = msgspec.structs.replace(self.defaults, **given)
        return rest, [stop] if isinstance(stop, str) else stop

    def _finish(self, batch: _Batch, total: int, progress: bool) -> None:
        """Run a batch to its end, with a progress bar if `progress` is set."""
        columns = TextColumn("Generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, disable=not progress) as bar:
            task = bar.add_task("", total=total)
            for event in batch.events():
                if isinstance(event, Finished):
                    bar.advance(task)


class TokenizerWrapper:
    """The methods of mlx-lm's tokenizer that model cards use."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.chat_template = llm.template.source

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **template: Any,
    ) -> list[int]:
        """Return the token ids of a rendered conversation."""
        rendered = self._llm.template.render(
            [dict(message) for message in messages],
            tools=[tool.definition for tool in read_tools(tools)],
            add_generation_prompt=add_generation_prompt,
            kwargs=template,
        )
        ids: list[int] = self._llm.tokenizer.encode_rendered(rendered).tolist()
        return ids

    def encode(self, text: str) -> list[int]:
        """Return the token ids of plain text."""
        return self._llm.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return self._llm.tokenizer.decode(ids)


def load(model: str | Path | None = None, **config: Any) -> tuple[LLM, TokenizerWrapper]:
    """Load a model as `mlx_lm.load` does. `config`: keyword arguments of `LLM`."""
    llm = LLM(model, **config)
    return llm, TokenizerWrapper(llm)


def generate(
    model: LLM,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 256,
    temp: float | None = None,
    verbose: bool = False,
    **options: Any,
) -> str:
    """Continue one prompt as `mlx_lm.generate` does.

    Args:
        prompt: token ids, or text in which special tokens are recognized.
        temp: temperature. None: the checkpoint's default.
        verbose: also print the text.
        options: `top_k`, `top_p`, `min_p`, `seed`, `stop`, … as for `LLM.generate`.

    Returns:
        The generated text, special tokens included.
    """
    if temp is not None:
        options["temperature"] = temp
    (completion,) = model.generate([prompt], max_tokens=max_tokens, n=1, **options)
    if verbose:
        print(completion.text)
    return completion.text
