"""Between text and token ids, as this server does it: `/tokenize`, `/detokenize`,
`/apply-template`. Fields are named as in vLLM and, where it differs, as in llama.cpp."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from glmd.api.client_id import GivenClient
from glmd.api.json_route import JsonRoute
from glmd.api.openai.input import ConversationFields
from glmd.api.openai.parameters import TokenId
from glmd.api.sampling import ignored_header
from glmd.api.state import AppState, get_state
from glmd.errors import InvalidRequest

router = APIRouter(tags=["Tokens"], route_class=JsonRoute)

GivenService = Annotated[AppState, Depends(get_state)]


class TokenizeText(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    prompt: str | None = Field(None, description="Text whose tags are tags.")
    content: str | None = Field(None, description="The same, under llama.cpp's name.")
    return_token_strs: bool | None = Field(None, description="Spell the tokens, too.")


class TokenizeChat(ConversationFields):
    model: str | None = None
    profile: str | None = Field(None, description="As in a chat request.")
    return_token_strs: bool | None = Field(None, description="Spell the tokens, too.")


def kind_of(body: object) -> str:
    return "chat" if isinstance(body, dict) and "messages" in body else "text"


TokenizeRequest = Annotated[
    Annotated[TokenizeChat, Tag("chat")] | Annotated[TokenizeText, Tag("text")],
    Discriminator(kind_of),
]


class Tokenized(BaseModel):
    count: int
    max_model_len: int | None = Field(description="The context; null until the engine is ready.")
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    tokens: list[TokenId]


class Detokenized(BaseModel):
    prompt: str
    content: str = Field(description="The same, under llama.cpp's name.")


class Rendered(BaseModel):
    prompt: str
    tokens: list[int]


def name_ignored(body: BaseModel, response: Response) -> None:
    """List in the response's header what nothing here knows."""
    extra = body.model_extra or {}
    response.headers.update(ignored_header(name for name in extra if extra[name] is not None))


@router.post("/tokenize")
async def tokenize(
    body: TokenizeRequest, response: Response, service: GivenService, client: GivenClient
) -> Tokenized:
    """The tokens of a text, or of a conversation as the model would read it."""
    name_ignored(body, response)
    if isinstance(body, TokenizeChat):
        defaults = service.defaults(body.model, body.profile)
        async with service.one_each.acquire(client):
            prompt = await service.build_prompt(body.conversation(defaults))
        ids = prompt.tokens
    else:
        service.defaults(body.model)
        text = body.prompt if body.prompt is not None else body.content
        if text is None:
            raise InvalidRequest("Send prompt, a text, or messages.", param="prompt")
        async with service.one_each.acquire(client):
            ids = await service.run_in_worker(partial(service.tokenizer.encode_markup, text))
    tokens = ids.tolist()
    info = service.engine.info
    return Tokenized(
        count=len(tokens),
        max_model_len=info.max_context if info else None,
        tokens=tokens,
        token_strs=[service.tokenizer.decode([id]) for id in tokens]
        if body.return_token_strs
        else None,
    )


@router.post("/detokenize")
async def detokenize(
    body: DetokenizeRequest, response: Response, service: GivenService, client: GivenClient
) -> Detokenized:
    """The text of tokens, tags spelt out."""
    name_ignored(body, response)
    service.defaults(body.model)
    async with service.one_each.acquire(client):
        text = await service.run_in_worker(partial(service.tokenizer.decode, body.tokens))
    return Detokenized(prompt=text, content=text)


@router.post("/apply-template")
async def apply_template(
    body: TokenizeChat, response: Response, service: GivenService, client: GivenClient
) -> Rendered:
    """A conversation as the model would read it."""
    name_ignored(body, response)
    defaults = service.defaults(body.model, body.profile)
    async with service.one_each.acquire(client):
        prompt = await service.build_prompt(body.conversation(defaults))
    tokens = prompt.tokens.tolist()
    return Rendered(prompt=service.tokenizer.decode(tokens), tokens=tokens)
