"""A conversation's next turn, on its way: what every chat API has in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glmd.api.context import RequestContext
from glmd.api.generation import Generation
from glmd.api.state import AppState
from glmd.chat.output_processor import ChatOutputProcessor
from glmd.chat.types import Prompt, Tool
from glmd.ipc import EngineRequest, SamplingParams, pack_tokens


def start_generation(
    service: AppState,
    prompt: Prompt,
    terms: RequestContext,
    *,
    id: str,
    sampling: SamplingParams,
    param: str,
    tools: Sequence[Tool] = (),
    stop: Sequence[str] = (),
    reasoning_limit: int | None = None,
    single_call: bool = False,
    report_tokens: bool = False,
    report_progress: bool = False,
    **options: Any,
) -> Generation:
    """The request to the engine, which begins when its events are read.

    Args:
        id: of the request.
        param: what holds the messages, in the client's spelling.
        tools: what the answer may call.
        stop: strings that end the answer.
        reasoning_limit: tokens after which the reasoning is closed, if the prompt opens one.
        single_call: end the answer after its first tool call.
        report_tokens, report_progress: as of `Generation`.
        options: further fields of `EngineRequest`.

    Raises:
        InvalidRequest: the prompt is too long.
    """
    service.check_length(len(prompt.tokens), param=param)
    answers = [
        ChatOutputProcessor(
            service.tokenizer, prompt, tools=tools, stop=stop, single_call=single_call
        )
        for _ in range(options.get("n", 1))
    ]
    request = EngineRequest(
        id=id,
        prompt=pack_tokens(prompt.tokens),
        sampling=sampling,
        client=terms.client,
        thinking_budget=reasoning_limit if prompt.in_reasoning else None,
        thinking_close=(service.tokenizer.special_tokens.end_think,),
        prompt_progress=True,
        **options,
    )
    return Generation(
        service.engine,
        request,
        answers,
        deadlines=terms.timeouts,
        requests=service.registry,
        record=service.registry.record(terms.exchange, request),
        report_progress=report_progress,
        report_tokens=report_tokens,
        on_finished=lambda index: service.cache_turn(prompt, answers[index]),
    )
