"""Prompts of the bodies of each chat API, without a server: what the model would see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from live import CHECKPOINT

from glmd.api.anthropic import input as anthropic
from glmd.api.anthropic.protocol import CountTokensRequest
from glmd.api.generation_request import Defaults
from glmd.api.openai.protocol import ChatCompletionRequest
from glmd.api.responses.input import read_tools
from glmd.api.responses.input_items import read_input
from glmd.api.responses.protocol import ResponsesRequest
from glmd.chat.prompt import build_prompt
from glmd.chat.template import ChatTemplate
from glmd.chat.tokenizer import Tokenizer
from glmd.chat.types import Conversation
from glmd.config import Settings
from glmd.ipc import SamplingParams

Message = dict[str, Any]

FUNCTION = {"name": "load", "description": "Loads.", "parameters": {"type": "object"}}
CHAT_TOOL = {"type": "function", "function": FUNCTION}
RESPONSES_TOOL = {"type": "function", **FUNCTION}
MESSAGES_TOOL = {"name": "load", "description": "Loads.", "input_schema": {"type": "object"}}

TOKENIZER = Tokenizer.load(CHECKPOINT)
TEMPLATE = ChatTemplate.load(CHECKPOINT, TOKENIZER.controls)
DEFAULTS = Defaults.of(Settings(), SamplingParams())


@dataclass(frozen=True)
class Shown:
    """What the model sees of a conversation, and what it does not."""

    prompt: str
    omitted: Sequence[str]


Ask = Callable[..., Shown]


def show(conversation: Conversation) -> Shown:
    prompt = build_prompt(conversation, tokenizer=TOKENIZER, template=TEMPLATE)
    return Shown(TOKENIZER.decode(prompt.tokens.tolist()), conversation.omitted)


def chat(
    messages: list[Message], *tools: Message, defaults: Defaults = DEFAULTS, **fields: Any
) -> Shown:
    body = {"messages": messages, "tools": [CHAT_TOOL, *tools], **fields}
    return show(ChatCompletionRequest.model_validate(body).conversation(defaults))


def messages_api(
    messages: list[Message], *tools: Message, defaults: Defaults = DEFAULTS, **fields: Any
) -> Shown:
    body = {"messages": messages, "tools": [MESSAGES_TOOL, *tools], **fields}
    request = CountTokensRequest.model_validate(body)
    return show(request.conversation(defaults, anthropic.read_tools(request.tools)[0]))


def responses(
    items: list[Message], *tools: Message, defaults: Defaults = DEFAULTS, **fields: Any
) -> Shown:
    body = {"input": items, "tools": [RESPONSES_TOOL, *tools], **fields}
    request = ResponsesRequest.model_validate(body)
    read = read_input(request.new_input, None, {})
    return show(request.conversation(defaults, read, read_tools(request.tools)))
