"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from glmd.api.context import ContextDep, RequestContext, prepare_slot
from glmd.api.generation import Generation
from glmd.api.openai.chat_request import ChatCompletionRequest
from glmd.api.openai.chat_stream import ChatBuilder
from glmd.api.openai.protocol import ChatCompletion, Header
from glmd.api.request_body import JsonRoute
from glmd.api.serving import start_generation
from glmd.api.sse import EventStream, cancel_on_disconnect, prime
from glmd.api.state import AppState, get_state

router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)


@router.post("/api/v0/chat/completions", include_in_schema=False)  # as LM Studio has it
@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(
    body: ChatCompletionRequest,
    request: Request,
    service: Annotated[AppState, Depends(get_state)],
    terms: ContextDep,
) -> Response:
    """Continue a conversation, streamed or whole."""
    headers = body.ignored_header()
    async with prepare_slot(request, service, terms):
        generation, renderer = await prepare(body, service, terms)
    if body.stream:
        frames = await prime(renderer.stream(generation))
        return EventStream(frames, keep_alive=service.settings.keep_alive, headers=headers)
    completion = await cancel_on_disconnect(request, renderer.fold(generation))
    return Response(
        completion.model_dump_json(exclude_unset=True),
        media_type="application/json",
        headers=headers,
    )


async def prepare(
    body: ChatCompletionRequest, service: AppState, terms: RequestContext
) -> tuple[Generation, ChatBuilder]:
    """Everything up to the engine: checks, prompt, request.

    Raises:
        ModelNotFound, InvalidRequest: the request cannot be served.
    """
    terms.exchange.set_request("chat", body.model, stream=body.stream)
    defaults = service.defaults(body.model, body.profile)
    body.refuse_unsupported()
    options = body.engine_options(body.token_limit or defaults.max_tokens)
    logprobs = body.top_k_logprobs
    sampling = body.sampling(defaults.sampling, logprobs)
    tools = body.callable_tools()
    reasoning_limit = body.reasoning_limit(service.settings.effort_budgets)
    structure = body.structure(tools)
    prompt = await service.build_prompt(body.conversation(defaults))

    header = Header.new("chatcmpl", service.model.id, service.fingerprint)
    generation = start_generation(
        service,
        prompt,
        terms,
        id=header.id,
        sampling=sampling,
        param="messages",
        tools=tools,
        stop=body.stops,
        reasoning_limit=reasoning_limit,
        single_call=body.parallel_tool_calls is False,
        report_tokens=bool(body.return_token_ids),
        grammar=await service.compile_grammar(structure, prompt),
        report_progress=bool(body.return_progress and body.stream),
        **options,
    )
    renderer = ChatBuilder(
        header,
        service.tokenizer,
        logprobs=logprobs is not None,
        usage_chunk=body.wants_usage_chunk,
        prompt_ids=prompt.tokens.tolist() if body.return_token_ids else None,
    )
    return generation, renderer
