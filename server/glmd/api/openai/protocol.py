"""The shapes of OpenAI's answers.

Fields are written out exactly when they were set, so that an explicit null stays one and an
absent field stays absent, as OpenAI has it.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, Field

from glmd.api.generation import Usage as Counted

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Header:
    """What an answer and each of its chunks begin with."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, prefix: str, model: str, system_fingerprint: str) -> Header:
        """A new answer's, with an id `prefix-…`."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model, system_fingerprint)


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens that were not computed again.")


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int
    accepted_prediction_tokens: int = Field(description="Drafted tokens that were kept.")
    rejected_prediction_tokens: int = Field(description="Drafted tokens that were not.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def of(cls, counted: Counted) -> Usage:
        return cls(
            prompt_tokens=counted.prompt_tokens,
            completion_tokens=counted.completion_tokens,
            total_tokens=counted.prompt_tokens + counted.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=counted.cached_tokens),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=counted.reasoning_tokens,
                accepted_prediction_tokens=counted.accepted,
                rejected_prediction_tokens=counted.drafted - counted.accepted,
            ),
        )


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob] | None
    refusal: None = None
    reasoning_content: list[TokenLogprob] | None = Field(
        default=None, description="Of the tokens in the reasoning."
    )


class FunctionCall(BaseModel):
    name: str
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | None = Field(default=None, description="Absent if there was none.")
    tool_calls: list[ToolCall] | None = Field(default=None, description="Absent if there was none.")


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = Field(default=None, description="If asked for.")


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = Field(default=None, description="If asked for.")


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str


class CallDelta(BaseModel):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = Field(default=None, description="If asked for.")


class PromptProgress(BaseModel):
    """In tokens, as llama.cpp reports it."""

    total: int
    processed: int


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = Field(
        default=None, description="Only in the last chunk, and if asked for."
    )
    prompt_progress: PromptProgress | None = Field(default=None, description="If asked for.")
    prompt_token_ids: list[int] | None = Field(
        default=None, description="If asked for, in the first chunk."
    )


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    prompt_token_ids: list[int] | None = Field(
        default=None, description="If asked for; in a stream, in the choice's first chunk."
    )
    token_ids: list[int] | None = Field(default=None, description="If asked for.")


class Completion(BaseModel):
    """Of `/v1/completions`, whole or as a chunk."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
