"""Build the token ids of a prompt from a conversation.

The rendered template is split at the role tokens, which only the template can write. Each section
that is an assistant's turn can then be replaced by the token ids that the model generated.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import inf
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from glmd.chat.template import ChatTemplate, template_variables
from glmd.chat.template_process import TemplateProcess
from glmd.chat.tokenizer import Piece, Tokenizer
from glmd.chat.turn_cache import TurnTokenCache
from glmd.chat.types import (
    AssistantMessage,
    Conversation,
    Message,
    Prompt,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from glmd.errors import invalid_field
from glmd.ipc import TokenArray

T = TypeVar("T")

Steps = Generator[int, None, T]
"""Work in steps that are short for any input. Yields the tokens of the prompt so far, returns T."""


def build_prompt(
    conversation: Conversation,
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate | TemplateProcess,
    turn_cache: TurnTokenCache | None = None,
    owner: str = "",
) -> Prompt:
    """Do all steps of `prompt_steps`."""
    steps = prompt_steps(
        conversation,
        tokenizer=tokenizer,
        template=template,
        turn_cache=turn_cache,
        owner=owner,
    )
    end = advance(steps, inf)
    assert isinstance(end, Done)
    return end.result


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """The end of all steps."""

    result: T


def advance(steps: Steps[T], tokens: float) -> int | Done[T]:
    """Do steps until they have added `tokens` tokens.

    Return the prompt's tokens so far.
    """
    begun: int | None = None
    while True:
        try:
            reached = next(steps)
        except StopIteration as end:
            return Done(end.value)
        begun = reached if begun is None else begun
        if not 0 <= reached - begun < tokens:  # less: the next of several prompts
            return reached


def prompt_steps(
    conversation: Conversation,
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate | TemplateProcess,
    turn_cache: TurnTokenCache | None = None,
    owner: str = "",
) -> Steps[Prompt]:
    """Render and encode a conversation, with cached turns in place of rendered ones.

    With `conversation.continue_final` the last message, an assistant's, stays open: the model
    continues its content, or its reasoning if it has no content.

    Args:
        turn_cache: None: every turn is encoded from its text.
        owner: whose cached turns may be used.

    Raises:
        InvalidRequest: the template cannot render the conversation, or the last message cannot be
            continued.
    """
    special_tokens = tokenizer.special_tokens
    messages = list(conversation.messages)
    final = _message_to_continue(messages) if conversation.continue_final else None
    if final is not None:
        messages.pop()
    pieces = template.render(
        [_template_message(message) for message in messages],
        tools=[tool.definition for tool in conversation.tools if not tool.deferred],
        kwargs=conversation.template_kwargs,
    )
    *sections, opening = _split_at(special_tokens.roles, pieces)
    if not opening or opening[0] != special_tokens.assistant:
        raise invalid_field("messages", "the chat template does not open an assistant's turn.")
    returned: dict[int, AssistantMessage] = {}
    if turn_cache is not None:
        variables = template_variables(conversation.template_kwargs, template.defaults)
        clear = bool(variables["clear_thinking"])
        opened = [i for i, pieces in enumerate(sections) if pieces[0] == special_tokens.assistant]
        returned = _returned_turns(messages, opened, after_user=clear)

    ids = _PromptIds(owner, conversation.cache_salt)

    def encode(pieces: Sequence[Piece]) -> Steps[None]:
        for chunk in tokenizer.encode_steps(pieces):
            ids.add(chunk)
            yield ids.length

    spliced = 0
    for index, section in enumerate(sections):
        message = returned.get(index)
        if message is None or turn_cache is None:
            yield from encode(section)
            continue
        ids.add([special_tokens.assistant])
        turn = turn_cache.find(ids.digest(), message)
        if turn is None:
            yield from encode(section[1:])
        else:
            spliced += 1
            ids.add(turn.tokens)
            ids.add(turn.closing)
    ids.add([special_tokens.assistant])
    turn_start, turn_key = ids.length, ids.digest()
    prefilled = False
    if final is None or not (final.text or final.reasoning):
        yield from encode(opening[1:])
    else:
        turn = turn_cache.find(turn_key, final) if turn_cache is not None else None
        if turn is None:
            prefilled = True
            yield from encode(_open_turn(final, tokenizer))
        else:
            ids.add(turn.tokens)
    tokens = ids.array()
    think, end_think = special_tokens.think, special_tokens.end_think
    generated = tokens[turn_start:]
    thinking = generated[(generated == think) | (generated == end_think)]
    return Prompt(
        tokens,
        in_reasoning=bool(len(thinking) and thinking[-1] == think),
        turn_start=turn_start,
        turn_key=turn_key,
        reasoning=(final.reasoning or "") if final is not None else "",
        content=final.text if final is not None else "",
        spliced_turns=spliced,
        prefilled=prefilled,
    )


class _PromptIds:
    """Token ids of a prompt under construction, and their digest."""

    def __init__(self, owner: str, salt: str) -> None:
        self.length = 0
        self._chunks: list[TokenArray] = []
        scope = f"{owner}\0{salt}\0".encode("utf-8", "surrogatepass")
        self._digest = blake2b(scope, digest_size=16)

    def add(self, ids: npt.ArrayLike) -> None:
        chunk = np.asarray(ids, dtype=np.int32)
        self.length += len(chunk)
        self._chunks.append(chunk)
        self._digest.update(chunk.tobytes())

    def digest(self) -> bytes:
        return self._digest.digest()

    def array(self) -> TokenArray:
        return np.concatenate(self._chunks)


def _message_to_continue(messages: Sequence[Message]) -> AssistantMessage:
    last = messages[-1] if messages else None
    if not isinstance(last, AssistantMessage):
        raise invalid_field("messages", "only a last message by the assistant can be continued.")
    if last.calls:
        raise invalid_field("messages", "a message with tool calls cannot be continued.")
    return last


def _template_message(message: Message) -> dict[str, Any]:
    """A message in the shape that chat templates expect, without null fields."""
    match message:
        case SystemMessage(text):
            return {"role": "system", "content": text}
        case UserMessage(text):
            return {"role": "user", "content": text}
        case ToolMessage(text):
            return {"role": "tool", "content": text}
        case AssistantMessage(text, reasoning, calls):
            fields: dict[str, Any] = {"role": "assistant", "content": text}
            if reasoning:
                fields["reasoning_content"] = reasoning
            if calls:
                fields["tool_calls"] = [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                    for call in calls
                ]
            return fields


def _split_at(roles: frozenset[int], pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Split before each role token."""
    sections: list[list[Piece]] = [[]]
    for piece in pieces:
        if piece in roles and sections[-1]:
            sections.append([])
        sections[-1].append(piece)
    return sections


def _returned_turns(
    messages: Sequence[Message], opened: Sequence[int], *, after_user: bool
) -> dict[int, AssistantMessage]:
    """Assistant messages that may be cached turns, by index of their section.

    Args:
        opened: indices of the sections that start with `<|assistant|>`. In GLM's format there is
            one for each assistant message; otherwise the result is empty.
        after_user: only turns after the last user message. With `clear_thinking` the template
            keeps the reasoning of these turns alone.
    """
    turns = [index for index, one in enumerate(messages) if isinstance(one, AssistantMessage)]
    if len(turns) != len(opened):
        return {}
    last_user = -1
    if after_user:
        users = (index for index, one in enumerate(messages) if isinstance(one, UserMessage))
        last_user = max(users, default=-1)
    found = {}
    for index, section in zip(turns, opened, strict=True):
        message = messages[index]
        if index > last_user and isinstance(message, AssistantMessage):
            found[section] = message
    return found


def _open_turn(message: AssistantMessage, tokenizer: Tokenizer) -> list[Piece]:
    """A turn in GLM's format, without its end."""
    special_tokens = tokenizer.special_tokens
    pieces: list[Piece] = [special_tokens.end_think]
    if message.reasoning:
        pieces = [special_tokens.think, message.reasoning]
        if message.text:
            pieces.append(special_tokens.end_think)
    return [*pieces, message.text]
