"""What a checkpoint holds, or would hold after conversion: `glmd inspect` without its printing.

Reads config.json and file headers only; imports no mlx.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from glmd.checkpoint.config import ModelConfig, load_config
from glmd.checkpoint.layout import Shape, in_mlx_layout, main_weights, mtp_weights, source_shapes
from glmd.checkpoint.weights import check_tensors, list_mtp_tensors, list_tensors
from glmd.convert.plan import Line, Plan, PlannedWeight, lines, plan_recipe, plan_stored, total
from glmd.convert.recipes import DEFAULT_RECIPE, find_recipe
from glmd.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Stored:
    """The real bytes of a checkpoint's arrays beside those that its config.json implies.

    Attributes:
        main_bytes: of the main model's arrays, in the files.
        main_planned: of the same, computed.
        mtp_bytes: of the MTP layer's arrays, in the files; 0: there is none.
        mtp_planned: of the same, computed.
    """

    main_bytes: int
    main_planned: int
    mtp_bytes: int
    mtp_planned: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A plan in lines, and how the files compare.

    Attributes:
        recipe: the recipe that the plan follows; None: the checkpoint is quantised, and the plan
            is its own.
        components: of the main model.
        main: their sum.
        mtp: the MTP layer; None: there is none.
        mtp_vocabulary: what the layer takes more if its embedding and head are not those of the
            main model, which only the files can tell; None: known to be in `mtp` already.
        stored: the comparison; None: only a config.json was given.
    """

    recipe: str | None
    components: tuple[Line, ...]
    main: Line
    mtp: Line | None
    mtp_vocabulary: Line | None
    stored: Stored | None


def inspect(path: Path, recipe: str | None = None) -> Inspection:
    """Plan the checkpoint in folder `path`, or the one that the config.json `path` describes.

    Args:
        recipe: by which recipe to plan an unquantised one; None: the default recipe.

    Raises:
        CheckpointError: the configuration or the files are not what they should be.
        SettingsError: there is no such recipe, or the checkpoint is quantised already.
    """
    config = load_config(path)
    stored = _compare(path, config) if path.is_dir() and any(path.glob("*.safetensors")) else None
    if config.quantization is not None:
        if recipe is not None:
            raise SettingsError(f"{path} is quantised already, so --recipe says nothing of it.")
        return _in_lines(None, plan_stored(config), None, stored)
    chosen = find_recipe(recipe or DEFAULT_RECIPE)
    has_mtp = stored.mtp_bytes > 0 if stored else config.num_nextn_predict_layers > 0
    plan = plan_recipe(config, chosen, mtp=has_mtp)
    own = plan_recipe(config, chosen, mtp=has_mtp, own_embedding=True, own_head=True)
    vocabulary = [planned for planned in own.mtp if planned not in plan.mtp]
    extra = total(vocabulary, "MTP vocabulary") if vocabulary else None
    return _in_lines(chosen.name, plan, extra, stored)


def _in_lines(
    recipe: str | None, plan: Plan, vocabulary: Line | None, stored: Stored | None
) -> Inspection:
    return Inspection(
        recipe=recipe,
        components=tuple(lines(plan.main)),
        main=total(plan.main, "main model"),
        mtp=total(plan.mtp, "MTP layer") if plan.mtp else None,
        mtp_vocabulary=vocabulary,
        stored=stored,
    )


def _compare(folder: Path, config: ModelConfig) -> Stored:
    every = list_tensors(folder)
    mtp = list_mtp_tensors(folder, config, every)
    main = {name: tensor for name, tensor in every.items() if name not in mtp}
    plan = plan_stored(config, unquantized_mtp=bool(mtp))
    if in_mlx_layout(main):
        shapes, mtp_shapes = _stored_shapes(plan.main), _stored_shapes(plan.mtp)
    else:
        shapes = source_shapes(main_weights(config))
        mtp_shapes = source_shapes(mtp_weights(config)) if mtp else {}
    check_tensors(main, shapes, folder=folder)
    check_tensors(mtp, mtp_shapes, folder=folder)
    return Stored(
        main_bytes=sum(tensor.nbytes for tensor in main.values()),
        main_planned=total(plan.main, "").nbytes,
        mtp_bytes=sum(tensor.nbytes for tensor in mtp.values()),
        mtp_planned=sum(planned.nbytes for planned in plan.mtp),
    )


def _stored_shapes(weights: Iterable[PlannedWeight]) -> dict[str, Shape]:
    return {spec.name: spec.shape for planned in weights for spec in planned.specs}
