"""Control tokens of the GLM-4.7 chat format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

from glmd.errors import CheckpointError

Piece = str | int
"""Part of a rendered prompt: plain text, or the id of one control token."""

SPELLINGS = {
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
    """Ids of the tokens that structure a conversation."""

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
        """Look the tokens up.

        Args:
            controls: id of each added token of the tokenizer, by spelling.
            file: the tokenizer's file, for errors.

        Raises:
            CheckpointError: a token is missing.
        """
        missing = [spelling for spelling in SPELLINGS.values() if spelling not in controls]
        if missing:
            raise CheckpointError(
                f"{file}: missing control tokens: {', '.join(missing)}.",
                file=file,
            )
        return cls(**{name: controls[spelling] for name, spelling in SPELLINGS.items()})

    @property
    def roles(self) -> frozenset[int]:
        """Tokens that start a turn."""
        return frozenset((self.system, self.user, self.assistant, self.observation))

    @property
    def in_turn(self) -> frozenset[int]:
        """Tokens inside an assistant's turn."""
        return frozenset(astuple(self)) - self.roles
