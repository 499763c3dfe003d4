"""Configuration of the engine, and validation of requests against it.

Error messages name the field.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal

from glmd.errors import InvalidRequest, SettingsError
from glmd.ipc import EngineRequest, ModelInfo, SamplingParams, TokenArray

MAX_DRAFTS = 3
"""Most MTP draft tokens per sequence and step."""

MAX_WIDTH = 1 + MAX_DRAFTS
"""Most rows that a decoding sequence may have in a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of the engine.

    Attributes:
        max_running: sequences that run at once. Others wait.
        max_step_tokens: rows of a step. Decoding sequences that fill it leave room for a few more,
            so that prompts progress.
        max_context: tokens of a sequence; None: the checkpoint's limit.
        memory_budget: bytes for weights, KV and working memory; None: from the device.
        min_stream_rate: tokens per second that each decoding sequence keeps on average while
            prompts are computed. Several short prompts may lower it
            (`scheduler.prefill_budget.FIRST_TOKEN_WEIGHT`), and so does a slow device.
        max_gap: longest time between two tokens of a sequence while prompts are computed, in
            seconds; at least two steps without prefill.
        max_slowdown: deprecated, use `max_gap`. Duration of a step with prefill, as a multiple of
            a step without, in addition to `max_gap`; None: no such limit.
        dtype: of activations and KV. "auto": bfloat16 on a GPU; float32 on a CPU, where quantised
            products in bfloat16 take eight times as long.
        mtp: draft tokens per sequence and step. "auto": none or one, by measurement, and no MTP
            layer where memory is short. 0: the MTP layer is not loaded.
        kv_bits: bits of a cached value; 16: in `dtype`. "auto": 16 if 65,536 tokens fit, else 8.
        mla_kernel: "auto": decode with `glmd.model.mla_kernel` where a trial at load finds it right
            and not slower. "on": without comparing times; it must run. "off": never.
        experts_kernel: the same for `glmd.model.experts_kernel`, decided by itself for several
            bands of numbers of rows.
        prefix_cache: share KV between requests and keep it after they end.
        disk_cache: most bytes of KV in files, from which prefixes are restored; 0: none.
        disk_cache_folder: of these files, one engine at a time; required with `disk_cache`.
        kv_events: ZeroMQ endpoint at which cached blocks are published; None: nowhere.
        kv_events_replay: endpoint that sends missed events again; None: none does.
        ranks: processes among which the model is divided: their number, all on this machine, or a
            file of hosts; see `glmd.engine.ranks.hosts`.
        rank_port: at which rank 0 waits for those of other hosts.
        rank_timeout: seconds without a sign of a rank after which it counts as lost.
    """

    max_running: int = 32
    max_step_tokens: int = 2048
    max_context: int | None = None
    memory_budget: int | None = None
    min_stream_rate: float = 10.0
    max_gap: float = 0.25
    max_slowdown: float | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    mtp: Literal["auto", 0, 1, 2, 3] = "auto"
    kv_bits: Literal["auto", 16, 8, 4] = "auto"
    mla_kernel: Literal["auto", "on", "off"] = "auto"
    experts_kernel: Literal["auto", "on", "off"] = "auto"
    prefix_cache: bool = True
    disk_cache: int = 0
    disk_cache_folder: str | None = None
    kv_events: str | None = None
    kv_events_replay: str | None = None
    ranks: int | str = 1
    rank_port: int = 32322
    rank_timeout: float = 10.0

    @property
    def width(self) -> int:
        """Most rows that a decoding sequence has in a step."""
        return 2 if self.mtp == "auto" else 1 + self.mtp

    def __post_init__(self) -> None:
        for name in ("max_running", "max_step_tokens", "max_slowdown", "ranks"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str) and not value >= 1:
                raise SettingsError(f"{name} must be at least 1, not {value}.")
        for name in ("min_stream_rate", "max_gap"):
            value = getattr(self, name)
            if not value > 0:
                raise SettingsError(f"{name} must be greater than 0, not {value}.")
        if self.disk_cache < 0:
            raise SettingsError(f"disk_cache must be at least 0, not {self.disk_cache}.")
        if self.ranks != 1 and self.disk_cache:
            raise SettingsError("disk_cache: not with ranks, whose KV is not saved. Set it to 0.")
        for name in ("mla_kernel", "experts_kernel"):
            if self.ranks != 1 and getattr(self, name) == "on":
                raise SettingsError(f"{name}: not with ranks. Set it to auto or off.")
        if self.disk_cache and self.disk_cache_folder is None:
            raise SettingsError("disk_cache needs disk_cache_folder. Name a folder for its files.")
        if self.kv_events is not None and not self.prefix_cache:
            raise SettingsError("kv_events needs prefix_cache: otherwise nothing stays cached.")
        if self.kv_events_replay is not None and self.kv_events is None:
            raise SettingsError("kv_events_replay needs kv_events, the endpoint of the events.")


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
        _check_range("max_tokens", request.max_tokens, 0)
    if request.prompt_logprobs is not None:
        _check_range("prompt_logprobs", request.prompt_logprobs, *SAMPLING_RANGES["logprobs"])
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
