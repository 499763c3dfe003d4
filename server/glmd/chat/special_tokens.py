"""Control tokens of the GLM-4.7 chat format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from typing import Any

from glmd.errors import CheckpointError

Piece = str | int
"""Part of a rendered prompt: plain text, or the id of one control token."""


def _spelled(spelling: str) -> Any:
    return field(metadata={"spelling": spelling})


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the tokens that structure a conversation."""

    system: int = _spelled("<|system|>")
    user: int = _spelled("<|user|>")
    assistant: int = _spelled("<|assistant|>")
    observation: int = _spelled("<|observation|>")
    think: int = _spelled("<think>")
    end_think: int = _spelled("</think>")
    tool_call: int = _spelled("<tool_call>")
    end_tool_call: int = _spelled("</tool_call>")
    arg_key: int = _spelled("<arg_key>")
    end_arg_key: int = _spelled("</arg_key>")
    arg_value: int = _spelled("<arg_value>")
    end_arg_value: int = _spelled("</arg_value>")

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


SPELLINGS: Mapping[str, str] = {
    each.name: each.metadata["spelling"] for each in fields(SpecialTokens)
}
