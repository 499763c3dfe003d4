"""Reference sampling distribution in float64, and a chi-square test against it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from glmd.ipc import SamplingParams

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]


def exact(
    logits: npt.NDArray[np.floating], params: SamplingParams, prompt: Ids, output: Ids
) -> Floats:
    """Return the probabilities of the token after `prompt` and `output`: [vocabulary]."""
    x = logits.astype(np.float64)
    vocabulary = len(x)
    seen = np.isin(np.arange(vocabulary), np.concatenate([prompt, output]))
    counts = np.bincount(output, minlength=vocabulary)
    rate = params.repetition_penalty
    x = np.where(seen, np.where(x > 0, x / rate, x * rate), x)
    x = x - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    for token, value in params.logit_bias.items():
        x[token] += value
    x = x / params.temperature
    order = np.argsort(-x, kind="stable")
    keep = np.ones(vocabulary, bool)
    if params.top_k:
        keep[order[params.top_k :]] = False
    p = _softmax(np.where(keep, x, -np.inf))
    if params.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        keep[order[before >= params.top_p]] = False
        p = _softmax(np.where(keep, x, -np.inf))
    keep &= p >= params.min_p * p.max()
    return _softmax(np.where(keep, x, -np.inf))


def _softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())


def deviation(observed: npt.NDArray[np.int64], expected: Floats) -> float:
    """Return the chi-square of counts in standard deviations (Wilson and Hilferty, 1931).

    Rare bins are merged.
    """
    assert not observed[expected == 0].any(), "drew a token of probability 0"
    order = np.argsort(expected)
    observed, expected = observed[order], expected[order]
    rare = int(np.searchsorted(np.cumsum(expected), 8)) + 1
    observed = np.concatenate([[observed[:rare].sum()], observed[rare:]])
    expected = np.concatenate([[expected[:rare].sum()], expected[rare:]])
    statistic = float(((observed - expected) ** 2 / expected).sum())
    dof = max(1, len(expected) - 1)
    return float(((statistic / dof) ** (1 / 3) - (1 - 2 / (9 * dof))) / math.sqrt(2 / (9 * dof)))
