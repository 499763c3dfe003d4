"""Messages between the API process and the engine process.

Each is a msgspec struct, sent as one ZeroMQ message in MessagePack. Only token ids cross the
process boundary: text, templates and JSON stay in the API process, arrays in the engine process.
This module imports neither mlx nor any other part of glmd.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.int32]

LogLevelName = Literal["DEBUG", "INFO", "WARNING", "ERROR"]

FinishReason = Literal["stop", "length", "cancelled", "error"]
ErrorKind = Literal["invalid_request", "overloaded", "internal"]

EXIT_REPORTED = 3
"""Exit code of an engine process that has sent `EngineFailed`."""


EXIT_RANK_LOST = 4
"""Exit code of an engine process that has lost one of its ranks."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters of one request.

    Order of application: penalties and logit_bias, temperature, top_k, top_p, min_p (each
    filter renormalizes), as in transformers and vLLM.
    """

    temperature: float = 1.0
    """0: greedy."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Applied to prompt and output, as in CTRL (https://arxiv.org/abs/1909.05858)."""
    presence_penalty: float = 0.0
    """Applied to the output, as in OpenAI's API."""
    frequency_penalty: float = 0.0
    """Applied to the output, as in OpenAI's API."""
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    """None: drawn by the engine. A token depends on (seed, position) only."""
    logprobs: int | None = None
    """None: no log-probabilities. 0 to 20: those of the sampled token and of this many most likely
    tokens, before penalties, temperature and filters."""


class GrammarSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Grammar that constrains the output, checked by `glmd.structured_output`."""

    grammar: str
    """llguidance grammar with control tokens by id. EOS ids are allowed where it is complete."""
    after: tuple[int, ...] = ()
    """Token ids (`</think>`, `<tool_call>`) of which the first generated one starts the grammar.
    (): the grammar starts with the first token."""
    required: bool = True
    """Forbid EOS and all other control tokens until the grammar starts. False: the sequence may
    end without it."""


class EngineRequest(msgspec.Struct, tag="generate", frozen=True, kw_only=True):
    """Request for `n` continuations of one prompt."""

    id: str
    prompt: bytes
    """Token ids as little-endian int32; see `pack_tokens`."""
    sampling: SamplingParams = SamplingParams()
    n: int = 1
    max_tokens: int | None = None
    """None: up to the context limit. 0: the prompt is computed, and no token is output."""
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a sequence, in addition to the checkpoint's EOS ids. The id is emitted."""
    ignore_eos: bool = False
    thinking_budget: int | None = None
    """Generated tokens after which `thinking_close` is forced, unless its last id was generated
    before. Only for prompts that end inside the reasoning. None: no limit."""
    thinking_close: tuple[int, ...] = ()
    """Token ids that close the reasoning, up to and including `</think>`."""
    grammar: GrammarSpec | None = None
    client: str = ""
    """Opaque client name. Clients share the engine fairly."""
    priority: int = 0
    """Order among the client's waiting requests: larger first. Below 0: behind the requests of
    all clients."""
    cache_salt: str = ""
    """Requests with different salts share no cached prefix."""
    prompt_logprobs: int | None = None
    """None: no log-probabilities of the prompt. 0 to 20: those of each prompt token but the first,
    and of this many most likely tokens at its place. Sequence 0 computes the prompt for it rather
    than read it from the cache."""
    prompt_progress: bool = False
    """Emit an output with `computed_tokens` after each prefill chunk."""

    def __post_init__(self) -> None:
        if len(self.prompt) % 4:
            raise ValueError("prompt: length is not a multiple of 4 bytes (int32).")


class AbortRequest(msgspec.Struct, tag="cancel", frozen=True):
    """Abort request `id`, or only its sequence `index`. Unknown ids are ignored."""

    id: str
    index: int | None = None


class SetLogLevel(msgspec.Struct, tag="log_level", frozen=True):
    """Set the engine process's log level."""

    level: LogLevelName


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """Exit after the current step."""


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """Ask the loop around the engine's steps for a `Pong`."""


ToEngine = EngineRequest | AbortRequest | SetLogLevel | Shutdown | Ping


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of the sampled and the most likely tokens at a position."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of consecutive prompt tokens."""

    start: int
    """Position of the first of them in the prompt."""
    tokens: list[TokenLogprobs]


class CacheMatch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Cached prefix of a prompt at admission, and the reason why it is not longer."""

    tokens: int
    """Cached tokens from the start of the prompt."""
    reason: Literal["whole", "new", "differs", "evicted", "off"]
    """whole: all but the last token, which is always computed. new: no stored sequence continues
    the prefix. differs: stored sequences continue the prefix differently. evicted: the next tokens
    were stored, but evicted. off: the cache is disabled, or not read for the sake of the prompt's
    log-probabilities. All of it with the same cache_salt."""
    diverging_tokens: int = 0
    """differs: tokens of the longest stored continuation."""


class SequenceOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Output of one sequence in one step."""

    id: str
    index: int = 0
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[PromptLogprobs] | None = None
    """In the order of the prompt, before the first token. A preempted sequence begins again."""
    finish_reason: FinishReason | None = None
    """Set on the last output of a sequence. "stop": the last token is an EOS or stop token."""
    error: str | None = None
    """Message for finish reason "error"."""
    error_kind: ErrorKind | None = None
    error_param: str | None = None
    prompt_tokens: int = 0
    """Set on the first output with tokens, as is `cached_tokens`."""
    cached_tokens: int = 0
    """Prompt tokens read from the cache."""
    admitted: bool = False
    """Set on one output, before any with tokens: the sequence left the queue."""
    cache_match: CacheMatch | None = None
    """Set together with `admitted`."""
    computed_tokens: int = 0
    """Prompt tokens in the KV cache so far, cached ones included. Needs `prompt_progress`."""
    drafted: int = 0
    """MTP draft tokens verified for this output."""
    accepted: int = 0
    """Draft tokens accepted."""


class StepOutputs(msgspec.Struct, tag="step", frozen=True):
    """All outputs of one engine step."""

    outputs: list[SequenceOutput]


class LoadProgress(msgspec.Struct, tag="loading", frozen=True):
    """Progress of loading the weights."""

    done_bytes: int
    total_bytes: int


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Properties of the loaded model."""

    path: str
    vocab_size: int
    max_context: int
    """Prompt and output tokens: the smaller of the checkpoint's and the configured limit."""
    eos_token_ids: tuple[int, ...]
    has_mtp: bool
    mtp_left_out: bool = False
    """The checkpoint has an MTP layer that was not loaded, as memory is short."""
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bits: int = 16
    """Bits of a cached value; 16: in the dtype of activations."""
    bits_per_weight: float
    device: str


class EngineReady(msgspec.Struct, tag="ready", frozen=True):
    """The engine accepts requests."""

    model: ModelInfo


class EngineStats(msgspec.Struct, tag="stats", frozen=True, kw_only=True):
    """Counters and gauges of the engine, sent at most once per second."""

    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0
    kv_idle_tokens: int = 0
    """Part of `kv_tokens` held by no request: reusable and evictable."""
    kv_segments: int = 0
    """Segments in the prefix tree."""
    kv_branches: int = 0
    """Leaves of the prefix tree."""
    kv_longest: int = 0
    """Tokens of the longest stored prefix."""
    kv_bytes: int = 0
    kv_budget_bytes: int = 0
    """Limit of `kv_bytes`."""
    memory_budget_bytes: int = 0
    """Limit of weights, KV cache and activations together."""
    weight_bytes: int = 0
    active_bytes: int = 0
    """Live arrays in MLX's allocator."""
    cache_bytes: int = 0
    """Free memory that MLX's allocator keeps for reuse."""
    footprint_bytes: int = 0
    """Memory of the engine process; see `glmd.utils.memory`."""
    out_of_memory: int = 0
    """Steps that failed because the device was out of memory."""
    mla_kernel: int = 0
    """1: decode steps use `glmd.model.mla_kernel`; 0: they do not."""
    experts_kernel: int = 0
    """1: steps of some numbers of rows use `glmd.model.experts_kernel`; 0: none does."""
    steps: int = 0
    rows: int = 0
    """Token rows of all steps: decode, verify and prefill rows."""
    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    tokens_generated: int = 0
    drafted: int = 0
    accepted: int = 0
    verified: int = 0
    """Verified sequences, summed over steps; 1 + accepted / verified is the mean accepted
    length."""
    drafts: int = 0
    """Current number of drafts per sequence and step."""
    acceptance: float = 0.0
    """Moving average of accepted / drafted; 0 without an MTP layer."""
    preemptions: int = 0
    evicted_tokens: int = 0
    disk_bytes: int = 0
    """Bytes of KV in the disk cache."""
    disk_budget_bytes: int = 0
    """Limit of `disk_bytes`; 0: there is no disk cache."""
    disk_segments: int = 0
    disk_hits: int = 0
    """Sequences for which KV was restored from disk."""
    disk_restored_tokens: int = 0
    disk_read_bytes: int = 0
    disk_written_bytes: int = 0
    """Since the folder was created, for the disk's wear."""
    ranks: int = 1
    """Processes among which the model is divided."""
    rank_latency: float = 0.0
    """Seconds of a sum over the ranks of one number, measured at the start."""
    rank_bandwidth: float = 0.0
    """Bytes per second of a sum of many, measured at the start."""
    rank_sums: int = 0
    """Sums over the ranks since the start."""
    rank_sum_bytes: int = 0
    """Bytes that each rank put into them."""
    rank_sum_seconds: float = 0.0
    """Their duration, estimated from latency and bandwidth."""
    step_seconds: float = 0.0
    """Moving average of a step's duration."""
    step_seconds_total: float = 0.0


class EngineFailed(msgspec.Struct, tag="failed", frozen=True):
    """The engine failed for the reason in `message`, and exits with `EXIT_REPORTED`."""

    message: str


class Pong(msgspec.Struct, tag="pong", frozen=True):
    """The answer to `Ping`, between two steps."""


FromEngine = StepOutputs | LoadProgress | EngineReady | EngineStats | EngineFailed | Pong

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def pack_tokens(tokens: npt.ArrayLike) -> bytes:
    """Pack token ids as little-endian int32: microseconds for 100k ids."""
    return np.ascontiguousarray(tokens, dtype="<i4").tobytes()


def unpack_tokens(data: bytes) -> TokenArray:
    """Invert `pack_tokens`; return a read-only view of `data`."""
    return np.frombuffer(data, dtype="<i4")


def count_tokens(data: bytes) -> int:
    """Number of token ids in packed `data`."""
    return len(data) // 4
