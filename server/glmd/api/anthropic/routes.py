"""`POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from glmd.api.anthropic.input import read_tools
from glmd.api.anthropic.protocol import (
    AnthropicMessage,
    CountTokensRequest,
    MessagesRequest,
    TokenCount,
)
from glmd.api.anthropic.stream import MessageBuilder
from glmd.api.context import ClientDep, ContextDep
from glmd.api.request_body import JsonRoute
from glmd.api.serving import count_prompt_tokens, serve
from glmd.api.state import StateDep
from glmd.api.streaming import Generation

router = APIRouter(tags=["Anthropic"], route_class=JsonRoute)


@router.post("/v1/messages", response_model=AnthropicMessage)
async def create_message(
    body: MessagesRequest, http: Request, state: StateDep, context: ContextDep
) -> Response:
    """Continue a conversation, streamed or whole."""

    def build(generation: Generation) -> MessageBuilder:
        return MessageBuilder(
            generation,
            model=state.model.id,
            max_tokens=body.max_tokens,
            omit_thinking=body.thinking is not None and body.thinking.display == "omitted",
            request_id=http.state.request_id,
        )

    return await serve(http, state, context, body, body.to_generation_request, build)


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountTokensRequest, state: StateDep, client: ClientDep) -> TokenCount:
    """Count the tokens of a request's prompt."""
    defaults = state.defaults(body.model, body.profile)
    body.unknown_parameters()
    tools, _ = read_tools(body.tools)
    conversation = body.conversation(defaults, tools)
    return TokenCount(input_tokens=await count_prompt_tokens(state, client, conversation))
