"""Recipes: the bits of each weight, and the resulting arrays and sizes.

Plans are computed from the shapes in config.json. The converter writes exactly what a plan says,
file headers first, so a plan's numbers are those of the files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import msgspec

from glmd.checkpoint.config import Bits, ModelConfig, QuantizedAs
from glmd.checkpoint.layout import Component, Weight, main_weights, mtp_weights
from glmd.checkpoint.stored import StoredWeights
from glmd.checkpoint.weights import TensorSpec, quantized_specs
from glmd.errors import SettingsError
from glmd.utils.text import did_you_mean

GROUP_SIZE: Final = 64
"""Affine quantisation in groups of 64 costs half a bit per weight: a bf16 scale and bias each."""

SHARD_BYTES = 5_000_000_000
"""Maximum tensor bytes per file: 5 GB, as on the hub and in mlx-lm."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Bits of the routed experts and of other matrices, or of each matrix.

    The experts are nine tenths of the parameters, and each token uses four of sixty-four: their
    bits determine the model's size, the other matrices' bits its quality. The router and the norms
    stay in bfloat16 (MLX cannot quantise the router), the router's correction bias in float32.

    Attributes:
        experts: bits of the routed experts; None: bfloat16.
        others: bits of attention, embedding, head, shared experts, dense MLP and `eh_proj`.
        modules: quantisation by module path, in place of the above; others are unquantised.
        importance: safetensors file of input importances by module path, for `refine`. None:
            scales and biases are those of `mx.quantize`.
        search: how `modules` were found; None: not by a search.
    """

    name: str
    experts: Bits | None = None
    others: Bits | None = None
    modules: Mapping[str, QuantizedAs] | None = None
    importance: Path | None = None
    search: SearchResult | None = None

    def quantization(self, weight: Weight) -> QuantizedAs | None:
        """Quantisation of a weight; None: unquantised.

        As in mlx-lm, a matrix stays unquantised if its last dimension is not a multiple of the
        group size.
        """
        if self.modules is not None:
            named = self.modules.get(weight.path) if weight.is_matrix else None
            return None if named is None or weight.shape[-1] % named.group_size else named
        bits = self.experts if weight.component is Component.ROUTED_EXPERTS else self.others
        if bits is None or not weight.is_matrix or weight.shape[-1] % GROUP_SIZE:
            return None
        return QuantizedAs(bits=bits, group_size=GROUP_SIZE)

    @property
    def default(self) -> QuantizedAs | None:
        """Quantisation of most parameters: the top level of MLX's quantisation table."""
        if self.modules is not None:
            counts = Counter(self.modules.values())
            return counts.most_common(1)[0][0] if counts else None
        if self.experts is None:
            return None
        return QuantizedAs(bits=self.experts, group_size=GROUP_SIZE)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("mixed-8-3", experts=3, others=8),
        Recipe("mixed-8-4", experts=4, others=8),
        Recipe("mixed-8-5", experts=5, others=8),
        Recipe("mixed-8-6", experts=6, others=8),
        Recipe("uniform-4", experts=4, others=4),
        Recipe("uniform-5", experts=5, others=5),
        Recipe("uniform-6", experts=6, others=6),
        Recipe("uniform-8", experts=8, others=8),
        Recipe("bf16", experts=None, others=None),
    )
}

DEFAULT_RECIPE = "mixed-8-5"


class MeasuredOption(QuantizedAs, frozen=True, kw_only=True):
    """A component in one option: mean KL of the model with only this component quantised."""

    kl: float

    @property
    def quantized(self) -> QuantizedAs:
        """The option alone."""
        return QuantizedAs(self.bits, self.group_size, self.mode)


class DraftOption(MeasuredOption, frozen=True, kw_only=True):
    """The MTP layer with its routed experts in one option.

    Attributes:
        nbytes: of the layer.
        kl: mean KL of its drafts from those of the unquantised layer.
        acceptance: probability that a draft is accepted at temperature 1.
        loss, loss_error: how much lower it is than the unquantised layer's on the same tokens, and
            the standard error.
    """

    nbytes: int = msgspec.field(name="bytes")
    acceptance: float
    loss: float
    loss_error: float


class SearchedComponent(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Bits and sensitivity of one component.

    Attributes:
        layers: the first and the last; None: embedding or head.
        bits: as of `PlannedWeight.bits`.
        kl: predicted share in the model's mean KL.
        kl_at_4_bits: the same at 4 bits in groups of 64; None: that does not fit the shape.
        options: empty in a converted checkpoint.
    """

    component: str
    layers: tuple[int, int] | None
    parameters: int
    bits: str
    bits_per_weight: float
    kl: float
    kl_at_4_bits: float | None = None
    options: list[MeasuredOption] = []


class SearchedDrafts(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Bits and sensitivity of the MTP layer.

    Attributes:
        chosen: option of the routed experts; None: that of `mixed-8-5`, as none is known to keep
            the acceptance.
        reference: acceptance of the unquantised layer's drafts.
        options: empty in a converted checkpoint.
    """

    chosen: DraftOption | None
    reference: float
    options: list[DraftOption] = []


class SearchResult(msgspec.Struct, kw_only=True):
    """How a recipe was found; see docs/quality.md.

    Attributes:
        nbytes: of the main model.
        tokens: of the calibration text.
        allocation: name of the best allocation.
        predicted_kl: by the components' sensitivities.
        bound: no allocation of the size has a smaller prediction.
        measured_kl: mean KL of the whole on the calibration text, by name of the allocation.
        mtp: None: there is no MTP layer, or its acceptance was not measured.
    """

    bits_per_weight: float
    nbytes: int = msgspec.field(name="bytes")
    tokens: int
    allocation: str
    predicted_kl: float
    bound: float
    measured_kl: dict[str, float]
    components: list[SearchedComponent]
    mtp: SearchedDrafts | None = None

    @property
    def summary(self) -> SearchResult:
        """This without the options that were not chosen."""
        components = [msgspec.structs.replace(each, options=[]) for each in self.components]
        mtp = self.mtp and msgspec.structs.replace(self.mtp, options=[])
        return msgspec.structs.replace(self, components=components, mtp=mtp)


class RecipeFile(msgspec.Struct, kw_only=True):
    """A recipe as `glmd recipe search` writes it.

    Attributes:
        modules: quantisation by module path, of the MTP layer's too.
        importance: name of a safetensors file in the same folder; see `Recipe`.
        search: None: the recipe was not searched.
    """

    name: str
    modules: dict[str, QuantizedAs]
    importance: str | None = None
    search: SearchResult | None = None


def read_recipe(file: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        SettingsError: the file cannot be read, or is malformed.
    """
    try:
        read = msgspec.json.decode(file.read_bytes(), type=RecipeFile)
    except OSError as error:
        raise SettingsError(f"--recipe: {file} cannot be read: {error.strerror}.") from None
    except msgspec.MsgspecError as error:
        raise SettingsError(
            f"--recipe: {file}: {error}. Write it with `glmd recipe search`."
        ) from None
    importance = None if read.importance is None else file.parent / read.importance
    if importance is not None and not importance.is_file():
        raise SettingsError(f"--recipe: {file} needs {importance}, which is missing.")
    return Recipe(read.name, modules=read.modules, importance=importance, search=read.search)


def find_recipe(name: str) -> Recipe:
    """Return a recipe by name, or from a file.

    Raises:
        SettingsError: there is no such recipe; the message lists all.
    """
    if name in RECIPES:
        return RECIPES[name]
    if name.endswith(".json") or Path(name).expanduser().is_file():
        return read_recipe(Path(name).expanduser())
    hint = did_you_mean(name, RECIPES)
    raise SettingsError(f'no recipe "{name}"{hint} There are {", ".join(RECIPES)}.')


# -- plans ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlannedWeight:
    """A weight and its quantisation.

    None: bfloat16, or float32 for the correction bias.
    """

    weight: Weight
    quantized: QuantizedAs | None

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The stored tensors: one, or `mx.quantize`'s weight, scales and biases."""
        weight = self.weight
        if self.quantized is None:
            dtype = "F32" if weight.keeps_float32 else "BF16"
            return (TensorSpec(weight.name, dtype, weight.shape),)
        return quantized_specs(weight.path, weight.shape, self.quantized)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)

    @property
    def bits(self) -> str:
        """Such as "8", "5/32" (groups of 32 instead of 64), "mxfp4", "bf16" or "f32"."""
        if self.quantized is not None:
            return name_bits(self.quantized)
        return "f32" if self.weight.keeps_float32 else "bf16"


def name_bits(how: QuantizedAs) -> str:
    """Such as "8", "5/32" (groups of 32 instead of 64), or "mxfp4"."""
    if how.mode != "affine":
        return how.mode
    return f"{how.bits}" if how.group_size == GROUP_SIZE else f"{how.bits}/{how.group_size}"


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a plan's table.

    Attributes:
        bits: of the weights, such as "8" or "bf16, f32".
        parameters: number of weights before quantisation.
        nbytes: of all arrays, including scales and biases.
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
    """All weights of a model as stored, in the order of the files.

    Attributes:
        mtp: weights of the MTP layer; empty: no MTP layer.
    """

    main: tuple[PlannedWeight, ...]
    mtp: tuple[PlannedWeight, ...] = ()

    @property
    def all(self) -> tuple[PlannedWeight, ...]:
        return self.main + self.mtp


def plan_recipe(
    config: ModelConfig,
    recipe: Recipe,
    *,
    mtp: bool,
    own_embedding: bool = False,
    own_head: bool = False,
) -> Plan:
    """Plan a conversion.

    Args:
        config: of the source.
        mtp: include the MTP layer.
        own_embedding, own_head: the MTP layer's embedding or head differs from the main model's,
            so it is stored too.
    """
    layer = mtp_weights(config, own_embedding=own_embedding, own_head=own_head) if mtp else ()
    return Plan(
        _planned(main_weights(config), recipe.quantization), _planned(layer, recipe.quantization)
    )


def plan_stored(config: ModelConfig, stored: StoredWeights | None = None) -> Plan:
    """The plan of an existing checkpoint.

    Args:
        stored: its files; None: only config.json is known, and the quantisation table is taken at
            its word.
    """

    def quantization(weight: Weight) -> QuantizedAs | None:
        if stored is not None:
            return stored.quantization.get(weight.path)
        if config.quantization is None or not weight.is_matrix:
            return None
        how = config.quantization.of(weight.path)
        return None if how is None or weight.shape[-1] % how.group_size else how

    main = _planned(main_weights(config), quantization)
    if config.mtp is None if stored is None else not stored.mtp:
        return Plan(main)
    own_embedding = own_head = True
    table: Mapping[str, QuantizedAs] = {}
    if config.mtp is not None:
        table = config.mtp.quantization
        own_embedding, own_head = not config.mtp.shares_embedding, not config.mtp.shares_head
    elif stored is not None:
        own_embedding, own_head = stored.mtp_vocabulary
    layer = mtp_weights(config, own_embedding=own_embedding, own_head=own_head)
    return Plan(main, _planned(layer, lambda weight: table.get(weight.path)))


def _planned(
    weights: Iterable[Weight], quantization: Callable[[Weight], QuantizedAs | None]
) -> tuple[PlannedWeight, ...]:
    return tuple(PlannedWeight(weight, quantization(weight)) for weight in weights)


def lines(weights: Iterable[PlannedWeight]) -> list[Line]:
    """Sum up by component, in the order of `Component`."""
    by_component: dict[Component, list[PlannedWeight]] = {}
    for planned in weights:
        by_component.setdefault(planned.weight.component, []).append(planned)
    return [total(by_component[c], c.value) for c in Component if c in by_component]


def total(weights: Iterable[PlannedWeight], name: str = "") -> Line:
    """Sum up all of `weights` in one line."""
    weights = list(weights)
    return Line(
        component=name,
        bits=", ".join(sorted({planned.bits for planned in weights})),
        parameters=sum(prod(planned.weight.shape) for planned in weights),
        nbytes=sum(planned.nbytes for planned in weights),
    )


def shard(
    weights: Iterable[PlannedWeight], limit: int = SHARD_BYTES
) -> list[tuple[PlannedWeight, ...]]:
    """Divide `weights`, in order, into files of at most `limit` tensor bytes.

    A weight's tensors stay together; a weight larger than the limit has its own file.
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
