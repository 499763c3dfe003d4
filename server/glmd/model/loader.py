"""Loading a checkpoint folder into memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import mlx.core as mx
import msgspec
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten, tree_unflatten

from glmd.checkpoint.config import ModelConfig, Quantization, load_config
from glmd.checkpoint.layout import main_weights, mtp_prefix
from glmd.checkpoint.weights import StoredTensor, list_mtp_tensors, list_tensors
from glmd.errors import CheckpointError, SettingsError
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch, PrefillChunk
from glmd.model.glm4_moe_lite import Glm4MoeLiteModel
from glmd.model.mlx_lm_layers import Model, ModelArgs, SwitchLinear
from glmd.model.mtp import MTPLayer, MTPWeights

DtypeName = Literal["auto", "bfloat16", "float16", "float32"]

_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


class LoadedModel(Glm4MoeLiteModel):
    """A model loaded from a checkpoint, with its MTP layer.

    Attributes:
        mtp: None: the checkpoint has no MTP layer, or it was not asked for.
        folder: of the checkpoint.
        eos_token_ids: ids that end a sequence.
        bits_per_weight: of the main model's files.
        weight_bytes: bytes in memory.
    """

    def __init__(
        self,
        model: Model,
        mtp: MTPWeights | None,
        dtype: mx.Dtype,
        *,
        folder: Path,
        eos_token_ids: tuple[int, ...],
        bits_per_weight: float,
    ) -> None:
        super().__init__(model, dtype)
        self.folder = folder
        self.eos_token_ids = eos_token_ids
        self.bits_per_weight = bits_per_weight
        self.weight_bytes = _nbytes(model)
        self.mtp: MTPLayer | None = None
        if mtp is not None:
            self.weight_bytes += _nbytes(mtp)
            self.mtp = MTPLayer(
                mtp,
                index=self.args.num_hidden_layers,
                shape=self.shape,
                embed_tokens=model.model.embed_tokens,
                lm_head=model.lm_head,
            )

    @property
    def kv_layers(self) -> int:
        """Number of layers with KV, including the MTP layer."""
        return int(self.args.num_hidden_layers) + (self.mtp is not None)

    @property
    def kv_bytes_per_token(self) -> int:
        return self.kv_layers * self.shape.kv_width * self.dtype.size

    def warm_up(self) -> None:
        """Compile kernels before the first request, by running one row and two rows.

        More rows use the kernels of two.
        """
        tails = TailPool(self.kv_layers, self.shape.kv_width, self.dtype)
        for rows in (1, 2):
            tokens, positions = mx.zeros(rows, mx.int32), mx.arange(rows, dtype=mx.int32)
            chunk = PrefillChunk(0, rows, [], expanded=False, logits_rows=rows)
            batch = ForwardBatch(tokens, positions, [], [chunk])
            hidden, _ = self.forward(batch, tails)
            outputs = [self.logits(hidden)]
            if self.mtp is not None:
                outputs.append(self.mtp.compute_kv(tokens, hidden, batch, tails))
                outputs.append(self.mtp.forward(tokens, hidden, batch, tails))
            mx.eval(outputs)


def load_model(
    folder: Path,
    dtype: DtypeName,
    on_progress: Callable[[int, int], None],
    *,
    mtp: bool = True,
) -> LoadedModel:
    """Load a checkpoint: MLX files (quantised or not) or the published BF16 layout.

    Args:
        dtype: of activations, KV and unquantised weights; see `EngineConfig`.
        on_progress: called with (bytes loaded, total bytes) after each layer.
        mtp: load the MTP layer, if the checkpoint has one.

    Raises:
        CheckpointError: no checkpoint of this family, or files are missing or damaged.
        SettingsError: the device cannot run the checkpoint in this dtype.
    """
    config = load_config(folder)
    tensors = list_tensors(folder)
    layer = mtp_prefix(config) + "."
    main = [tensor for name, tensor in tensors.items() if not name.startswith(layer)]
    model = _load_main(folder, config, tensors)
    kind = choose_dtype(dtype)
    if kind != mx.float32 and mx.default_device().type == mx.DeviceType.cpu:
        _check_experts(model, kind)
    done, total = 0, _nbytes(model)
    # Part by part, as a cast of everything at once would hold all weights twice.
    for part in (model.model.embed_tokens, model.lm_head, *model.layers, model.model.norm):
        done += _nbytes(part)
        _cast(part, kind)
        on_progress(done, total)
    weights: MTPWeights | None = None
    if mtp and (config.mtp is not None or len(main) < len(tensors)):
        weights = _load_mtp(folder, config, model)
        _cast(weights, kind)
    parameters = sum(prod(weight.shape) for weight in main_weights(config))
    return LoadedModel(
        model,
        weights,
        kind,
        folder=folder,
        eos_token_ids=config.eos_token_ids,
        bits_per_weight=8 * sum(tensor.nbytes for tensor in main) / parameters,
    )


def _load_main(folder: Path, config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> Model:
    """Load the main model; its weights are read from the files when they are first evaluated."""
    model = Model(ModelArgs.from_dict(msgspec.structs.asdict(config)))
    stored: dict[str, mx.array] = {}
    for file in sorted({tensor.file for tensor in tensors.values()}):
        stored |= read_arrays(file)
    try:
        arrays: dict[str, mx.array] = model.sanitize(stored)
        if config.quantization is not None:
            predicate = partial(stored_quantization, config.quantization, arrays)
            quantize(model, class_predicate=predicate)
        model.eval()
        model.load_weights(list(arrays.items()))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: {error}", file=str(folder)) from error
    return model


def stored_quantization(
    table: Quantization, arrays: Mapping[str, mx.array], path: str, module: Module
) -> bool | dict[str, Any]:
    """Return the quantisation of a module of the main model as `quantize` takes it.

    mlx-lm writes mixed checkpoints whose default does not hold for modules that the table does not
    name, so for those bits and group size are inferred from the arrays' shapes.
    """
    if path in table.modules:
        named = table.modules[path]
        return False if named is None else msgspec.structs.asdict(named)
    if not hasattr(module, "to_quantized") or f"{path}.scales" not in arrays:
        return False
    width = module.weight.shape[-1]
    return {
        "group_size": width // arrays[f"{path}.scales"].shape[-1],
        "bits": arrays[f"{path}.weight"].shape[-1] * 32 // width,
        "mode": "affine",
    }


def _load_mtp(folder: Path, config: ModelConfig, model: Model) -> MTPWeights:
    """Load the MTP layer from its own file, or from the published layout's weights."""
    prefix = mtp_prefix(config) + "."
    arrays: dict[str, mx.array] = {}
    if config.mtp is not None:
        arrays = read_arrays(folder / config.mtp.file)
        quantization = config.mtp.quantization
    else:
        for file in sorted({tensor.file for tensor in list_tensors(folder).values()}):
            arrays |= read_arrays(file)
        arrays = {name: array for name, array in arrays.items() if name.startswith(prefix)}
        # mlx-lm stacks experts and splits kv_b_proj for `num_hidden_layers` layers.
        args = replace(model.args, num_hidden_layers=config.num_hidden_layers + 1)
        sanitize: Any = Model.sanitize
        arrays = sanitize(SimpleNamespace(args=args), arrays)
        quantization = {}
    arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    _drop_if_shared(arrays, "embed_tokens", model.model.embed_tokens)
    _drop_if_shared(arrays, "shared_head.head", model.lm_head)
    weights = MTPWeights(
        model.args,
        own_embedding="embed_tokens.weight" in arrays,
        own_head="shared_head.head.weight" in arrays,
    )

    def quantized_as(path: str, _: Module) -> bool | dict[str, Any]:
        stored = quantization.get(prefix + path)
        return False if stored is None else msgspec.structs.asdict(stored)

    quantize(weights, class_predicate=quantized_as)
    try:
        weights.load_weights(list(arrays.items()))
    except ValueError as error:
        raise CheckpointError(f"{folder}: MTP layer: {error}", file=str(folder)) from error
    return weights


def _check_experts(model: Model, dtype: mx.Dtype) -> None:
    """On a CPU, MLX multiplies with selected experts only in float32 or quantised."""
    if any(isinstance(module, SwitchLinear) for module in model.modules()):
        name = str(dtype).removeprefix("mlx.core.")
        raise SettingsError(f"On a CPU, unquantised experts run in float32 only, not in {name}.")


def _drop_if_shared(arrays: dict[str, mx.array], path: str, main: Module) -> None:
    """Drop the MTP layer's embedding or head if it is bit-equal to the main model's.

    Args:
        main: the main model's module, which has been cast already.
    """
    own, shared = arrays.get(f"{path}.weight"), main.weight
    if own is None or own.shape != shared.shape:
        return
    if mx.array_equal(own.astype(shared.dtype), shared):
        for name in [name for name in arrays if name.startswith(f"{path}.")]:
            del arrays[name]


def read_arrays(file: Path) -> dict[str, mx.array]:
    try:
        return cast(dict[str, mx.array], mx.load(str(file)))
    except RuntimeError as error:
        raise CheckpointError(f"{file}: {error}", file=str(file)) from error


def _arrays(module: Module) -> list[tuple[str, mx.array]]:
    """All arrays of a module with their dotted names."""
    return cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))


def _nbytes(module: Module) -> int:
    return sum(array.nbytes for _, array in _arrays(module))


def _cast(module: Module, dtype: mx.Dtype) -> None:
    """Read a module's weights into memory, floating ones as `dtype`."""
    floating = [
        (name, array.astype(dtype_in_memory(name, dtype)))
        for name, array in _arrays(module)
        if mx.issubdtype(array.dtype, mx.floating)
    ]
    module.update(tree_unflatten(floating))
    mx.eval(module.parameters())


def dtype_in_memory(name: str, dtype: mx.Dtype) -> mx.Dtype:
    """The dtype of a floating weight in memory: the router and its bias stay in float32."""
    return mx.float32 if "mlp.gate." in name else dtype


def choose_dtype(name: DtypeName) -> mx.Dtype:
    """The dtype of activations and KV; see `EngineConfig`."""
    if name != "auto":
        return _DTYPES[name]
    return mx.bfloat16 if mx.default_device().type == mx.DeviceType.gpu else mx.float32


def has_mtp_layer(folder: Path, config: ModelConfig) -> bool:
    """Whether a checkpoint holds the MTP layer."""
    return bool(list_mtp_tensors(folder, config, list_tensors(folder)))


def weight_bytes(folder: Path, config: ModelConfig, dtype: mx.Dtype, *, mtp: bool) -> int:
    """Compute the bytes of a checkpoint's weights in memory from its files' headers.

    Args:
        dtype: of unquantised weights in memory.
        mtp: count the MTP layer, if there is one. In the published layout its embedding and head
            are not counted, as they are not loaded if they equal the main model's.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    tensors = list_tensors(folder)
    layer = list_mtp_tensors(folder, config, tensors)
    counted = {name: tensor for name, tensor in tensors.items() if name not in layer}
    if mtp:
        copies = () if config.mtp is not None else (".embed_tokens.weight", ".head.weight")
        counted |= {name: t for name, t in layer.items() if not name.endswith(copies)}
    return sum(_bytes_in_memory(tensor, dtype) for tensor in counted.values())


def _bytes_in_memory(tensor: StoredTensor, dtype: mx.Dtype) -> int:
    if tensor.dtype not in ("F32", "F16", "BF16"):
        return tensor.nbytes
    return prod(tensor.shape) * dtype_in_memory(tensor.name, dtype).size
