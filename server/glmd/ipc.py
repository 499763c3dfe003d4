"""What the API process and the engine process say to each other.

Plain msgspec structs, encoded as MessagePack, one ZeroMQ message each. Only token ids cross
this border: text, templates and JSON stay in the API process, arrays stay in the engine.
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


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token of one sequence is chosen.

    Order of application: penalties and logit_bias, temperature, top_k, top_p, min_p (each
    filter renormalises), as in transformers and vLLM.
    """

    temperature: float = 1.0
    """0 means greedy."""
    top_k: int = 0
    """0 means off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output, CTRL's form (https://arxiv.org/abs/1909.05858)."""
    presence_penalty: float = 0.0
    """Over the output, OpenAI's form."""
    frequency_penalty: float = 0.0
    """Over the output, OpenAI's form."""
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    """None: the engine draws one. A token depends on (seed, position) alone."""
    logprobs: int | None = None
    """None: none. k in 0..20: the chosen token's and the k most likely ones', of the model's
    own distribution (before penalties, temperature and filters)."""


class GrammarSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A grammar that a continuation must follow, checked by `glmd.structured_output`."""

    grammar: str
    """In llguidance's form, control tokens by id. Where it is fulfilled, EOS ids may come."""
    after: tuple[int, ...] = ()
    """It begins behind the first of these ids that is generated (`</think>`, `<tool_call>`);
    (): with the first token."""
    required: bool = True
    """Until it begins, neither EOS nor any other control token may be generated, so that no
    sequence ends without it. Otherwise it may not begin at all."""


class EngineRequest(msgspec.Struct, tag="generate", frozen=True, kw_only=True):
    """Ask for `n` continuations of one prompt."""

    id: str
    prompt: bytes
    """The prompt's token ids, int32 little-endian; see `pack_tokens`."""
    sampling: SamplingParams = SamplingParams()
    n: int = 1
    max_tokens: int | None = None
    """None: up to the context limit."""
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """End the sequence, beside the checkpoint's EOS ids; the id itself is emitted."""
    ignore_eos: bool = False
    thinking_budget: int | None = None
    """Once this many tokens are generated and the last id of `thinking_close` is not among them,
    the next tokens are `thinking_close`, forced; then sampling goes on. Set only for a prompt that
    ends inside the reasoning. None: no bound."""
    thinking_close: tuple[int, ...] = ()
    """What closes the reasoning in-band: `</think>`, perhaps after a few words."""
    grammar: GrammarSpec | None = None
    client: str = ""
    """Whose request it is: an opaque name. Clients take turns under load."""
    priority: int = 0
    """Larger goes first among the client's waiting requests; below 0 lets everyone's go ahead."""
    cache_salt: str = ""
    """Requests with different salts share no cached prefix."""
    prompt_progress: bool = False
    """Emit an Output with `computed_tokens` after each prefill chunk."""

    def __post_init__(self) -> None:
        if len(self.prompt) % 4:
            raise ValueError("the prompt's bytes are no int32")


class AbortRequest(msgspec.Struct, tag="cancel", frozen=True):
    """Free what request `id` holds (or one of its sequences, by index). Unknown ids are ignored."""

    id: str
    index: int | None = None


class SetLogLevel(msgspec.Struct, tag="log_level", frozen=True):
    """Log from this level on, as `logging` names it."""

    level: LogLevelName


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """Leave after the present step."""


ToEngine = EngineRequest | AbortRequest | SetLogLevel | Shutdown


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: of the chosen token, and of the most likely ones."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class CacheMatch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How much of a prompt was stored when its turn came, and why not more."""

    tokens: int
    """From the first on."""
    reason: Literal["whole", "new", "differs", "evicted", "salt", "off"]
    """whole: all but the last token, which is always computed; new: nothing is stored behind them;
    differs: what is stored behind them goes on differently; evicted: it went on the same way, but
    was evicted; salt: more is stored, with another cache_salt; off: nothing is ever stored."""
    diverging_tokens: int = 0
    """differs: tokens that are stored there, in the longest run."""


class SequenceOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one step gave one sequence."""

    id: str
    index: int = 0
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    """Set once, on the sequence's last Output. "stop": `tokens` ends with the EOS or stop token."""
    error: str | None = None
    """A sentence, with finish "error"."""
    error_kind: Literal["invalid_request", "overloaded", "internal"] | None = None
    error_param: str | None = None
    prompt_tokens: int = 0
    """Set on the first Output of a sequence that has tokens, like the next one."""
    cached_tokens: int = 0
    """Prompt tokens whose KV was not computed for this request."""
    admitted: bool = False
    """Set once, when the sequence leaves the queue, on an Output before any with tokens."""
    cache_match: CacheMatch | None = None
    """Comes with `admitted`."""
    computed_tokens: int = 0
    """With prompt_progress: prompt tokens ready so far, cached ones included."""
    drafted: int = 0
    """MTP draft tokens verified for this Output, and how many of them were accepted."""
    accepted: int = 0


class StepOutputs(msgspec.Struct, tag="step", frozen=True):
    """All Outputs of one engine step, in one message."""

    outputs: list[SequenceOutput]


class LoadProgress(msgspec.Struct, tag="loading", frozen=True):
    """Weights are on their way."""

    done_bytes: int
    total_bytes: int


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine serves, said once when it is ready."""

    path: str
    vocab_size: int
    max_context: int
    """Tokens, prompt and output together: the checkpoint's limit or the configured one."""
    eos_token_ids: tuple[int, ...]
    has_mtp: bool
    weight_bytes: int
    kv_bytes_per_token: int
    bits_per_weight: float
    device: str


class EngineReady(msgspec.Struct, tag="ready", frozen=True):
    """The engine takes requests from now on."""

    model: ModelInfo


class EngineStats(msgspec.Struct, tag="stats", frozen=True, kw_only=True):
    """A snapshot of the engine's counters and gauges, sent at most once per second."""

    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0
    kv_idle_tokens: int = 0
    """Of `kv_tokens`, those that no request holds: kept for the next one, evicted for room."""
    kv_segments: int = 0
    """Sealed runs of tokens that the prefix tree consists of."""
    kv_branches: int = 0
    """Stored prefixes that no other continues."""
    kv_longest: int = 0
    """Tokens of the longest stored prefix."""
    kv_bytes: int = 0
    kv_budget_bytes: int = 0
    """What `kv_bytes` may grow to, and what weights, KV and working memory may together."""
    memory_budget_bytes: int = 0
    weight_bytes: int = 0
    active_bytes: int = 0
    """MLX's allocator: arrays alive."""
    cache_bytes: int = 0
    """MLX's allocator: kept for reuse."""
    footprint_bytes: int = 0
    """What the engine process occupies, as the system counts it; see `glmd.utils.memory`."""
    out_of_memory: int = 0
    """Steps for which the device refused memory."""
    steps: int = 0
    rows: int = 0
    """Token rows of all steps: decode, verify and prefill rows."""
    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    tokens_generated: int = 0
    drafted: int = 0
    accepted: int = 0
    verified: int = 0
    """Times that a sequence had drafts verified in a step; 1 + accepted / verified is the mean
    accepted length."""
    drafts: int = 0
    """What the gate has chosen lately: drafts per sequence and step."""
    acceptance: float = 0.0
    """Moving average of the share of drafts that were accepted; 0 without an MTP layer."""
    preemptions: int = 0
    evicted_tokens: int = 0
    step_seconds: float = 0.0
    """Moving average of the time of one step."""
    step_seconds_total: float = 0.0


class EngineFailed(msgspec.Struct, tag="failed", frozen=True):
    """The engine cannot start (bad checkpoint, no memory) and is about to exit."""

    message: str


FromEngine = StepOutputs | LoadProgress | EngineReady | EngineStats | EngineFailed

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def pack_tokens(tokens: npt.ArrayLike) -> bytes:
    """Token ids as int32 little-endian bytes: 100k ids cross in microseconds, not milliseconds."""
    return np.ascontiguousarray(tokens, dtype="<i4").tobytes()


def unpack_tokens(data: bytes) -> TokenArray:
    """The inverse of `pack_tokens`; the array is a read-only view of `data`."""
    return np.frombuffer(data, dtype="<i4")


def count_tokens(data: bytes) -> int:
    """How many ids `pack_tokens` has packed."""
    return len(data) // 4
