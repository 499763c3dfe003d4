"""Contents and sizes of a checkpoint: for `glmd inspect`, and for its model card.

Reads only config.json and file headers; does not import mlx.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from glmd.checkpoint.config import RECOMMENDED, load_config, read_json_object
from glmd.checkpoint.stored import StoredWeights, read_weights
from glmd.convert.recipes import (
    DEFAULT_RECIPE,
    Line,
    Plan,
    PlannedWeight,
    Recipe,
    SearchResult,
    find_recipe,
    lines,
    plan_recipe,
    plan_stored,
    total,
)
from glmd.errors import CheckpointError, SettingsError
from glmd.utils.text import gb, gib


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes of a checkpoint's arrays, in the files and by its config.json.

    `mtp_bytes` is 0 if there is no MTP layer, as `no_drafts` says.
    """

    main_bytes: int
    main_planned: int
    mtp_bytes: int
    mtp_planned: int
    no_drafts: str | None
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, weights: StoredWeights) -> Stored:
        plan = plan_stored(weights.config, weights)
        return cls(
            main_bytes=sum(tensor.nbytes for tensor in weights.main.values()),
            main_planned=total(plan.main).nbytes,
            mtp_bytes=sum(tensor.nbytes for tensor in weights.mtp.values()),
            mtp_planned=total(plan.mtp).nbytes,
            no_drafts=weights.no_drafts,
            warnings=weights.warnings,
        )


@dataclass(frozen=True, slots=True)
class Inspection:
    """A plan as a table, and the bytes in the files.

    Attributes:
        recipe: of the plan; None: the plan is that of a quantised checkpoint.
        components: lines of the main model.
        main: their sum.
        mtp: the MTP layer; None: no MTP layer.
        mtp_vocabulary: the layer's embedding and head, stored only if they differ from the main
            model's; None: included in `mtp`.
        stored: None: only a config.json was given.
        search: how the recipe was found; None: not by a search.
    """

    recipe: str | None
    components: tuple[Line, ...]
    main: Line
    mtp: Line | None
    mtp_vocabulary: Line | None
    stored: Stored | None
    search: SearchResult | None


def inspect(path: Path, recipe: str | None = None) -> Inspection:
    """Plan a checkpoint.

    Args:
        path: its folder, or its config.json.
        recipe: for an unquantised checkpoint; None: the default recipe.

    Raises:
        CheckpointError: the configuration or the files are damaged or not supported.
        SettingsError: there is no such recipe, or the checkpoint is quantised already.
    """
    config = load_config(path)
    has_files = path.is_dir() and any(path.glob("*.safetensors"))
    weights = read_weights(path, config) if has_files else None
    stored = Stored.of(weights) if weights is not None else None
    if config.quantization is not None:
        if recipe is not None:
            raise SettingsError(f"{path} is quantised already, so --recipe cannot be used.")
        return _tabulate(None, plan_stored(config, weights), None, stored, _read_search(path))
    chosen = find_recipe(recipe or DEFAULT_RECIPE)
    has_mtp = stored.mtp_bytes > 0 if stored else config.num_nextn_predict_layers > 0
    plan = plan_recipe(config, chosen, mtp=has_mtp)
    own = plan_recipe(config, chosen, mtp=has_mtp, own_embedding=True, own_head=True)
    vocabulary = [planned for planned in own.mtp if planned not in plan.mtp]
    extra = total(vocabulary, "MTP vocabulary") if vocabulary else None
    return _tabulate(chosen.name, plan, extra, stored, chosen.search)


def _read_search(path: Path) -> SearchResult | None:
    """How the recipe of a converted checkpoint was found, as its config.json says."""
    file = path / "config.json" if path.is_dir() else path
    described = read_json_object(file).get("glmd") or {}
    try:
        return msgspec.convert(described.get("search"), SearchResult | None)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{file}: glmd.search: {error}.", file=str(file)) from None


def _tabulate(
    recipe: str | None,
    plan: Plan,
    vocabulary: Line | None,
    stored: Stored | None,
    search: SearchResult | None,
) -> Inspection:
    return Inspection(
        recipe=recipe,
        components=tuple(lines(plan.main)),
        main=total(plan.main, "main model"),
        mtp=total(plan.mtp, "MTP layer") if plan.mtp else None,
        mtp_vocabulary=vocabulary,
        stored=stored,
        search=search,
    )


_CARD = """\
---
library_name: mlx
pipeline_tag: text-generation
{base_model}tags:
- mlx
---

# {source}, {recipe}

Made by `glmd convert` from {source} with the recipe `{recipe}` ({bits}): {bits_per_weight:.3f} \
bits per weight.

| Component | Parameters | Bits | Bytes | GB | GiB | Bits per weight |
| --- | --: | --- | --: | --: | --: | --: |
{rows}

Bytes include scales and biases; 1 GB is 10^9 bytes, 1 GiB 2^30. Bits per weight are 8 × bytes ÷ \
parameters. Compared with BF16:

{ratios}

{mtp}

## Use

Recommended sampling, also in `generation_config.json`: temperature {sampling.temperature}, top_k \
{sampling.top_k}, top_p {sampling.top_p}, min_p {sampling.min_p}, no repeat penalty. The chat \
template defaults to `enable_thinking = true` and `clear_thinking = false`.

The main files load in plain mlx-lm. `glmd serve` serves this folder through the OpenAI and \
Anthropic APIs.
"""

_WITH_MTP = """\
The multi-token-prediction (MTP) layer is in `mtp.safetensors`, described in config.json under \
`glmd.mtp`. Plain mlx-lm does not read it; glmd drafts with it."""

_WITHOUT_MTP = "There is no multi-token-prediction (MTP) layer."


def model_card(source: str, recipe: Recipe, plan: Plan, unquantized: Plan) -> str:
    """The text of README.md.

    Args:
        source: the hub id or folder name of the converted checkpoint.
        plan: of the weights written.
        unquantized: plan of the same weights, unquantised.
    """
    main = total(plan.main, "**main model**")
    rows = [*lines(plan.main), main]
    ratios = [f"- Main model: {_ratio(unquantized.main, plan.main)}."]
    if plan.mtp:
        rows += [total(plan.mtp, "**MTP layer**"), total(plan.all, "**all**")]
        ratios.append(f"- With the MTP layer: {_ratio(unquantized.all, plan.all)}.")
    return _CARD.format(
        base_model=f"base_model: {source}\n" if source.count("/") == 1 else "",
        source=source,
        recipe=recipe.name,
        bits=_describe(recipe),
        bits_per_weight=main.bits_per_weight,
        rows="\n".join(map(_row, rows)),
        ratios="\n".join(ratios),
        mtp=_WITH_MTP if plan.mtp else _WITHOUT_MTP,
        sampling=RECOMMENDED,
    )


def _describe(recipe: Recipe) -> str:
    if recipe.modules is not None:
        refined = ", scales and biases fitted to calibration text" if recipe.importance else ""
        return f"each matrix with bits of its own{refined}"
    if recipe.experts is None:
        return "unquantised"
    if recipe.experts == recipe.others:
        return f"every matrix in {recipe.experts} bits, affine, groups of 64"
    return (
        f"routed experts in {recipe.experts} bits, other matrices in {recipe.others}, affine,"
        " groups of 64; router and norms unquantised"
    )


def _ratio(unquantized: Iterable[PlannedWeight], written: Iterable[PlannedWeight]) -> str:
    before, after = total(unquantized).nbytes, total(written).nbytes
    return f"{gb(before)} GB → {gb(after)} GB, {before / after:.2f}×"


def _row(line: Line) -> str:
    cells = (
        line.component,
        f"{line.parameters:,}",
        line.bits,
        f"{line.nbytes:,}",
        gb(line.nbytes),
        gib(line.nbytes),
        f"{line.bits_per_weight:.3f}",
    )
    return f"| {' | '.join(cells)} |"
