"""Routes `/tokenize`, `/detokenize` and `/apply-template`.

Fields have vLLM's names and, where llama.cpp's names differ, also llama.cpp's names.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from glmd.api.context import ClientDep
from glmd.api.generation_request import FailFastList, TokenId, ignored_header, omitted_header
from glmd.api.openai.input import ConversationFields
from glmd.api.request_body import JsonRoute
from glmd.api.state import StateDep
from glmd.errors import InvalidRequest

router = APIRouter(tags=["Tokens"], route_class=JsonRoute)


class TokenizeText(BaseModel):
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


TokenizeRequest = Annotated[
    Annotated[TokenizeChat, Tag("chat")] | Annotated[TokenizeText, Tag("text")],
    Discriminator(request_kind),
]


class Tokenized(BaseModel):
    count: int
    max_model_len: int | None = Field(description="Context length; null until the engine is ready.")
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    tokens: FailFastList[TokenId]


class Detokenized(BaseModel):
    prompt: str
    content: str = Field(description="`prompt` under llama.cpp's name.")


class Rendered(BaseModel):
    prompt: str
    tokens: list[int]


def set_ignored_header(body: BaseModel, response: Response) -> None:
    """List unknown fields in the response's header."""
    extra = body.model_extra or {}
    response.headers.update(ignored_header(name for name in extra if extra[name] is not None))


@router.post("/tokenize")
async def tokenize(
    body: TokenizeRequest, response: Response, state: StateDep, client: ClientDep
) -> Tokenized:
    """Tokenize a text, or a conversation as rendered by the chat template."""
    set_ignored_header(body, response)
    if isinstance(body, TokenizeChat):
        defaults = state.defaults(body.model, body.profile)
        conversation = body.conversation(defaults)
        response.headers.update(omitted_header(conversation))
        async with state.client_lock.acquire(client):
            prompt = await state.build_prompt(conversation)
        ids = prompt.tokens
    else:
        state.defaults(body.model)
        text = body.prompt if body.prompt is not None else body.content
        if text is None:
            raise InvalidRequest("prompt: missing. Send prompt or messages.", param="prompt")
        async with state.client_lock.acquire(client):
            ids = await state.run_in_worker(partial(state.tokenizer.encode_markup, text))
    tokens = ids.tolist()
    info = state.engine.info
    return Tokenized(
        count=len(tokens),
        max_model_len=info.max_context if info else None,
        tokens=tokens,
        token_strs=[state.tokenizer.decode([id]) for id in tokens]
        if body.return_token_strs
        else None,
    )


@router.post("/detokenize")
async def detokenize(
    body: DetokenizeRequest, response: Response, state: StateDep, client: ClientDep
) -> Detokenized:
    """Convert tokens to text, special tokens included."""
    set_ignored_header(body, response)
    state.defaults(body.model)
    async with state.client_lock.acquire(client):
        text = await state.run_in_worker(partial(state.tokenizer.decode, body.tokens))
    return Detokenized(prompt=text, content=text)


@router.post("/apply-template")
async def apply_template(
    body: TokenizeChat, response: Response, state: StateDep, client: ClientDep
) -> Rendered:
    """Render a conversation with the chat template."""
    set_ignored_header(body, response)
    defaults = state.defaults(body.model, body.profile)
    conversation = body.conversation(defaults)
    response.headers.update(omitted_header(conversation))
    async with state.client_lock.acquire(client):
        prompt = await state.build_prompt(conversation)
    tokens = prompt.tokens.tolist()
    return Rendered(prompt=state.tokenizer.decode(tokens), tokens=tokens)
