"""From a conversation to the token ids of a prompt.

A rendered prompt falls apart at the role tags, which only the template can write: so the ids of
each assistant turn are known, and a remembered turn stands in for what the template made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from glmd.chat.messages import (
    AssistantMessage,
    Conversation,
    Message,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from glmd.chat.template import Template
from glmd.chat.tokenizer import Piece, Tokenizer
from glmd.chat.turn_cache import TurnTokenCache
from glmd.errors import InvalidRequest
from glmd.ipc import TokenArray


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What the engine continues, and what its continuation will mean."""

    tokens: TokenArray
    """int32, shape [n]."""
    in_reasoning: bool
    """The first generated token is reasoning (or `</think>`)."""
    turn_start: int
    """Index into `tokens` of the first token of the turn to be generated: after `<|assistant|>`."""
    turn_key: bytes
    """Digest of the cache salt and of `tokens[:turn_start]`."""
    reasoning: str = ""
    """Prefilled reasoning and content: part of the turn that the client already has."""
    content: str = ""
    spliced_turns: int = 0
    """Assistant turns whose generated ids were remembered and stand in the prompt as they were."""


def build_prompt(
    conversation: Conversation,
    *,
    tokenizer: Tokenizer,
    template: Template,
    turns: TurnTokenCache | None = None,
) -> Prompt:
    """Render, encode and splice remembered turns in (`turns=None`: never).

    With `conversation.continue_final` the last message, an assistant's, stays open and is what
    the model continues: in its content, or in its reasoning if it has no content.

    Raises:
        InvalidRequest: the template refuses the conversation, or its last message cannot be
            continued.
    """
    tags = tokenizer.tags
    messages = list(conversation.messages)
    final = _final(messages) if conversation.continue_final else None
    if final is not None:
        messages.pop()
    rendered = template.render(
        [_in_template(message) for message in messages],
        tools=[tool.definition for tool in conversation.tools],
        kwargs=conversation.template_kwargs,
    )
    *sections, opening = _sections(rendered.pieces, tags.roles)
    if not opening or opening[0] != tags.assistant:
        raise InvalidRequest("The chat template opens no turn to answer in.", param="messages")
    returning: dict[int, AssistantMessage] = {}
    if turns is not None:
        clear = bool(template.variables(conversation.template_kwargs).get("clear_thinking"))
        opened = [index for index, one in enumerate(sections) if one[0] == tags.assistant]
        returning = _returning(messages, opened, after_user=clear)

    ids = _Ids(conversation.cache_salt)
    spliced = 0
    for index, section in enumerate(sections):
        message = returning.get(index)
        if message is None or turns is None:
            ids.add(tokenizer.encode_rendered(section))
            continue
        ids.add([tags.assistant])
        turn = turns.find(ids.key(), message)
        if turn is None:
            ids.add(tokenizer.encode_rendered(section[1:]))
        else:
            spliced += 1
            ids.add(turn.tokens)
            ids.add(turn.closing)
    ids.add([tags.assistant])
    turn_start, turn_key = ids.length, ids.key()
    if final is None or not (final.text or final.reasoning):
        ids.add(tokenizer.encode_rendered(opening[1:]))
    else:
        turn = turns.find(turn_key, final) if turns is not None else None
        ids.add(_open_turn(final, tokenizer) if turn is None else turn.tokens)
    tokens = ids.array()
    return Prompt(
        tokens,
        in_reasoning=_ends_in_reasoning(tokens[turn_start:], tags.think, tags.end_think),
        turn_start=turn_start,
        turn_key=turn_key,
        reasoning=(final.reasoning or "") if final is not None else "",
        content=final.text if final is not None else "",
        spliced_turns=spliced,
    )


class _Ids:
    """Ids of a prompt under construction, and a digest of all of them so far."""

    def __init__(self, salt: str) -> None:
        self.length = 0
        self._chunks: list[TokenArray] = []
        self._digest = blake2b(salt.encode("utf-8", "surrogatepass") + b"\0", digest_size=16)

    def add(self, ids: npt.ArrayLike) -> None:
        chunk = np.asarray(ids, dtype=np.int32)
        self.length += len(chunk)
        self._chunks.append(chunk)
        self._digest.update(chunk.tobytes())

    def key(self) -> bytes:
        return self._digest.digest()

    def array(self) -> TokenArray:
        return np.concatenate(self._chunks)


def _final(messages: Sequence[Message]) -> AssistantMessage:
    last = messages[-1] if messages else None
    if not isinstance(last, AssistantMessage):
        raise InvalidRequest(
            "Only a last message of the assistant can be continued.", param="messages"
        )
    if last.calls:
        raise InvalidRequest("A message with tool calls cannot be continued.", param="messages")
    return last


def _in_template(message: Message) -> dict[str, Any]:
    """A message as templates expect it: absent rather than null."""
    match message:
        case SystemMessage(text):
            return {"role": "system", "content": text}
        case UserMessage(text):
            return {"role": "user", "content": text}
        case ToolMessage(text):
            return {"role": "tool", "content": text}
        case AssistantMessage(text, reasoning, calls):
            shown: dict[str, Any] = {"role": "assistant", "content": text}
            if reasoning:
                shown["reasoning_content"] = reasoning
            if calls:
                shown["tool_calls"] = [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                    for call in calls
                ]
            return shown


def _sections(pieces: Sequence[Piece], roles: frozenset[int]) -> list[list[Piece]]:
    """What was rendered, cut before each role tag."""
    sections: list[list[Piece]] = [[]]
    for piece in pieces:
        if piece in roles and sections[-1]:
            sections.append([])
        sections[-1].append(piece)
    return sections


def _returning(
    messages: Sequence[Message], opened: Sequence[int], *, after_user: bool
) -> dict[int, AssistantMessage]:
    """Which sections are assistant turns that may be remembered.

    Args:
        opened: the sections that begin with `<|assistant|>`, of which there is one per message in
            GLM's format; were it otherwise, none would be known for certain.
        after_user: only those after the last user message, where alone the template keeps
            reasoning when `clear_thinking` is on.
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


def _open_turn(message: AssistantMessage, tokenizer: Tokenizer) -> TokenArray:
    """A turn in GLM's format, to the last character of what there is, without an end."""
    tags = tokenizer.tags
    pieces: list[Piece] = [tags.end_think]
    if message.reasoning:
        pieces = [tags.think, message.reasoning]
        if message.text:
            pieces.append(tags.end_think)
    return tokenizer.encode_rendered([*pieces, message.text])


def _ends_in_reasoning(tokens: TokenArray, think: int, end_think: int) -> bool:
    marks = tokens[(tokens == think) | (tokens == end_think)]
    return bool(len(marks) and marks[-1] == think)
