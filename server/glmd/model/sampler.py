"""Choosing the next tokens of many rows at once, each with parameters of its own.

The noise of a row is a hash of (seed, position, token id), not a stream: a request's tokens
do not depend on which rows it shares its steps with, nor on whether they were drafted, and
resume unchanged after preemption. Adding Gumbel noise to log-probabilities and taking the
maximum samples from the distribution (https://arxiv.org/abs/1611.01144, eq. 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import mlx.core as mx
import msgspec
import numpy as np

from glmd.ipc import SamplingParams, TokenArray

_FEW = 256
"""top_k up to which candidates are selected rather than the whole vocabulary sorted."""

GREEDY_BELOW = 1e-5
"""A temperature under which logits would leave the range of float32 when divided by it."""

_BLOCK = 128
"""Tokens per block in `top_candidates`."""

_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class RowSampling:
    """One sequence's sampling, prepared for use at every step.

    Attributes:
        key: two 32-bit words that name the sequence's noise; see `noise_key`.
        banned_at_first: ids that may not be chosen before `min_tokens` tokens exist.
        bias: [vocabulary] float32, or None.
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

    def for_drafts(self) -> RowSampling:
        """The same without what needs a history or logprobs: drafts are guesses."""
        params = msgspec.structs.replace(
            self.params,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            logprobs=None,
        )
        return replace(self, params=params)


class History:
    """Which tokens a sequence has seen, on the device, for penalties.

    Attributes:
        seen: [vocabulary] bool, prompt and output.
        counts: [vocabulary] float32, occurrences in the output.
    """

    def __init__(self, vocabulary: int, prompt: TokenArray, output: TokenArray) -> None:
        seen = np.zeros(vocabulary, bool)
        seen[prompt] = True
        seen[output] = True
        self.seen = mx.array(seen)
        self.counts = mx.array(np.bincount(output, minlength=vocabulary).astype(np.float32))

    def with_token(self, token: mx.array, weight: mx.array | float = 1.0) -> History:
        """This history and one more output token.

        Args:
            token: scalar, need not be evaluated yet.
            weight: 1, or 0 to leave things as they are.
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

    sampling: RowSampling
    generated: int
    """Output tokens before this one, as far as they are known."""
    history: History | None
    forced: int | None = None
    """The token to choose, whatever the logits and parameters."""

    @property
    def banned(self) -> tuple[int, ...]:
        """Ids that may not be chosen."""
        early = self.generated < self.sampling.min_tokens
        return self.sampling.banned_at_first if early else ()


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Which tokens some of the rows may choose.

    Attributes:
        rows: their indices, ascending.
        words: [len(rows), ceil(vocabulary / 32)] uint32, a bit per token, lowest first.
    """

    rows: list[int]
    words: mx.array


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """What a step sampled, not necessarily evaluated yet.

    Attributes:
        tokens: [rows] int32.
        logprobs: by row index, for the rows that asked: the chosen token's log-probability
            (scalar), the most likely ids [k] and their log-probabilities [k].
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
        logits: [rows, vocabulary] float32, as the model gives them.
        positions: [rows] int32, those that the sampled tokens will take.
        masks: stand in for the bans of the rows that they are for.
    """
    adjusted = _adjust(logits, rows, masks.rows if masks is not None else ())
    if masks is not None and masks.rows:
        adjusted = _mask(adjusted, masks, copy=adjusted is logits)
    tokens = _dispatch(adjusted, rows, positions)
    wanted = [i for i, row in enumerate(rows) if row.sampling.params.logprobs is not None]
    return SamplerOutput(tokens, {i: _logprobs(logits[i], tokens[i], rows[i]) for i in wanted})


def _logprobs(
    logits: mx.array, token: mx.array, row: SamplingRow
) -> tuple[mx.array, mx.array, mx.array]:
    logprobs = logits - mx.logsumexp(logits)
    count = row.sampling.params.logprobs or 0
    if count == 0:
        empty = mx.zeros((0,))
        return logprobs[token], empty.astype(mx.int32), empty
    ids, values = top_candidates(logprobs[None], count)
    return logprobs[token], ids[0], values[0]


# -- adjusting logits ---------------------------------------------------------------------


def _adjust(logits: mx.array, rows: list[SamplingRow], masked: Sequence[int]) -> mx.array:
    """Penalties, bias, bans and forced tokens, on copies of the rows that have any.

    Args:
        masked: rows whose bans are in their masks.
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
    # Out of place: the caller still needs the model's own logits for logprobs.
    result = mx.array(logits)
    result[mx.array(touched)] = mx.stack(adjusted)
    return result


def _mask(logits: mx.array, masks: TokenMasks, *, copy: bool) -> mx.array:
    """Logits of minus infinity for what the masks leave out.

    Args:
        copy: leave `logits` as they are.
    """
    vocabulary = logits.shape[1]
    bits = (masks.words[:, :, None] >> mx.arange(32, dtype=mx.uint32)) & 1
    allowed = bits.reshape(len(masks.rows), -1)[:, :vocabulary].astype(mx.bool_)
    if len(masks.rows) == logits.shape[0]:
        return mx.where(allowed, logits, -mx.inf)
    at = mx.array(masks.rows)
    result = mx.array(logits) if copy else logits
    result[at] = mx.where(allowed, logits[at], -mx.inf)
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


# -- choosing -----------------------------------------------------------------------------


def _dispatch(logits: mx.array, rows: list[SamplingRow], positions: mx.array) -> mx.array:
    """Rows are split by how much work their parameters ask for, so none pays for another."""
    vocabulary = logits.shape[1]
    kinds: dict[Callable[[mx.array, list[SamplingRow], mx.array], mx.array], list[int]] = {}
    for i, row in enumerate(rows):
        p = row.sampling.params
        if p.temperature < GREEDY_BELOW or p.top_k == 1:
            kind = _greedy
        elif 0 < p.top_k <= min(_FEW, vocabulary):
            kind = _sample_top_candidates
        elif p.top_p >= 1 and p.min_p <= 0 and not 0 < p.top_k < vocabulary:
            kind = _sample_full_vocab
        else:
            kind = _sorted
        kinds.setdefault(kind, []).append(i)
    if len(kinds) == 1:
        return next(iter(kinds))(logits, rows, positions).astype(mx.int32)
    parts, order = [], []
    for choose, members in kinds.items():
        at = mx.array(members)
        part = choose(logits[at], [rows[i] for i in members], positions[at])
        parts.append(part.astype(mx.int32))
        order += members
    return mx.concatenate(parts)[mx.array(np.argsort(order).astype(np.int32))]


def _greedy(logits: mx.array, rows: list[SamplingRow], positions: mx.array) -> mx.array:
    return mx.argmax(logits, axis=-1)


def _sample_top_candidates(
    logits: mx.array, rows: list[SamplingRow], positions: mx.array
) -> mx.array:
    count = max(row.sampling.params.top_k for row in rows)
    return _filtered(*top_candidates(logits, count), rows, positions)


def _sorted(logits: mx.array, rows: list[SamplingRow], positions: mx.array) -> mx.array:
    ids = mx.argsort(-logits, axis=-1)
    return _filtered(ids, mx.take_along_axis(logits, ids, axis=-1), rows, positions)


def _sample_full_vocab(logits: mx.array, rows: list[SamplingRow], positions: mx.array) -> mx.array:
    ids = mx.arange(logits.shape[1], dtype=mx.uint32)[None]
    temperature = _column([row.sampling.params.temperature for row in rows])
    return mx.argmax(logits / temperature + _gumbel(ids, rows, positions), axis=-1)


def _filtered(
    ids: mx.array, logits: mx.array, rows: list[SamplingRow], positions: mx.array
) -> mx.array:
    """Temperature, then top_k, top_p, min_p, over candidates in descending order.

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
    # The running sum may reach 1 before the end by rounding; at top_p = 1 nothing is cut.
    keep = before < _column([p.top_p if p.top_p < 1 else 2.0 for p in params])
    keep = keep & (probs >= _column([p.min_p for p in params]) * probs[:, :1])
    scaled = mx.where(keep | (rank == 0), scaled, -mx.inf)
    best = mx.argmax(scaled + _gumbel(ids, rows, positions), axis=-1)
    return mx.take_along_axis(ids, best[:, None], axis=-1)[:, 0]


def top_candidates(values: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The `count` largest values of each row, in descending order, with their ids.

    The largest `count` values lie in the `count` blocks with the largest maxima, so only those
    are searched: one pass over the vocabulary and two small partitions, where a partition of
    all of it would cost a full sort on a GPU.

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
        ids = mx.minimum(ids, vocabulary - 1)  # Padding, where fewer than `count` are finite.
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
    """The key of continuation `index` of a request with `seed`, by SplitMix64
    (https://doi.org/10.1145/2714064.2660195)."""
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
    first = _mix(positions.astype(mx.uint32)[:, None] ^ keys[:, :1])
    second = _mix(first ^ keys[:, 1:])
    return gumbel_of(_mix(_mix(ids.astype(mx.uint32) ^ first) ^ second))


def gumbel_of(word: mx.array) -> mx.array:
    """Standard Gumbel noise, float32 and finite, from uniform 32-bit words."""
    # Small numbers are finely spaced in floating point, so the upper tail, which decides, comes
    # from uniforms near 0. None may be 1: with infinite noise a token's logit counts for nothing.
    uniform = mx.minimum((word.astype(mx.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -mx.log(-mx.log1p(-uniform))


def _mix(word: mx.array) -> mx.array:
    """A bijection of 32-bit words in which every input bit moves every output bit.

    The constants are those of lowbias32 (https://nullprogram.com/blog/2018/07/31/).
    """
    word = (word ^ (word >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    word = (word ^ (word >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return word ^ (word >> 16)
