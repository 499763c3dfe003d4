"""Shared types of the chat layer: conversations, tools, prompts, events, limits.

Every API's request becomes a `Conversation`, and every conversation a `Prompt`. A model's answer
becomes events: a streamed response renders them, a non-streamed response is their fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from glmd.errors import InvalidRequest, invalid_field
from glmd.ipc import TokenArray, TokenLogprobs

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function call by the assistant.

    Attributes:
        id: the client's id of the call; "" if the client sent none.
    """

    id: str
    name: str
    arguments: dict[str, Json]


@dataclass(frozen=True, slots=True)
class SystemMessage:
    text: str


@dataclass(frozen=True, slots=True)
class UserMessage:
    text: str


@dataclass(frozen=True, slots=True)
class AssistantMessage:
    """
    Attributes:
        reasoning: None or "": the client did not send the reasoning back.
        sent_text: `text` as it was before reasoning at its beginning became `reasoning`; None: it
            had none.
    """

    text: str
    reasoning: str | None = None
    calls: tuple[ToolCall, ...] = ()
    sent_text: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class ToolMessage:
    """The result of a tool call.

    Attributes:
        call_id: None: the first call without a result.
    """

    text: str
    call_id: str | None = None


Message = SystemMessage | UserMessage | AssistantMessage | ToolMessage


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Attributes:
        parameters: JSON schema of the arguments; {} if the client sent none.
        definition: what the chat template prints: `{"type": "function", "function": {…}}`.
        strict: calls must follow the schema; keywords that cannot be enforced are errors.
        param: the request field that holds the schema, for errors.
        deferred: not in the prompt's head, but where the conversation refers to the tool.
        schema_error: what is wrong with `parameters`. Only calls that must follow the schema need
            a valid one.
    """

    name: str
    parameters: dict[str, Json]
    definition: dict[str, Json]
    strict: bool = False
    param: str = "tools"
    deferred: bool = False
    schema_error: InvalidRequest | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Everything that determines a prompt.

    Attributes:
        messages: in order; tool results in the order of their calls (`order_tool_results`).
        tools: the tools of the request and of the messages, whether or not `tool_choice` allows
            calls. The prompt's head describes those that are not deferred.
        offered: the tools that the prompt offers at its end.
        omitted: `PLACE=KIND` of what the messages record and the prompt does not show.
        template_kwargs: variables of the chat template, such as `enable_thinking`; None: the
            variable's default.
        continue_final: the last message, an assistant's, is the beginning of the answer.
        cache_salt: separates the cached turns of one salt from those of every other.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    offered: Sequence[Tool] = ()
    omitted: Sequence[str] = ()
    template_kwargs: Mapping[str, Json] = field(default_factory=dict)
    continue_final: bool = False
    cache_salt: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """Token ids for the engine, and the state in which generation starts.

    Attributes:
        tokens: int32, shape [n].
        in_reasoning: generation starts inside `<think>`.
        turn_start: index into `tokens` of the generated turn's first token, after
            `<|assistant|>`.
        turn_key: digest of the owner, the cache salt and `tokens[:turn_start]`.
        reasoning: reasoning of the message to continue; "" if there is none.
        content: content of the message to continue; "" if there is none.
        spliced_turns: number of earlier turns whose token ids came from the turn cache.
        prefilled: the turn begins with text of the client that the model did not generate.
    """

    tokens: TokenArray
    in_reasoning: bool
    turn_start: int
    turn_key: bytes
    reasoning: str = ""
    content: str = ""
    spliced_turns: int = 0
    prefilled: bool = False


FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A generated token with its log-probabilities, for requests that ask for them."""

    id: int
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str
    tokens: list[TokenInfo] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str
    tokens: list[TokenInfo] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The start of a tool call. Its arguments follow as `ToolCallDelta`s.

    Attributes:
        index: 0 for the answer's first call.
    """

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a call's JSON arguments. The pieces of a call join to one object."""

    index: int
    arguments: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of an answer.

    Attributes:
        stop_sequence: the stop string that matched, or None.
    """

    reason: FinishReason
    stop_sequence: str | None = None


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallDelta | Finished


MAX_MESSAGES = 10_000
"""Messages, or input items, of a conversation. Each takes at least two tokens."""

MAX_BLOCKS = 10_000
"""Blocks, or parts, of a message. Clients send a few dozen: a block per tool result."""

MAX_TOOLS = 1000
"""An agent with a dozen MCP servers has 200."""

MAX_NAME = 256
"""Characters of a model or profile name."""

MAX_STOP_LENGTH = 1000
"""Characters of a stop string."""

MAX_STOP_TOKENS = 1000

MAX_BIASED_TOKENS = 4096

MAX_PATTERN = 10_000
"""Characters of a regular expression. Grammars and schemas are limited in bytes and in compile time
(`glmd.structured_output.compiler`)."""

MAX_DEPTH = 100
"""Nesting of JSON schemas. The deepest seen in practice have about 15 levels."""


def check_count(values: Sized | None, limit: int, param: str) -> None:
    """
    Raises:
        InvalidRequest: more than `limit` values.
    """
    if values is not None and len(values) > limit:
        raise invalid_field(param, f"{len(values)} entries exceed the limit of {limit}.")


def check_length(text: str | None, limit: int, param: str) -> None:
    """
    Raises:
        InvalidRequest: more than `limit` characters.
    """
    if text is not None and len(text) > limit:
        raise invalid_field(param, f"{len(text)} characters exceed the limit of {limit}.")


def check_depth(value: object, param: str, limit: int = 4 * MAX_DEPTH) -> None:
    """
    Args:
        limit: levels of lists and objects. One level of a JSON schema takes up to three.

    Raises:
        InvalidRequest: a JSON value has more levels.
    """
    level = [value]
    for _ in range(limit):
        below: list[object] = []
        for each in level:
            if isinstance(each, Mapping):
                below += each.values()
            elif isinstance(each, list):
                below += each
        if not below:
            return
        level = below
    raise invalid_field(param, "nested too deeply.")
