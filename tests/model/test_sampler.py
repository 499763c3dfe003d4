"""Sampled tokens follow the documented distribution and depend only on the row's own inputs."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from distribution import deviation, exact
from hypothesis import given, settings

from glmd.ipc import SamplingParams
from glmd.model.sampler import (
    History,
    SamplingRow,
    SequenceSampling,
    gumbel_of,
    noise_key,
    sample,
    top_candidates,
)

VOCABULARY = 300  # Not a multiple of the block in which candidates are looked for.
LOGITS = np.random.default_rng(0).normal(0, 2, VOCABULARY).astype(np.float32)
PROMPT = np.array([1, 2, 2, 3], np.int32)
OUTPUT = np.array([3, 4, 4, 4, 5], np.int32)


def _draw(
    logits: npt.NDArray[np.float32],
    params: SamplingParams | list[SamplingParams],
    places: list[tuple[int, int]],
    **spec: Any,
) -> npt.NDArray[np.int32]:
    """One token per (seed, position): [places], all in one call."""
    if isinstance(params, SamplingParams):
        params = [params] * len(places)
    rows, index = [], spec.get("index", 0)
    positions = mx.array([position for _, position in places], mx.int32)
    for (seed, _), p in zip(places, params, strict=True):
        bias = None
        if p.logit_bias:
            dense = np.zeros(logits.shape[-1], np.float32)
            for token, value in p.logit_bias.items():
                dense[token] = value
            bias = mx.array(dense)
        sampling = SequenceSampling(
            params=p,
            key=noise_key(seed, index),
            bias=bias,
            min_tokens=spec.get("min_tokens", 0),
            banned_at_first=spec.get("banned", ()),
        )
        history = None
        if sampling.penalised:
            history = History(logits.shape[-1], PROMPT, OUTPUT)
        rows.append(SamplingRow(sampling, spec.get("generated", 0), history))
    given_logits = mx.array(np.broadcast_to(logits, (len(places), logits.shape[-1])))
    tokens = np.array(sample(given_logits, rows, positions).tokens)
    assert (np.array(given_logits) == logits).all(), "the model's own logits were changed"
    return tokens


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_k": 299, "temperature": 3.0},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 0.2, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
        {"temperature": 2.0, "top_p": 0.8, "min_p": 0.1},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -0.5, "presence_penalty": -0.5, "top_k": 10},
        {"logit_bias": {0: 5.0, 7: -100.0, 299: 4.0}},
        {
            "repetition_penalty": 0.8,
            "frequency_penalty": 0.3,
            "logit_bias": {4: 2.0},
            "temperature": 1.3,
            "top_p": 0.9,
        },
    ],
    ids=lambda params: "-".join(params) or "plain",
)
def test_draws_follow_the_documented_distribution(params: dict[str, Any]) -> None:
    p = SamplingParams(**params)
    draws = 3000 if _adjusts(p) else 20_000
    tokens = _draw(LOGITS, p, [(seed, 17) for seed in range(draws)])
    observed = np.bincount(tokens, minlength=VOCABULARY)
    assert deviation(observed, draws * exact(LOGITS, p, PROMPT, OUTPUT)) < 3.5


def _adjusts(p: SamplingParams) -> bool:
    return bool(p.logit_bias) or SequenceSampling(params=p, key=(0, 0)).penalised


@pytest.mark.parametrize("params", [{}, {"top_k": 8}, {"top_p": 0.999}])
def test_noise_is_independent_over_positions_of_a_seed(params: dict[str, Any]) -> None:
    flat = np.zeros(8, np.float32)
    tokens = _draw(flat, SamplingParams(**params), [(7, position) for position in range(6400)])
    pairs = tokens[:-1:2] * 8 + tokens[1::2]
    assert deviation(np.bincount(pairs, minlength=64), np.full(64, 50.0)) < 3.5


def test_noise_is_independent_over_neighbouring_seeds() -> None:
    flat = np.zeros(8, np.float32)
    tokens = _draw(flat, SamplingParams(), [(seed, 3) for seed in range(6400)])
    pairs = tokens[:-1:2] * 8 + tokens[1::2]
    assert deviation(np.bincount(pairs, minlength=64), np.full(64, 50.0)) < 3.5


def test_continuations_of_a_seed_are_independent() -> None:
    flat = np.zeros(8, np.float32)
    places = [(3, position) for position in range(3200)]
    first, second = (_draw(flat, SamplingParams(), places, index=index) for index in (0, 1))
    assert deviation(np.bincount(first * 8 + second, minlength=64), np.full(64, 50.0)) < 3.5


def test_noise_is_finite_and_exact_over_the_range_of_words() -> None:
    words = np.concatenate(
        [
            np.arange(1000),
            np.random.default_rng(0).integers(0, 2**32, 10_000),
            2**32 - 1 - np.arange(1000),
        ]
    ).astype(np.uint32)
    noise = np.array(gumbel_of(mx.array(words)))
    assert np.isfinite(noise).all()
    exact = -np.log(-np.log1p(-(words.astype(np.float64) + 0.5) * 2.0**-32))
    middle = words < 0.9 * 2**32
    np.testing.assert_allclose(noise[middle], exact[middle], rtol=1e-5, atol=1e-5)
    assert noise[~middle].max() < -0.8


def test_a_token_without_probability_is_never_drawn_from_a_large_vocabulary() -> None:
    logits = np.full(154_880, -60, np.float32)
    logits[7] = 0
    for params in (SamplingParams(), SamplingParams(top_k=50, top_p=0.95, min_p=0.01)):
        places = [(seed, 1) for seed in range(100)]
        assert (_draw(logits, params, places) == 7).all()


# -- greedy ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"top_k": 1},
        {"top_p": 0.0},
        {"min_p": 1.0},
        {"temperature": 1e-30},
        {"temperature": 1e-6, "top_k": 50, "top_p": 0.9},
        {"temperature": 1e-30, "top_p": 0.9},
    ],
    ids=str,
)
def test_parameters_that_leave_one_token_choose_the_likeliest(params: dict[str, Any]) -> None:
    tokens = _draw(LOGITS, SamplingParams(**params), [(seed, seed) for seed in range(20)])
    assert (tokens == LOGITS.argmax()).all()


def test_greedy_ties_fall_to_the_lowest_id() -> None:
    logits = LOGITS.copy()
    logits[[250, 40, 120]] = logits.max() + 1
    assert (_draw(logits, SamplingParams(temperature=0.0), [(0, 0), (5, 9)]) == 40).all()


# -- independence ---------------------------------------------------------------------------

KINDS = [
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(top_k=5),
    SamplingParams(top_k=50, top_p=0.9, min_p=0.02),
    SamplingParams(top_p=0.9),
    SamplingParams(frequency_penalty=0.5),
    SamplingParams(logit_bias={3: 1.0}, top_k=20),
    SamplingParams(logprobs=2, temperature=1.7),
]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2**63 - 1)), min_size=1))
def test_a_row_draws_the_same_alone_and_among_any_others(
    rows: list[tuple[SamplingParams, int]],
) -> None:
    places = [(seed, 3 * i) for i, (_, seed) in enumerate(rows)]
    together = _draw(LOGITS, [params for params, _ in rows], places)
    alone = [
        int(_draw(LOGITS, params, [place])[0])
        for (params, _), place in zip(rows, places, strict=True)
    ]
    assert together.tolist() == alone


# -- bans and logprobs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.0}, {"top_k": 4}, {"top_p": 0.5}], ids=str
)
def test_tokens_that_end_are_banned_before_min_tokens_and_only_then(params: dict[str, Any]) -> None:
    best = np.argsort(-LOGITS)[:3].tolist()
    p, places = SamplingParams(**params), [(seed, 0) for seed in range(200)]
    early = _draw(LOGITS, p, places, min_tokens=4, generated=3, banned=tuple(best))
    later = _draw(LOGITS, p, places, min_tokens=4, generated=4, banned=tuple(best))
    assert not np.isin(early, best).any()
    assert np.isin(later, best).any()


def test_a_forced_token_is_chosen_with_any_parameters() -> None:
    worst = int(LOGITS.argmin())
    rows = [
        SamplingRow(
            SequenceSampling(params=params, key=(i, 0)), 0, None, forced=worst if i % 2 else None
        )
        for i, params in enumerate(p for p in KINDS if not SequenceSampling(p, (0, 0)).penalised)
    ]
    logits = mx.array(np.stack([LOGITS] * len(rows)))
    tokens = np.array(sample(logits, rows, mx.zeros(len(rows), mx.int32)).tokens)
    assert (tokens[1::2] == worst).all()
    assert (tokens[::2] != worst).all()


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_logprobs_describe_the_models_distribution(count: int) -> None:
    exact = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    for p in (
        SamplingParams(logprobs=count, temperature=0.0),
        SamplingParams(logprobs=count, temperature=2.0, top_k=7),
        SamplingParams(
            logprobs=count, repetition_penalty=1.9, logit_bias={9: 30.0}, temperature=0.5
        ),
    ):
        spec = SequenceSampling(
            params=p, key=(3, 0), bias=mx.array(np.eye(VOCABULARY, dtype=np.float32)[9])
        )
        history = History(VOCABULARY, PROMPT, OUTPUT) if spec.penalised else None
        silent = SamplingRow(SequenceSampling(params=SamplingParams(), key=(1, 1)), 0, None)
        sampled = sample(
            mx.array(np.stack([LOGITS] * 2)),
            [silent, SamplingRow(spec, 5, history)],
            mx.array([0, 5]),
        )
        assert sampled.logprobs.keys() == {1}
        chosen, ids, values = (np.array(part) for part in sampled.logprobs[1])
        assert chosen == pytest.approx(exact[np.array(sampled.tokens)[1]], abs=1e-5)
        assert ids.tolist() == np.argsort(-exact, kind="stable")[:count].tolist()
        np.testing.assert_allclose(values, exact[ids], atol=1e-5)


def test_a_history_counts_the_output_and_sees_the_prompt() -> None:
    history = History(10, np.array([1, 1], np.int32), np.array([2], np.int32))
    before = np.array(history.counts).tolist()
    after = history.with_token(mx.array(2)).with_token(mx.array(7), 0.0)
    assert np.array(history.counts).tolist() == before
    history = after.with_token(mx.array(5))
    assert np.flatnonzero(np.array(history.seen)).tolist() == [1, 2, 5]
    assert np.array(history.counts).tolist() == [0, 0, 2, 0, 0, 1, 0, 0, 0, 0]


# -- candidates -------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 1500),
    st.integers(1, 300),
    st.integers(0, 2**32 - 1),
    st.sampled_from([3, 50, 10**6]),
    st.sampled_from([0.0, 0.5, 0.999]),
)
def test_top_candidates_equal_a_full_sort(
    vocabulary: int, count: int, seed: int, distinct: int, masked: float
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, distinct, (3, vocabulary)).astype(np.float32)
    values[rng.random(values.shape) < masked] = -np.inf
    ids, found = (np.array(part) for part in top_candidates(mx.array(values), count))
    assert ids.shape == found.shape == (3, min(count, vocabulary))
    assert (found == -np.sort(-values, axis=1)[:, :count]).all()
    assert ((ids >= 0) & (ids < vocabulary)).all()
    for row in range(3):
        finite = np.isfinite(found[row])
        assert (values[row, ids[row, finite]] == found[row, finite]).all()
        assert len(set(ids[row, finite].tolist())) == finite.sum()
