"""Types of turns and dialogues."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    user: str
    reasoning: str
    answer: str
    direct: str | None = None
    """Answer with thinking off, if the steps must be in the answer. None: same as `answer`."""

    def messages(self, thinking: bool) -> list[Message]:
        answer = self.answer if thinking or self.direct is None else self.direct
        reply: Message = {"role": "assistant", "content": answer}
        if thinking:
            reply["reasoning_content"] = self.reasoning
        return [{"role": "user", "content": self.user}, reply]


@dataclass(frozen=True)
class Dialogue:
    """A training or evaluation example. The last message is the assistant's."""

    skill: str
    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = True
    clear_thinking: bool = False
