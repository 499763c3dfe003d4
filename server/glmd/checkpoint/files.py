"""The weight files of one checkpoint folder, listed and checked without reading their data.

Only safetensors: a pickle (`pytorch_model.bin`) can run code when it is opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from glmd.checkpoint.config import ModelConfig, is_file_name, read_json_object
from glmd.checkpoint.layout import mtp_prefix
from glmd.checkpoint.tensorfile import Shape, StoredTensor, read_header
from glmd.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"

# Old transformers stored these; they follow from the config.
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint's main files (`model*.safetensors`), by name.

    With an index, the files it names, which must hold exactly what it says; else all that match.

    Raises:
        CheckpointError: there are none, a shard is missing or damaged, or a tensor is there twice
            or not where the index says.
    """
    index_file = folder / INDEX_NAME
    if not index_file.exists():
        return _merge(sorted(folder.glob("model*.safetensors")), folder)
    weight_map = read_json_object(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_file}: no weight_map", file=str(index_file))
    for name in weight_map.values():
        if not is_file_name(name):
            raise CheckpointError(
                f"{index_file}: {json.dumps(name)} is no file's name in the folder",
                file=str(index_file),
            )
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).exists():
            raise CheckpointError(
                f"{folder / name}: missing, of {len(names)} weight files that {INDEX_NAME} lists",
                file=str(folder / name),
            )
    tensors = _merge([folder / name for name in names], folder)
    for tensor, name in weight_map.items():
        if tensor not in tensors or tensors[tensor].file.name != name:
            raise CheckpointError(
                f"{folder / name}: {tensor} is not in it, as {INDEX_NAME} says",
                file=str(folder / name),
                tensor=tensor,
            )
    return tensors


def list_mtp_tensors(
    folder: Path, config: ModelConfig, main: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint's MTP layer, by name; none if it holds no such layer.

    Args:
        folder: the checkpoint's.
        config: its configuration, which names the file if glmd wrote it.
        main: `list_tensors(folder)`, among which they are in the published layout.

    Raises:
        CheckpointError: the file that config.json names is missing or damaged.
    """
    if config.mtp is not None:
        return read_header(folder / config.mtp.file)
    prefix = f"{mtp_prefix(config)}."
    return {name: tensor for name, tensor in main.items() if name.startswith(prefix)}


def check_tensors(
    tensors: Mapping[str, StoredTensor],
    expected: Mapping[str, Shape],
    *,
    folder: Path,
    dtypes: frozenset[str] | None = None,
) -> None:
    """Compare what is there with what the configuration asks for.

    Args:
        tensors: what is there.
        expected: the shape of every tensor that must be there; nothing else may.
        folder: where, for the message.
        dtypes: if given, the safetensors dtypes that are allowed.

    Raises:
        CheckpointError: naming the first tensor that is missing, has another shape or dtype, or
            does not belong to the model, and its file.
    """
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{folder}: {name} is missing", file=str(folder), tensor=name)
        if tensor.shape != shape:
            raise _bad(tensor, f"has the shape {list(tensor.shape)}, but config.json asks for"
                               f" {list(shape)}")  # fmt: skip
        if dtypes is not None and tensor.dtype not in dtypes:
            raise _bad(tensor, f"is {tensor.dtype}, not {' or '.join(sorted(dtypes))}")
    for name, tensor in tensors.items():
        if name not in expected and not _COMPUTED.search(name):
            raise _bad(tensor, "does not belong to the model that config.json describes")


def _merge(files: list[Path], folder: Path) -> dict[str, StoredTensor]:
    if not files:
        other = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.gguf"))
        hint = f" (only {other[0].name}, which glmd does not read)" if other else ""
        raise CheckpointError(f"{folder}: no model*.safetensors{hint}", file=str(folder))
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{file}: {name} is in {tensors[name].file.name} already",
                    file=str(file),
                    tensor=name,
                )
            tensors[name] = tensor
    return tensors


def _bad(tensor: StoredTensor, what: str) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file}: {tensor.name} {what}", file=str(tensor.file), tensor=tensor.name
    )
