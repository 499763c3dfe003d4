"""What config.json says about a model, read once into one typed, immutable value.

The key names are those of Hugging Face's `Glm4MoeLiteConfig` (transformers 5) and of zai-org's
own files, which differ in places: `load_config` accepts both. Whatever this server would compute
wrongly is refused here, by name, before a weight is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from glmd.errors import CheckpointError

MODEL_TYPE = "glm4_moe_lite"

Bits = Literal[2, 3, 4, 5, 6, 8]

_TABLES = ("rope_parameters", "rope_scaling", "quantization", "quantization_config", "glmd")

Count = Annotated[int, msgspec.Meta(gt=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]

_ONLY: dict[str, tuple[Any, ...]] = {
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
"""Settings that the family's config may spell out but whose other values would need other code.

Absent or null means the value given here: `scoring_func` is missing from the published file and
means sigmoid.
"""


class QuantizedAs(msgspec.Struct, frozen=True):
    """MLX's affine quantisation of one weight matrix along its last dimension."""

    bits: Bits
    group_size: Literal[32, 64, 128] = 64
    mode: Literal["affine"] = "affine"


class Quantization(msgspec.Struct, frozen=True):
    """The `quantization` table of an MLX checkpoint: a default and the modules that differ."""

    default: QuantizedAs
    modules: dict[str, QuantizedAs | None]
    """By module path (`model.layers.0.mlp.up_proj`); None: stored unquantised."""

    def of(self, path: str) -> QuantizedAs | None:
        """How module `path` is stored, if it is of a kind that gets quantised at all."""
        return self.modules.get(path, self.default)


class MtpFile(msgspec.Struct, frozen=True, kw_only=True):
    """Where the multi-token-prediction layer of an MLX checkpoint lies (`glmd.mtp`).

    Its arrays are named as they were in the source, `model.layers.N.…` with N the number of main
    layers, experts stacked and `kv_b_proj` split as in the main files. Plain mlx-lm reads only
    `model*.safetensors`, and so never sees it.
    """

    file: str
    """Beside config.json, never elsewhere."""
    shares_embedding: bool
    """No `embed_tokens` of its own: the main model's serves, being equal to the bit."""
    shares_head: bool
    """No `shared_head.head` of its own: the main model's `lm_head` serves."""
    quantization: dict[str, QuantizedAs]
    """By module path; a module that is not named is not quantised."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The dimensions and constants of one GLM-4.7-Flash checkpoint.

    Field names equal those of mlx-lm's `ModelArgs`, so that
    `ModelArgs.from_dict(msgspec.structs.asdict(config))` builds the same model; what `ModelArgs`
    has beyond them is fixed for everything that `load_config` accepts.
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
    """So many layers at the front have a dense MLP, the others experts."""
    max_position_embeddings: Count
    rms_norm_eps: Positive
    rope_theta: Positive
    """From `rope_theta` or `rope_parameters.rope_theta`, wherever the file keeps it."""
    num_nextn_predict_layers: Literal[0, 1] = 0
    """MTP layers the file announces. Whether the weights are there, the files say."""
    eos_token_ids: tuple[int, ...] = ()
    """From config.json and generation_config.json together, in this order, without repeats."""
    pad_token_id: int | None = None
    quantization: Quantization | None = None
    """None: the weights are as trained."""
    mtp: MtpFile | None = None
    """None: no MTP file of glmd's; an unquantised checkpoint may still hold the layer."""

    @property
    def num_key_value_heads(self) -> int:
        """MLA expands one latent for all heads, so there are as many as query heads."""
        return self.num_attention_heads

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the part without and the part with RoPE."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_dense(self, layer: int) -> bool:
        """Whether main layer `layer` has a dense MLP. The MTP layer never has."""
        return layer < self.first_k_dense_replace


def load_config(path: Path) -> ModelConfig:
    """Read a checkpoint's configuration.

    Args:
        path: the checkpoint's folder, or a config.json alone. A generation_config.json beside it
            contributes its EOS ids.

    Raises:
        CheckpointError: the file is missing or malformed, or asks for what glmd cannot compute.
    """
    file = path / "config.json" if path.is_dir() else path
    raw = read_json_object(file)
    generation = file.parent / "generation_config.json"
    also = read_json_object(generation) if generation.exists() else {}
    try:
        return _parse(raw, also)
    except _RefusedError as refused:
        raise CheckpointError(f"{file}: {refused}", file=str(file)) from None
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{file}: {_plain(error)}", file=str(file)) from None


def normalise(raw: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config.json's content with what readers look up in other places filled in.

    transformers 5 saves theta as `rope_parameters.rope_theta` and the dense layers as
    `mlp_layer_types`; mlx-lm reads `rope_theta` and `first_k_dense_replace` at the top level and
    silently takes 1e6 and 1 when they are not there. Nothing is removed.

    Raises:
        ValueError: `mlp_layer_types` is not some dense layers followed by sparse ones, or theta is
            nowhere.
    """
    out = dict(raw)
    rope = raw.get("rope_parameters") or {}
    if out.get("rope_theta") is None:
        if "rope_theta" not in rope:
            raise ValueError("neither rope_theta nor rope_parameters.rope_theta is there")
        out["rope_theta"] = rope["rope_theta"]
    if out.get("first_k_dense_replace") is None:
        out["first_k_dense_replace"] = _dense_layers(raw.get("mlp_layer_types"))
    return out


def read_json_object(file: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file", file=str(file)) from None
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}", file=str(file)) from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})", file=str(file)) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: not a JSON object", file=str(file))
    return value


def is_file_name(name: object) -> bool:
    """Whether `name` can only be a file of the checkpoint's own folder, as a checkpoint's must."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


class _RefusedError(Exception):
    """The rest of a sentence that begins with the file's name."""


def _parse(raw: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    if raw.get("model_type") != MODEL_TYPE:
        raise _RefusedError(
            f"model_type is {json.dumps(raw.get('model_type'))}, but glmd serves only"
            f' "{MODEL_TYPE}" (GLM-4.7-Flash)'
        )
    for key in _TABLES:
        if not isinstance(raw.get(key), dict | None):
            raise _RefusedError(f"{key} is not an object")
    if raw.get("model_file") is not None:
        raise _RefusedError(
            f"model_file is {json.dumps(raw['model_file'])}, but glmd runs no code that comes with"
            " a checkpoint"
        )
    _refuse_unsupported(raw)
    try:
        known = normalise(raw)
    except ValueError as error:
        raise _RefusedError(str(error)) from None
    known["eos_token_ids"] = list(
        dict.fromkeys(_ids(raw.get("eos_token_id")) + _ids(generation.get("eos_token_id")))
    )
    known["num_nextn_predict_layers"] = raw.get("num_nextn_predict_layers") or 0
    known["quantization"] = _quantization(raw.get("quantization"))
    known["mtp"] = (raw.get("glmd") or {}).get("mtp")
    config = msgspec.convert(known, ModelConfig)
    _check_sense(config)
    return config


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    rope = raw.get("rope_parameters") or {}
    for key, supported in _ONLY.items():
        for where, table in (("", raw), ("rope_parameters.", rope)):
            value = table.get(key)
            if value is not None and value not in supported:
                raise _RefusedError(
                    f"{where}{key} is {json.dumps(value)}, but only"
                    f" {json.dumps(supported[0])} is supported"
                )
    for key in ("rope_scaling", "rope_parameters"):
        table = raw.get(key) or {}
        kind = table.get("rope_type", table.get("type", "default"))
        if kind != "default":
            raise _RefusedError(f"{key} of type {json.dumps(kind)} is not supported")
    if raw.get("quantization") is None and raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method")
        raise _RefusedError(
            f"the weights are quantised by {json.dumps(method)}; glmd reads BF16, F16 or F32"
            " weights and MLX's affine quantisation"
        )
    heads, kv_heads = raw.get("num_attention_heads"), raw.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != heads:
        raise _RefusedError(
            f"num_key_value_heads is {json.dumps(kv_heads)}, but must equal"
            f" num_attention_heads, {json.dumps(heads)}"
        )


def _dense_layers(types: list[str] | None) -> int:
    if types is None:
        return 1  # as both transformers and mlx-lm assume
    dense = types.count("dense")
    if types != ["dense"] * dense + ["sparse"] * (len(types) - dense):
        raise ValueError(
            "mlp_layer_types is not a run of dense layers followed by a run of sparse ones"
        )
    return dense


def _ids(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _quantization(table: dict[str, Any] | None) -> dict[str, Any] | None:
    """mlx-lm keeps the default's keys and the modules' paths in one object; part them."""
    if table is None:
        return None
    default = {k: v for k, v in table.items() if k in QuantizedAs.__struct_fields__}
    modules = {k: v for k, v in table.items() if isinstance(v, dict | bool)}
    return {
        "default": default,
        "modules": {
            path: default if how is True else None if how is False else how
            for path, how in modules.items()
        },
    }


def _check_sense(config: ModelConfig) -> None:
    if config.num_experts_per_tok > config.n_routed_experts:
        raise _RefusedError(
            f"num_experts_per_tok is {config.num_experts_per_tok}, more than the"
            f" {config.n_routed_experts} of n_routed_experts"
        )
    if config.qk_rope_head_dim % 2:
        raise _RefusedError(f"qk_rope_head_dim is {config.qk_rope_head_dim}, but must be even")
    if config.mtp is not None and not is_file_name(config.mtp.file):
        raise _RefusedError(
            f"glmd.mtp.file is {json.dumps(config.mtp.file)}, but must be a file's name beside"
            " config.json"
        )
    for token in config.eos_token_ids:
        if not 0 <= token < config.vocab_size:
            raise _RefusedError(
                f"eos_token_id {token} is outside the vocabulary of {config.vocab_size}"
            )


def _plain(error: msgspec.ValidationError) -> str:
    """msgspec's message with the field's name in front: `hidden_size: expected …`."""
    what, _, where = str(error).partition(" - at `$")
    what = what.replace("Object missing required field", "missing")
    field = where.strip("`").lstrip(".")
    return f"{field}: {what[0].lower()}{what[1:]}" if field else what
