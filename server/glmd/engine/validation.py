"""What can be wrong with a request, said in one sentence that names the field."""

from __future__ import annotations

from math import inf, isfinite

from glmd.errors import InvalidRequest
from glmd.ipc import EngineRequest, ModelInfo, SamplingParams, TokenArray

MAX_LOGPROBS = 20

MAX_CONTINUATIONS = 1024
"""Of one prompt: each is a sequence, and has a place in the queue."""


def validate_request(request: EngineRequest, prompt: TokenArray, info: ModelInfo) -> None:
    """Refuse what the engine cannot serve.

    Args:
        prompt: the request's token ids, unpacked.

    Raises:
        InvalidRequest: with the offending field as `param`.
    """
    _check_prompt(prompt, info)
    _check_range("n", request.n, 1, MAX_CONTINUATIONS)
    if request.max_tokens is not None:
        _check_range("max_tokens", request.max_tokens, 1)
    _check_range("min_tokens", request.min_tokens, 0)
    _check_sampling(request.sampling)
    _check_ids("logit_bias", request.sampling.logit_bias, info)
    _check_ids("stop_token_ids", request.stop_token_ids, info)
    _check_ids("thinking_close", request.thinking_close, info)
    if request.thinking_budget is not None:
        _check_range("thinking_budget", request.thinking_budget, 0)
        if not request.thinking_close:
            raise InvalidRequest(
                "thinking_budget needs the tokens that close the reasoning.",
                param="thinking_budget",
            )


def _check_prompt(prompt: TokenArray, info: ModelInfo) -> None:
    if not len(prompt):
        raise InvalidRequest("The prompt has no tokens.", param="prompt")
    if int(prompt.min()) < 0 or int(prompt.max()) >= info.vocab_size:
        raise InvalidRequest(
            f"The prompt holds a token id outside 0 to {info.vocab_size - 1}.", param="prompt"
        )
    if len(prompt) >= info.max_context:
        raise InvalidRequest(
            f"The prompt has {len(prompt)} tokens, but the context is limited to "
            f"{info.max_context} tokens, prompt and output together.",
            param="prompt",
            code="context_length_exceeded",
        )


def _check_sampling(params: SamplingParams) -> None:
    _check_range("temperature", params.temperature, 0)
    _check_range("top_k", params.top_k, 0)
    _check_range("top_p", params.top_p, 0, 1)
    _check_range("min_p", params.min_p, 0, 1)
    if not (params.repetition_penalty > 0 and isfinite(params.repetition_penalty)):
        raise InvalidRequest(
            f"repetition_penalty must be above 0, not {params.repetition_penalty}.",
            param="repetition_penalty",
        )
    _check_range("presence_penalty", params.presence_penalty, -inf)
    _check_range("frequency_penalty", params.frequency_penalty, -inf)
    for value in params.logit_bias.values():
        _check_range("logit_bias", value, -inf)
    if params.logprobs is not None:
        _check_range("logprobs", params.logprobs, 0, MAX_LOGPROBS)


def _check_range(param: str, value: float, low: float, high: float = inf) -> None:
    """Refuse what is no finite number from `low` to `high`."""
    if isfinite(value) and low <= value <= high:
        return
    if high < inf:
        wanted = f"from {low} to {high}"
    elif low > -inf:
        wanted = f"{low} or more"
    else:
        wanted = "a finite number"
    raise InvalidRequest(f"{param} must be {wanted}, not {value}.", param=param)


def _check_ids(param: str, ids: dict[int, float] | tuple[int, ...], info: ModelInfo) -> None:
    for token in ids:
        if not 0 <= token < info.vocab_size:
            raise InvalidRequest(
                f"{param} names the token id {token}, outside 0 to {info.vocab_size - 1}.",
                param=param,
            )
