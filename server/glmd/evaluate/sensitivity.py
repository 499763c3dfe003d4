"""Sensitivity of a model's components to quantisation, measured by streaming.

One pass over the reference does three things layer by layer, with each layer's weights read once:

- *importance*: the mean square of each input of each matrix, per expert for routed experts;
- *errors*: for each matrix and option, Σ importance · (w − ŵ)², the error of its output;
- *probes*: for each component (such as the key-value projections of layers 0 to 11), all tokens
  also run through the model with only this component quantised, coarsely and finely, so that its
  KL is measured.

KL would be proportional to the squared error of a smooth model; where errors make a router choose
other experts it grows like the error itself. So KL is taken as a power of the squared error, with
one exponent, and errors of components, which are independent, add up: the sum is of
KL ** (1 / exponent). (Adding up KL itself would overrate small errors: with the demo it predicts
0.17 for `mixed-8-5`, which has 0.11.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any, cast

import mlx.core as mx
import msgspec
import numpy as np

from glmd.checkpoint.config import QuantizedAs
from glmd.checkpoint.layout import Component, Weight, main_weights
from glmd.convert.refine import dequantize, quantize
from glmd.convert.weights import bounded_cache
from glmd.errors import CheckpointError
from glmd.evaluate.corpus import TokenSet
from glmd.evaluate.layer_pass import (
    CACHE_BYTES,
    LOGITS_ROWS,
    Activations,
    Arrays,
    LayerReader,
    LayerRunner,
)
from glmd.utils.files import atomic_write

NUMBERS, IMPORTANCE = "sensitivities.json", "importance.safetensors"
"""Files of kept sensitivities; the first is written last."""

PROBES = (QuantizedAs(bits=4, group_size=32), QuantizedAs(bits=8, group_size=32))
"""Quantisations of the two probes of a component."""

EXPONENTS = (0.25, 1.25)
"""Least and greatest exponent of KL over squared error: 0.5 where only flips of routers count, 1
without flips, less where KL saturates. Others are noise."""

PRIOR_TOKENS = 16
"""Tokens of average input that each expert's importance begins with."""

OPTIONS: tuple[QuantizedAs, ...] = (
    *(
        QuantizedAs(bits=bits, group_size=group_size)
        for bits in (2, 3, 4, 5, 6, 8)
        for group_size in (32, 64, 128)
    ),
    QuantizedAs(bits=4, group_size=32, mode="mxfp4"),
    QuantizedAs(bits=4, group_size=16, mode="nvfp4"),
)

_PARTS = {
    "q_a_proj": "query", "q_b_proj": "query", "kv_a_proj_with_mqa": "key-value latent",
    "embed_q": "key-value heads", "unembed_out": "key-value heads", "o_proj": "attention output",
}  # fmt: skip


@dataclass
class Group:
    """Matrices that are probed together.

    Attributes:
        kl: mean KL of the model with only these matrices quantised, for each of `PROBES`.
        layers: the first and the last layer, None for embedding and head.
    """

    component: str
    layers: tuple[int, int] | None
    weights: list[Weight] = field(default_factory=list)
    kl: tuple[float, float] = (0.0, 0.0)


class _Numbers(msgspec.Struct):
    kl: list[tuple[float, float]]
    errors: dict[str, list[tuple[QuantizedAs, float]]]


@dataclass
class Sensitivities:
    """Result of `measure`.

    Attributes:
        errors: for each matrix by path, the error of each of `OPTIONS` that fits its shape, and of
            `PROBES`.
        importance: by path, [columns] or [experts, columns].
    """

    groups: list[Group]
    errors: dict[str, dict[QuantizedAs, float]]
    importance: dict[str, mx.array]

    def save(self, folder: Path) -> None:
        """Keep the result for `read_sensitivities`."""
        mx.save_safetensors(str(folder / IMPORTANCE), self.importance)
        errors = {path: list(each.items()) for path, each in self.errors.items()}
        numbers = _Numbers([group.kl for group in self.groups], errors)
        atomic_write(folder / NUMBERS, msgspec.json.encode(numbers))

    @property
    def exponent(self) -> float:
        """Exponent of KL over squared error: the median of the components'."""
        found = []
        for group in self.groups:
            coarse, fine = (self._error(group, probe) for probe in PROBES)
            if fine and coarse > fine and min(group.kl) > 0:
                found.append(log(group.kl[0] / group.kl[1]) / log(coarse / fine))
        low, high = EXPONENTS
        return min(high, max(low, median(found))) if found else 1.0

    def cost(self, group: Group, weight: Weight, option: QuantizedAs, exponent: float) -> float:
        """Share of one quantised matrix in KL ** (1 / exponent)."""
        rates = [
            log(kl) / exponent - log(error)
            for kl, probe in zip(group.kl, PROBES, strict=True)
            if kl > 0 and (error := self._error(group, probe)) > 0
        ]
        rate = exp(sum(rates) / len(rates)) if rates else 0.0
        return rate * self.errors[weight.path][option]

    def _error(self, group: Group, option: QuantizedAs) -> float:
        return sum(self.errors[weight.path][option] for weight in group.weights)


def read_sensitivities(folder: Path, reader: LayerReader, bands: int) -> Sensitivities | None:
    """Read the result of `measure` that `Sensitivities.save` kept; None: there is none."""
    if not (folder / NUMBERS).exists():
        return None
    kept = msgspec.json.decode((folder / NUMBERS).read_bytes(), type=_Numbers)
    groups = groups_of(reader, bands)
    for group, kl in zip(groups, kept.kl, strict=True):
        group.kl = kl
    errors = {path: dict(each) for path, each in kept.errors.items()}
    importance = cast(Arrays, mx.load(str(folder / IMPORTANCE)))
    return Sensitivities(groups, errors, importance)


def groups_of(reader: LayerReader, bands: int) -> list[Group]:
    """Components of the main model; those of layers in up to `bands` bands of equal length."""
    layers = reader.layers
    bands = min(bands, layers)
    groups: dict[tuple[str, int], Group] = {}
    for weight in main_weights(reader.config):
        if not weight.is_matrix or not options_of(weight):
            continue
        name, layer = _component(weight), _layer_of(weight)
        band = -1 if layer is None else layer * bands // layers
        group = groups.setdefault((name, band), Group(name, None))
        group.weights.append(weight)
        if layer is not None:
            start = layer if group.layers is None else group.layers[0]
            group.layers = (start, layer)
    return list(groups.values())


def options_of(weight: Weight) -> list[QuantizedAs]:
    """The options that fit a matrix's shape; none for a matrix that cannot be probed."""
    if any(weight.shape[-1] % probe.group_size for probe in PROBES):
        return []
    return [option for option in OPTIONS if weight.shape[-1] % option.group_size == 0]


def _component(weight: Weight) -> str:
    part = weight.path.rsplit(".", 1)[-1]
    if weight.component is Component.ATTENTION:
        return f"attention: {_PARTS[part]}"
    if weight.component is Component.ROUTED_EXPERTS:
        return f"routed experts: {'down' if part == 'down_proj' else 'gate and up'}"
    return weight.component.value


def _layer_of(weight: Weight) -> int | None:
    parts = weight.path.split(".")
    return int(parts[2]) if parts[1:2] == ["layers"] else None


# -- importance -----------------------------------------------------------------------------


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


# -- measuring ------------------------------------------------------------------------------


class Variant:
    """The model with some matrices quantised, run beside the reference.

    Attributes:
        how: quantisation by module path.
        kl: sum of the tokens' KL, after the pass.
    """

    def __init__(
        self, name: str, how: Mapping[str, QuantizedAs], *, refined: bool, activations: Activations
    ) -> None:
        self.name = name
        self.how = how
        self.refined = refined
        self.kl = 0.0
        self._activations = activations
        self._started = False

    def arrays(self, arrays: Arrays, importance: Mapping[str, mx.array]) -> Arrays | None:
        """A part's arrays with those of the variant; None: the variant has none of them."""
        changed = {}
        for name, array in arrays.items():
            path = name.removesuffix(".weight")
            how = self.how.get(path)
            if how is not None:
                weights = importance.get(path) if self.refined else None
                changed[name] = dequantize(quantize(array, how, weights), how)
        return {**arrays, **changed} if changed else None

    def embed(self, runner: LayerRunner, embedding: Any) -> None:
        runner.embed(embedding, self._activations)
        self._started = True

    def run(self, runner: LayerRunner, layer: Any, base: Activations, *, changed: bool) -> None:
        if not changed and not self._started:
            return
        runner.run(layer, self._activations if self._started else base, self._activations)
        self._started = True

    def delete(self) -> None:
        """Delete the file of hidden states."""
        self._activations.delete()

    def hidden(self, base: Activations, start: int, end: int) -> mx.array:
        return (self._activations if self._started else base).read(start, end)


def run_variants(
    reader: LayerReader,
    text: TokenSet,
    variants: Iterable[Variant],
    work: Path,
    on_progress: Callable[[int, int], None],
    *,
    importance: dict[str, mx.array],
    observe: Callable[[Weight, mx.array], None] | None = None,
) -> None:
    """Run reference and variants through the model, and add up the variants' KL.

    Args:
        importance: filled for each layer, unless it is there.
        observe: called with each matrix of the reference once its importance is known.
    """
    variants = list(variants)
    runner = LayerRunner(text, reader.shape, reader.dtype, rows=512, absorbed=True)
    shape = (len(text), reader.config.hidden_size, reader.dtype)
    base = [Activations(work / f"base{i}.bin", *shape) for i in range(2)]
    weights: dict[int | None, list[Weight]] = {}
    for weight in main_weights(reader.config):
        if weight.is_matrix:
            weights.setdefault(_layer_of(weight), []).append(weight)
    steps = reader.layers + 2
    with bounded_cache(CACHE_BYTES):
        arrays = reader.read("model.embed_tokens.")
        runner.embed(reader.embedding(arrays), base[0])
        counts = np.bincount(text.tokens, minlength=reader.config.vocab_size)
        used = mx.array(counts.astype(np.float32))[:, None]
        embedding = arrays["model.embed_tokens.weight"]
        importance.setdefault("model.embed_tokens", mx.ones(embedding.shape[-1]))
        for variant in variants:
            changed = variant.arrays(arrays, importance)
            if changed is not None:
                variant.embed(runner, reader.embedding(changed))
        if observe is not None:
            present = mx.where(used > 0, embedding, 0)
            observe(weights[None][0], present)
        on_progress(1, steps)
        for index in range(reader.layers):
            before, after = base[index % 2], base[(index + 1) % 2]
            prefix = f"model.layers.{index}"
            arrays = reader.read(prefix + ".")
            mx.eval(arrays)
            layer = reader.layer(index, arrays)
            taps = {
                weight.path: _install(
                    layer,
                    weight.path.removeprefix(prefix + "."),
                    reader.config.n_routed_experts
                    if weight.component is Component.ROUTED_EXPERTS
                    else None,
                )
                for weight in weights[index]
                if weight.path not in importance
            }
            runner.run(layer, before, after)
            importance |= {path: tap.importance for path, tap in taps.items()}
            if observe is not None:
                for weight in weights[index]:
                    observe(weight, arrays[weight.name])
            del layer, taps
            plain: Any = None
            for variant in variants:
                changed = variant.arrays(arrays, importance)
                if changed is None and plain is None:
                    plain = reader.layer(index, arrays)
                module = plain
                if changed is not None:
                    module = reader.layer(index, changed)
                variant.run(runner, module, before, changed=changed is not None)
            mx.clear_cache()
            on_progress(index + 2, steps)
        _compare(reader, text, variants, base[reader.layers % 2], importance, observe, weights)
    for activations in base:
        activations.delete()
    on_progress(steps, steps)


def _compare(
    reader: LayerReader,
    text: TokenSet,
    variants: list[Variant],
    base: Activations,
    importance: dict[str, mx.array],
    observe: Callable[[Weight, mx.array], None] | None,
    weights: Mapping[int | None, list[Weight]],
) -> None:
    """Run norm and head, and add up the KL of all rows."""
    norm = reader.norm()
    arrays = reader.read("lm_head.")
    head = reader.head(arrays)
    spans = [
        (start, min(start + LOGITS_ROWS, len(text))) for start in range(0, len(text), LOGITS_ROWS)
    ]
    if "lm_head" not in importance:
        tap = _InputTap(head, None)
        for start, end in spans:
            tap(norm(base.read(start, end)))
        importance["lm_head"] = tap.importance
    if observe is not None:
        observe(weights[None][-1], arrays["lm_head.weight"])
    own = {}
    for variant in variants:
        changed = variant.arrays(arrays, importance)
        if changed is not None:
            own[variant.name] = reader.head(changed)
    for start, end in spans:
        p = _log_softmax(head(norm(base.read(start, end))))
        for variant in variants:
            rows = norm(variant.hidden(base, start, end))
            q = _log_softmax(own.get(variant.name, head)(rows))
            variant.kl += float((mx.exp(p) * (p - q)).sum())


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def measure(
    reader: LayerReader,
    text: TokenSet,
    work: Path,
    *,
    bands: int,
    on_progress: Callable[[int, int], None],
) -> Sensitivities:
    """Measure importances, errors of all options, and the KL of all components.

    Args:
        reader: of an unquantised checkpoint.
        bands: layers of a component are probed in so many parts.

    Raises:
        CheckpointError: the checkpoint is quantised.
    """
    if reader.config.quantization is not None:
        raise CheckpointError(
            f"{reader.folder} is quantised. Search recipes on the BF16 checkpoint.",
            file=str(reader.folder),
        )
    groups = groups_of(reader, bands)
    shape = (len(text), reader.config.hidden_size, reader.dtype)
    probes = [
        Variant(
            f"{group.component} {group.layers} {probe.bits}",
            dict.fromkeys((weight.path for weight in group.weights), probe),
            refined=False,
            activations=Activations(work / f"probe{i}-{probe.bits}.bin", *shape),
        )
        for i, group in enumerate(groups)
        for probe in PROBES
    ]
    importance: dict[str, mx.array] = {}
    errors: dict[str, dict[QuantizedAs, float]] = {}
    probed = {weight.path for group in groups for weight in group.weights}

    def observe(weight: Weight, array: mx.array) -> None:
        if weight.path in probed:
            options = {*options_of(weight), *PROBES}
            found = importance[weight.path]
            errors[weight.path] = {how: _error(array, how, found) for how in options}

    run_variants(reader, text, probes, work, on_progress, importance=importance, observe=observe)
    for group, coarse, fine in zip(groups, probes[::2], probes[1::2], strict=True):
        group.kl = (coarse.kl / len(text), fine.kl / len(text))
    for probe in probes:
        probe.delete()
    return Sensitivities(groups, errors, importance)


def _error(array: mx.array, how: QuantizedAs, importance: mx.array) -> float:
    """Σ importance · (w − ŵ)² with the scales of `mx.quantize`."""
    total = 0.0
    stack = array.reshape(-1, *array.shape[-2:])
    weights = mx.broadcast_to(importance[..., None, :], (stack.shape[0], 1, stack.shape[-1]))
    for matrix, weight in zip(stack, weights, strict=True):
        difference = dequantize(quantize(matrix, how), how) - matrix.astype(mx.float32)
        total += float((weight * mx.square(difference)).sum())
    return total
