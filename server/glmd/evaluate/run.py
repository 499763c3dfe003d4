"""Evaluation of checkpoints: a row of scores for each, against a reference if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from glmd.errors import CheckpointError
from glmd.evaluate.corpus import TokenSet
from glmd.evaluate.layer_pass import BATCH_ROWS, LayerReader
from glmd.evaluate.model_pass import Candidate, Pass, Progress
from glmd.evaluate.scores import LayerScores, TokenScores, compare_layers, row
from glmd.kv_cache.stored_keys import KVBits
from glmd.model.loader import choose_dtype


def evaluate(
    candidates: Sequence[Candidate],
    reference: Candidate | None,
    text: TokenSet,
    *,
    work: Path,
    on_progress: Progress,
    dtype: mx.Dtype | None = None,
    noise_floor: bool = True,
    contexts: Sequence[int] = (),
    kv_bits: Sequence[KVBits] = (),
) -> list[dict[str, Any]]:
    """Evaluate checkpoints, against a reference if there is one.

    Args:
        dtype: of activations; None: as `glmd serve` chooses.
        work: folder of the passes; see `glmd.evaluate.model_pass`.
        noise_floor: also evaluate the reference against itself, in the other precision and with
            other batches.
        contexts: for each, further rows of the tokens with at least so many tokens before them,
            up to the next.
        kv_bits: for each, a further row of each model, and of the reference, with its KV in so
            many bits.

    Returns:
        a row of the table for the reference, the noise floor and each candidate.

    Raises:
        CheckpointError: a checkpoint is damaged, or of another vocabulary or shape than the
            reference.
    """
    kind = dtype or choose_dtype("auto")
    rows: list[dict[str, Any]] = []
    if reference is None:
        for candidate in _with_kv_bits(candidates, kv_bits):
            one = Pass(candidate, text, kind, work)
            scores = one.run(on_progress)
            rows += _rows(candidate.name, one, scores, None, (), contexts)
        return rows
    base = Pass(reference, text, kind, work)
    for candidate in candidates:
        _check_comparable(candidate, base)
    expected = base.run(on_progress)
    same = TokenScores(
        expected.nll,
        expected.top,
        np.zeros_like(expected.nll),
        np.zeros_like(expected.nll),
        expected.accepted,
    )
    layers = compare_layers(base.experts, base.experts, base.residuals, base.residuals, base.dense)
    rows += _rows(f"{reference.name} (reference)", base, same, expected, layers, contexts)
    passes = [
        (candidate.name, Pass(candidate, text, kind, work, reference=base))
        for candidate in [
            *_with_kv_bits([reference], kv_bits)[1:],
            *_with_kv_bits(candidates, kv_bits),
        ]
    ]
    if noise_floor:
        other = mx.bfloat16 if kind == mx.float32 else mx.float32
        floor = Pass(reference, text, other, work, reference=base, rows=BATCH_ROWS // 3, mtp=False)
        floor.name = f"{reference.name} (noise floor)"
        passes.insert(0, (floor.name, floor))
    for name, one in passes:
        scores = one.run(on_progress)
        layers = compare_layers(
            one.experts, base.experts, one.residuals, base.residuals, base.dense
        )
        rows += _rows(name, one, scores, expected, layers, contexts)
    return rows


def _with_kv_bits(candidates: Sequence[Candidate], kv_bits: Sequence[KVBits]) -> list[Candidate]:
    """Each candidate, followed by itself with its KV in each number of bits."""
    return [
        each
        for one in candidates
        for each in (
            one,
            *(replace(one, name=f"{one.name}, {n}-bit KV", kv_bits=n) for n in kv_bits),
        )
    ]


def _rows(
    name: str,
    one: Pass,
    scores: TokenScores,
    reference: TokenScores | None,
    layers: tuple[LayerScores, ...],
    contexts: Sequence[int],
) -> list[dict[str, Any]]:
    sizes: dict[str, Any] = {"bits_per_weight": one.bits_per_weight, "nbytes": one.nbytes}
    kv = {"kv_bits": one.kv_bits}
    rows = [row(name, scores, reference, one.text, layers=layers, **sizes) | kv]
    positions = one.text.positions[one.text.scored]
    bounds = [*sorted(contexts), len(one.text) + 1]
    for start, end in pairwise(bounds):
        chosen = (positions >= start) & (positions < end)
        if chosen.any():
            label = f"{name}, context from {start}"
            part = row(label, scores, reference, one.text, chosen=chosen, **sizes)
            rows.append(part | kv | {"context": start})
    return rows


def _check_comparable(candidate: Candidate, base: Pass) -> None:
    ours, theirs = LayerReader(candidate.folder, mx.float32).config, base.reader.config
    for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "n_routed_experts", "num_experts_per_tok"
    ):  # fmt: skip
        if getattr(ours, name) != getattr(theirs, name):
            raise CheckpointError(
                f"{candidate.name}: {name} is {getattr(ours, name)}, but"
                f" {getattr(theirs, name)} in {base.name}. Compare checkpoints of one model.",
                file=str(candidate.folder),
            )
