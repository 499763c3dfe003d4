"""A sequence: one continuation of a request's prompt, and its state in the engine."""

from __future__ import annotations

import secrets
from enum import Enum, auto
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from glmd.engine.config import MAX_WIDTH
from glmd.engine.structured_output import GrammarState
from glmd.ipc import (
    CacheMatch,
    EngineRequest,
    FinishReason,
    ModelInfo,
    SequenceOutput,
    TokenArray,
    TokenLogprobs,
)
from glmd.kv_cache.node import Keys, Lease
from glmd.kv_cache.segment import Segment
from glmd.model.sampler import History, SequenceSampling, noise_key

NO_SLOT = -1


class SequenceStatus(Enum):
    """State of a sequence. Only running ones hold KV."""

    COMPILING = auto()  # waits for its grammar, not in the scheduler yet
    WAITING = auto()  # in the queue, has never run
    RUNNING = auto()
    PREEMPTED = auto()  # in the queue again
    FINISHED = auto()  # ended, cancelled or failed; steps in flight may have its rows


class Sequence:
    """One continuation of a request.

    Tokens up to `num_cached_tokens` have KV in the tree, those up to `num_computed_tokens` in the
    tail, those up to `length` are known and have none. Launched steps that have not been read will
    add up to `num_inflight_tokens` tokens. A sequence that needs one row is decoding; one that
    needs more is in prefill, whether it is new or was preempted.

    Attributes:
        length: known tokens, prompt and output.
        max_length: `length` at which the sequence ends.
        lease: on the cached prefix; None unless running.
        slot: of the tail pool; `NO_SLOT`: no tail.
        grammar: state of the grammar that the output follows; None: no grammar.
        history: tokens seen, on the device; None until penalties need it.
        cache_match: cached part of the prompt at the first admission; None before.
        thinking_left: tokens that reasoning may still take; None: unbounded, or closed. Below 0,
            -i: i tokens of `thinking_close` have been generated.
        arrival: number of sequences that arrived earlier.
        arrival_prefill_clock: prefill tokens that the scheduler had served at the arrival.
    """

    def __init__(
        self,
        request: EngineRequest,
        index: int,
        prompt: TokenArray,
        sampling: SequenceSampling,
        max_length: int,
        *,
        paired_keys: bool,
    ) -> None:
        """
        Args:
            index: of the continuation within the request.
            prompt: the request's, unpacked.
            paired_keys: the KV of a token depends on the next token, too, as the MTP layer's does.
        """
        self.request = request
        self.index = index
        self.sampling = sampling
        self.draft_sampling = sampling.for_drafts()
        self.max_length = max_length
        self.prompt_length = self.length = len(prompt)
        capacity = len(prompt) + 256
        self._tokens = np.empty(capacity, np.int32)
        self._tokens[: len(prompt)] = prompt
        self._pairs: npt.NDArray[np.int64] | None = None
        """[capacity] int64: each token and the next one; None without `paired_keys`."""
        if paired_keys:
            self._pairs = np.empty(capacity, np.int64)
            self._pairs[: len(prompt) - 1] = prompt[:-1].astype(np.int64) << 32 | prompt[1:]

        self.status = SequenceStatus.WAITING
        if request.grammar is not None:
            self.status = SequenceStatus.COMPILING
        self.lease: Lease[Segment] | None = None
        self.slot = NO_SLOT
        self.num_cached_tokens = 0
        self.num_computed_tokens = 0
        self.num_inflight_tokens = 0
        self.thinking_left = request.thinking_budget
        self.grammar: GrammarState | None = None
        self.history: History | None = None
        self.cache_match: CacheMatch | None = None
        self.arrival = 0
        self.arrival_prefill_clock = 0
        self._computed_mask = np.zeros(len(prompt), bool)
        """Prompt tokens that were computed for this sequence rather than found in the tree."""

    # -- derived state ------------------------------------------------------------------------

    @property
    def num_uncomputed_tokens(self) -> int:
        """Rows to run before the next token can be sampled."""
        return 1 if self.num_inflight_tokens else self.length - self.num_computed_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether it reports log-probabilities of the prompt, and so computes all of it."""
        return self.request.prompt_logprobs is not None and not self.index

    @property
    def at_length_limit(self) -> bool:
        """Whether the tokens in flight may be the last ones allowed."""
        return self.length + self.num_inflight_tokens >= self.max_length

    @property
    def num_generated_tokens(self) -> int:
        """Output tokens known."""
        return self.length - self.prompt_length

    @property
    def requires_sync(self) -> bool:
        """Whether the last token must be known before the next step is scheduled.

        So it is near the end of the thinking budget, where tokens are forced.
        """
        return self.thinking_left is not None and self.thinking_left <= 2 * MAX_WIDTH

    @property
    def can_draft(self) -> bool:
        """Whether drafts are allowed.

        They are not where the exact number of tokens matters.
        """
        return self.num_generated_tokens >= self.request.min_tokens and not self.requires_sync

    @property
    def forced_token(self) -> int | None:
        """Next token of `thinking_close` once the thinking budget is used up."""
        if self.thinking_left is None or self.thinking_left > 0:
            return None
        return self.request.thinking_close[-self.thinking_left]

    @property
    def num_prompt_tokens_cached(self) -> int:
        """Prompt tokens whose KV was found in the tree."""
        return self.prompt_length - int(self._computed_mask.sum())

    @property
    def num_confirmed_tokens(self) -> int:
        """Leading tokens that are known and have KV, steps in flight included.

        A step in flight begins with the last known token. Its KV behind that token may belong to a
        refused draft.
        """
        if self.num_inflight_tokens:
            return self.length
        return min(self.num_computed_tokens, self.length)

    @property
    def num_cacheable_tokens(self) -> int:
        """Leading tokens that may be in the tree: confirmed, with their keys known."""
        if self._pairs is None:
            return self.num_confirmed_tokens
        return min(self.num_confirmed_tokens, self.length - 1)

    @property
    def max_tail_tokens(self) -> int:
        """Tokens that the tail may hold once the steps in flight are done."""
        unconfirmed = max(0, self.num_inflight_tokens - 1)
        return self.num_confirmed_tokens + unconfirmed - self.num_cached_tokens

    # -- tokens -------------------------------------------------------------------------------

    def tokens(self, start: int, end: int) -> TokenArray:
        """View of the known tokens at positions `start` to `end`."""
        assert end <= self.length
        return self._tokens[start:end]

    def cache_keys(self, start: int, end: int) -> Keys:
        """View of the tree's keys for the tokens at positions `start` to `end`.

        The MTP layer computes a token's KV from the token and the next one, so with such a layer
        the pair of both is the key. Otherwise a prompt that forks off another would reuse KV of the
        last common token that was computed from the other prompt's next token.
        """
        if self._pairs is None:
            return self.tokens(start, end)
        assert end < self.length
        return self._pairs[start:end]

    def mark_computed(self, start: int, end: int) -> int:
        """Note that positions `start` to `end` are computed for this sequence.

        Returns:
            number of prompt tokens among them.
        """
        computed = self._computed_mask[start:end]
        computed[:] = True
        return len(computed)

    def append(self, token: int) -> None:
        """Add a confirmed token."""
        if self.length == len(self._tokens):
            self._tokens = np.resize(self._tokens, 2 * self.length)
            if self._pairs is not None:
                self._pairs = np.resize(self._pairs, 2 * self.length)
        self._tokens[self.length] = token
        if self._pairs is not None:
            self._pairs[self.length - 1] = int(self._tokens[self.length - 1]) << 32 | token
        self.length += 1
        if self.thinking_left is not None:
            closed = token == self.request.thinking_close[-1]
            self.thinking_left = None if closed else self.thinking_left - 1

    def output(self, **fields: Any) -> SequenceOutput:
        """An output of this sequence, with fields of `SequenceOutput`."""
        return SequenceOutput(id=self.request.id, index=self.index, **fields)

    def advance(
        self,
        tokens: list[int],
        logprobs: list[tuple[mx.array, mx.array, mx.array] | None],
        eos_token_ids: tuple[int, ...],
    ) -> SequenceOutput:
        """Add a step's confirmed tokens, up to the sequence's end, and report them.

        Args:
            logprobs: of each token; see `SamplerOutput`.
        """
        output = self.output()
        if not self.num_generated_tokens:
            output.prompt_tokens = self.prompt_length
            output.cached_tokens = self.num_prompt_tokens_cached
        if self.request.max_tokens == 0:
            output.finish_reason = "length"
            return output
        for token, entry in zip(tokens, logprobs, strict=True):
            self.append(token)
            output.tokens.append(token)
            if entry is not None:
                chosen, ids, values = (np.array(part) for part in entry)
                found = TokenLogprobs(float(chosen), ids.tolist(), values.tolist())
                output.logprobs = [*(output.logprobs or []), found]
            output.finish_reason = self._finish_reason(token, eos_token_ids)
            if output.finish_reason is not None:
                return output
        if self.grammar is not None and self.grammar.error:
            # A grammar that needs more than `structured_output.backend.LIMITS`, at this text.
            output.finish_reason, output.error_kind = "error", "invalid_request"
            output.error = (
                "The grammar or schema cannot be followed further: "
                f"{self.grammar.error}. Simplify it."
            )
        return output

    def _finish_reason(self, token: int, eos_token_ids: tuple[int, ...]) -> FinishReason | None:
        """Reason for which the sequence ends with its last token; None: it goes on."""
        request = self.request
        # EOS is the only token that may follow the end of a grammar.
        ignore_eos = request.ignore_eos and (self.grammar is None or not self.grammar.active)
        if token in request.stop_token_ids or (token in eos_token_ids and not ignore_eos):
            return "stop"
        return "length" if self.length >= self.max_length else None


def make_sequences(request: EngineRequest, prompt: TokenArray, info: ModelInfo) -> list[Sequence]:
    """The sequences of a valid request.

    Args:
        prompt: the request's, unpacked.
    """
    max_length = info.max_context
    if request.max_tokens is not None:
        # A last prompt token is only computed where a token may follow.
        max_length = min(max_length, len(prompt) + max(1, request.max_tokens))
    params = request.sampling
    seed = secrets.randbits(63) if params.seed is None else params.seed
    bias = None
    if params.logit_bias:
        dense = np.zeros(info.vocab_size, np.float32)
        dense[list(params.logit_bias)] = list(params.logit_bias.values())
        bias = mx.array(dense)
    return [
        Sequence(
            request,
            index,
            prompt,
            SequenceSampling(
                params=params,
                key=noise_key(seed, index),
                min_tokens=request.min_tokens,
                banned_at_first=(*info.eos_token_ids, *request.stop_token_ids),
                bias=bias,
            ),
            max_length,
            paired_keys=info.has_mtp,
        )
        for index in range(request.n)
    ]
