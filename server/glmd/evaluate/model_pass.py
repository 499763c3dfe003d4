"""A pass of all tokens through a checkpoint, resumable layer by layer.

Each pass over a checkpoint has a folder in the work folder: the state, the hidden states before
and after the current layer, and the results. An interrupted pass goes on behind the last complete
layer; a complete one is not repeated. Of the reference are kept, per token, the chosen experts,
the logits of the most probable tokens with the exact log-sum of all, and hidden states of some
tokens behind each layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from glmd.checkpoint.layout import main_weights
from glmd.convert.weights import bounded_cache
from glmd.evaluate.corpus import Batch, TokenSet
from glmd.evaluate.drafts import Drafts, acceptance, log_softmax
from glmd.evaluate.layer_pass import (
    BATCH_ROWS,
    CACHE_BYTES,
    LOGITS_ROWS,
    Activations,
    LayerReader,
    LayerRunner,
)
from glmd.evaluate.scores import TokenScores
from glmd.kv_cache.stored_keys import KVBits
from glmd.utils.files import atomic_write, check_room

TOP_K = 2048
"""Logits kept of the reference per token: 1.6 GB for 100,000 tokens. KL takes all others as one
token, so it is at most `kl_bound` too small, and not at all where the vocabulary is smaller."""

RESIDUAL_TOKENS = 1024
"""Tokens whose hidden states behind each layer are kept: 0.4 GB of the published model."""

_VERSION = 1
"""Increased when results of earlier passes cannot be used."""

Progress = Callable[[str, int, int], None]
"""Called with the model's name, and units of work done and in all."""


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to evaluate: the name that the user gave, its folder, and the bits of its KV."""

    name: str
    folder: Path
    kv_bits: KVBits = 16


class Pass:
    """One pass of all tokens through a checkpoint.

    Args:
        reference: compare with this pass, which is complete before `run`; None: compare with
            none, and keep what others can be compared with.
        rows: tokens that run through a layer together.
        mtp: score the MTP layer, if there is one.
    """

    def __init__(
        self,
        candidate: Candidate,
        text: TokenSet,
        dtype: mx.Dtype,
        work: Path,
        *,
        reference: Pass | None = None,
        rows: int = BATCH_ROWS,
        mtp: bool = True,
    ) -> None:
        self.name = candidate.name
        self.reader = LayerReader(candidate.folder, dtype)
        self.kv_bits = candidate.kv_bits
        self._shape = replace(self.reader.shape, kv_bits=candidate.kv_bits)
        self.text = text
        self._dtype = dtype
        self._rows = rows
        self._mtp = mtp
        self._reference = reference
        against = None if reference is None else reference.folder.name
        kv = candidate.kv_bits
        settings = [_VERSION, str(dtype), rows, mtp, kv, TOP_K, text.digest, against]
        self.folder: Path = work / pass_key(candidate.folder, settings)
        config = self.reader.config
        self.dense = min(config.first_k_dense_replace, config.num_hidden_layers)
        count = min(RESIDUAL_TOKENS, len(text))
        self._sampled = np.linspace(0, len(text) - 1, count).astype(np.int64)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / sum(prod(w.shape) for w in main_weights(self.reader.config))

    @property
    def nbytes(self) -> int:
        """Bytes of the main model's arrays in the files."""
        return sum(tensor.nbytes for tensor in self.reader.stored.main.values())

    @property
    def experts(self) -> npt.NDArray[np.uint16]:
        """[layers with experts, tokens, experts per token]"""
        config = self.reader.config
        shape = (
            config.num_hidden_layers - self.dense, len(self.text), config.num_experts_per_tok
        )  # fmt: skip
        return self._array("experts.bin", np.uint16, shape)

    @property
    def residuals(self) -> npt.NDArray[np.float32]:
        """[layers, sampled tokens, hidden]"""
        config = self.reader.config
        shape = (config.num_hidden_layers, len(self._sampled), config.hidden_size)
        return self._array("residuals.bin", np.float32, shape)

    def _array(self, name: str, kind: type[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        file = self.folder / name
        return np.memmap(file, kind, "r+" if file.exists() else "w+", shape=shape)

    # -- layers

    def run(self, on_progress: Progress) -> TokenScores:
        """Run what is missing, and return the scores.

        Raises:
            CheckpointError: the checkpoint is damaged, or the disk is full.
        """
        results = self.folder / "scores.npz"
        if results.exists():
            return _load_scores(results)
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.reader.config
        layers = config.num_hidden_layers
        check_room(self.folder / "h", 2 * len(self.text) * config.hidden_size * self._dtype.size)
        runner = LayerRunner(self.text, self._shape, self._dtype, self._rows)
        hidden = [
            Activations(self.folder / f"h{i}.bin", len(self.text), config.hidden_size, self._dtype)
            for i in range(2)
        ]
        state = self.folder / "state.json"
        done = json.loads(state.read_bytes())["stages"] if state.exists() else 0
        total = (layers + 2) * len(self.text)
        on_progress(self.name, done * len(self.text), total)
        with bounded_cache(CACHE_BYTES):
            for stage in range(done, layers + 1):
                if stage == 0:
                    runner.embed(self.reader.embedding(), hidden[0])
                else:
                    before, after = hidden[(stage - 1) % 2], hidden[stage % 2]
                    self._run_layer(runner, stage - 1, before, after, on_progress, total)
                hidden[stage % 2].flush()
                atomic_write(state, json.dumps({"stages": stage + 1}).encode())
                on_progress(self.name, (stage + 1) * len(self.text), total)
                mx.clear_cache()
            scores = self._score(runner, hidden[layers % 2], on_progress, total)
        _save_scores(results, scores)
        for activations in hidden:
            activations.delete()
        return scores

    def _run_layer(
        self,
        runner: LayerRunner,
        index: int,
        before: Activations,
        after: Activations,
        on_progress: Progress,
        total: int,
    ) -> None:
        layer = self.reader.layer(index)
        experts, residuals = self.experts, self.residuals

        def observe(batch: Batch, h: mx.array, chosen: mx.array | None) -> None:
            if chosen is not None:
                ids = np.asarray(chosen.astype(mx.uint16))
                experts[index - self.dense, batch.start : batch.end] = ids
            inside = (self._sampled >= batch.start) & (self._sampled < batch.end)
            if inside.any():
                rows = mx.array(self._sampled[inside] - batch.start)
                residuals[index, inside] = np.asarray(h[rows].astype(mx.float32))
            on_progress(self.name, (index + 1) * len(self.text) + batch.end, total)

        runner.run(layer, before, after, observe)

    # -- logits

    def _score(
        self,
        runner: LayerRunner,
        hidden: Activations,
        on_progress: Progress,
        total: int,
    ) -> TokenScores:
        reader, text, reference = self.reader, self.text, self._reference
        norm, head = reader.norm(), reader.head()
        with_drafts = self._mtp and reader.stored.mtp
        drafts = Drafts(reader, head, text, self._shape) if with_drafts else None
        kept = KeptLogits(self if reference is None else reference)
        columns: dict[str, list[npt.NDArray[Any]]] = {}
        for batch in runner.batches:
            final = norm(hidden.read(batch.start, batch.end))
            states = drafts.hidden(batch, final) if drafts is not None else None
            for start in range(batch.start, batch.end, LOGITS_ROWS):
                end = min(start + LOGITS_ROWS, batch.end)
                # One row more, as drafts are compared with the main model's next row.
                ahead = min(end + 1, batch.end)
                logits = log_softmax(head(final[start - batch.start : ahead - batch.start]))
                span = slice(start, end)
                found = _next_tokens(logits[: end - start], text.successors[span])
                if reference is None:
                    kept.keep(span, logits[: end - start])
                else:
                    found |= kept.compare(span, logits[: end - start])
                if drafts is not None and states is not None:
                    rows = states[start - batch.start : end - batch.start]
                    found["accepted"] = acceptance(log_softmax(drafts.head(rows)), logits)
                for name, values in found.items():
                    columns.setdefault(name, []).append(values)
            on_progress(self.name, (reader.layers + 1) * len(text) + batch.end, total)
        joined = {name: np.concatenate(parts) for name, parts in columns.items()}
        if "accepted" in joined:
            joined["accepted"][text.starts[1:] - 1] = np.nan
        return TokenScores(**{name: values[text.scored] for name, values in joined.items()})


class KeptLogits:
    """Logits of the reference's most probable tokens, relative to the log-sum.

    Files of the reference's pass: `top_ids` and `top_logits` [tokens, k], and `tails` [tokens], the
    log of the mass of all other tokens.
    """

    def __init__(self, reference: Pass) -> None:
        size = min(TOP_K, reference.reader.config.vocab_size)
        shape = (len(reference.text), size)
        self._whole = size == reference.reader.config.vocab_size
        self._ids: npt.NDArray[np.int32] = reference._array("top_ids.bin", np.int32, shape)
        self._values: npt.NDArray[np.float32] = reference._array(
            "top_logits.bin", np.float32, shape
        )
        self._tails: npt.NDArray[np.float32] = reference._array("tails.bin", np.float32, shape[:1])

    def keep(self, span: slice, logits: mx.array) -> None:
        """Keep rows of log-probabilities, [rows, vocabulary]."""
        size = self._ids.shape[1]
        ids = mx.argpartition(-logits, kth=size - 1, axis=-1)[:, :size]
        self._ids[span] = np.asarray(ids.astype(mx.int32))
        self._values[span] = np.asarray(mx.take_along_axis(logits, ids, axis=-1))
        self._tails[span] = np.asarray(self._tail(logits, ids))

    def _tail(self, logits: mx.array, ids: mx.array) -> mx.array:
        """The log of the mass beyond the tokens `ids`: [rows]."""
        others = mx.put_along_axis(logits, ids, mx.array(-mx.inf), axis=-1)
        return mx.logsumexp(others, axis=-1)

    def compare(self, span: slice, logits: mx.array) -> dict[str, npt.NDArray[np.float64]]:
        """KL divergence of log-probabilities from the kept ones, and its bound.

        With p the reference, the tokens beyond the kept count as one, of mass `tail` under p and
        `other` under q. By the log-sum inequality this is at most the KL of all tokens; it is
        short by tail · KL(p/tail ‖ q/other) over these tokens, where p is at most the least kept
        probability, and q at least the least of all.
        """
        ids = mx.array(self._ids[span])
        p = mx.array(self._values[span])
        q = mx.take_along_axis(logits, ids, axis=-1)
        kl = (mx.exp(p) * (p - q)).sum(-1)
        bound = mx.zeros_like(kl)
        if not self._whole:
            tail, other = mx.array(self._tails[span]), self._tail(logits, ids)
            kl = kl + mx.exp(tail) * (tail - other)
            largest = mx.minimum(p.min(-1) - tail, 0)
            bound = mx.exp(tail) * mx.maximum(largest - (logits.min(-1) - other), 0)
        return {
            "kl": np.asarray(mx.maximum(kl, 0)).astype(np.float64),
            "kl_bound": np.asarray(bound).astype(np.float64),
        }


def _next_tokens(
    logits: mx.array, successors: npt.NDArray[np.int32]
) -> dict[str, npt.NDArray[Any]]:
    nll = -mx.take_along_axis(logits, mx.array(successors)[:, None], axis=-1)[:, 0]
    top = mx.argmax(logits, axis=-1)
    return {
        "nll": np.asarray(nll).astype(np.float64),
        "top": np.asarray(top).astype(np.int64),
    }


def pass_key(folder: Path, settings: list[Any]) -> str:
    """Identifies a pass by its settings and the checkpoint's files."""
    files = sorted((*folder.glob("*.safetensors"), folder / "config.json"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = json.dumps([str(folder.resolve()), stats, settings])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _save_scores(file: Path, scores: TokenScores) -> None:
    partial = file.with_name(f".{file.name}")  # .npz, as np.savez would append it
    columns = {name: getattr(scores, name) for name in TokenScores.__dataclass_fields__}
    np.savez(partial, **{name: value for name, value in columns.items() if value is not None})
    partial.replace(file)


def _load_scores(file: Path) -> TokenScores:
    with np.load(file) as stored:
        return TokenScores(**{name: stored[name] for name in stored.files})
