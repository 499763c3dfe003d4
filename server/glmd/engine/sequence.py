"""A sequence: one prompt and its growing continuation, as the engine sees it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from glmd.engine.config import MAX_WIDTH
from glmd.engine.structured_output import GrammarState
from glmd.ipc import CacheMatch, EngineRequest, TokenArray, unpack_tokens
from glmd.kv_cache.node import Keys, Lease
from glmd.kv_cache.segment import Segment
from glmd.model.sampler import History, SequenceSampling

NO_SLOT = -1


class Sequence:
    """State of one continuation of one request.

    Positions count from the prompt's first token: `0 … sealed` have KV in the tree (under
    `lease`), `sealed … computed` in the tail, `computed … length` are known tokens without KV.
    Steps that have been launched but not read will add up to `num_inflight_tokens` tokens.

    A sequence that needs one row is decoding; one that needs more is in prefill, be it new or
    preempted: there is no other difference.

    Attributes:
        prompt_length: tokens of the prompt.
        length: tokens known, prompt and output.
        limit: `length` at which the sequence ends.
        constraint: the grammar that its output follows, if there is one.
    """

    def __init__(
        self,
        request: EngineRequest,
        index: int,
        sampling: SequenceSampling,
        limit: int,
        *,
        paired: bool = False,
    ) -> None:
        """
        Args:
            paired: the KV of a token depends on the one that follows it, too.
        """
        prompt = unpack_tokens(request.prompt)
        self.request = request
        self.index = index
        self.sampling = sampling
        self.draft_sampling = sampling.for_drafts()
        self.max_length = limit
        self.prompt_length = len(prompt)
        self.length = len(prompt)
        room = len(prompt) + 256
        self._tokens = np.empty(room, np.int32)
        self._tokens[: len(prompt)] = prompt
        self._pairs = _pairs(prompt, room) if paired else None
        """[room] int64, each token with the one that follows it; None: not `paired`."""

        self.lease: Lease[Segment] | None = None
        self.slot = NO_SLOT
        self.num_cached_tokens = 0
        self.num_computed_tokens = 0
        self.num_inflight_tokens = 0

        self.thinking_left = request.thinking_budget
        """Tokens that reasoning may still take; None: no bound, or closed. Below 0, -i means
        that i tokens of what closes it are out."""
        self.grammar: GrammarState | None = None
        self.history: History | None = None
        self._computed_mask = np.zeros(len(prompt), bool)
        """Prompt tokens that were computed for this sequence."""
        self.admitted = False
        """Whether it has left the queue before, though it may wait again."""
        self.cache_match: CacheMatch | None = None
        """How much of its prompt was stored when it left the queue first."""
        self.reported_usage = False
        self.finished = False
        self.arrival = 0
        """How many sequences had arrived before this one."""
        self.arrival_prefill_clock = 0
        """Prefill tokens that the scheduler had served when this sequence arrived."""

    @property
    def num_uncomputed_tokens(self) -> int:
        """Rows to run before the next token can be sampled."""
        return 1 if self.num_inflight_tokens else self.length - self.num_computed_tokens

    @property
    def at_length_limit(self) -> bool:
        """Whether the tokens in flight may be the last ones allowed."""
        return self.length + self.num_inflight_tokens >= self.max_length

    @property
    def num_generated_tokens(self) -> int:
        """Output tokens known."""
        return self.length - self.prompt_length

    @property
    def can_draft(self) -> bool:
        """Whether its tokens may be drafted: where their exact number matters they may not."""
        return self.num_generated_tokens >= self.request.min_tokens and not self._near_budget

    @property
    def requires_sync(self) -> bool:
        """Whether its last token must be known before the next step is planned."""
        return self._near_budget

    @property
    def forced(self) -> int | None:
        """The token that must come next, whatever the model says."""
        if self.thinking_left is None or self.thinking_left > 0:
            return None
        return self.request.thinking_close[-self.thinking_left]

    @property
    def _near_budget(self) -> bool:
        return self.thinking_left is not None and self.thinking_left <= 2 * MAX_WIDTH

    @property
    def num_prompt_tokens_cached(self) -> int:
        """Prompt tokens whose KV others had computed."""
        return self.prompt_length - int(self._computed_mask.sum())

    @property
    def num_confirmed_tokens(self) -> int:
        """Positions, from the first, whose KV is computed (or being computed) and whose tokens
        are known.

        Any step in flight begins with the last known token; what it computes behind it may be
        a refused draft.
        """
        return (
            self.length if self.num_inflight_tokens else min(self.num_computed_tokens, self.length)
        )

    @property
    def num_cacheable_tokens(self) -> int:
        """Positions, from the first, that can be in the tree: settled, and their keys known."""
        return (
            self.num_confirmed_tokens
            if self._pairs is None
            else min(self.num_confirmed_tokens, self.length - 1)
        )

    @property
    def max_tail_tokens(self) -> int:
        """Tokens that the tail may hold once the steps in flight are done."""
        return (
            self.num_confirmed_tokens
            + max(0, self.num_inflight_tokens - 1)
            - self.num_cached_tokens
        )

    def tokens(self, start: int, stop: int) -> TokenArray:
        """Known tokens at positions `start` to `stop`, a view."""
        assert stop <= self.length
        return self._tokens[start:stop]

    def cache_keys(self, start: int, stop: int) -> Keys:
        """What the tree tells the tokens at positions `start` to `stop` apart by, a view.

        The MTP layer's KV of a token is made of the token that follows it. Were tokens told apart
        by themselves, a prompt that forks off another's would find the KV of the last common one
        made of the other's next. So a token's key is the pair of both there, and the fork comes
        one token earlier.
        """
        if self._pairs is None:
            return self.tokens(start, stop)
        assert stop < self.length
        return self._pairs[start:stop]

    def mark_computed(self, start: int, stop: int) -> int:
        """Note that positions `start` to `stop` are computed for this sequence, perhaps once more
        after preemption; returns how many of them are the prompt's."""
        own = self._computed_mask[start:stop]
        own[:] = True
        return len(own)

    def append(self, token: int) -> None:
        """Add a token that has become known."""
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


def _pairs(tokens: TokenArray, room: int) -> npt.NDArray[np.int64]:
    """Each token with the one that follows it, as one number: [room], known but for the last."""
    pairs = np.empty(room, np.int64)
    pairs[: len(tokens) - 1] = tokens[:-1].astype(np.int64) << 32 | tokens[1:]
    return pairs
