"""From a checkpoint folder to a model in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import mlx.core as mx
import msgspec
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_unflatten
from mlx_lm.models.glm4_moe_lite import Model
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load_model as load_mlx_model

from glmd.checkpoint.config import ModelConfig, load_config
from glmd.checkpoint.files import list_mtp_tensors, list_tensors
from glmd.checkpoint.layout import main_weights, mtp_prefix
from glmd.checkpoint.tensorfile import StoredTensor
from glmd.errors import CheckpointError, SettingsError
from glmd.model.glm4_moe_lite import Glm4MoeLiteModel
from glmd.model.mtp import MTPLayer, MTPWeights
from glmd.model.weights import named_arrays

DtypeName = Literal["auto", "bfloat16", "float16", "float32"]

_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


def load_model(
    folder: Path,
    dtype: DtypeName,
    on_progress: Callable[[int, int], None],
    *,
    mtp: bool = True,
) -> Glm4MoeLiteModel:
    """Load a checkpoint: MLX files (quantised or not) or the published BF16 layout.

    Args:
        mtp: whether to load the MTP layer, where the checkpoint has it.
        dtype: of activations, KV and unquantised weights; see `EngineConfig`.
        on_progress: called with (bytes loaded, bytes in all), layer by layer.

    Raises:
        CheckpointError: no checkpoint of this family, files missing or damaged.
        SettingsError: the device cannot run the checkpoint in this dtype.
    """
    config = load_config(folder)
    layer = mtp_prefix(config) + "."
    tensors = list_tensors(folder)
    main = [t for name, t in tensors.items() if not name.startswith(layer)]
    stored = sum(tensor.nbytes for tensor in main)
    try:
        # transformers 5 keeps these where mlx-lm does not look; `load_config` found them.
        found = {
            "rope_theta": config.rope_theta,
            "first_k_dense_replace": config.first_k_dense_replace,
        }
        model, _ = load_mlx_model(folder, lazy=True, model_config=found)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: {error}", file=str(folder)) from error
    kind = choose_dtype(dtype)
    if kind != mx.float32 and mx.default_device().type == mx.DeviceType.cpu:
        _check_experts(model, kind)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        on_progress(done, total)

    total = sum(array.nbytes for _, array in named_arrays(model))
    _cast([model.model.embed_tokens, model.lm_head, *model.layers, model.model.norm], kind, count)
    parameters = sum(prod(weight.shape) for weight in main_weights(config))
    loaded = Glm4MoeLiteModel(
        model,
        kind,
        folder=folder,
        eos_token_ids=config.eos_token_ids,
        bits_per_weight=8 * stored / parameters,
    )
    if mtp and (config.mtp is not None or len(main) < len(tensors)):
        weights = _load_mtp(folder, config, model)
        _cast([weights], kind, lambda _: None)
        loaded.mtp = MTPLayer(weights, loaded)
        loaded.weight_bytes += sum(array.nbytes for _, array in named_arrays(weights))
    return loaded


def _load_mtp(folder: Path, config: ModelConfig, model: Model) -> MTPWeights:
    """The MTP layer, from its own file or from among the published layout's weights."""
    prefix = mtp_prefix(config) + "."
    arrays: dict[str, mx.array] = {}
    if config.mtp is not None:
        arrays = _read_arrays(folder / config.mtp.file)
        quantization = config.mtp.quantization
    else:
        for file in sorted({t.file for t in list_tensors(folder).values()}):
            arrays |= _read_arrays(file)
        arrays = {name: array for name, array in arrays.items() if name.startswith(prefix)}
        # mlx-lm stacks experts and splits kv_b_proj for as many layers as it believes there are.
        args = replace(model.args, num_hidden_layers=config.num_hidden_layers + 1)
        sanitize: Any = Model.sanitize
        arrays = sanitize(SimpleNamespace(args=args), arrays)
        quantization = {}
    arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    _share(arrays, "embed_tokens", model.model.embed_tokens)
    _share(arrays, "shared_head.head", model.lm_head)
    weights = MTPWeights(
        model.args,
        own_embedding="embed_tokens.weight" in arrays,
        own_head="shared_head.head.weight" in arrays,
    )

    def how(path: str, _: Module) -> bool | dict[str, Any]:
        stored = quantization.get(prefix + path)
        return False if stored is None else msgspec.structs.asdict(stored)

    quantize(weights, class_predicate=how)
    try:
        weights.load_weights(list(arrays.items()))
    except ValueError as error:
        raise CheckpointError(f"{folder}: MTP layer: {error}", file=str(folder)) from error
    return weights


def _check_experts(model: Model, dtype: mx.Dtype) -> None:
    """MLX's product with chosen experts is implemented on a CPU for float32 and quantised ones."""
    if any(isinstance(module, SwitchLinear) for module in model.modules()):
        name = str(dtype).removeprefix("mlx.core.")
        raise SettingsError(f"On a CPU, unquantised experts run in float32 only, not in {name}.")


def _share(arrays: dict[str, mx.array], path: str, main: Module) -> None:
    """Drop an MTP copy of the embedding or the head if it is bit-equal to the main model's, which
    has been cast already."""
    own, shared = arrays.get(f"{path}.weight"), main.weight
    if own is None or own.shape != shared.shape:
        return
    if mx.array_equal(own.astype(shared.dtype), shared):
        for name in [name for name in arrays if name.startswith(f"{path}.")]:
            del arrays[name]


def _read_arrays(file: Path) -> dict[str, mx.array]:
    try:
        return cast(dict[str, mx.array], mx.load(str(file)))
    except RuntimeError as error:
        raise CheckpointError(f"{file}: {error}", file=str(file)) from error


def _cast(parts: list[Module], dtype: mx.Dtype, on_bytes: Callable[[int], None]) -> None:
    """Bring the weights into memory part by part, floating ones as `dtype`.

    Part by part, because a cast of everything at once would hold everything twice. The router
    and its bias stay in float32.

    Args:
        on_bytes: called with the size of each part.
    """
    for part in parts:
        arrays = named_arrays(part)
        cast = [
            (name, array.astype(_kept_as(name, dtype)))
            for name, array in arrays
            if mx.issubdtype(array.dtype, mx.floating)
        ]
        part.update(tree_unflatten(cast))
        mx.eval(part.parameters())
        on_bytes(sum(array.nbytes for _, array in arrays))


def _kept_as(name: str, dtype: mx.Dtype) -> mx.Dtype:
    """The type in which a floating weight is kept in memory, for activations of `dtype`."""
    return mx.float32 if "mlp.gate." in name else dtype


def choose_dtype(name: DtypeName) -> mx.Dtype:
    """The type of activations and KV; see `EngineConfig`."""
    if name != "auto":
        return _DTYPES[name]
    return mx.bfloat16 if mx.default_device().type == mx.DeviceType.gpu else mx.float32


def has_mtp_layer(folder: Path, config: ModelConfig) -> bool:
    """Whether a checkpoint holds the MTP layer."""
    return bool(list_mtp_tensors(folder, config, list_tensors(folder)))


def weight_bytes(folder: Path, config: ModelConfig, dtype: mx.Dtype, *, mtp: bool) -> int:
    """Bytes that a checkpoint's weights will take in memory, from the headers of its files.

    Args:
        dtype: as which unquantised weights are kept.
        mtp: whether to load the MTP layer. Its own embedding and head are not counted where they
            may turn out to be the main model's.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    tensors = list_tensors(folder)
    layer = list_mtp_tensors(folder, config, tensors)
    wanted = {name: tensor for name, tensor in tensors.items() if name not in layer}
    if mtp:
        copies = () if config.mtp is not None else (".embed_tokens.weight", ".head.weight")
        wanted |= {name: t for name, t in layer.items() if not name.endswith(copies)}
    return sum(_bytes_in_memory(tensor, dtype) for tensor in wanted.values())


def _bytes_in_memory(tensor: StoredTensor, dtype: mx.Dtype) -> int:
    if tensor.dtype not in ("F32", "F16", "BF16"):
        return tensor.nbytes
    return prod(tensor.shape) * _kept_as(tensor.name, dtype).size
