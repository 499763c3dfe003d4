"""Adding the MTP layer to MLX files without it, such as plain mlx-lm's."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from glmd.checkpoint.config import ModelConfig, load_config, read_json_object
from glmd.checkpoint.layout import Component, main_weights
from glmd.checkpoint.weights import list_tensors
from glmd.convert.convert import MTP_FILE, Conversion, Source, open_source
from glmd.convert.recipes import Plan, Recipe, total
from glmd.convert.weights import Progress, WeightReader, WeightWriter, write_json
from glmd.errors import CheckpointError
from glmd.utils.files import check_room, sync, write_error

_MAY_DIFFER = {
    "eos_token_ids", "max_position_embeddings", "mtp", "num_nextn_predict_layers", "pad_token_id",
    "quantization",
}  # fmt: skip
"""Configuration fields that do not determine the weights' shapes or use."""


def add_mtp(
    source: Path, folder: Path, recipe: Recipe, *, progress: Progress | None = None
) -> Conversion:
    """Add a checkpoint's MTP layer to MLX files made from the checkpoint without it.

    Writes `mtp.safetensors`, then its description in config.json, each under a temporary name
    first.

    Args:
        source: a folder in Hugging Face's layout that holds the layer.
        folder: MLX files of the same model, quantised or not.

    Raises:
        CheckpointError: the source holds no MTP layer, or the folder has one already, is of
            another model, or cannot be written.
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
    writer = WeightWriter(opened.reader, total(plan.mtp).nbytes, progress)
    partial = folder / f".{MTP_FILE}.partial"
    config_partial = folder / ".config.json.partial"
    check_room(partial, writer.nbytes)
    try:
        partial.unlink(missing_ok=True)
        writer.write(partial, plan.mtp)
        write_json(config_partial, raw)
        sync(config_partial)
        partial.replace(folder / MTP_FILE)
        config_partial.replace(folder / "config.json")
        sync(folder)
    except OSError as error:
        raise write_error(folder, error, need=writer.nbytes) from error
    finally:
        partial.unlink(missing_ok=True)
        config_partial.unlink(missing_ok=True)
    return Conversion(plan, tuple(opened.notes(plan)))


def _check_same_model(opened: Source, folder: Path, config: ModelConfig) -> None:
    """Compare dimensions, and the arrays that are never quantised: norms and routers."""

    def differs(problem: str, tensor: str | None = None) -> CheckpointError:
        message = f"{folder} is not of the model in {opened.folder}: {problem}."
        return CheckpointError(message, file=str(folder), tensor=tensor)

    for field in config.__struct_fields__:
        ours, theirs = getattr(opened.config, field), getattr(config, field)
        if field not in _MAY_DIFFER and ours != theirs:
            raise differs(f"{field} is {theirs}, not {ours}")
    tensors = list_tensors(folder)
    reader = WeightReader(config, tensors)
    for weight in main_weights(opened.config):
        if weight.component not in (Component.NORM, Component.ROUTER):
            continue
        if weight.name not in tensors:
            raise differs(f"{weight.name} is missing", weight.name)
        # In bfloat16, to which other converters also round the router's bias.
        ours = opened.reader.read(weight).astype(mx.bfloat16)
        theirs = reader.read(weight).astype(mx.bfloat16)
        if not mx.array_equal(ours, theirs).item():
            raise differs(f"{weight.name} differs", weight.name)
