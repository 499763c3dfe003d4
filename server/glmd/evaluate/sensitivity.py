"""Sensitivity of a model's components to quantisation, measured by streaming.

One pass over the reference does three things layer by layer, with each layer's weights read once:

- *importance*: the mean square of each input of each matrix, per expert for routed experts;
- *errors*: for each matrix and option, Σ importance · (w − ŵ)², the error of its output;
- *probes*: for each component (such as the key-value projections of layers 0 to 11), all tokens
  also run through the model with only this component quantised, coarsely and finely, so that its
  KL is measured.

The MTP layer has no KL: its drafts are verified. Its sensitivity is the acceptance of drafts.

KL would be proportional to the squared error of a smooth model; where errors make a router choose
other experts it grows like the error itself. So KL is taken as a power of the squared error, with
one exponent, and errors of components, which are independent, add up: the sum is of
KL ** (1 / exponent). (Adding up KL itself would overrate small errors: with the demo it predicts
0.17 for `mixed-8-5`, which has 0.11.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import exp, log
from pathlib import Path
from statistics import median
from typing import cast

import mlx.core as mx
import msgspec

from glmd.checkpoint.config import QuantizedAs
from glmd.checkpoint.layout import Component, Weight, main_weights
from glmd.convert.recipes import DraftOption
from glmd.errors import CheckpointError
from glmd.evaluate.corpus import TokenSet
from glmd.evaluate.drafts import draft_options, measure_drafts
from glmd.evaluate.layer_pass import Arrays, LayerReader
from glmd.evaluate.variants import VariantsRun
from glmd.utils.files import atomic_write

NUMBERS, IMPORTANCE = "sensitivities.json", "importance.safetensors"
"""Files of kept sensitivities; the first is written last."""

PROBES = (QuantizedAs(bits=4, group_size=32), QuantizedAs(bits=8, group_size=32))
"""Quantisations of the two probes of a component."""

EXPONENTS = (0.25, 1.25)
"""Least and greatest exponent of KL over squared error: 0.5 where only flips of routers count, 1
without flips, less where KL saturates. Others are noise."""

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
    drafts: list[DraftOption]


@dataclass
class Sensitivities:
    """Result of `measure`.

    Attributes:
        errors: for each matrix by path, the error of each of `OPTIONS` that fits its shape, and of
            `PROBES`.
        importance: by path, [columns] or [experts, columns].
        drafts: of the MTP layer, with its routed experts in each of `OPTIONS` that fits.
    """

    groups: list[Group]
    errors: dict[str, dict[QuantizedAs, float]]
    importance: dict[str, mx.array]
    drafts: list[DraftOption]

    def save(self, folder: Path) -> None:
        """Keep the result for `read_sensitivities`."""
        mx.save_safetensors(str(folder / IMPORTANCE), self.importance)
        errors = {path: list(each.items()) for path, each in self.errors.items()}
        numbers = _Numbers([group.kl for group in self.groups], errors, self.drafts)
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
    return Sensitivities(groups, errors, importance, kept.drafts)


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


# -- measuring ------------------------------------------------------------------------------


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
        work: folder of this measurement, which continues where it was interrupted. The caller
            deletes it.
        bands: layers of a component are probed in so many parts.

    Raises:
        CheckpointError: the checkpoint is quantised, or there is too little room on the disk.
    """
    if reader.config.quantization is not None:
        raise CheckpointError(
            f"{reader.folder} is quantised. Search recipes on the BF16 checkpoint.",
            file=str(reader.folder),
        )
    groups = groups_of(reader, bands)
    probes = [
        (dict.fromkeys((weight.path for weight in group.weights), probe), False)
        for group in groups
        for probe in PROBES
    ]
    options = {
        weight.path: (*options_of(weight), *PROBES) for group in groups for weight in group.weights
    }
    run = VariantsRun(reader, text, work, probes, options=options)
    of_drafts = draft_options(reader, OPTIONS)
    total = reader.layers + 2 + len(of_drafts)
    kl = run.run(lambda done, stages: on_progress(done, total))
    for group, coarse, fine in zip(groups, kl[::2], kl[1::2], strict=True):
        group.kl = (coarse, fine)
    drafts = []
    if of_drafts:
        drafts = measure_drafts(
            reader, text, run.final, work, of_drafts,
            lambda done: on_progress(reader.layers + 2 + done, total),
        )  # fmt: skip
    return Sensitivities(groups, run.errors, run.importance, drafts)
