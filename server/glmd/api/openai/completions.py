"""`POST /v1/completions`: raw text, continued without a chat template."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends, Request, Response

from glmd.api.context import ContextDep, RequestContext, prepare_slot
from glmd.api.generation import Generation
from glmd.api.openai.completion_request import DEFAULT_MAX_TOKENS, CompletionRequest
from glmd.api.openai.completion_stream import CompletionBuilder
from glmd.api.openai.protocol import Completion, Header
from glmd.api.request_body import JsonRoute
from glmd.api.sse import EventStream, cancel_on_disconnect, prime
from glmd.api.state import AppState, get_state
from glmd.chat.output_processor import CompletionOutputProcessor
from glmd.chat.tokenizer import Tokenizer
from glmd.errors import InvalidRequest
from glmd.ipc import EngineRequest, TokenArray, pack_tokens
from glmd.structured_output import OutputSpec

router = APIRouter(tags=["OpenAI"], route_class=JsonRoute)


@router.post("/api/v0/completions", include_in_schema=False)  # as LM Studio has it
@router.post("/v1/completions", response_model=Completion)
async def create_completion(
    body: CompletionRequest,
    request: Request,
    service: Annotated[AppState, Depends(get_state)],
    terms: ContextDep,
) -> Response:
    """Continue one or several texts, streamed or whole."""
    headers = body.ignored_header()
    async with prepare_slot(request, service, terms):
        generations, renderer = await prepare(body, service, terms)
    if body.stream:
        frames = await prime(renderer.stream(generations))
        return EventStream(frames, keep_alive=service.settings.keep_alive, headers=headers)
    completion = await cancel_on_disconnect(request, renderer.fold(generations))
    return Response(
        completion.model_dump_json(exclude_unset=True),
        media_type="application/json",
        headers=headers,
    )


async def prepare(
    body: CompletionRequest, service: AppState, terms: RequestContext
) -> tuple[list[Generation], CompletionBuilder]:
    """Everything up to the engine: checks, tokens, requests.

    Raises:
        ModelNotFound, InvalidRequest: the request cannot be served.
    """
    terms.exchange.set_request("completions", body.model, stream=body.stream)
    defaults = service.defaults(body.model, body.profile)
    body.refuse_unsupported()
    limit = body.max_tokens or defaults.max_tokens or DEFAULT_MAX_TOKENS
    options = body.engine_options(limit)
    sampling = body.sampling(defaults.sampling, body.logprobs)
    prompts = await service.run_in_worker(partial(encode, body.prompts(), service.tokenizer))
    for tokens in prompts:
        service.check_length(len(tokens), param="prompt")

    guidance = await service.compile_grammar(OutputSpec(body.guided_format))
    header = Header.new("cmpl", service.model.id, service.fingerprint)
    requests = [
        EngineRequest(
            id=f"{header.id}-{number}",
            prompt=pack_tokens(tokens),
            sampling=sampling,
            client=terms.client,
            grammar=guidance,
            prompt_progress=True,
            **options,
        )
        for number, tokens in enumerate(prompts)
    ]
    generations = [
        Generation(
            service.engine,
            request,
            [
                CompletionOutputProcessor(service.tokenizer, stop=body.stops)
                for _ in range(request.n)
            ],
            requests=service.registry,
            record=service.registry.record(terms.exchange, request),
            deadlines=terms.timeouts,
            report_tokens=bool(body.return_token_ids),
        )
        for request in requests
    ]
    renderer = CompletionBuilder(
        header,
        service.tokenizer,
        n=options["n"],
        echoes=[
            service.tokenizer.decode(tokens.tolist()) if body.echo else "" for tokens in prompts
        ],
        logprobs=body.logprobs is not None,
        usage_chunk=body.wants_usage_chunk,
        prompt_ids=[ids.tolist() for ids in prompts] if body.return_token_ids else None,
    )
    return generations, renderer


def encode(prompts: list[str | list[int]], tokenizer: Tokenizer) -> list[TokenArray]:
    """Each prompt as token ids.

    Raises:
        InvalidRequest: a prompt is empty.
    """
    encoded = [
        tokenizer.encode_markup(prompt) if isinstance(prompt, str) else np.array(prompt, np.int32)
        for prompt in prompts
    ]
    if not all(map(len, encoded)):
        raise InvalidRequest("prompt: there is no token to continue from.", param="prompt")
    return encoded
