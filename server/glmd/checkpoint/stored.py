"""The weights that a checkpoint folder holds, checked against config.json.

`glmd serve`, `inspect`, `doctor`, `convert` and the look into the hub's cache all read this list,
so what one of them accepts, all of them accept. Read from file headers, without data.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import msgspec

from glmd.checkpoint.config import FLOAT_MODES, ModelConfig, QuantizedAs
from glmd.checkpoint.layout import Fold, Shape, Weight, main_weights, mtp_prefix, mtp_weights
from glmd.checkpoint.weights import (
    INDEX_NAME,
    ITEM_BYTES,
    StoredTensor,
    TensorSpec,
    check_specs,
    glob_tensors,
    list_tensors,
    quantized_specs,
    read_header,
    read_index,
)
from glmd.errors import CheckpointError

MTP_FILE = "mtp.safetensors"

ADAPTER_FILES = ("adapters.safetensors", "adapter_model.safetensors")
"""LoRA adapters of mlx-lm and of PEFT."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_MTP_ONLY = ("eh_proj.", "enorm.", "hnorm.", "shared_head.")
_MTP_ELSEWHERE = ("mtp.", "model.mtp.", "model.mtp_layers.")
_FUSED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)(?:\.weight)?")


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The weights in a folder.

    Attributes:
        main: tensors of the main model by name, in any of the supported layouts. Fused experts
            appear as one tensor per expert.
        mtp: tensors of the MTP layer; empty: it cannot be used, or there is none.
        quantization: of the main model's quantised modules, by path, in the layout that the
            tensors have and in MLX's.
        no_mtp: why drafts are impossible, as a clause; None: they are possible.
        warnings: sentences for the user.
    """

    folder: Path
    config: ModelConfig
    main: Mapping[str, StoredTensor]
    mtp: Mapping[str, StoredTensor]
    quantization: Mapping[str, QuantizedAs]
    no_mtp: str | None
    warnings: tuple[str, ...]

    @property
    def is_mlx(self) -> bool:
        """Whether experts are stacked or `kv_b_proj` is split, as in MLX's layout."""
        return _is_mlx(self.main)

    @property
    def no_drafts(self) -> str | None:
        """`no_mtp` as a sentence with the remedy."""
        if self.no_mtp is None or "does not fit" in self.no_mtp:
            return self.no_mtp and f"No drafts: {self.no_mtp}."
        return (
            f"No drafts: {self.no_mtp}. To add the MTP layer, run `glmd convert --mtp-only"
            f" zai-org/GLM-4.7-Flash {self.folder}`."
        )

    @property
    def mtp_vocabulary(self) -> tuple[bool, bool]:
        """Whether the MTP layer is stored with an embedding, and with a head."""
        prefix = mtp_prefix(self.config)
        names = (f"{prefix}.embed_tokens.weight", f"{prefix}.shared_head.head.weight")
        return names[0] in self.mtp, names[1] in self.mtp

    @property
    def files(self) -> list[Path]:
        """The files of the main model."""
        return sorted({tensor.file for tensor in self.main.values()})


def read_weights(folder: Path, config: ModelConfig) -> StoredWeights:
    """List a folder's weights, and check them against its configuration.

    The index is followed if it agrees with the files. If it does not, the `model*.safetensors` in
    the folder are taken, provided that they hold exactly the tensors that the model needs.

    Raises:
        CheckpointError: files or tensors of the main model are missing, damaged or of another
            model.
    """
    warnings = [
        f"{folder / name}: a LoRA adapter is not applied. Merge it into the model with"
        " `mlx_lm.fuse`."
        for name in ADAPTER_FILES
        if (folder / name).exists()
    ]
    try:
        return _check(folder, config, list_tensors(folder), warnings)
    except CheckpointError:
        if not (folder / INDEX_NAME).exists():
            raise
        stale = (
            f"{folder / INDEX_NAME}: does not match the files. It is ignored, as"
            " model*.safetensors hold all tensors of the model. Delete it."
        )
        try:
            return _check(folder, config, glob_tensors(folder), [*warnings, stale])
        except CheckpointError:
            pass  # The first error tells more, such as which file of the index is missing.
        raise


def read_mtp_source(folder: Path, config: ModelConfig) -> StoredWeights:
    """List the MTP layer of a checkpoint, of which other weight files may be missing.

    If they are, `main` has the main model's tensors in the files of `mtp_files` alone.

    Raises:
        CheckpointError: as `read_weights`, for the files that are needed.
    """
    try:
        return read_weights(folder, config)
    except CheckpointError:
        weight_map = read_index(folder)
        if weight_map is None:
            raise
        absent = {name for name in weight_map.values() if not (folder / name).exists()}
        needed = mtp_files(config, weight_map, str(folder))
        if not absent or not absent.isdisjoint(needed):
            raise
    return _check(folder, config, list_tensors(folder, needed), [], partly=True)


def mtp_files(config: ModelConfig, weight_map: Mapping[str, str], place: str) -> list[str]:
    """Name the files with what adding the MTP layer to other files of the model takes.

    Those with the layer, with the embedding and the head that it may share, and with the final
    norm, by which the model is recognised. In the published checkpoint they are 3 of 48.

    Args:
        weight_map: file name of each tensor, as in the index.
        place: folder or repository, for errors.

    Raises:
        CheckpointError: there is no such layer, or a tensor is not in the index.
    """
    spare = _spare_names(config, weight_map)
    problem = _missing_layer(config, spare)
    if problem is not None:
        raise CheckpointError(f"{place}: {problem}.", file=place)
    prefix = mtp_prefix(config)
    main = ["model.norm.weight"]
    if f"{prefix}.embed_tokens.weight" in spare:
        main.append("model.embed_tokens.weight")
    if f"{prefix}.shared_head.head.weight" in spare:
        main.append("lm_head.weight")
    for name in main:
        if name not in weight_map:
            message = f"{place}: {INDEX_NAME} does not name the file of {name}."
            raise CheckpointError(message, file=place, tensor=name)
    return sorted({weight_map[name] for name in (*spare, *main)})


def _check(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    warnings: Iterable[str],
    *,
    partly: bool = False,
) -> StoredWeights:
    tensors = _split_fused_experts(tensors)
    names = _spare_names(config, tensors)
    spare = {name: tensors[name] for name in names}
    main = {name: tensor for name, tensor in tensors.items() if name not in spare}
    quantization: dict[str, QuantizedAs] = {}
    expected = _expected(config, main_weights(config), main, quantization)
    if partly:
        expected = [spec for spec in expected if spec.name in main]
    check_specs(main, expected, folder=folder)
    main = {spec.name: main[spec.name] for spec in expected}
    mtp, no_mtp = _find_mtp(folder, config, spare)
    return StoredWeights(folder, config, main, mtp, quantization, no_mtp, tuple(warnings))


def _is_mlx(names: Iterable[str]) -> bool:
    return any(".switch_mlp." in name or ".embed_q." in name for name in names)


def _is_scale(name: str) -> bool:
    return name.endswith((".scales", ".biases"))


def _split_fused_experts(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Replace fused experts by one tensor for each expert's matrix, same bytes.

    transformers 5 keeps `experts.gate_up_proj` [E, 2 × width, hidden], the rows of the gate first,
    and `experts.down_proj` [E, hidden, width] (`Glm4MoeLiteNaiveMoe` in modeling_glm4_moe_lite.py).
    """
    out: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        if match is None or len(tensor.shape) != 3:
            out[name] = tensor
            continue
        matrices = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
        experts, rows, columns = tensor.shape
        shape = (rows // len(matrices), columns)
        nbytes = prod(shape) * ITEM_BYTES[tensor.dtype]
        for number in range(experts * len(matrices)):
            expert, which = divmod(number, len(matrices))
            part = f"{match[1]}.{expert}.{matrices[which]}.weight"
            offset = tensor.offset + number * nbytes
            out[part] = replace(tensor, name=part, shape=shape, offset=offset)
    return out


def _spare_names(config: ModelConfig, names: Collection[str]) -> list[str]:
    """The tensors in the main files that belong to an MTP layer, wherever it is."""
    layers = {
        int(match[1])
        for name in names
        if (match := _LAYER.fullmatch(name)) and match[2].startswith(_MTP_ONLY)
    }
    prefixes = tuple(f"model.layers.{i}." for i in layers if i >= config.num_hidden_layers)
    return [name for name in names if name.startswith((*prefixes, *_MTP_ELSEWHERE))]


def _missing_layer(config: ModelConfig, spare: Collection[str]) -> str | None:
    """Why the main files hold no MTP layer that can be used; None: they do."""
    prefix = f"{mtp_prefix(config)}."
    if not spare:
        return "the checkpoint has no MTP layer"
    if any(map(_is_scale, spare)):
        return "the MTP layer in the main files is quantised"
    if not any(name.startswith(prefix) for name in spare):
        return f"the MTP layer is stored as {min(spare)}, not as {prefix}*"
    return None


def _expected(
    config: ModelConfig,
    weights: Iterable[Weight],
    tensors: Mapping[str, StoredTensor],
    quantization: dict[str, QuantizedAs],
) -> list[TensorSpec]:
    """The tensors that must store `weights`, in the layout that `tensors` have.

    Args:
        quantization: filled with that of each quantised module, by its path in the layout that
            the tensors have, and in MLX's.
    """
    specs: list[TensorSpec] = []
    is_mlx = _is_mlx(tensors)
    for weight in weights:
        direct = weight.name in tensors or (is_mlx and weight.sources[0] not in tensors)
        names = (weight.name,) if direct else weight.sources
        shape = weight.shape if direct else weight.source_shape
        for name in names:
            path = name.removesuffix(".weight")
            how = _quantization(config, tensors, path, shape) if weight.is_matrix else None
            if how is None:
                specs.append(TensorSpec(name, "F32" if weight.keeps_float32 else "BF16", shape))
                continue
            specs += quantized_specs(path, shape, how)
            # kv_b_proj is quantised again by head, if its groups fit.
            if weight.fold is Fold.COPY or not weight.shape[-1] % how.group_size:
                quantization[weight.path] = how
            quantization[path] = how
    return specs


def _quantization(
    config: ModelConfig, tensors: Mapping[str, StoredTensor], path: str, shape: Shape
) -> QuantizedAs | None:
    """The quantisation of a stored module, from the table or the tensors' shapes.

    mlx-lm writes mixed checkpoints whose default does not hold for modules that the table does not
    name.
    """
    if config.quantization is None:
        return None
    if path in config.quantization.modules:
        return config.quantization.modules[path]
    weight, scales = tensors.get(f"{path}.weight"), tensors.get(f"{path}.scales")
    if weight is None or scales is None or not weight.shape or not scales.shape:
        return None
    group = shape[-1] // max(scales.shape[-1], 1)
    bits = weight.shape[-1] * 32 // shape[-1]
    modes = {pair: mode for mode, pair in FLOAT_MODES.items()} if scales.dtype == "U8" else {}
    how = {"bits": bits, "group_size": group, "mode": modes.get((bits, group), "affine")}
    try:
        return msgspec.convert(how, QuantizedAs)
    except msgspec.ValidationError:
        raise CheckpointError(
            f"{weight.file}: {weight.name} is quantised to {bits} bits in groups of {group}, which"
            " MLX has no kernels for. Convert the model again.",
            file=str(weight.file),
            tensor=weight.name,
        ) from None


# -- MTP layer ------------------------------------------------------------------------------


def _find_mtp(
    folder: Path, config: ModelConfig, spare: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], str | None]:
    """The tensors of the MTP layer, or why there are none."""
    prefix = f"{mtp_prefix(config)}."
    if config.mtp is not None:
        file = folder / config.mtp.file
        if not file.exists():
            return {}, f"{file.name}, which config.json names, is missing"
        tensors = read_header(file)
        specs = list(_described(config))
    elif not spare and (folder / MTP_FILE).exists():
        return {}, f"config.json does not describe {MTP_FILE}"
    else:
        problem = _missing_layer(config, spare)
        if problem is not None:
            return {}, problem
        tensors = {name: tensor for name, tensor in spare.items() if name.startswith(prefix)}
        weights = mtp_weights(
            config,
            own_embedding=f"{prefix}embed_tokens.weight" in tensors,
            own_head=f"{prefix}shared_head.head.weight" in tensors,
        )
        specs = _expected(config, weights, tensors, {})
    try:
        check_specs(tensors, specs, folder=folder)
    except CheckpointError as error:
        return {}, f"the MTP layer does not fit the main model ({error.message})"
    return dict(tensors), None


def _described(config: ModelConfig) -> Iterator[TensorSpec]:
    """The tensors of the file that config.json describes under `glmd.mtp`."""
    assert config.mtp is not None
    weights = mtp_weights(
        config,
        own_embedding=not config.mtp.shares_embedding,
        own_head=not config.mtp.shares_head,
    )
    for weight in weights:
        how = config.mtp.quantization.get(weight.path)
        if how is None:
            yield TensorSpec(weight.name, "BF16", weight.shape)
        else:
            yield from quantized_specs(weight.path, weight.shape, how)
