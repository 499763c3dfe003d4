"""GLM's control tokens: the ids that structure a conversation, looked up by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields

from glmd.errors import CheckpointError

NAMES = {
    "system": "<|system|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
    "observation": "<|observation|>",
    "think": "<think>",
    "end_think": "</think>",
    "tool_call": "<tool_call>",
    "end_tool_call": "</tool_call>",
    "arg_key": "<arg_key>",
    "end_arg_key": "</arg_key>",
    "arg_value": "<arg_value>",
    "end_arg_value": "</arg_value>",
}


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Token ids of the tags that the prompt builder and the parser work with."""

    system: int
    user: int
    assistant: int
    observation: int
    think: int
    end_think: int
    tool_call: int
    end_tool_call: int
    arg_key: int
    end_arg_key: int
    arg_value: int
    end_arg_value: int

    @classmethod
    def find(cls, controls: Mapping[str, int], file: str) -> SpecialTokens:
        """Look the tags up among a tokenizer's added tokens.

        Raises:
            CheckpointError: a tag is not one token of its own.
        """
        missing = [name for name in NAMES.values() if name not in controls]
        if missing:
            raise CheckpointError(
                f"{file}: {', '.join(missing)} must each be one added token of a GLM-4.7 tokenizer",
                file=file,
            )
        return cls(**{field.name: controls[NAMES[field.name]] for field in fields(cls)})

    @property
    def parts(self) -> frozenset[int]:
        """The tags that stand inside an assistant's turn."""
        return frozenset(astuple(self)) - self.roles

    @property
    def roles(self) -> frozenset[int]:
        """The tags that open a turn."""
        return frozenset((self.system, self.user, self.assistant, self.observation))
