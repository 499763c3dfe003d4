"""The model card of a converted checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from glmd.checkpoint.generation_config import RECOMMENDED
from glmd.convert.recipes import Line, Plan, PlannedWeight, Recipe, lines, total
from glmd.utils.units import gb, gib

_HEADER = ("Component", "Parameters", "Bits", "Bytes", "GB", "GiB", "Bits per weight")


def model_card(source: str, recipe: Recipe, plan: Plan, unquantized: Plan) -> str:
    """The text of README.md.

    Args:
        source: the hub id or folder name of the converted checkpoint.
        plan: of the weights written.
        unquantized: plan of the same weights, unquantised.
    """
    main = total(plan.main, "main model")
    rows = [*lines(plan.main), _bold(main)]
    ratios = [f"Main model: {_ratio(unquantized.main, plan.main)}."]
    if plan.mtp:
        rows += [_bold(total(plan.mtp, "MTP layer")), _bold(total(plan.all, "all"))]
        ratios.append(f"With the MTP layer: {_ratio(unquantized.all, plan.all)}.")
    return "\n".join(
        [
            *_front_matter(source),
            f"# {source}, {recipe.name}",
            "",
            f"Made by `glmd convert` from {source} with the recipe `{recipe.name}`"
            f" ({_describe(recipe)}): {main.bits_per_weight:.3f} bits per weight.",
            "",
            *_table(rows),
            "",
            "Bytes include scales and biases; 1 GB is 10^9 bytes, 1 GiB 2^30. Bits per weight are"
            " 8 × bytes ÷ parameters. Compared with BF16:",
            "",
            *(f"- {ratio}" for ratio in ratios),
            "",
            *_mtp_section(plan),
            "## Use",
            "",
            "Recommended sampling, also in `generation_config.json`:"
            f" temperature {RECOMMENDED.temperature}, top_k {RECOMMENDED.top_k},"
            f" top_p {RECOMMENDED.top_p}, min_p {RECOMMENDED.min_p}, no repeat penalty. The chat"
            " template defaults to `enable_thinking = true` and `clear_thinking = false`.",
            "",
            "The main files load in plain mlx-lm. `glmd serve` serves this folder through the"
            " OpenAI and Anthropic APIs.",
            "",
        ]
    )


def _front_matter(source: str) -> list[str]:
    base = [f"base_model: {source}"] if source.count("/") == 1 else []
    return [
        "---",
        "library_name: mlx",
        "pipeline_tag: text-generation",
        *base,
        "tags:",
        "- mlx",
        "---",
        "",
    ]


def _describe(recipe: Recipe) -> str:
    if recipe.experts is None:
        return "unquantised"
    if recipe.experts == recipe.others:
        return f"every matrix in {recipe.experts} bits, affine, groups of 64"
    return (
        f"routed experts in {recipe.experts} bits, other matrices in {recipe.others}, affine,"
        " groups of 64; router and norms unquantised"
    )


def _mtp_section(plan: Plan) -> list[str]:
    if not plan.mtp:
        return ["There is no multi-token-prediction (MTP) layer.", ""]
    return [
        "The multi-token-prediction (MTP) layer is in `mtp.safetensors`, described in config.json"
        " under `glmd.mtp`. Plain mlx-lm does not read it; glmd drafts with it.",
        "",
    ]


def _ratio(unquantized: Iterable[PlannedWeight], written: Iterable[PlannedWeight]) -> str:
    before, after = total(unquantized).nbytes, total(written).nbytes
    return f"{gb(before)} GB → {gb(after)} GB, {before / after:.2f}×"


def _table(rows: Sequence[Line]) -> list[str]:
    body = [
        (
            row.component,
            f"{row.parameters:,}",
            row.bits,
            f"{row.nbytes:,}",
            gb(row.nbytes),
            gib(row.nbytes),
            f"{row.bits_per_weight:.3f}",
        )
        for row in rows
    ]
    marks = ("---", "--:", "---", "--:", "--:", "--:", "--:")
    return [f"| {' | '.join(cells)} |" for cells in (_HEADER, marks, *body)]


def _bold(line: Line) -> Line:
    return Line(f"**{line.component}**", line.bits, line.parameters, line.nbytes)
