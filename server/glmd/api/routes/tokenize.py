"""Routes `/tokenize`, `/detokenize` and `/apply-template`.

Fields have vLLM's names and, where llama.cpp's names differ, also llama.cpp's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Discriminator, Field, RootModel, Tag

from glmd.api.auth import Access
from glmd.api.context import AccessDep, client_id
from glmd.api.generation_request import (
    FailFastList,
    RequestBody,
    TokenId,
    ignored_header,
    omitted_header,
)
from glmd.api.openai.input import ConversationFields
from glmd.api.request_body import JsonRoute
from glmd.api.serving import markup_steps
from glmd.api.state import AppState, StateDep
from glmd.chat.types import Prompt
from glmd.errors import InvalidRequest, invalid_field

router = APIRouter(tags=["Tokens"], route_class=JsonRoute)

MAX_ANSWER_TOKENS = 1_000_000
"""Token ids in an answer: five full contexts."""


class TokenizeText(RequestBody):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    prompt: str | None = Field(
        None, description="Text; tags of the chat format are special tokens."
    )
    content: str | None = Field(None, description="`prompt` under llama.cpp's name.")
    return_token_strs: bool | None = Field(None, description="Also return the text of each token.")


class TokenizeChat(ConversationFields):
    model: str | None = None
    profile: str | None = Field(None, description="As in chat completions.")
    return_token_strs: bool | None = Field(None, description="Also return the text of each token.")


def request_kind(body: object) -> str:
    return "chat" if isinstance(body, dict) and "messages" in body else "text"


class TokenizeRequest(
    RootModel[
        Annotated[
            Annotated[TokenizeChat, Tag("chat")] | Annotated[TokenizeText, Tag("text")],
            Discriminator(request_kind),
        ]
    ]
):
    """A text, or a conversation."""


class Tokenized(BaseModel):
    count: int
    max_model_len: int | None = Field(description="Context length; null until the engine is ready.")
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(RequestBody):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    tokens: FailFastList[TokenId]


class Detokenized(BaseModel):
    prompt: str
    content: str = Field(description="`prompt` under llama.cpp's name.")


class Rendered(BaseModel):
    prompt: str
    tokens: list[int]


@router.post("/tokenize", response_model=Tokenized)
async def tokenize(
    body: TokenizeRequest, http: Request, state: StateDep, access: AccessDep
) -> Response:
    """Tokenize a text, or a conversation as rendered by the chat template."""
    request = body.root
    headers: dict[str, str] = {}
    if isinstance(request, TokenizeChat):
        prompt, headers = await _build_prompt(request, http, state, access)
        ids = prompt.tokens
    else:
        state.defaults(request.model)
        text = request.prompt if request.prompt is not None else request.content
        if text is None:
            raise InvalidRequest("prompt: missing. Send prompt or messages.", param="prompt")
        async with state.client_lock.acquire(client_id(http.scope)):
            ids = await state.take_turns(markup_steps(text, state.tokenizer))
    _check_answer(len(ids), "messages" if isinstance(request, TokenizeChat) else "prompt")
    info = state.engine.info

    def answer() -> bytes:
        tokens = ids.tolist()
        strings = map(state.tokenizer.decode, ([id] for id in tokens))
        return msgspec.json.encode(
            {
                "count": len(tokens),
                "max_model_len": info.max_context if info else None,
                "tokens": tokens,
                "token_strs": list(strings) if request.return_token_strs else None,
            }
        )

    return _respond(await state.run_in_worker(answer), request, headers)


@router.post("/detokenize", response_model=Detokenized)
async def detokenize(body: DetokenizeRequest, http: Request, state: StateDep) -> Response:
    """Convert tokens to text, special tokens included."""
    state.defaults(body.model)

    def answer() -> bytes:
        text = state.tokenizer.decode(body.tokens)
        return msgspec.json.encode({"prompt": text, "content": text})

    async with state.client_lock.acquire(client_id(http.scope)):
        return _respond(await state.run_in_worker(answer), body)


@router.post("/apply-template", response_model=Rendered)
async def apply_template(
    body: TokenizeChat, http: Request, state: StateDep, access: AccessDep
) -> Response:
    """Render a conversation with the chat template."""
    prompt, headers = await _build_prompt(body, http, state, access)
    _check_answer(len(prompt.tokens), "messages")

    def answer() -> bytes:
        tokens = prompt.tokens.tolist()
        return msgspec.json.encode({"prompt": state.tokenizer.decode(tokens), "tokens": tokens})

    return _respond(await state.run_in_worker(answer), body, headers)


async def _build_prompt(
    body: TokenizeChat, http: Request, state: AppState, access: Access
) -> tuple[Prompt, dict[str, str]]:
    """The prompt, and the header that lists what it does not show."""
    defaults = state.defaults(body.model, body.profile)
    async with state.client_lock.acquire(client_id(http.scope)):
        conversation = await state.run_by_size(http, partial(body.conversation, defaults))
        prompt = await state.build_prompt(conversation, access.owner)
    return prompt, omitted_header(conversation)


def _check_answer(tokens: int, param: str) -> None:
    """
    Raises:
        InvalidRequest: more tokens than an answer lists.
    """
    if tokens > MAX_ANSWER_TOKENS:
        problem = f"{tokens} tokens exceed the limit of {MAX_ANSWER_TOKENS} of this route."
        raise invalid_field(param, problem)


def _respond(answer: bytes, body: BaseModel, headers: Mapping[str, str] | None = None) -> Response:
    """A response with `headers` and a header that lists the body's unknown fields."""
    extra = body.model_extra or {}
    ignored = ignored_header(name for name in extra if extra[name] is not None)
    return Response(answer, media_type="application/json", headers={**ignored, **(headers or {})})
