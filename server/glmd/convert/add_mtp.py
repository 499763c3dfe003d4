"""Adding the MTP layer to MLX files that were made without it, as plain mlx-lm makes them."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from glmd.checkpoint.config import ModelConfig, load_config, read_json_object
from glmd.checkpoint.layout import Component, main_weights
from glmd.checkpoint.weights import list_tensors
from glmd.convert.atomic_dir import check_room, sync, write_error
from glmd.convert.hf_checkpoint import MTP_FILE, Source, open_source
from glmd.convert.plan import Plan, total
from glmd.convert.recipes import Recipe
from glmd.convert.weights import WeightReader
from glmd.convert.writer import Conversion, Progress, Report, write_json, write_weights
from glmd.errors import CheckpointError

_MAY_DIFFER = {
    "eos_token_ids", "max_position_embeddings", "mtp", "num_nextn_predict_layers", "pad_token_id",
    "quantization",
}  # fmt: skip
"""What of a configuration says nothing of the weights' shapes or use."""


def add_mtp(
    source: Path, folder: Path, recipe: Recipe, *, progress: Progress | None = None
) -> Conversion:
    """Add the MTP layer of the checkpoint in `source` to an MLX folder made from it without.

    Writes `mtp.safetensors`, then describes it in config.json; each takes its name only when it
    is whole.

    Args:
        source: a folder in Hugging Face's layout that holds the layer.
        folder: MLX files of the same model, quantised or not.
        recipe: which bits the layer's arrays get.
        progress: told how far it is.

    Raises:
        CheckpointError: the source holds no MTP layer, the folder has one already or is of another
            model, or cannot be written.
    """
    opened = open_source(source, mtp=True)
    if not opened.has_mtp:
        raise CheckpointError(f"{source} holds no MTP layer.", file=str(source))
    config = load_config(folder)
    if config.mtp is not None:
        raise CheckpointError(f"{folder} has an MTP layer already.", file=str(folder))
    _check_same_model(opened, folder, config)
    plan = Plan((), opened.plan(recipe).mtp)
    raw = read_json_object(folder / "config.json")
    raw["num_nextn_predict_layers"] = 1
    raw["glmd"] = {**(raw.get("glmd") or {}), "mtp": opened.describe_mtp(plan)}
    report = Report(progress, total(plan.mtp, "").nbytes)
    partial = folder / f".{MTP_FILE}.partial"
    config_partial = folder / ".config.json.partial"
    check_room(partial, report.total)
    try:
        partial.unlink(missing_ok=True)
        write_weights(partial, plan.mtp, opened.reader, report)
        write_json(config_partial, raw)
        sync(config_partial)
        partial.replace(folder / MTP_FILE)
        config_partial.replace(folder / "config.json")
        sync(folder)
    except OSError as error:
        raise write_error(folder, error, need=report.total) from error
    finally:
        partial.unlink(missing_ok=True)
        config_partial.unlink(missing_ok=True)
    return Conversion(plan, tuple(opened.notes(plan)))


def _check_same_model(opened: Source, folder: Path, config: ModelConfig) -> None:
    """Compare the dimensions, and what stays unquantised under one name: norms and routers."""
    for field in config.__struct_fields__:
        ours, theirs = getattr(opened.config, field), getattr(config, field)
        if field not in _MAY_DIFFER and ours != theirs:
            raise _other_model(opened, folder, f"{field} is {theirs}, not {ours}")
    tensors = list_tensors(folder)
    reader = WeightReader(config, tensors)
    for weight in main_weights(opened.config):
        if weight.component not in (Component.NORM, Component.ROUTER):
            continue
        if weight.name not in tensors:
            raise _other_model(opened, folder, f"{weight.name} is missing", weight.name)
        # Both in bfloat16, to which other converters round the router's bias too.
        ours = opened.reader.read(weight).astype(mx.bfloat16)
        theirs = reader.read(weight).astype(mx.bfloat16)
        if not mx.array_equal(ours, theirs).item():
            raise _other_model(opened, folder, f"{weight.name} differs", weight.name)


def _other_model(
    opened: Source, folder: Path, how: str, tensor: str | None = None
) -> CheckpointError:
    return CheckpointError(
        f"{folder} is not of the model in {opened.folder}: {how}.", file=str(folder), tensor=tensor
    )
