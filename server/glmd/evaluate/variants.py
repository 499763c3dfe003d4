"""Quantised variants of a model beside the model itself, resumable layer by layer.

Stage 0 is the embedding, each layer is a stage, and the head is the last one. In each stage the
reference runs first, then each variant that differs from it by then. An interrupted run continues
with the variant at which it stopped: the reference's stage is complete when its JSON file exists,
a variant's when the file of its hidden states bears the stage's number, and KL of the rows so far
is kept beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import msgspec
import numpy as np

from glmd.checkpoint.config import QuantizedAs
from glmd.checkpoint.layout import Component, Weight, main_weights
from glmd.convert.refine import dequantize, quantize
from glmd.convert.weights import bounded_cache
from glmd.evaluate.corpus import TokenSet
from glmd.evaluate.drafts import log_softmax
from glmd.evaluate.layer_pass import (
    CACHE_BYTES,
    LOGITS_ROWS,
    Activations,
    Arrays,
    LayerReader,
    LayerRunner,
)
from glmd.utils.files import atomic_write, check_room

ROWS = 512
"""Tokens that run through a layer together."""

PRIOR_TOKENS = 16
"""Tokens of average input that each expert's importance begins with."""

Errors = dict[str, list[tuple[QuantizedAs, float]]]
"""By matrix: options and the error of each, Σ importance · (w − ŵ)²."""


class _Scores(msgspec.Struct):
    """KL of the first `rows` rows, a sum for each variant."""

    rows: int
    kl: list[float]


class VariantsRun:
    """One run of all tokens through the reference and its variants.

    Args:
        reader: of an unquantised checkpoint.
        work: folder of this run alone, which the caller deletes.
        variants: of each, the quantisation by module path, and whether scales are refined.
        importance: by path, mean squares of inputs; None: measure.
        options: by path, the quantisations whose errors are measured.

    Attributes:
        importance: by path, [columns] or [experts, columns].
        errors: by path, the error of each of `options`.
    """

    def __init__(
        self,
        reader: LayerReader,
        text: TokenSet,
        work: Path,
        variants: Sequence[tuple[Mapping[str, QuantizedAs], bool]],
        *,
        importance: Mapping[str, mx.array] | None = None,
        options: Mapping[str, Sequence[QuantizedAs]] | None = None,
    ) -> None:
        self.importance = dict(importance or {})
        self.errors: dict[str, dict[QuantizedAs, float]] = {}
        self._reader = reader
        self._text = text
        self._work = work
        self._options = options or {}
        self._shape = (len(text), reader.config.hidden_size, reader.dtype)
        self._runner = LayerRunner(text, reader.shape, reader.dtype, rows=ROWS, absorbed=True)
        self._weights: dict[int, list[Weight]] = {}
        for weight in main_weights(reader.config):
            if weight.is_matrix:
                self._weights.setdefault(self._stage_of(weight), []).append(weight)
        work.mkdir(parents=True, exist_ok=True)
        check_room(work / "h", self._missing_bytes(len(variants)))
        self._base = [Activations(work / f"base{i}.bin", *self._shape) for i in range(2)]
        self._variants = [
            _Variant(work, i, how, self._shape, refined=refined)
            for i, (how, refined) in enumerate(variants)
        ]

    def run(self, on_progress: Callable[[int, int], None]) -> list[float]:
        """Run what is missing, and return the mean KL of each variant."""
        head = self._reader.layers + 1
        done = self._read_stages()
        on_progress(max(done - 1, 0), head + 1)
        with bounded_cache(CACHE_BYTES):
            for stage in range(max(done - 1, 0), head):
                self._run_stage(stage, known=stage < done)
                mx.clear_cache()
                on_progress(stage + 1, head + 1)
            kl = self._compare(head, known=head < done)
        on_progress(head + 1, head + 1)
        return [total / len(self._text) for total in kl]

    @property
    def final(self) -> Activations:
        """The reference's hidden states behind its last layer, after `run`."""
        return self._base[self._reader.layers % 2]

    def _missing_bytes(self, variants: int) -> int:
        """Bytes of the files of hidden states that do not exist yet."""
        there = sum(file.stat().st_size for file in self._work.glob("*.bin"))
        rows, hidden, dtype = self._shape
        return max(0, (variants + 3) * rows * hidden * dtype.size - there)

    def _stage_of(self, weight: Weight) -> int:
        parts = weight.path.split(".")
        if parts[1:2] == ["layers"]:
            return int(parts[2]) + 1
        return 0 if weight.path == "model.embed_tokens" else self._reader.layers + 1

    # -- stages

    def _run_stage(self, stage: int, *, known: bool) -> None:
        """Run the embedding or a layer.

        Args:
            known: the reference's stage is complete.
        """
        reader = self._reader
        prefix = f"model.layers.{stage - 1}" if stage else "model.embed_tokens"
        arrays = reader.read(prefix + ".")
        mx.eval(arrays)
        before, after = self._base[(stage - 1) % 2], self._base[stage % 2]

        def part(own: Arrays) -> Any:
            return reader.layer(stage - 1, own) if stage else reader.embedding(own)

        if not known:
            module = part(arrays)
            taps = self._install_taps(module, prefix, stage)
            self._forward(stage, module, before, after)
            after.flush()
            self._keep(stage, arrays, taps)
            del module, taps
        plain: Any = None
        for variant in self._variants:
            if variant.stage == stage:
                continue
            changed = variant.arrays(arrays, self.importance)
            if changed is None and variant.states is None:
                continue
            if changed is None and plain is None:
                plain = part(arrays)
            module = plain if changed is None else part(changed)
            with variant.advance(stage) as target:
                self._forward(stage, module, variant.states or before, target)

    def _forward(self, stage: int, module: Any, source: Activations, target: Activations) -> None:
        if stage:
            self._runner.run(module, source, target)
        else:
            self._runner.embed(module, target)

    def _install_taps(self, module: Any, prefix: str, stage: int) -> dict[str, _InputTap]:
        """Put a tap on each of a layer's matrices whose importance is not known."""
        taps: dict[str, _InputTap] = {}
        for weight in self._weights[stage] if stage else ():
            if weight.path not in self.importance:
                experts = self._reader.config.n_routed_experts
                routed = weight.component is Component.ROUTED_EXPERTS
                path = weight.path.removeprefix(prefix + ".")
                taps[weight.path] = _install(module, path, experts if routed else None)
        return taps

    def _keep(self, stage: int, arrays: Arrays, taps: Mapping[str, _InputTap]) -> None:
        """Measure the errors of a stage's matrices, and keep the reference's results."""
        found = {path: tap.importance for path, tap in taps.items()}
        if stage == 0 and not self.importance:
            # Inputs are one-hot: all columns count alike, and only rows of the text's tokens.
            embedding = arrays["model.embed_tokens.weight"]
            found["model.embed_tokens"] = mx.ones(embedding.shape[-1])
            counts = np.bincount(self._text.tokens, minlength=embedding.shape[0])
            used = mx.array(counts > 0)[:, None]
            arrays = {"model.embed_tokens.weight": mx.where(used, embedding, 0)}
        self.importance |= found
        errors = {
            weight.path: [
                (how, _error(arrays[weight.name], how, self.importance[weight.path]))
                for how in dict.fromkeys(self._options[weight.path])
            ]
            for weight in self._weights.get(stage, ())
            if weight.path in self._options
        }
        self.errors |= {path: dict(each) for path, each in errors.items()}
        if found:
            mx.save_safetensors(str(self._work / f"{stage}.safetensors"), found)
        atomic_write(self._work / f"{stage}.json", msgspec.json.encode(errors))

    def _read_stages(self) -> int:
        """Read the results of the reference's complete stages, and return how many there are."""
        stage = 0
        while (file := self._work / f"{stage}.json").exists():
            errors = msgspec.json.decode(file.read_bytes(), type=Errors)
            self.errors |= {path: dict(each) for path, each in errors.items()}
            importance = self._work / f"{stage}.safetensors"
            if importance.exists():
                self.importance |= cast(Arrays, mx.load(str(importance)))
            stage += 1
        return stage

    # -- logits

    def _compare(self, stage: int, *, known: bool) -> list[float]:
        """Run norm and head, and return the variants' sums of KL."""
        reader, base, count = self._reader, self._base[(stage - 1) % 2], len(self._text)
        norm = reader.norm()
        arrays = reader.read("lm_head.")
        head = reader.head(arrays)
        if not known:
            taps = {}
            if "lm_head" not in self.importance:
                taps["lm_head"] = tap = _InputTap(head, None)
                for start in range(0, count, LOGITS_ROWS):
                    tap(norm(base.read(start, min(start + LOGITS_ROWS, count))))
            self._keep(stage, arrays, taps)
        heads = []
        for variant in self._variants:
            changed = variant.arrays(arrays, self.importance)
            heads.append(head if changed is None else reader.head(changed))
        file = self._work / "scores.json"
        scores = _Scores(0, [0.0] * len(heads))
        if file.exists():
            scores = msgspec.json.decode(file.read_bytes(), type=_Scores)
        for start in range(scores.rows, count, LOGITS_ROWS):
            end = min(start + LOGITS_ROWS, count)
            p = log_softmax(head(norm(base.read(start, end))))
            for i, (variant, own) in enumerate(zip(self._variants, heads, strict=True)):
                q = log_softmax(own(norm((variant.states or base).read(start, end))))
                scores.kl[i] += float((mx.exp(p) * (p - q)).sum())
            scores.rows = end
            atomic_write(file, msgspec.json.encode(scores))
        return scores.kl


class _Variant:
    """The model with some matrices quantised.

    Attributes:
        stage: the last complete stage.
        states: hidden states after it; None: still those of the reference.
    """

    def __init__(
        self,
        work: Path,
        index: int,
        how: Mapping[str, QuantizedAs],
        shape: tuple[int, int, mx.Dtype],
        *,
        refined: bool,
    ) -> None:
        self.stage: int | None = None
        self.states: Activations | None = None
        self._work = work
        self._index = index
        self._how = how
        self._shape = shape
        self._refined = refined
        stages = [int(file.stem.split("-")[1]) for file in work.glob(f"variant{index}-*.bin")]
        if stages:
            self.stage = max(stages)
            self.states = Activations(self._file(self.stage), *shape)

    def _file(self, stage: int) -> Path:
        return self._work / f"variant{self._index}-{stage}.bin"

    def arrays(self, arrays: Arrays, importance: Mapping[str, mx.array]) -> Arrays | None:
        """A part's arrays with those of the variant; None: the variant has none of them."""
        changed = {}
        for name, array in arrays.items():
            path = name.removesuffix(".weight")
            how = self._how.get(path)
            if how is not None:
                weights = importance.get(path) if self._refined else None
                changed[name] = dequantize(quantize(array, how, weights), how)
        return {**arrays, **changed} if changed else None

    @contextmanager
    def advance(self, stage: int) -> Iterator[Activations]:
        """Yield where to write a stage's hidden states, which then replace those before."""
        states = Activations(self._work / "partial.bin", *self._shape)
        yield states
        states.flush()
        states.rename(self._file(stage))
        if self.states is not None:
            self.states.delete()
        self.stage, self.states = stage, states


# -- importance and errors ------------------------------------------------------------------


class _InputTap:
    """A matrix's module that sums up the squares of its inputs."""

    def __init__(self, module: Any, experts: int | None) -> None:
        self.module = module
        self._experts = experts
        self.total: mx.array | None = None
        self.count: mx.array | float = 0.0

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
        if self._experts is None:
            # [..., columns], or [heads, rows, columns] of a matrix per head.
            square = mx.square(x.astype(mx.float32))
            headed = self.module.weight.ndim == 3
            total = square.sum(-2) if headed else square.reshape(-1, x.shape[-1]).sum(0)
            count: mx.array | float = square.size / total.size
        else:
            chosen = args[0].flatten()
            square = mx.square(x.astype(mx.float32)).squeeze(-2)
            square = mx.broadcast_to(square, (*args[0].shape, x.shape[-1]))
            one_hot = (chosen[None] == mx.arange(self._experts)[:, None]).astype(mx.float32)
            total = one_hot @ square.reshape(-1, x.shape[-1])
            count = one_hot.sum(-1, keepdims=True)
        self.total = total if self.total is None else self.total + total
        self.count = self.count + count
        mx.eval(self.total, self.count)
        out: mx.array = self.module(x, *args, **options)
        return out

    @property
    def importance(self) -> mx.array:
        """Sums of squares, [columns], or [stack, columns]."""
        assert self.total is not None
        if self._experts is None:
            return self.total
        average = self.total.sum(0) / mx.maximum(mx.array(self.count).sum(), 1)
        return self.total + PRIOR_TOKENS * average


def _install(module: Any, path: str, experts: int | None) -> _InputTap:
    *parents, name = path.split(".")
    for parent in parents:
        module = getattr(module, parent)
    tap = _InputTap(getattr(module, name), experts)
    setattr(module, name, tap)
    return tap


def _error(array: mx.array, how: QuantizedAs, importance: mx.array) -> float:
    """Σ importance · (w − ŵ)² with the scales of `mx.quantize`."""
    total = 0.0
    stack = array.reshape(-1, *array.shape[-2:])
    weights = mx.broadcast_to(importance[..., None, :], (stack.shape[0], 1, stack.shape[-1]))
    for matrix, weight in zip(stack, weights, strict=True):
        difference = dequantize(quantize(matrix, how), how) - matrix.astype(mx.float32)
        total += float((weight * mx.square(difference)).sum())
    return total
