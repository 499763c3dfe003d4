"""What a recipe makes of a model, from the shapes alone: every array, its bits and bytes.

The converter writes exactly what the plan says, file headers first, so a plan's numbers are those
of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

from glmd.checkpoint.config import ModelConfig, QuantizedAs
from glmd.checkpoint.layout import Component, Weight, main_weights, mtp_weights
from glmd.checkpoint.weights import TensorSpec
from glmd.convert.recipes import Recipe

Choice = Callable[[Weight], QuantizedAs | None]

SHARD_BYTES = 5_000_000_000
"""The most tensor bytes in one file: 5 GB, as the hub and mlx-lm have it."""


@dataclass(frozen=True, slots=True)
class PlannedWeight:
    """A weight and how it is stored (`quantized` None: in bfloat16, or float32 if it must)."""

    weight: Weight
    quantized: QuantizedAs | None

    @property
    def parameters(self) -> int:
        """Before quantisation."""
        return prod(self.weight.shape)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The tensors that hold it: one, or `mx.quantize`'s weight, scales and biases."""
        name, path, shape = self.weight.name, self.weight.path, self.weight.shape
        if self.quantized is None:
            return (TensorSpec(name, "F32" if self.weight.keeps_float32 else "BF16", shape),)
        rows, columns = shape[:-1], shape[-1]
        groups = columns // self.quantized.group_size
        return (
            TensorSpec(name, "U32", (*rows, columns * self.quantized.bits // 32)),
            TensorSpec(f"{path}.scales", "BF16", (*rows, groups)),
            TensorSpec(f"{path}.biases", "BF16", (*rows, groups)),
        )

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the plan's table.

    Attributes:
        component: its name.
        bits: what its weights are stored in, such as "8", "bf16", "bf16, f32".
        parameters: their number.
        nbytes: of all arrays, scales and biases included.
    """

    component: str
    bits: str
    parameters: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters


@dataclass(frozen=True, slots=True)
class Plan:
    """All weights of a model as stored.

    Attributes:
        main: of the main model, in the order of the files.
        mtp: of the MTP layer; empty: without.
    """

    main: tuple[PlannedWeight, ...]
    mtp: tuple[PlannedWeight, ...] = ()


def plan_recipe(
    config: ModelConfig,
    recipe: Recipe,
    *,
    mtp: bool,
    own_embedding: bool = False,
    own_head: bool = False,
) -> Plan:
    """Plan what the converter would write.

    Args:
        config: the source's.
        recipe: the bits.
        mtp: with the MTP layer.
        own_embedding: the MTP layer's embedding differs from the main one, so is stored too.
        own_head: the same of its head.
    """
    layer = mtp_weights(config, own_embedding=own_embedding, own_head=own_head) if mtp else ()
    choose = recipe.quantization
    return Plan(_planned(main_weights(config), choose), _planned(layer, choose))


def plan_stored(config: ModelConfig, *, unquantized_mtp: bool = False) -> Plan:
    """Plan what an existing checkpoint holds, by what its own config.json says.

    Args:
        config: the checkpoint's.
        unquantized_mtp: it is in Hugging Face's layout and holds the MTP layer.
    """

    def choose(weight: Weight) -> QuantizedAs | None:
        if config.quantization is None or not weight.is_matrix:
            return None
        how = config.quantization.of(weight.path)
        return None if how is None or weight.shape[-1] % how.group_size else how

    main = _planned(main_weights(config), choose)
    if config.mtp is not None:
        table = config.mtp.quantization
        layer = mtp_weights(
            config,
            own_embedding=not config.mtp.shares_embedding,
            own_head=not config.mtp.shares_head,
        )
        return Plan(main, _planned(layer, lambda weight: table.get(weight.path)))
    if unquantized_mtp:
        return Plan(main, _planned(mtp_weights(config), lambda _: None))
    return Plan(main)


def lines(weights: Iterable[PlannedWeight]) -> list[Line]:
    """Sum up by component, in the order of `Component`."""
    by_component: dict[Component, list[PlannedWeight]] = {}
    for planned in weights:
        by_component.setdefault(planned.weight.component, []).append(planned)
    return [total(by_component[c], c.value) for c in Component if c in by_component]


def total(weights: Iterable[PlannedWeight], name: str) -> Line:
    """Sum up all of `weights` in one line."""
    weights = list(weights)
    kinds = sorted({_bits(planned) for planned in weights})
    return Line(
        component=name,
        bits=", ".join(kinds),
        parameters=sum(planned.parameters for planned in weights),
        nbytes=sum(planned.nbytes for planned in weights),
    )


def shard(
    weights: Iterable[PlannedWeight], limit: int = SHARD_BYTES
) -> list[tuple[PlannedWeight, ...]]:
    """Part `weights`, in order, into files of at most `limit` bytes of tensors each.

    A weight's tensors stay together; one that is larger than the limit gets a file of its own.
    """
    shards: list[list[PlannedWeight]] = [[]]
    filled = 0
    for planned in weights:
        if shards[-1] and filled + planned.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(planned)
        filled += planned.nbytes
    return [tuple(part) for part in shards]


def _planned(weights: Iterable[Weight], choose: Choice) -> tuple[PlannedWeight, ...]:
    return tuple(PlannedWeight(weight, choose(weight)) for weight in weights)


def _bits(planned: PlannedWeight) -> str:
    if planned.quantized is not None:
        return str(planned.quantized.bits)
    return "f32" if planned.weight.keeps_float32 else "bf16"
