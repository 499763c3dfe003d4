"""Addition of the MTP layer to MLX files that were made without it.

Of the source, only the files that hold the layer are needed: the model is recognised by its
dimensions, and by the norms and routers that these files happen to hold.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from glmd.checkpoint.config import ModelConfig, load_config, read_json_object
from glmd.checkpoint.layout import Component, main_weights
from glmd.checkpoint.stored import MTP_FILE, StoredWeights, read_weights
from glmd.convert.convert import Conversion, Source, open_source
from glmd.convert.recipes import Plan, Recipe, total
from glmd.convert.weights import Progress, WeightReader, WeightWriter, write_json
from glmd.errors import CheckpointError
from glmd.utils.files import check_room, sync, write_error

_MAY_DIFFER = {
    "eos_token_ids", "max_position_embeddings", "mtp", "num_nextn_predict_layers", "pad_token_id",
    "quantization",
}  # fmt: skip
"""Configuration fields that do not determine the weights' shapes or use."""

_ROUNDING = 2.0**-7
"""Relative difference that two roundings in bfloat16's eight bits can make."""

_SMALL = 2.0**-24
"""Least positive number of float16: smaller weights become 0 in float16 files."""


def add_mtp(
    source: Path, folder: Path, recipe: Recipe, *, progress: Progress | None = None
) -> Conversion:
    """Add a checkpoint's MTP layer to MLX files made from the checkpoint without it.

    Writes `mtp.safetensors`, then its description in config.json, each under a temporary name
    first.

    Args:
        source: a folder in Hugging Face's layout that holds the layer; see
            `glmd.checkpoint.stored.mtp_files` for the weight files that it needs.
        folder: MLX files of the same model, quantised or not.

    Raises:
        CheckpointError: the source holds no MTP layer, or the folder has one already, is of
            another model, or cannot be written.
    """
    opened = open_source(source, mtp=True, mtp_only=True)
    if not opened.has_mtp:
        raise CheckpointError(f"{source}: {opened.no_mtp}.", file=str(source))
    stored = check_target(folder, opened.config, source)
    _compare_weights(opened, stored)
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


def check_target(folder: Path, config: ModelConfig, source: Path | str) -> StoredWeights:
    """Check that a folder is of a model with these dimensions, and has no MTP layer.

    Args:
        config: of the source.
        source: its folder or repository, for the error.

    Raises:
        CheckpointError: it is not, or it has one.
    """
    stored = read_weights(folder, load_config(folder))
    if stored.mtp:
        raise CheckpointError(f"{folder} has an MTP layer already.", file=str(folder))
    for field in stored.config.__struct_fields__:
        ours, theirs = getattr(config, field), getattr(stored.config, field)
        if field not in _MAY_DIFFER and ours != theirs:
            raise _differs(stored, source, f"{field} is {theirs}, not {ours}")
    return stored


def _compare_weights(opened: Source, stored: StoredWeights) -> None:
    """Compare the arrays that are never quantised: norms and routers, if present.

    Converters round the router's bias to bfloat16, and everything to float16.
    """
    reader = WeightReader(stored.config, stored.main)
    for weight in main_weights(opened.config):
        if weight.component not in (Component.NORM, Component.ROUTER):
            continue
        if not opened.reader.has(weight):
            continue
        ours, theirs = (r.read(weight).astype(mx.float32) for r in (opened.reader, reader))
        if not mx.allclose(ours, theirs, rtol=_ROUNDING, atol=_SMALL).item():
            raise _differs(stored, opened.folder, f"{weight.name} differs", weight.name)


def _differs(
    stored: StoredWeights, source: Path | str, problem: str, tensor: str | None = None
) -> CheckpointError:
    message = f"{stored.folder} is not of the model in {source}: {problem}."
    return CheckpointError(message, file=str(stored.folder), tensor=tensor)
