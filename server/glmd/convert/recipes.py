"""Which bits each weight gets: the recipes, by name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Final

from glmd.checkpoint.config import Bits, QuantizedAs
from glmd.checkpoint.layout import Component, Weight
from glmd.errors import SettingsError

GROUP_SIZE: Final = 64
"""Affine quantisation at group 64 costs half a bit per weight: a bf16 scale and bias per group."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Bits for the routed experts, and for every other matrix.

    The experts are nine tenths of the parameters, and each token reads four of sixty-four: their
    bits decide the size of the model, the other matrices' its quality. The router and the norms
    stay bfloat16 (MLX's router gate has no quantised form) and the router's correction bias
    float32.

    Attributes:
        name: as the command line knows it.
        experts: bits of the routed experts; None: bfloat16.
        others: bits of attention, embedding, head, shared experts, dense MLP and `eh_proj`.
    """

    name: str
    experts: Bits | None
    others: Bits | None

    def quantization(self, weight: Weight) -> QuantizedAs | None:
        """How `weight` is stored; None: as it is.

        A matrix whose last dimension is not a multiple of the group stays unquantised, as in
        mlx-lm.
        """
        bits = self.experts if weight.component is Component.ROUTED_EXPERTS else self.others
        if bits is None or not weight.is_matrix or weight.shape[-1] % GROUP_SIZE:
            return None
        return QuantizedAs(bits=bits, group_size=GROUP_SIZE)

    @property
    def default(self) -> QuantizedAs | None:
        """What most parameters get: the top level of MLX's quantisation table."""
        if self.experts is None:
            return None
        return QuantizedAs(bits=self.experts, group_size=GROUP_SIZE)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
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


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        SettingsError: there is none; the message has the nearest name and all of them.
    """
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise SettingsError(f'no recipe "{name}"{hint} There are {", ".join(RECIPES)}.')
