"""The body of `POST /v1/completions`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from glmd.api.openai.parameters import Parameters, TokenId
from glmd.api.request_body import FailFastList
from glmd.errors import InvalidRequest

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for this endpoint (https://platform.openai.com/docs/api-reference/completions)."""

MAX_PROMPTS = 128

Tokens = Annotated[FailFastList[TokenId], Field(min_length=1)]
Prompts = Annotated[FailFastList[str], Field(min_length=1, max_length=MAX_PROMPTS)]
TokenPrompts = Annotated[FailFastList[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]


class CompletionRequest(Parameters):
    prompt: str | Tokens | Prompts | TokenPrompts = Field(
        description="Text in the model's own language (tags are tags), or token ids; or several."
    )
    echo: bool | None = Field(None, description="Begin the answer with the prompt.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Log-probabilities of the tokens, and of so many others."
    )
    best_of: int | None = Field(None, ge=1, description="1 only.")
    suffix: str | None = Field(None, description="Refused: the model cannot fill in.")

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[id for id in self.prompt if isinstance(id, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]

    def refuse_unsupported(self) -> None:
        """Raise InvalidRequest for what this model or engine cannot do."""
        if self.suffix:
            raise InvalidRequest("suffix: the model cannot fill in the middle.", param="suffix")
        if self.best_of is not None and self.best_of != 1:
            raise InvalidRequest("best_of must be 1; send n for several answers.", param="best_of")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest(
                "echo with logprobs: log-probabilities of the prompt are not available.",
                param="logprobs",
            )
