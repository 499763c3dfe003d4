"""Reading and checking config.json.

Key names are those of Hugging Face's `Glm4MoeLiteConfig` (transformers 5) or of zai-org's own
files; `load_config` accepts both. Settings that glmd would compute wrongly are refused by name,
before any weight is read.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from glmd.errors import CheckpointError
from glmd.ipc import SamplingParams

MODEL_TYPE = "glm4_moe_lite"

Bits = Literal[2, 3, 4, 5, 6, 8]

_TABLES = ("rope_parameters", "rope_scaling", "quantization", "quantization_config", "glmd")

Count = Annotated[int, msgspec.Meta(gt=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "hidden_act": ("silu",),
    "moe_layer_freq": (1,),
    "n_group": (1,),
    "partial_rotary_factor": (1,),
    "rope_interleave": (True,),
    "scoring_func": ("sigmoid",),
    "tie_word_embeddings": (False,),
    "topk_group": (1,),
    "topk_method": ("noaux_tc",),
}
"""Supported values of settings of the model family; other values would need other code.

Absent or null means the value here: the published file has no `scoring_func`, which means sigmoid.
"""


QuantizationMode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]

FLOAT_MODES: dict[str, tuple[int, int]] = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""Bits and group size of the modes with 8-bit scales and no biases (`mx.quantize`)."""


class QuantizedAs(msgspec.Struct, frozen=True):
    """Parameters of MLX's quantisation along a matrix's last dimension."""

    bits: Bits
    group_size: Literal[16, 32, 64, 128] = 64
    mode: QuantizationMode = "affine"

    def __post_init__(self) -> None:
        if self.mode == "affine" and self.group_size == 16:
            raise ValueError("affine has groups of 32, 64 or 128")
        if self.mode != "affine" and (self.bits, self.group_size) != FLOAT_MODES[self.mode]:
            bits, group_size = FLOAT_MODES[self.mode]
            raise ValueError(f"{self.mode} has {bits} bits in groups of {group_size}")

    @property
    def stored_bits(self) -> float:
        """Bits per weight with scales and biases."""
        extra = 32 if self.mode == "affine" else 8
        return self.bits + extra / self.group_size


class Quantization(msgspec.Struct, frozen=True):
    """The `quantization` table of an MLX checkpoint: a default and exceptions."""

    default: QuantizedAs
    modules: dict[str, QuantizedAs | None]
    """Exceptions by module path (`model.layers.0.mlp.up_proj`); None: stored unquantised."""

    def of(self, path: str) -> QuantizedAs | None:
        """Quantisation of a module, provided its kind is quantised at all."""
        return self.modules.get(path, self.default)


class MtpFile(msgspec.Struct, frozen=True, kw_only=True):
    """File of the multi-token-prediction layer of an MLX checkpoint (`glmd.mtp`).

    Its arrays are named as in the source, `model.layers.N.…` with N the number of main layers,
    with stacked experts and split `kv_b_proj` as in the main files. Plain mlx-lm does not read
    it, as it reads only `model*.safetensors`.
    """

    file: str
    """File name, in the folder of config.json."""
    shares_embedding: bool
    """The layer uses the main model's embedding, which is bit-equal to its own."""
    shares_head: bool
    """The layer uses the main model's `lm_head`, which is bit-equal to its own."""
    quantization: dict[str, QuantizedAs]
    """By module path; other modules are not quantised."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Dimensions and constants of a GLM-4.7-Flash checkpoint.

    Field names equal those of mlx-lm's `ModelArgs`, so that
    `ModelArgs.from_dict(msgspec.structs.asdict(config))` builds the same model. The other fields
    of `ModelArgs` have fixed values in all configurations that `load_config` accepts.
    """

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    moe_intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    q_lora_rank: Count
    kv_lora_rank: Count
    qk_nope_head_dim: Count
    qk_rope_head_dim: Count
    v_head_dim: Count
    n_routed_experts: Count
    n_shared_experts: Count
    num_experts_per_tok: Count
    routed_scaling_factor: Positive
    norm_topk_prob: bool = True
    first_k_dense_replace: Annotated[int, msgspec.Meta(ge=0)]
    """Number of layers at the front with a dense MLP; the others have experts."""
    max_position_embeddings: Count
    rms_norm_eps: Positive
    rope_theta: Positive
    """From `rope_theta` or `rope_parameters.rope_theta`."""
    num_nextn_predict_layers: Literal[0, 1] = 0
    """MTP layers according to config.json; the weight files may lack them."""
    eos_token_ids: tuple[int, ...] = ()
    """From config.json, generation_config.json and the tokenizer, then all role tags."""
    pad_token_id: int | None = None
    quantization: Quantization | None = None
    """None: unquantised."""
    mtp: MtpFile | None = None
    """None: no MTP file by glmd; the published layout may hold the layer in its main files."""

    def is_dense(self, layer: int) -> bool:
        """Whether a main layer has a dense MLP. The MTP layer has experts."""
        return layer < self.first_k_dense_replace


def load_config(path: Path) -> ModelConfig:
    """Read a checkpoint's configuration.

    Args:
        path: a checkpoint's folder, or a config.json. EOS ids are also read from the
            generation_config.json and the tokenizer in the same folder.

    Raises:
        CheckpointError: a file is missing, malformed or has unsupported settings.
    """
    file = path / "config.json" if path.is_dir() else path
    raw = read_json_object(file)
    generation = file.parent / "generation_config.json"
    eos = _ids(raw.get("eos_token_id"))
    if generation.exists():
        eos += _ids(read_json_object(generation).get("eos_token_id"))
    try:
        return _parse(raw, eos + _tokenizer_eos(file.parent, raw.get("vocab_size")))
    except _RefusedError as refused:
        raise CheckpointError(f"{file}: {refused}", file=str(file)) from None
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{file}: {_message(error)}", file=str(file)) from None


def normalise(raw: dict[str, Any]) -> dict[str, Any]:
    """Copy a config.json's content, with default fields filled in.

    transformers 5 saves them as `rope_parameters.rope_theta` and `mlp_layer_types`; mlx-lm reads
    them at the top level and silently assumes 1e6 and 1 if they are missing.

    Raises:
        ValueError: `mlp_layer_types` has a dense layer behind a sparse one, or there is no theta.
    """
    out = dict(raw)
    rope = raw.get("rope_parameters") or {}
    if out.get("rope_theta") is None:
        if "rope_theta" not in rope:
            raise ValueError("neither rope_theta nor rope_parameters.rope_theta is set")
        out["rope_theta"] = rope["rope_theta"]
    if out.get("first_k_dense_replace") is None:
        out["first_k_dense_replace"] = _dense_layers(raw.get("mlp_layer_types"))
    return out


def read_json_object(file: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        CheckpointError: the file is missing, not readable or not a JSON object.
    """
    try:
        data = file.read_bytes()
        value = json.loads(data)
    except FileNotFoundError:
        raise CheckpointError(_explain_missing(file), file=str(file)) from None
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}", file=str(file)) from None
    except ValueError as error:
        if data.startswith(LFS_POINTER):
            message = f"{file}: {describe_lfs_pointer()}"
            raise CheckpointError(message, file=str(file)) from None
        raise CheckpointError(f"{file}: not valid JSON ({error})", file=str(file)) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object", file=str(file))
    return value


LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""Beginning of a file that Git LFS has not replaced by its content."""


def describe_lfs_pointer() -> str:
    """The problem of a file that is a Git LFS pointer, and the remedy."""
    remedy = "Run `git lfs pull` in its folder, or download the model with `hf download`."
    return f"a Git LFS pointer, not the file. {remedy}"


def _explain_missing(file: Path) -> str:
    folder = file.parent
    if file.name == "config.json" and (folder / "adapter_config.json").exists():
        return (
            f"{folder}: a LoRA adapter, not a model. Merge it into its base model with"
            f" `mlx_lm.fuse --model BASE --adapter-path {folder}`, and serve the result."
        )
    if file.name == "config.json" and any(folder.glob("*.gguf")):
        return (
            f"{folder}: GGUF files, which glmd does not read. Convert the BF16 model with"
            " `glmd convert zai-org/GLM-4.7-Flash OUT`."
        )
    return f"{file}: no such file"


def is_file_name(name: object) -> bool:
    """Whether `name` names a file in the checkpoint's own folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


class _RefusedError(Exception):
    """A problem, to be reported with the file's name."""


def _parse(raw: dict[str, Any], eos: list[Any]) -> ModelConfig:
    if raw.get("model_type") != MODEL_TYPE:
        raise _RefusedError(
            f"model_type is {json.dumps(raw.get('model_type'))}, but glmd supports only"
            f' "{MODEL_TYPE}" (GLM-4.7-Flash)'
        )
    for key in _TABLES:
        if not isinstance(raw.get(key), dict | None):
            raise _RefusedError(f"{key} is not an object")
    if raw.get("model_file") is not None:
        raise _RefusedError(
            f"model_file is {json.dumps(raw['model_file'])}, but glmd runs no code from checkpoints"
        )
    _refuse_unsupported(raw)
    try:
        known = normalise(raw)
    except ValueError as error:
        raise _RefusedError(str(error)) from None
    known["eos_token_ids"] = list(dict.fromkeys(eos))
    known["num_nextn_predict_layers"] = raw.get("num_nextn_predict_layers") or 0
    known["quantization"] = _quantization(raw.get("quantization") or _from_hf_table(raw))
    known["mtp"] = (raw.get("glmd") or {}).get("mtp")
    config = msgspec.convert(known, ModelConfig)
    _check_consistency(config)
    return config


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    rope = raw.get("rope_parameters") or {}
    for key, supported in _SUPPORTED.items():
        for where, table in (("", raw), ("rope_parameters.", rope)):
            value = table.get(key)
            if value is not None and value not in supported:
                tied = ". If the files hold lm_head.weight, set it to false"
                raise _RefusedError(
                    f"{where}{key} is {json.dumps(value)}, but only {json.dumps(supported[0])} is"
                    f" supported{tied if key == 'tie_word_embeddings' else ''}"
                )
    for key in ("rope_scaling", "rope_parameters"):
        table = raw.get(key) or {}
        kind = table.get("rope_type", table.get("type", "default"))
        if kind != "default":
            raise _RefusedError(f"{key} of type {json.dumps(kind)} is not supported")
    if raw.get("quantization") is None and raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        if method is not None and method not in FLOAT_MODES:
            raise _RefusedError(
                f"quantization_config.quant_method is {json.dumps(method)}, but only BF16, F16 and"
                " F32 weights and MLX's quantisation are supported. Convert the BF16 model with"
                " `glmd convert`"
            )
    heads, kv_heads = raw.get("num_attention_heads"), raw.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != heads:
        raise _RefusedError(
            f"num_key_value_heads is {json.dumps(kv_heads)}, but must equal"
            f" num_attention_heads, {json.dumps(heads)}"
        )


def _dense_layers(types: list[str] | None) -> int:
    if types is None:
        return 1  # The default of transformers and mlx-lm.
    dense = types.count("dense")
    if types != ["dense"] * dense + ["sparse"] * (len(types) - dense):
        raise ValueError(
            "mlp_layer_types has a dense layer behind a sparse one, or another kind of layer"
        )
    return dense


def _ids(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


class _Tokenizer(msgspec.Struct):
    """The part of a tokenizer.json that names control tokens."""

    added_tokens: list[dict[str, Any]] = []


ROLE_TAGS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
"""Each begins a turn, so each ends the turn before. Many files list only `<|endoftext|>`."""


def _tokenizer_eos(folder: Path, vocab_size: Any) -> list[int]:
    """Ids of the EOS token and of the role tags; empty: there is no tokenizer."""
    file = folder / "tokenizer.json"
    text = file.read_bytes().removeprefix(codecs.BOM_UTF8) if file.is_file() else b"{}"
    try:
        tokens = msgspec.json.decode(text, type=_Tokenizer).added_tokens
    except msgspec.DecodeError as error:
        is_pointer = text.startswith(LFS_POINTER)
        problem = describe_lfs_pointer() if is_pointer else f"not a tokenizer: {error}"
        raise CheckpointError(f"{file}: {problem}", file=str(file)) from None
    own = folder / "tokenizer_config.json"
    named = read_json_object(own).get("eos_token") if own.exists() else None
    spelling = named.get("content") if isinstance(named, dict) else named
    ids = {token.get("content"): token.get("id") for token in tokens}
    found = [id for name in (spelling, *ROLE_TAGS) if isinstance(id := ids.get(name), int)]
    if isinstance(vocab_size, int) and max(found, default=0) >= vocab_size:
        raise CheckpointError(
            f"{file}: has the token {max(found)}, but the model has {vocab_size}. Use the"
            " tokenizer of the same model.",
            file=str(file),
        )
    return found


def _from_hf_table(raw: dict[str, Any]) -> dict[str, Any] | None:
    """MLX's quantisation, if only the table that the hub's model tree reads is there."""
    table: dict[str, Any] | None = raw.get("quantization_config") or None
    if table is None or table.get("quant_method") is None:
        return table
    return {"mode": table["quant_method"]}


def _quantization(table: dict[str, Any] | None) -> dict[str, Any] | None:
    """Split mlx-lm's table into the default's fields and the module paths."""
    if table is None:
        return None
    default = _quantized_as(table)
    modules = {k: v for k, v in table.items() if isinstance(v, dict | bool)}
    return {
        "default": default,
        "modules": {
            path: default if how is True else None if how is False else _quantized_as(how)
            for path, how in modules.items()
        },
    }


def _quantized_as(table: dict[str, Any]) -> dict[str, Any]:
    """The fields of `QuantizedAs`, without nulls, with values that the mode fixes."""
    given = {k: table[k] for k in QuantizedAs.__struct_fields__ if table.get(k) is not None}
    if given.get("mode") in FLOAT_MODES:
        bits, group_size = FLOAT_MODES[given["mode"]]
        return {"bits": bits, "group_size": group_size} | given
    return given


def _check_consistency(config: ModelConfig) -> None:
    if config.num_experts_per_tok > config.n_routed_experts:
        raise _RefusedError(
            f"num_experts_per_tok is {config.num_experts_per_tok}, more than n_routed_experts,"
            f" {config.n_routed_experts}"
        )
    if config.qk_rope_head_dim % 2:
        raise _RefusedError(f"qk_rope_head_dim is {config.qk_rope_head_dim}, but must be even")
    if config.mtp is not None and not is_file_name(config.mtp.file):
        raise _RefusedError(
            f"glmd.mtp.file is {json.dumps(config.mtp.file)}, but must name a file in the folder"
            " of config.json"
        )
    for token in config.eos_token_ids:
        if not 0 <= token < config.vocab_size:
            raise _RefusedError(
                f"eos_token_id {token} is outside the vocabulary of {config.vocab_size}"
            )


def _message(error: msgspec.ValidationError) -> str:
    """Put the field's name in front of msgspec's message: `hidden_size: expected …`."""
    problem, _, path = str(error).partition(" - at `$")
    problem = problem.replace("Object missing required field", "missing")
    field = path.strip("`").lstrip(".")
    return f"{field}: {problem[0].lower()}{problem[1:]}" if field else problem


FILE_NAME = "generation_config.json"

RECOMMENDED = SamplingParams(temperature=0.2, top_k=50, top_p=0.95, min_p=0.01)
"""From the model card of the mixed 8/5-bit GLM-4.7-Flash, which also recommends no repeat penalty
(https://huggingface.co/leonsarmiento/GLM-4.7-Flash-5bit-mlx)."""

SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""The keys of generation_config.json that glmd uses."""


class _Sampling(msgspec.Struct):
    """The sampling fields of transformers' `GenerationConfig`; null means absent."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def read_sampling(folder: Path) -> dict[str, float]:
    """Sampling parameters of generation_config.json, if there is such a file.

    `do_sample: false` is a temperature of 0. A `top_k` of -1, off elsewhere, is 0 here.

    Raises:
        CheckpointError: the file is malformed, or a value has the wrong type or is out of range.
    """
    file = folder / FILE_NAME
    if not file.exists():
        return {}
    try:
        fields = msgspec.convert(read_json_object(file), _Sampling)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{file}: {error}", file=str(file)) from None
    values = {key: getattr(fields, key) for key in SAMPLING_FIELDS}
    given = {key: value for key, value in values.items() if value is not None}
    _check_ranges(file, given)
    if "top_k" in given:
        given["top_k"] = max(0, int(given["top_k"]))
    return given | {"temperature": 0.0} if fields.do_sample is False else given


def sampling_defaults(folder: Path) -> SamplingParams:
    """The sampling parameters of requests that set none.

    Each is that of generation_config.json, else that of `RECOMMENDED`: the published file sets a
    temperature alone.

    Raises:
        CheckpointError: as `read_sampling`.
    """
    given: dict[str, Any] = read_sampling(folder)
    return msgspec.structs.replace(RECOMMENDED, **given)


def recommended_fields() -> dict[str, Any]:
    """`RECOMMENDED` as entries of a generation_config.json."""
    return {"do_sample": True} | {
        key: getattr(RECOMMENDED, key) for key in SAMPLING_FIELDS if key != "repetition_penalty"
    }


def _check_ranges(file: Path, given: dict[str, float]) -> None:
    def refuse(key: str, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"{file}: {key} is {given[key]}, but must be {allowed}", file=str(file)
        )

    if not given.get("temperature", 0) >= 0:  # Also refuses NaN.
        raise refuse("temperature", "at least 0")
    top_k = given.get("top_k", 0)
    if not (top_k >= -1 and float(top_k).is_integer()):
        raise refuse("top_k", "a whole number; 0 and -1 are off")
    for key in ("top_p", "min_p"):
        if not 0 <= given.get(key, 0) <= 1:
            raise refuse(key, "from 0 to 1")
    if given.get("repetition_penalty", 1) <= 0:
        raise refuse("repetition_penalty", "above 0")
