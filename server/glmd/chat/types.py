"""Conversations, tools and prompts: the types that the chat layer's modules share.

Every API's request becomes a `Conversation`, and every conversation a `Prompt`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from glmd.ipc import TokenArray

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
    """

    text: str
    reasoning: str | None = None
    calls: tuple[ToolCall, ...] = ()


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
    """

    name: str
    parameters: dict[str, Json]
    definition: dict[str, Json]
    strict: bool = False
    param: str = "tools"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Everything that determines a prompt.

    Attributes:
        messages: in order; tool results in the order of their calls (`order_tool_results`).
        tools: the tools that the prompt describes, whether or not `tool_choice` allows calls.
        template_kwargs: variables of the chat template, such as `enable_thinking`; None: the
            variable's default.
        continue_final: the last message, an assistant's, is the beginning of the answer.
        cache_salt: separates the cached turns of one salt from those of every other.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
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
        turn_key: digest of the cache salt and `tokens[:turn_start]`.
        reasoning: reasoning of the message to continue; "" if there is none.
        content: content of the message to continue; "" if there is none.
        spliced_turns: number of earlier turns whose token ids came from the turn cache.
    """

    tokens: TokenArray
    in_reasoning: bool
    turn_start: int
    turn_key: bytes
    reasoning: str = ""
    content: str = ""
    spliced_turns: int = 0
