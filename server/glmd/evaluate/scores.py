"""Statistics of a model against a reference, named as by llama-perplexity.

Standard errors take each sample as one observation of a cluster, as tokens of one text are not
independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from glmd.evaluate.corpus import TokenSet

Floats = npt.NDArray[np.float64]

KL_PERCENTILES = {"median_kl": 50.0, "kl_90": 90.0, "kl_99": 99.0, "kl_999": 99.9, "max_kl": 100.0}
DP_PERCENTILES = (0.1, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True)
class TokenScores:
    """Predictions of one model, at each scored token. Shapes: [scored].

    Attributes:
        nll: negative log-probability of the text's next token.
        top: id of the most probable token.
        kl: KL divergence of the model from the reference. None: without reference.
        kl_bound: how much `kl` may be too small; the reference keeps its top tokens only.
        accepted: probability that a draft of the MTP layer is accepted at temperature 1, NaN
            where the sample ends. None: no MTP layer.
    """

    nll: Floats
    top: npt.NDArray[np.int64]
    kl: Floats | None = None
    kl_bound: Floats | None = None
    accepted: Floats | None = None


@dataclass(frozen=True)
class LayerScores:
    """Comparison of one layer with the reference's.

    Attributes:
        expert_overlap: share of the chosen experts that the reference chooses too. None: a dense
            layer.
        router_flips: share of tokens with another set of experts. None: a dense layer.
        residual_error: norm of the difference of the layer's output, relative to the reference's.
    """

    layer: int
    expert_overlap: float | None
    router_flips: float | None
    residual_error: float


def mean_and_error(values: Floats, clusters: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Mean, and its standard error with one cluster per sample.

    With fewer than two clusters the tokens are taken as independent.
    """
    count = len(values)
    deviations = values - values.mean()
    _, index = np.unique(clusters, return_inverse=True)
    sums = np.bincount(index, deviations)
    if len(sums) < 2:
        sums = deviations
    groups = len(sums)
    if groups < 2:
        return float(values.mean()), float("nan")
    error = sqrt(float((sums**2).sum()) * groups / (groups - 1)) / count
    return float(values.mean()), error


def row(
    model: str,
    scores: TokenScores,
    reference: TokenScores | None,
    text: TokenSet,
    *,
    bits_per_weight: float,
    nbytes: int,
    layers: tuple[LayerScores, ...] = (),
    chosen: npt.NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """A row of the table, as JSON.

    Args:
        chosen: [scored], the tokens to count; None: all, and also by domain.
    """
    whole = chosen is None
    pick = np.ones(len(scores.nll), np.bool_) if chosen is None else chosen
    clusters = text.sample_of[text.scored]
    statistics, errors = _statistics(scores, reference, pick, clusters)
    overlaps = [part.expert_overlap for part in layers if part.expert_overlap is not None]
    flips = [part.router_flips for part in layers if part.router_flips is not None]
    out: dict[str, Any] = {
        "model": model,
        "bits_per_weight": bits_per_weight,
        **{key: statistics.pop(key, None) for key in _FIRST},
        "expert_overlap": float(np.mean(overlaps)) if overlaps and whole else None,
        "tokens": int(pick.sum()),
        "bytes": nbytes,
        "router_flips": float(np.mean(flips)) if flips and whole else None,
        **statistics,
        "standard_errors": errors,
    }
    if whole:
        out["layers"] = [
            {
                "layer": part.layer,
                "expert_overlap": part.expert_overlap,
                "router_flips": part.router_flips,
                "residual_error": part.residual_error,
            }
            for part in layers
        ]
        out["domains"] = _by_domain(scores, reference, text, clusters)
    return out


_FIRST = ("mean_kl", "kl_99", "same_top", "ppl", "ppl_ratio")

_DOMAIN_KEYS = ("mean_kl", "kl_99", "same_top", "ppl", "ppl_ratio", "mtp_acceptance", "tokens")


def _by_domain(
    scores: TokenScores,
    reference: TokenScores | None,
    text: TokenSet,
    clusters: npt.NDArray[np.int64],
) -> dict[str, dict[str, Any]]:
    domains = np.array(text.domains)[clusters]
    out = {}
    for domain in dict.fromkeys(text.domains):
        pick = domains == domain
        if pick.any():
            found, errors = _statistics(scores, reference, pick, clusters)
            found["tokens"] = int(pick.sum())
            out[domain] = {key: found[key] for key in _DOMAIN_KEYS if key in found} | {
                "standard_errors": {key: errors[key] for key in _DOMAIN_KEYS if key in errors}
            }
    return out


def _statistics(
    scores: TokenScores,
    reference: TokenScores | None,
    pick: npt.NDArray[np.bool_],
    clusters: npt.NDArray[np.int64],
) -> tuple[dict[str, Any], dict[str, float]]:
    """Statistics of the picked tokens, and standard errors under the same names."""
    clusters = clusters[pick]
    out: dict[str, Any] = {}
    errors: dict[str, float] = {}

    def put(name: str, values: Floats, scale: float = 1.0) -> None:
        mean, error = mean_and_error(values, clusters)
        out[name], errors[name] = mean * scale, error * scale

    nll = scores.nll[pick]
    mean, error = mean_and_error(nll, clusters)
    out["ppl"] = float(np.exp(mean))
    errors["ppl"] = out["ppl"] * error
    if scores.accepted is not None:
        accepted = scores.accepted[pick]
        known = ~np.isnan(accepted)
        if known.any():
            out["mtp_acceptance"], errors["mtp_acceptance"] = mean_and_error(
                accepted[known], clusters[known]
            )
    if reference is None or scores.kl is None or scores.kl_bound is None:
        return out, errors
    kl = scores.kl[pick]
    put("mean_kl", kl)
    out |= {name: float(np.percentile(kl, at)) for name, at in KL_PERCENTILES.items()}
    out["kl_bound"] = float(scores.kl_bound[pick].mean())
    put("same_top", (scores.top[pick] == reference.top[pick]).astype(np.float64))
    nll_reference = reference.nll[pick]
    mean, error = mean_and_error(nll - nll_reference, clusters)
    out["ppl_ratio"] = float(np.exp(mean))
    errors["ppl_ratio"] = out["ppl_ratio"] * error
    dp = np.exp(-nll) - np.exp(-nll_reference)
    put("dp_mean", dp)
    mean, error = mean_and_error(dp**2, clusters)
    out["dp_rms"] = sqrt(mean)
    errors["dp_rms"] = error / (2 * sqrt(mean)) if mean else 0.0
    out["dp_percentiles"] = {f"{at:g}": float(np.percentile(dp, at)) for at in DP_PERCENTILES} | {
        "min": float(dp.min()),
        "max": float(dp.max()),
    }
    return out, errors


def compare_layers(
    experts: npt.NDArray[np.uint16],
    expected: npt.NDArray[np.uint16],
    residuals: npt.NDArray[np.float32],
    reference: npt.NDArray[np.float32],
    dense: int,
) -> tuple[LayerScores, ...]:
    """Compare the layers of two models on the same tokens.

    Args:
        experts, expected: [layers with experts, tokens, experts per token] of model and reference.
        residuals, reference: [layers, sampled tokens, hidden].
        dense: number of dense layers, which come first.
    """
    out = []
    for layer in range(len(residuals)):
        difference = residuals[layer] - reference[layer]
        norm = float(np.linalg.norm(reference[layer])) or 1.0
        overlap = flips = None
        if layer >= dense:
            ours, theirs = experts[layer - dense], expected[layer - dense]
            shared = (ours[:, :, None] == theirs[:, None, :]).any(-1).sum(-1)
            overlap = float(shared.mean() / ours.shape[-1])
            flips = float((shared < ours.shape[-1]).mean())
        error = float(np.linalg.norm(difference)) / norm
        out.append(LayerScores(layer, overlap, flips, error))
    return tuple(out)


def domain_order(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Domains of all rows, in the order of the corpus."""
    return list(dict.fromkeys(name for each in rows for name in each.get("domains", {})))
