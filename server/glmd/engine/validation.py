"""Validation of requests. Error messages name the field."""

from __future__ import annotations

from math import inf, isfinite

from glmd.errors import InvalidRequest
from glmd.ipc import EngineRequest, ModelInfo, SamplingParams, TokenArray

MAX_CONTINUATIONS = 1024
"""Sequences of one request. Each takes a place in the queue."""

SAMPLING_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, inf),
    "top_k": (0, inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-inf, inf),
    "frequency_penalty": (-inf, inf),
    "logprobs": (0, 20),  # the limit of OpenAI's API
}


def validate_request(request: EngineRequest, prompt: TokenArray, info: ModelInfo) -> None:
    """Refuse a request that the engine cannot serve.

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
                "thinking_budget requires thinking_close, the tokens that close the reasoning.",
                param="thinking_budget",
            )


def _check_prompt(prompt: TokenArray, info: ModelInfo) -> None:
    if not len(prompt):
        raise InvalidRequest("The prompt is empty.", param="prompt")
    if int(prompt.min()) < 0 or int(prompt.max()) >= info.vocab_size:
        raise InvalidRequest(
            f"The prompt contains a token id outside 0 to {info.vocab_size - 1}.", param="prompt"
        )
    if len(prompt) >= info.max_context:
        raise InvalidRequest(
            f"The prompt has {len(prompt)} tokens, but the context is limited to "
            f"{info.max_context} tokens, prompt and output together.",
            param="prompt",
            code="context_length_exceeded",
        )


def _check_sampling(params: SamplingParams) -> None:
    for name, (low, high) in SAMPLING_RANGES.items():
        value = getattr(params, name)
        if value is not None:
            _check_range(name, value, low, high)
    if not (params.repetition_penalty > 0 and isfinite(params.repetition_penalty)):
        raise InvalidRequest(
            f"repetition_penalty must be greater than 0, not {params.repetition_penalty}.",
            param="repetition_penalty",
        )
    for bias in params.logit_bias.values():
        _check_range("logit_bias", bias, -inf)


def _check_range(param: str, value: float, low: float, high: float = inf) -> None:
    if isfinite(value) and low <= value <= high:
        return
    if high < inf:
        expected = f"between {low} and {high}"
    elif low > -inf:
        expected = f"at least {low}"
    else:
        expected = "a finite number"
    raise InvalidRequest(f"{param} must be {expected}, not {value}.", param=param)


def _check_ids(param: str, ids: dict[int, float] | tuple[int, ...], info: ModelInfo) -> None:
    for token in ids:
        if not 0 <= token < info.vocab_size:
            raise InvalidRequest(
                f"{param} contains the token id {token}, outside 0 to {info.vocab_size - 1}.",
                param=param,
            )
