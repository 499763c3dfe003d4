"""Shared by the chat tests: a tiny tokenizer, a chat template, and answers to generated ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from glmd.chat.output_processor import ChatOutputProcessor
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
    Message,
    Prompt,
    ReasoningDelta,
    TokenInfo,
    Tool,
    ToolCallDelta,
    ToolCallStart,
    UserMessage,
)
from glmd.ipc import FinishReason, SequenceOutput, TokenLogprobs

SPECIAL = (
    "<|endoftext|>", "[gMASK]", "<sop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)  # fmt: skip
ADDED = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink",
)  # fmt: skip
SPELLINGS = SPECIAL + ADDED

TEMPLATE = """
[gMASK]<sop>
{%- if tools -%}
<|system|># Tools
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
Call them so: <tool_call>{name}<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>
{%- endif -%}
{%- set last = namespace(user=-1) -%}
{%- for message in messages if message.role == 'user' -%}
    {%- set last.user = messages.index(message) -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}<|system|>{{ message.content }}
    {%- elif message.role == 'user' -%}<|user|>{{ message.content }}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|observation|>{% endif -%}
        <tool_response>{{ message.content }}</tool_response>
    {%- elif message.role == 'assistant' -%}
        <|assistant|>
        {%- set content = message.content -%}
        {%- set reasoning = message.reasoning_content or '' -%}
        {%- if not reasoning and '</think>' in content -%}
            {%- set reasoning = content.split('</think>')[0] -%}
            {%- set content = content.split('</think>')[-1] -%}
        {%- endif -%}
        {%- if reasoning and (not clear_thinking or loop.index0 > last.user) -%}
            {{ '<think>' + reasoning.strip() + '</think>' }}
        {%- else -%}
            </think>
        {%- endif -%}
        {{- content.strip() -}}
        {%- for call in message.tool_calls or [] -%}
            {{- '<tool_call>' + call.function.name -}}
            {%- for key, value in call.function.arguments.items() -%}
                <arg_key>{{ key }}</arg_key>
                {%- set shown = value if value is string else value | tojson(ensure_ascii=False) -%}
                <arg_value>{{ shown }}</arg_value>
            {%- endfor -%}
            </tool_call>
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|assistant|>{{ '<think>' if enable_thinking else '</think>' }}
{%- endif -%}
""".strip()


REASONING_PARTS = [
    {"type": "thinking", "thinking": "Ask.", "signature": "x"},
    {"type": "reasoning", "text": "Ask."},
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Ask."}]},
    {"type": "reasoning_content", "reasoning_content": "Ask."},
    {"type": "reasoning_text", "text": "Ask."},
]
"""Content parts with the reasoning `Ask.`"""

REASONING_FIELDS: list[dict[str, Any]] = [
    {"reasoning_content": "Ask."},
    {"reasoning": "Ask."},
    {"reasoning": {"text": "Ask."}},
    {"reasoning": {"content": [{"type": "text", "text": "Ask."}]}},
    {"reasoning_content": ["Ask", "."]},
    {"reasoning_text": "Ask."},
    {"thinking": "Ask."},
    {"thinking_blocks": [{"type": "thinking", "thinking": "Ask.", "signature": "x"}]},
    {"reasoning_details": [{"type": "reasoning.text", "text": "Ask", "index": 0}, {"text": "."}]},
    {"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}], "reasoning": "Ask."},
]
"""Fields of a message with the same reasoning."""

INLINE = [
    "<think>Ask.</think>Rain.",
    "<think>\nAsk.\n</think>\n\nRain.",
    "\n<think>Ask.</think>Rain.",
    '<details type="reasoning" done="true" duration="3">\n<summary>Thought</summary>\n'
    "&gt; Ask.\n</details>\nRain.",
    '<details type="reasoning" done="true">\n<summary>Thought</summary>\n> Ask.\n</details>\nRain.',
]
"""Texts that begin with the same reasoning, before the answer `Rain.`"""


def backend(*, special: bool = False) -> tokenizers.Tokenizer:
    """Byte-level BPE with GLM's control tokens, trained on a few lines.

    Args:
        special: mark the tags inside a turn special, which GLM's own tokenizer does not do.
    """
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    lines = [TEMPLATE, 'The quick brown fox: 123.5, Grüße, 你好世界, {"name": "get_weather"}\n']
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(lines * 3, trainer)
    made.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    made.add_tokens([AddedToken(name, special=special, normalized=False) for name in ADDED])
    return made


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(backend(), "tokenizer.json")


@cache
def template() -> ChatTemplate:
    return ChatTemplate(TEMPLATE, tokenizer().controls)


def ids(text: str) -> list[int]:
    """Token ids of text in which spelled tags are tags."""
    return [int(id) for id in tokenizer().encode_markup(text)]


def text_ids(text: str) -> list[int]:
    """Token ids of text in which spelled tags are text."""
    return tokenizer().encode(text)


def prompt(in_reasoning: bool = True) -> Prompt:
    tokens = tokenizer().encode_markup(
        "<|assistant|>" + ("<think>" if in_reasoning else "</think>")
    )
    return Prompt(tokens, in_reasoning, turn_start=1, turn_key=b"")


def build(
    messages: Sequence[Message],
    turn_cache: TurnTokenCache | None = None,
    owner: str = "",
    **options: Any,
) -> Prompt:
    """The prompt of a conversation; `options` are fields of `Conversation`."""
    return build_prompt(
        Conversation(messages, **options),
        tokenizer=tokenizer(),
        template=template(),
        turn_cache=turn_cache,
        owner=owner,
    )


def ask(text: str, turn_cache: TurnTokenCache | None = None, **options: Any) -> Prompt:
    return build([UserMessage(text)], turn_cache, **options)


def tool(name: str, **properties: Any) -> Tool:
    parameters = {"type": "object", "properties": properties}
    (made,) = read_tools([{"function": {"name": name, "parameters": parameters}}])
    return made


@dataclass
class Folded:
    """A non-streamed answer, folded from its events."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """Names and arguments."""
    call_ids: list[str] = field(default_factory=list)
    reasoning_tokens: list[TokenInfo] = field(default_factory=list)
    content_tokens: list[TokenInfo] = field(default_factory=list)
    finish: str | None = None
    stop_sequence: str | None = None

    @property
    def objects(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(arguments)) for name, arguments in self.calls]


def fold(events: Iterable[Event]) -> Folded:
    folded = Folded()
    for event in events:
        assert folded.finish is None, "an event after Finished"
        match event:
            case ReasoningDelta(text, tokens):
                folded.reasoning += text
                folded.reasoning_tokens += tokens
            case ContentDelta(text, tokens):
                folded.content += text
                folded.content_tokens += tokens
            case ToolCallStart(index, id, name):
                assert index == len(folded.calls)
                folded.calls.append((name, ""))
                folded.call_ids.append(id)
            case ToolCallDelta(index, arguments):
                assert index == len(folded.calls) - 1
                assert arguments
                folded.calls[index] = (folded.calls[index][0], folded.calls[index][1] + arguments)
            case Finished(reason, stop_sequence):
                folded.finish, folded.stop_sequence = reason, stop_sequence
    return folded


def outputs(
    tokens: Sequence[int],
    finish: FinishReason | None = "length",
    *,
    sizes: Iterable[int] = (),
    logprobs: bool = False,
) -> list[SequenceOutput]:
    """Engine outputs of `sizes` tokens, then of one token each; the last has `finish`."""
    chunks: list[list[int]] = []
    rest = list(tokens)
    for size in sizes:
        if rest:
            chunks.append(rest[:size])
            rest = rest[size:]
    chunks += [[token] for token in rest] or ([] if chunks else [[]])
    return [
        SequenceOutput(
            id="answer",
            tokens=chunk,
            logprobs=[TokenLogprobs(-0.5, [], []) for _ in chunk] if logprobs else None,
            finish_reason=finish if index == len(chunks) - 1 else None,
        )
        for index, chunk in enumerate(chunks)
    ]


def answer(
    text: str | Sequence[int],
    *,
    tools: Sequence[Tool] = (),
    stop: Sequence[str] = (),
    in_reasoning: bool = False,
    finish: FinishReason | None = None,
    sizes: Iterable[int] = (),
    logprobs: bool = False,
) -> Folded:
    """The answer that the client sees. `finish=None` adds an end token."""
    generated = ids(text) if isinstance(text, str) else list(text)
    if finish is None:
        generated = [*generated, tokenizer().special_tokens.user]
        finish = "stop"
    processor = ChatOutputProcessor(tokenizer(), prompt(in_reasoning), tools=tools, stop=stop)
    events: list[Event] = []
    for output in outputs(generated, finish, sizes=sizes, logprobs=logprobs):
        events += processor.feed(output)
    return fold(events)


def whole_or_pieces(generated: Sequence[int], sizes: Sequence[int] = (), **options: Any) -> Folded:
    """The answer, the same in one output, in outputs of `sizes` tokens, and token by token."""
    at_once = answer(generated, sizes=[len(generated) + 1], **options)
    in_pieces = answer(generated, sizes=sizes, **options)
    by_token = answer(generated, **options)
    for one in (at_once, in_pieces, by_token):
        one.call_ids.clear()
    assert at_once == in_pieces == by_token
    return by_token


texts = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from(" \n\t<>/|\"'{}[]\\0123456789abcü你🙂"),
    ),
    max_size=30,
)
"""Any text, with many characters that parsers get wrong."""

tag_like = st.lists(st.one_of(st.sampled_from(SPELLINGS), texts), max_size=6).map("".join)
"""Text that contains spellings of control tokens."""

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def written(name: str, arguments: Mapping[str, Any]) -> list[int]:
    """Token ids of a call as the template prints it: strings raw, other values as JSON."""
    tags = tokenizer().special_tokens
    made = [tags.tool_call, *text_ids(name)]
    for key, value in arguments.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        made += [tags.arg_key, *text_ids(key), tags.end_arg_key]
        made += [tags.arg_value, *text_ids(shown), tags.end_arg_value]
    return [*made, tags.end_tool_call]


any_ids = st.lists(st.integers(0, tokenizer().vocab_size - 1), max_size=40)
