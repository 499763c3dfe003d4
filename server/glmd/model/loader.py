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

from glmd.checkpoint.config import QuantizedAs, load_config
from glmd.checkpoint.layout import main_weights, mtp_prefix
from glmd.checkpoint.shard import read_part, shard_weights
from glmd.checkpoint.stored import StoredWeights, read_weights
from glmd.checkpoint.weights import StoredTensor
from glmd.errors import CheckpointError, SettingsError
from glmd.kv_cache.stored_keys import arrays_of, vector_bytes
from glmd.kv_cache.tail_pool import TailPool
from glmd.model.batch import ForwardBatch, PrefillChunk
from glmd.model.glm4_moe_lite import DecoderBlock, Glm4MoeLiteModel, SumRanks, identity
from glmd.model.mla import MLAShape
from glmd.model.mlx_lm_layers import Model, ModelArgs, SwitchLinear
from glmd.model.mtp import MTPLayer, MTPWeights

DtypeName = Literal["auto", "bfloat16", "float16", "float32"]

MAX_ERROR_CHARS = 400
"""Of MLX's errors, which list the names of all tensors."""

_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


class LoadedModel(Glm4MoeLiteModel):
    """A model loaded from a checkpoint, with its MTP layer.

    Attributes:
        mtp: None: the checkpoint has no MTP layer, or it was not asked for.
        folder: of the checkpoint.
        eos_token_ids: ids that end a sequence.
        bits_per_weight: of the main model's files.
        weight_bytes, mtp_weight_bytes: bytes in memory of all weights, and of the MTP layer's.
        fused_rows: numbers of rows for which experts run in `glmd.model.experts_kernel`.
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
        sum_ranks: SumRanks = identity,
    ) -> None:
        super().__init__(model, dtype, sum_ranks)
        self.folder = folder
        self.eos_token_ids = eos_token_ids
        self.bits_per_weight = bits_per_weight
        self.weight_bytes = _nbytes(model)
        self.mtp_weight_bytes = 0
        self.fused_rows: frozenset[int] = frozenset()
        self.mtp: MTPLayer | None = None
        if mtp is not None:
            self.mtp_weight_bytes = _nbytes(mtp)
            self.weight_bytes += self.mtp_weight_bytes
            self.mtp = MTPLayer(
                mtp,
                index=self.args.num_hidden_layers,
                shape=self.shape,
                embed_tokens=model.model.embed_tokens,
                lm_head=model.lm_head,
                sum_ranks=sum_ranks,
            )

    @property
    def kv_layers(self) -> int:
        """Number of layers with KV, including the MTP layer."""
        return int(self.args.num_hidden_layers) + (self.mtp is not None)

    @property
    def kv_bytes_per_token(self) -> int:
        width, bits = self.shape.kv_width, self.shape.kv_bits
        return self.kv_layers * vector_bytes(width, self.dtype.size, bits)

    def use_shape(self, shape: MLAShape) -> None:
        """Change memory limits and the form of KV, before the first step."""
        self.shape = shape
        if self.mtp is not None:
            self.mtp.shape = shape

    @property
    def all_blocks(self) -> list[DecoderBlock]:
        """All layers, including the MTP layer."""
        return self.blocks if self.mtp is None else [*self.blocks, self.mtp.block]

    def use_fused_experts(self, rows: frozenset[int]) -> None:
        """Run experts in `glmd.model.experts_kernel` for these numbers of rows.

        Other numbers, and layers that the kernels are not made for, run MLX's operations.
        """
        self.fused_rows = rows
        for block in self.all_blocks:
            block.fused_rows = rows

    def warm_up(self) -> None:
        """Compile kernels before the first request, by running one row and two rows.

        More rows use the kernels of two.

        Raises:
            CheckpointError: the logits are not finite, or all equal, so that every answer would be
                the same token for ever.
        """
        shape = self.shape
        tails = TailPool(self.kv_layers, shape.kv_width, self.dtype, shape.kv_bits)
        for rows in (1, 2):
            tokens = positions = mx.arange(rows, dtype=mx.int32)
            chunk = PrefillChunk(0, rows, [], expanded=False, logits_rows=rows)
            batch = ForwardBatch(tokens, positions, [], [chunk])
            hidden, _ = self.forward(batch, tails)
            outputs = [self.logits(hidden)]
            if self.mtp is not None:
                outputs += arrays_of(self.mtp.compute_kv(tokens, hidden, batch, tails))
                outputs.append(self.mtp.forward(tokens, hidden, batch, tails))
            mx.eval(outputs)
        logits = outputs[0]
        if not (mx.isfinite(logits).all() & (logits.max() > logits.min())).item():
            raise CheckpointError(self._explain_logits(), file=str(self.folder))

    def _explain_logits(self) -> str:
        for name, array in _arrays(self._model):
            if name.endswith((".weight", ".scales")) and not mx.any(array).item():
                return f"{self.folder}: {name} is all zeros. Download or convert the model again."
        dtype = str(self.dtype).removeprefix("mlx.core.")
        return (
            f"{self.folder}: the model computes no finite, distinct logits in {dtype}. Use the"
            " setting dtype = bfloat16, or convert the model again."
        )


def load_model(
    folder: Path,
    dtype: DtypeName,
    on_progress: Callable[[int, int], None],
    *,
    mtp: bool = True,
    group: mx.distributed.Group | None = None,
) -> LoadedModel:
    """Load a checkpoint: MLX files (quantised or not) or the published BF16 layout.

    Args:
        dtype: of activations, KV and unquantised weights; see `EngineConfig`.
        on_progress: called with (bytes loaded, total bytes) after each layer.
        mtp: load the MTP layer, if the checkpoint has one.
        group: load this process's part of a model that is divided among the group's ranks; None:
            load it whole.

    Raises:
        CheckpointError: no checkpoint of this family, or files are missing or damaged.
        SettingsError: the device cannot run the checkpoint in this dtype, or the model cannot be
            divided by so many ranks.
    """
    stored = read_weights(folder, load_config(folder))
    sum_ranks: SumRanks = identity
    if group is not None:
        stored = shard_weights(stored, group.rank(), group.size())
        sum_ranks = partial(mx.distributed.all_sum, group=group)
    config = stored.config
    model = _load_main(stored)
    kind = choose_dtype(dtype)
    if kind != mx.float32 and mx.default_device().type == mx.DeviceType.cpu:
        _check_experts(model, kind)
    done, total = 0, _nbytes(model)
    # Part by part, as a cast of everything at once would hold all weights twice.
    parts = {
        "model.embed_tokens.": model.model.embed_tokens,
        "lm_head.": model.lm_head,
        **{f"model.layers.{index}.": layer for index, layer in enumerate(model.layers)},
        "model.norm.": model.model.norm,
    }
    for prefix, part in parts.items():
        done += _nbytes(part)
        _cast(part, kind, folder, prefix)
        on_progress(done, total)
    weights: MTPWeights | None = None
    if mtp and stored.mtp:
        weights = _load_mtp(stored, model)
        _cast(weights, kind, folder, f"{mtp_prefix(config)}.")
    parameters = sum(prod(weight.shape) for weight in main_weights(config))
    return LoadedModel(
        model,
        weights,
        kind,
        folder=folder,
        eos_token_ids=config.eos_token_ids,
        bits_per_weight=8 * sum(tensor.nbytes for tensor in stored.main.values()) / parameters,
        sum_ranks=sum_ranks,
    )


def _load_main(stored: StoredWeights) -> Model:
    """Load the main model; its weights are read from the files when they are first evaluated."""
    model = Model(ModelArgs.from_dict(msgspec.structs.asdict(stored.config)))
    arrays = to_mlx_layout(model.args, read_arrays(stored.main), stored.quantization)
    quantize(model, class_predicate=partial(_quantized_as, stored.quantization, ""))
    model.eval()
    _set_weights(model, arrays, stored.folder)
    return model


def _quantized_as(
    quantization: Mapping[str, QuantizedAs], prefix: str, path: str, _: Module
) -> bool | dict[str, Any]:
    """Return the quantisation of a module as `quantize` takes it."""
    how = quantization.get(prefix + path)
    return False if how is None else msgspec.structs.asdict(how)


def _set_weights(module: Module, arrays: Mapping[str, mx.array], folder: Path) -> None:
    try:
        module.load_weights(list(arrays.items()))
    except ValueError as error:  # it lists all names
        message = f"{folder}: {str(error)[:MAX_ERROR_CHARS]}".replace("\n", " ")
        raise CheckpointError(message, file=str(folder)) from error


def _load_mtp(stored: StoredWeights, model: Model) -> MTPWeights:
    """Load the MTP layer from its own file, or from the published layout's weights."""
    config = stored.config
    prefix = mtp_prefix(config) + "."
    arrays = read_arrays(stored.mtp)
    quantization: Mapping[str, QuantizedAs] = {}
    if config.mtp is not None:
        quantization = config.mtp.quantization
    else:
        # mlx-lm stacks experts and splits kv_b_proj for `num_hidden_layers` layers.
        args = replace(model.args, num_hidden_layers=config.num_hidden_layers + 1)
        arrays = to_mlx_layout(args, arrays, quantization)
    arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    _drop_if_shared(arrays, "embed_tokens", model.model.embed_tokens)
    _drop_if_shared(arrays, "shared_head.head", model.lm_head)
    weights = MTPWeights(
        model.args,
        own_embedding="embed_tokens.weight" in arrays,
        own_head="shared_head.head.weight" in arrays,
    )
    quantize(weights, class_predicate=partial(_quantized_as, quantization, prefix))
    _set_weights(weights, arrays, stored.folder)
    return weights


def to_mlx_layout(
    args: ModelArgs, arrays: dict[str, mx.array], quantization: Mapping[str, QuantizedAs]
) -> dict[str, mx.array]:
    """Stack experts and split `kv_b_proj` and fused experts.

    Args:
        quantization: of modules by path, in the layout that the arrays have and in MLX's.
    """
    for name in [name for name in arrays if ".mlp.experts.gate_up_proj" in name]:
        experts = name.partition(".experts.")[0]
        gate, up = mx.split(arrays.pop(name), 2, axis=1)  # [E, 2 × width, hidden]
        arrays[f"{experts}.switch_mlp.gate_proj.weight"] = mx.contiguous(gate)
        arrays[f"{experts}.switch_mlp.up_proj.weight"] = mx.contiguous(up)
    for name in [name for name in arrays if ".mlp.experts.down_proj" in name]:
        experts = name.partition(".experts.")[0]
        arrays[f"{experts}.switch_mlp.down_proj.weight"] = arrays.pop(name)
    for path in [path for path in quantization if f"{path}.weight" in arrays]:
        if path.endswith(".kv_b_proj"):
            _split_quantized_kv_b(args, arrays, path, quantization)
    sanitize: Any = Model.sanitize
    result: dict[str, mx.array] = sanitize(SimpleNamespace(args=args), arrays)
    return result


def _split_quantized_kv_b(
    args: ModelArgs,
    arrays: dict[str, mx.array],
    path: str,
    quantization: Mapping[str, QuantizedAs],
) -> None:
    """Split a quantised `kv_b_proj` by head, and quantise each half again if its groups fit."""
    how = msgspec.structs.asdict(quantization[path])
    names = ("weight", "scales", "biases")[: 3 if how["mode"] == "affine" else 2]
    parts: list[Any] = [arrays.pop(f"{path}.{name}") for name in names]
    whole = mx.dequantize(*parts, **how)
    whole = whole.reshape(args.num_attention_heads, -1, args.kv_lora_rank)
    nope = args.qk_nope_head_dim
    halves = {"embed_q": whole[:, :nope].swapaxes(1, 2), "unembed_out": whole[:, nope:]}
    for name, half in halves.items():
        half_path = path.removesuffix("kv_b_proj") + name
        if half_path not in quantization:
            arrays[f"{half_path}.weight"] = mx.contiguous(half)
            continue
        for part, array in zip(names, mx.quantize(half, **how), strict=True):
            arrays[f"{half_path}.{part}"] = array


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


def read_arrays(tensors: Mapping[str, StoredTensor]) -> dict[str, mx.array]:
    """The arrays of the tensors, by their names in the files."""
    whole = [tensor for tensor in tensors.values() if tensor.part is None]
    parts = {name: tensor for name, tensor in tensors.items() if tensor.part is not None}
    wanted = {(tensor.file, tensor.stored_as) for tensor in whole}
    arrays: dict[str, mx.array] = {}
    for file in sorted({tensor.file for tensor in whole}):
        try:
            loaded = cast(dict[str, mx.array], mx.load(str(file)))
        except RuntimeError as error:
            raise CheckpointError(f"{file}: {error}", file=str(file)) from error
        arrays |= {name: array for name, array in loaded.items() if (file, name) in wanted}
    for name, tensor in parts.items():
        array = mx.array(read_part(tensor))
        arrays[name] = array.view(mx.bfloat16) if tensor.dtype == "BF16" else array
    return arrays


def _arrays(module: Module) -> list[tuple[str, mx.array]]:
    """All arrays of a module with their dotted names."""
    return cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))


def _nbytes(module: Module) -> int:
    return sum(array.nbytes for _, array in _arrays(module))


def _cast(module: Module, dtype: mx.Dtype, folder: Path, prefix: str) -> None:
    """Read a module's weights into memory, floating ones as `dtype`.

    Args:
        prefix: of the module's names, for errors.

    Raises:
        CheckpointError: a weight is not finite.
    """
    floating = [
        (name, array.astype(dtype_in_memory(name, dtype)))
        for name, array in _arrays(module)
        if mx.issubdtype(array.dtype, mx.floating)
    ]
    module.update(tree_unflatten(floating))
    mx.eval(module.parameters())
    finite = [mx.isfinite(array).all() for _, array in floating]
    mx.eval(finite)
    for (name, array), is_finite in zip(floating, finite, strict=True):
        if not is_finite.item():
            kind = str(array.dtype).removeprefix("mlx.core.")
            remedy = "Use the setting dtype = bfloat16" if dtype == mx.float16 else "Download"
            raise CheckpointError(
                f"{folder}: {prefix}{name} holds infinities or NaN as {kind}. {remedy}, or convert"
                " the model again.",
                file=str(folder),
                tensor=prefix + name,
            )


def dtype_in_memory(name: str, dtype: mx.Dtype) -> mx.Dtype:
    """The dtype of a floating weight in memory: the router and its bias stay in float32."""
    return mx.float32 if "mlp.gate." in name else dtype


def choose_dtype(name: DtypeName) -> mx.Dtype:
    """The dtype of activations and KV; see `EngineConfig`."""
    if name != "auto":
        return _DTYPES[name]
    return mx.bfloat16 if mx.default_device().type == mx.DeviceType.gpu else mx.float32


def weight_bytes(stored: StoredWeights, dtype: mx.Dtype, *, mtp: bool) -> int:
    """Compute the bytes of a checkpoint's weights in memory from its files' headers.

    Args:
        dtype: of unquantised weights in memory.
        mtp: count the MTP layer, if there is one. In the published layout its embedding and head
            are not counted, as they are not loaded if they equal the main model's.
    """
    counted = dict(stored.main)
    if mtp:
        copies = () if stored.config.mtp is not None else (".embed_tokens.weight", ".head.weight")
        counted |= {name: t for name, t in stored.mtp.items() if not name.endswith(copies)}
    return sum(_bytes_in_memory(tensor, dtype) for tensor in counted.values())


def _bytes_in_memory(tensor: StoredTensor, dtype: mx.Dtype) -> int:
    if tensor.dtype not in ("F32", "F16", "BF16"):
        return tensor.nbytes
    return prod(tensor.shape) * dtype_in_memory(tensor.name, dtype).size
