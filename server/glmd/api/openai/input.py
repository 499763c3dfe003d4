"""The part of a request that decides the prompt: messages, tools, and how to think."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from glmd.api.defaults import Defaults
from glmd.api.request_body import FailFastList
from glmd.chat.messages import read_messages, read_tools
from glmd.chat.types import Conversation
from glmd.errors import InvalidRequest

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Thinking(BaseModel):
    """Anthropic's and z.ai's way to say how to think."""

    model_config = ConfigDict(strict=True)

    type: Literal["enabled", "disabled"] | None = None
    budget_tokens: int | None = Field(None, ge=0, description="As thinking_budget.")
    clear_thinking: bool | None = None


MESSAGE_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["type", "text"],
                            "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}},
                        },
                    },
                    {"type": "null"},
                ]
            },
            "reasoning_content": {"type": ["string", "null"]},
            "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}},
            "tool_call_id": {"type": ["string", "null"]},
        },
    },
}
"""For the OpenAPI document; `glmd.chat.messages.read_messages` checks, and names the field."""


class ConversationFields(BaseModel):
    """Fields of the chat request, of `/tokenize` and of `/apply-template`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    messages: FailFastList[dict[str, Any]] = Field(json_schema_extra=MESSAGE_SCHEMA)
    tools: FailFastList[dict[str, Any]] | None = Field(
        None, description="Functions that the model may call, in OpenAI's form."
    )
    enable_thinking: bool | None = Field(None, description="Think before answering.")
    clear_thinking: bool | None = Field(
        None, description="Drop the reasoning of earlier turns from the prompt."
    )
    thinking: Thinking | None = Field(None, description="The same in another form.")
    reasoning_effort: Effort | None = Field(
        None,
        description="none: no thinking. The others allow as many tokens of reasoning as the"
        " server's setting effort_budgets says, unless a budget is given.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables of the chat template, these two among them."
    )
    continue_final_message: bool | None = Field(
        None, description="The last message, the assistant's, is the beginning of the answer."
    )
    add_generation_prompt: bool | None = Field(
        None, description="The opposite of continue_final_message, where clients send both."
    )
    cache_salt: str | None = Field(
        None, description="Requests with different salts share no cached prefix."
    )

    def conversation(self, defaults: Defaults) -> Conversation:
        """What decides the prompt.

        Raises:
            InvalidRequest: something in it cannot be honoured.
        """
        if self.add_generation_prompt is not None and (
            self.add_generation_prompt == bool(self.continue_final_message)
        ):
            raise InvalidRequest(
                "add_generation_prompt must be the opposite of continue_final_message.",
                param="add_generation_prompt",
            )
        kwargs = {
            **(self.chat_template_kwargs or {}),
            "enable_thinking": self._enable_thinking(defaults.enable_thinking),
            "clear_thinking": self._clear_thinking(defaults.clear_thinking),
        }
        return Conversation(
            messages=read_messages(self.messages),
            tools=read_tools(self.tools),
            template_kwargs=kwargs,
            continue_final=bool(self.continue_final_message),
            cache_salt=self.cache_salt or "",
        )

    def _enable_thinking(self, default: bool) -> bool:
        type = self.thinking.type if self.thinking else None
        return agreed(
            {
                "enable_thinking": self.enable_thinking,
                "chat_template_kwargs.enable_thinking": self._template_flag("enable_thinking"),
                "thinking.type": None if type is None else type == "enabled",
                # Any other effort is one that no thinking at all stays below.
                "reasoning_effort": False if self.reasoning_effort == "none" else None,
            },
            default or self.reasoning_effort is not None,
        )

    def _clear_thinking(self, default: bool) -> bool:
        return agreed(
            {
                "clear_thinking": self.clear_thinking,
                "chat_template_kwargs.clear_thinking": self._template_flag("clear_thinking"),
                "thinking.clear_thinking": self.thinking.clear_thinking if self.thinking else None,
            },
            default,
        )

    def _template_flag(self, name: str) -> bool | None:
        value = (self.chat_template_kwargs or {}).get(name)
        if value is not None and not isinstance(value, bool):
            param = f"chat_template_kwargs.{name}"
            raise InvalidRequest(f"{param} must be true or false.", param=param)
        return value


def agreed(said: dict[str, bool | None], default: bool) -> bool:
    """The value that all who say something agree on.

    Raises:
        InvalidRequest: two of them disagree; it names both.
    """
    voices = [(name, value) for name, value in said.items() if value is not None]
    for name, value in voices[1:]:
        first, expected = voices[0]
        if value != expected:
            raise InvalidRequest(f"{name} contradicts {first}.", param=name)
    return voices[0][1] if voices else default
