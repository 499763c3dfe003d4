"""Contents and sizes of a checkpoint, as stored or after conversion, for `glmd inspect`.

Reads only config.json and file headers; does not import mlx.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from glmd.checkpoint.config import ModelConfig, load_config
from glmd.checkpoint.layout import Shape, in_mlx_layout, main_weights, mtp_weights, source_shapes
from glmd.checkpoint.weights import check_tensors, list_mtp_tensors, list_tensors
from glmd.convert.recipes import (
    DEFAULT_RECIPE,
    Line,
    Plan,
    PlannedWeight,
    find_recipe,
    lines,
    plan_recipe,
    plan_stored,
    total,
)
from glmd.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes of a checkpoint's arrays in the files, and as computed from its config.json.

    `mtp_bytes` is 0 if there is no MTP layer.
    """

    main_bytes: int
    main_planned: int
    mtp_bytes: int
    mtp_planned: int


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
    """

    recipe: str | None
    components: tuple[Line, ...]
    main: Line
    mtp: Line | None
    mtp_vocabulary: Line | None
    stored: Stored | None


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
    stored = _compare(path, config) if path.is_dir() and any(path.glob("*.safetensors")) else None
    if config.quantization is not None:
        if recipe is not None:
            raise SettingsError(f"{path} is quantised already, so --recipe cannot be used.")
        return _tabulate(None, plan_stored(config), None, stored)
    chosen = find_recipe(recipe or DEFAULT_RECIPE)
    has_mtp = stored.mtp_bytes > 0 if stored else config.num_nextn_predict_layers > 0
    plan = plan_recipe(config, chosen, mtp=has_mtp)
    own = plan_recipe(config, chosen, mtp=has_mtp, own_embedding=True, own_head=True)
    vocabulary = [planned for planned in own.mtp if planned not in plan.mtp]
    extra = total(vocabulary, "MTP vocabulary") if vocabulary else None
    return _tabulate(chosen.name, plan, extra, stored)


def _tabulate(
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
        main_planned=total(plan.main).nbytes,
        mtp_bytes=sum(tensor.nbytes for tensor in mtp.values()),
        mtp_planned=total(plan.mtp).nbytes,
    )


def _stored_shapes(weights: Iterable[PlannedWeight]) -> dict[str, Shape]:
    return {spec.name: spec.shape for planned in weights for spec in planned.specs}
