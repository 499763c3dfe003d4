"""Batched sampling with per-row parameters.

A row's noise is a hash of (seed, position, token id), not a stream. So a request's tokens do not
depend on the other rows of a step or on drafting, and continue unchanged after preemption. Adding
Gumbel noise to log-probabilities and taking the maximum samples from the distribution
(https://arxiv.org/abs/1611.01144, eq. 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import mlx.core as mx
import msgspec
import numpy as np

from glmd.ipc import SamplingParams, TokenArray

_MAX_CANDIDATES = 256
"""top_k up to which candidates are selected instead of sorting the whole vocabulary."""

GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy: logits divided by them would leave the range of float32."""

_BLOCK = 128
"""Tokens per block in `top_candidates`."""

_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SequenceSampling:
    """Sampling parameters of one sequence, prepared for use at every step.

    Attributes:
        key: two 32-bit words, the key of the sequence's noise; see `noise_key`.
        banned_at_first: ids that are not allowed in the first `min_tokens` tokens.
        bias: [vocabulary] float32; None: no bias.
    """

    params: SamplingParams
    key: tuple[int, int]
    min_tokens: int = 0
    banned_at_first: tuple[int, ...] = ()
    bias: mx.array | None = None

    @property
    def penalised(self) -> bool:
        p = self.params
        return (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1.0, 0.0, 0.0)

    def for_drafts(self) -> SequenceSampling:
        """Copy without penalties and logprobs, which drafts do not need."""
        params = msgspec.structs.replace(
            self.params,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            logprobs=None,
        )
        return replace(self, params=params)


class History:
    """Token counts of a sequence on the device, for penalties.

    Attributes:
        seen: [vocabulary] bool: the token occurs in prompt or output.
        counts: [vocabulary] float32: occurrences in the output.
    """

    def __init__(self, vocabulary: int, prompt: TokenArray, output: TokenArray) -> None:
        seen = np.zeros(vocabulary, bool)
        seen[prompt] = True
        seen[output] = True
        self.seen = mx.array(seen)
        self.counts = mx.array(np.bincount(output, minlength=vocabulary).astype(np.float32))

    def with_token(self, token: mx.array, weight: mx.array | float = 1.0) -> History:
        """Return a history with one more output token.

        Args:
            token: scalar, possibly not evaluated.
            weight: 1, or 0 for a token that does not count.
        """
        after = copy(self)
        after.counts = self.counts.at[token].add(weight)
        after.seen = self.seen | (after.counts > 0)
        return after

    def arrays(self) -> list[mx.array]:
        return [self.seen, self.counts]


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row to sample."""

    sampling: SequenceSampling
    generated: int
    """Number of known output tokens before this one."""
    history: History | None
    """None: no penalties."""
    forced: int | None = None
    """The token to choose, regardless of logits and parameters."""

    @property
    def banned(self) -> tuple[int, ...]:
        """Ids that are not allowed in this row."""
        early = self.generated < self.sampling.min_tokens
        return self.sampling.banned_at_first if early else ()


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Allowed tokens of some rows.

    Attributes:
        rows: indices of the rows, ascending.
        words: [len(rows), ceil(vocabulary / 32)] uint32, one bit per token, lowest first.
    """

    rows: list[int]
    words: mx.array


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """Sampled tokens of a step, possibly not evaluated.

    Attributes:
        tokens: [rows] int32.
        logprobs: by row index, for rows with `logprobs`: the token's log-probability (scalar),
            the most likely ids [k] and their log-probabilities [k].
    """

    tokens: mx.array
    logprobs: dict[int, tuple[mx.array, mx.array, mx.array]] = field(default_factory=dict)

    def arrays(self) -> list[mx.array]:
        return [self.tokens, *(a for entry in self.logprobs.values() for a in entry)]


def sample(
    logits: mx.array, rows: list[SamplingRow], positions: mx.array, masks: TokenMasks | None = None
) -> SamplerOutput:
    """Sample one token per row.

    Args:
        logits: [rows, vocabulary] float32, from the model.
        positions: [rows] int32, the positions of the sampled tokens.
        masks: replace `banned` in the rows that they name.
    """
    adjusted = _adjust(logits, rows, masks.rows if masks is not None else ())
    if masks is not None and masks.rows:
        adjusted = _mask(adjusted, masks, copy=adjusted is logits)
    tokens = _dispatch(adjusted, rows, positions)
    counts = {i: row.sampling.params.logprobs for i, row in enumerate(rows)}
    return SamplerOutput(
        tokens,
        {i: _logprobs(logits[i], tokens[i], k) for i, k in counts.items() if k is not None},
    )


def token_logprobs(
    logits: mx.array, tokens: mx.array, count: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Log-probabilities of a token in each row, and of the row's most likely tokens.

    Args:
        logits: [rows, vocabulary] float32, from the model.
        tokens: [rows] int32.

    Returns:
        [rows] float32; ids [rows, count] int32; values [rows, count] float32.
    """
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    if count == 0:
        empty = mx.zeros((logits.shape[0], 0))
        return chosen, empty.astype(mx.int32), empty
    return chosen, *top_candidates(logprobs, count)


def _logprobs(logits: mx.array, token: mx.array, count: int) -> tuple[mx.array, mx.array, mx.array]:
    chosen, ids, values = token_logprobs(logits[None], token[None], count)
    return chosen[0], ids[0], values[0]


# -- adjusting logits ---------------------------------------------------------------------


def _adjust(logits: mx.array, rows: list[SamplingRow], masked: Sequence[int]) -> mx.array:
    """Apply penalties, bias, bans and forced tokens to copies of affected rows.

    Args:
        masked: rows whose bans are part of their masks.
    """
    unbanned = frozenset(masked)
    touched: list[int] = []
    adjusted: list[mx.array] = []
    for i, row in enumerate(rows):
        spec = row.sampling
        banned = () if i in unbanned else row.banned
        if row.forced is not None:
            touched.append(i)
            adjusted.append(mx.where(mx.arange(logits.shape[1]) == row.forced, 0.0, -mx.inf))
            continue
        if not (spec.penalised or spec.bias is not None or banned):
            continue
        values = logits[i]
        if spec.penalised:
            assert row.history is not None
            values = _penalise(values, spec.params, row.history)
        if spec.bias is not None:
            values = values + spec.bias
        if banned:
            values[mx.array(banned)] = -mx.inf
        touched.append(i)
        adjusted.append(values)
    if not touched:
        return logits
    if len(touched) == len(rows):
        return mx.stack(adjusted)
    # On a copy: logprobs are computed from the model's logits.
    result = mx.array(logits)
    result[mx.array(touched)] = mx.stack(adjusted)
    return result


def _mask(logits: mx.array, masks: TokenMasks, *, copy: bool) -> mx.array:
    """Set the logits of tokens that the masks exclude to -inf.

    Args:
        copy: do not change `logits` in place.
    """
    vocabulary = logits.shape[1]
    bits = (masks.words[:, :, None] >> mx.arange(32, dtype=mx.uint32)) & 1
    allowed = bits.reshape(len(masks.rows), -1)[:, :vocabulary].astype(mx.bool_)
    if len(masks.rows) == logits.shape[0]:
        return mx.where(allowed, logits, -mx.inf)
    indices = mx.array(masks.rows)
    result = mx.array(logits) if copy else logits
    result[indices] = mx.where(allowed, logits[indices], -mx.inf)
    return result


def _penalise(logits: mx.array, params: SamplingParams, history: History) -> mx.array:
    rate = params.repetition_penalty
    if rate != 1.0:
        repeated = mx.where(logits > 0, logits / rate, logits * rate)
        logits = mx.where(history.seen, repeated, logits)
    if params.frequency_penalty:
        logits = logits - params.frequency_penalty * history.counts
    if params.presence_penalty:
        logits = logits - params.presence_penalty * (history.counts > 0)
    return logits


# -- sampling -----------------------------------------------------------------------------


def _dispatch(logits: mx.array, rows: list[SamplingRow], positions: mx.array) -> mx.array:
    """Split rows by the work that their parameters require, and sample each part."""
    vocabulary = logits.shape[1]
    kinds: dict[Callable[[mx.array, list[SamplingRow], mx.array], mx.array], list[int]] = {}
    for i, row in enumerate(rows):
        p = row.sampling.params
        if p.temperature < GREEDY_BELOW or p.top_k == 1:
            kind = _greedy
        elif 0 < p.top_k <= min(_MAX_CANDIDATES, vocabulary):
            kind = _sample_top_candidates
        elif p.top_p >= 1 and p.min_p <= 0 and not 0 < p.top_k < vocabulary:
            kind = _sample_full_vocab
        else:
            kind = _sample_sorted
        kinds.setdefault(kind, []).append(i)
    if len(kinds) == 1:
        return next(iter(kinds))(logits, rows, positions).astype(mx.int32)
    parts, order = [], []
    for choose, members in kinds.items():
        indices = mx.array(members)
        part = choose(logits[indices], [rows[i] for i in members], positions[indices])
        parts.append(part.astype(mx.int32))
        order += members
    return mx.concatenate(parts)[mx.array(np.argsort(order).astype(np.int32))]


def _greedy(logits: mx.array, rows: list[SamplingRow], positions: mx.array) -> mx.array:
    return mx.argmax(logits, axis=-1)


def _sample_top_candidates(
    logits: mx.array, rows: list[SamplingRow], positions: mx.array
) -> mx.array:
    count = max(row.sampling.params.top_k for row in rows)
    return _sample_filtered(*top_candidates(logits, count), rows, positions)


def _sample_sorted(logits: mx.array, rows: list[SamplingRow], positions: mx.array) -> mx.array:
    ids = mx.argsort(-logits, axis=-1)
    return _sample_filtered(ids, mx.take_along_axis(logits, ids, axis=-1), rows, positions)


def _sample_full_vocab(logits: mx.array, rows: list[SamplingRow], positions: mx.array) -> mx.array:
    ids = mx.arange(logits.shape[1], dtype=mx.uint32)[None]
    temperature = _column([row.sampling.params.temperature for row in rows])
    return mx.argmax(logits / temperature + _gumbel(ids, rows, positions), axis=-1)


def _sample_filtered(
    ids: mx.array, logits: mx.array, rows: list[SamplingRow], positions: mx.array
) -> mx.array:
    """Sample after temperature, top_k, top_p and min_p from sorted candidates.

    Args:
        ids, logits: [rows, candidates].

    Returns:
        [rows] ids.
    """
    params = [row.sampling.params for row in rows]
    count = logits.shape[1]
    rank = mx.arange(count)[None]
    scaled = logits / _column([p.temperature for p in params])
    top_k = _column([p.top_k or count for p in params])
    scaled = mx.where(rank < top_k, scaled, -mx.inf)
    probs = mx.softmax(scaled, axis=-1, precise=True)
    before = mx.cumsum(probs, axis=-1) - probs
    # By rounding the cumulative sum may reach 1 before the end; top_p = 1 must not cut anything.
    keep = before < _column([p.top_p if p.top_p < 1 else 2.0 for p in params])
    keep = keep & (probs >= _column([p.min_p for p in params]) * probs[:, :1])
    scaled = mx.where(keep | (rank == 0), scaled, -mx.inf)
    best = mx.argmax(scaled + _gumbel(ids, rows, positions), axis=-1)
    return mx.take_along_axis(ids, best[:, None], axis=-1)[:, 0]


def top_candidates(values: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The `count` largest values of each row, in descending order, with their ids.

    The largest `count` values are in the `count` blocks with the largest maxima, so only these
    blocks are searched: one pass over the vocabulary and two small partitions. A partition of the
    whole vocabulary would cost a full sort on a GPU.

    Args:
        values: [rows, vocabulary].

    Returns:
        ids [rows, count] int32, values [rows, count].
    """
    rows, vocabulary = values.shape
    count = min(count, vocabulary)
    blocks = -(-vocabulary // _BLOCK)
    if blocks <= 2 * count:
        ids = _largest(values, count)
        found = mx.take_along_axis(values, ids, axis=-1)
    else:
        padding = blocks * _BLOCK - vocabulary
        padded = mx.pad(values, [(0, 0), (0, padding)], constant_values=-mx.inf)
        by_block = padded.reshape(rows, blocks, _BLOCK)
        best = _largest(by_block.max(axis=-1), count)  # [rows, count] blocks
        inside = mx.take_along_axis(by_block, best[..., None], axis=1).reshape(rows, -1)
        places = _largest(inside, count)
        found = mx.take_along_axis(inside, places, axis=-1)
        ids = mx.take_along_axis(best, places // _BLOCK, axis=-1) * _BLOCK + places % _BLOCK
        ids = mx.minimum(ids, vocabulary - 1)  # Padding, if fewer than `count` are finite.
    order = mx.argsort(-found, axis=-1)
    ids = mx.take_along_axis(ids, order, axis=-1)
    return ids.astype(mx.int32), mx.take_along_axis(found, order, axis=-1)


def _largest(values: mx.array, count: int) -> mx.array:
    if count >= values.shape[-1]:
        return mx.broadcast_to(mx.arange(values.shape[-1]), values.shape)
    return mx.argpartition(-values, kth=count - 1, axis=-1)[..., :count]


def _column(values: list[float] | list[int]) -> mx.array:
    return mx.array(np.array(values, np.float32))[:, None]


# -- noise --------------------------------------------------------------------------------


def noise_key(seed: int, index: int) -> tuple[int, int]:
    """Noise key of continuation `index` of a request with `seed`.

    By SplitMix64 (https://doi.org/10.1145/2714064.2660195).
    """
    word = _split_mix(_split_mix(seed) + index)
    return word & 0xFFFFFFFF, word >> 32


def _split_mix(word: int) -> int:
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _gumbel(ids: mx.array, rows: list[SamplingRow], positions: mx.array) -> mx.array:
    """Standard Gumbel noise for each (row, id): [rows, candidates] float32."""
    keys = mx.array(np.array([row.sampling.key for row in rows], np.uint32))
    by_position = _mix(positions.astype(mx.uint32)[:, None] ^ keys[:, :1])
    by_row = _mix(by_position ^ keys[:, 1:])
    return gumbel_of(_mix(_mix(ids.astype(mx.uint32) ^ by_position) ^ by_row))


def gumbel_of(word: mx.array) -> mx.array:
    """Standard Gumbel noise, float32 and finite, from uniform 32-bit words."""
    # The upper tail, which decides, is computed from uniforms near 0, where floating-point numbers
    # are finely spaced. Uniforms stay below 1, as infinite noise would outweigh any logit.
    uniform = mx.minimum((word.astype(mx.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -mx.log(-mx.log1p(-uniform))


def _mix(word: mx.array) -> mx.array:
    """Mix 32-bit words: lowbias32 (https://nullprogram.com/blog/2018/07/31/)."""
    word = (word ^ (word >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    word = (word ^ (word >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return word ^ (word >> 16)
