"""The model card of a converted checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

from glmd.checkpoint.generation_config import RECOMMENDED
from glmd.convert.recipes import Line, Plan, PlannedWeight, Recipe, lines, total
from glmd.utils.units import gb, gib

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
