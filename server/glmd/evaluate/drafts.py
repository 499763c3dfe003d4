"""Drafts of the MTP layer: their acceptance, and what quantising the layer costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import numpy.typing as npt

from glmd.checkpoint.config import ModelConfig, QuantizedAs
from glmd.checkpoint.layout import Component, Weight, mtp_prefix, mtp_weights
from glmd.convert.recipes import DraftOption, PlannedWeight, find_recipe, total
from glmd.convert.refine import dequantize, quantize
from glmd.convert.weights import bounded_cache
from glmd.evaluate.corpus import Batch, TokenSet
from glmd.evaluate.layer_pass import (
    BATCH_ROWS,
    CACHE_BYTES,
    LOGITS_ROWS,
    Activations,
    Arrays,
    LayerReader,
    forward_batch,
)
from glmd.evaluate.scores import mean_and_error
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.mla import MLAShape
from glmd.model.mtp import MTPLayer
from glmd.utils.files import atomic_write

OTHERS = find_recipe("mixed-8-5")
"""Recipe of the layer's matrices beside the routed experts, which are a twentieth of it."""

MOST_LOSS = 0.001
"""Loss of acceptance, with its standard error added, that counts as none. A gain is noise and
counts as none, too, so few tokens do not mean few bits."""

Floats = npt.NDArray[np.float64]


class Drafts:
    """The MTP layer of a checkpoint that has one, run over whole samples.

    Args:
        head: the main model's.
        arrays: the layer's, unquantised; None: those in the files.

    Attributes:
        head: the layer's own head, or the main model's.
    """

    def __init__(
        self,
        reader: LayerReader,
        head: Any,
        text: TokenSet,
        shape: MLAShape,
        arrays: Arrays | None = None,
    ) -> None:
        weights = reader.mtp(arrays)
        assert weights is not None
        self.head = weights.shared_head.head if "head" in weights.shared_head else head
        self._text = text
        self._shape = shape
        self._tails = TailPool(1, shape.kv_width, reader.dtype)
        own = "embed_tokens" in weights
        self._layer = MTPLayer(
            weights,
            index=0,
            shape=shape,
            embed_tokens=weights.embed_tokens if own else reader.embedding(),
            lm_head=head,
        )

    def hidden(self, batch: Batch, final: mx.array) -> mx.array:
        """The layer's output before its head, [rows, hidden].

        Args:
            final: [rows, hidden], the main model's hidden states after its norm.
        """
        rows = forward_batch(self._text, batch, self._shape)
        successors = mx.array(self._text.successors[batch.start : batch.end])
        out = self._layer.forward(successors, final, rows, self._tails)
        mx.eval(out)
        return out


def acceptance(drafts: mx.array, logits: mx.array) -> Floats:
    """Probability at temperature 1 that each draft is accepted.

    NaN for a row without a next one.

    Args:
        drafts: [n, vocabulary], log-probabilities.
        logits: [n or n + 1, vocabulary], the main model's log-probabilities of these rows and the
            next.
    """
    count = min(drafts.shape[0], logits.shape[0] - 1)
    out = np.full(drafts.shape[0], np.nan)
    if count > 0:
        shared = mx.exp(mx.minimum(drafts[:count], logits[1 : count + 1])).sum(-1)
        out[:count] = np.asarray(shared)
    return out


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities in float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


# -- the layer in fewer bits ----------------------------------------------------------------


def mtp_modules(config: ModelConfig, experts: QuantizedAs | None) -> dict[str, QuantizedAs]:
    """Quantisation of the MTP layer's matrices by path.

    Args:
        experts: of the routed experts; None: by `OTHERS`, too.
    """
    planned = {w.path: _quantization(w, experts) for w in mtp_weights(config)}
    return {path: how for path, how in planned.items() if how is not None}


def _quantization(weight: Weight, experts: QuantizedAs | None) -> QuantizedAs | None:
    routed = weight.component is Component.ROUTED_EXPERTS
    return experts if routed and experts is not None else OTHERS.quantization(weight)


def draft_options(reader: LayerReader, options: Sequence[QuantizedAs]) -> list[QuantizedAs]:
    """The options that fit the routed experts of the MTP layer; empty: there is none."""
    if not reader.stored.mtp:
        return []
    columns = {
        weight.shape[-1]
        for weight in mtp_weights(reader.config)
        if weight.component is Component.ROUTED_EXPERTS
    }
    return [how for how in options if not any(count % how.group_size for count in columns)]


def choose_option(options: Sequence[DraftOption]) -> DraftOption | None:
    """The affine option of the fewest bytes that keeps the acceptance of drafts.

    Returns:
        None: there is none whose loss is known to be at most `MOST_LOSS`.
    """
    kept = [
        option
        for option in options
        if option.mode == "affine" and max(option.loss, 0) + option.loss_error <= MOST_LOSS
    ]
    return min(kept, key=lambda option: (option.nbytes, option.loss), default=None)


def measure_drafts(
    reader: LayerReader,
    text: TokenSet,
    final: Activations,
    work: Path,
    options: Sequence[QuantizedAs],
    on_progress: Callable[[int], None],
) -> list[DraftOption]:
    """Measure drafts with the MTP layer's routed experts in each option.

    The main model is the reference. A measurement that is interrupted continues with the option at
    which it stopped.

    Args:
        reader: of an unquantised checkpoint with an MTP layer.
        final: the reference's hidden states behind its last layer.
        work: folder of this measurement, which the caller deletes.
        options: of `draft_options`.
    """
    weights = list(mtp_weights(reader.config, own_embedding=False, own_head=False))
    file = work / "drafts.json"
    found: list[DraftOption] = []
    if file.exists():
        found = msgspec.json.decode(file.read_bytes(), type=list[DraftOption])
    norm, head = reader.norm(), reader.head()
    expected = Activations(work / "drafts.bin", len(text), reader.config.hidden_size, reader.dtype)
    with bounded_cache(CACHE_BYTES):
        drafts = Drafts(reader, head, text, reader.shape)
        reference_head = drafts.head
        for batch in text.batches(BATCH_ROWS) if not found else ():
            rows = norm(final.read(batch.start, batch.end))
            expected.write(batch.start, drafts.hidden(batch, rows))
        expected.flush()
        del drafts
        for how in options[len(found) :]:
            planned = [PlannedWeight(weight, _quantization(weight, how)) for weight in weights]
            drafts = Drafts(reader, head, text, reader.shape, _arrays(reader, planned))
            parts: list[Floats] = []
            for batch in text.batches(BATCH_ROWS):
                rows = norm(final.read(batch.start, batch.end))
                reference = expected.read(batch.start, batch.end)
                parts += _compare(
                    (rows, head),
                    (reference, reference_head),
                    (drafts.hidden(batch, rows), drafts.head),
                )
            del drafts
            kl, before, after = np.concatenate(parts, axis=1)[:, text.scored]
            loss, error = mean_and_error(before - after, text.sample_of[text.scored])
            found.append(
                DraftOption(
                    how.bits, how.group_size, how.mode,
                    nbytes=total(planned).nbytes, kl=float(kl.mean()),
                    acceptance=float(after.mean()), loss=loss, loss_error=error,
                )
            )  # fmt: skip
            atomic_write(file, msgspec.json.encode(found))
            on_progress(len(found))
    return found


Outputs = tuple[mx.array, Any]
"""Hidden states, [rows, hidden], and the head that makes logits of them."""


def _compare(main: Outputs, reference: Outputs, drafted: Outputs) -> Iterator[Floats]:
    """Compare drafts with the reference's, a few rows at a time.

    Yields:
        [3, rows]: KL divergence from the reference, acceptance of its drafts, and of the drafts.
    """
    for start in range(0, len(main[0]), LOGITS_ROWS):
        end = start + LOGITS_ROWS
        # Logits of the row behind tell whether the last draft is accepted.
        target = _log_probabilities(main, start, end + 1)
        p = _log_probabilities(reference, start, end)
        q = _log_probabilities(drafted, start, end)
        kl = np.asarray((mx.exp(p) * (p - q)).sum(-1))
        yield np.stack([kl, acceptance(p, target), acceptance(q, target)])


def _log_probabilities(outputs: Outputs, start: int, end: int) -> mx.array:
    hidden, head = outputs
    return log_softmax(head(hidden[start:end]))


def _arrays(reader: LayerReader, planned: Sequence[PlannedWeight]) -> Arrays:
    """The MTP layer's arrays, as quantised."""
    arrays = reader.read(mtp_prefix(reader.config) + ".")
    for weight, how in ((each.weight, each.quantized) for each in planned):
        if how is not None:
            array = arrays[weight.name]
            arrays[weight.name] = dequantize(quantize(array, how), how).astype(reader.dtype)
    return arrays
