"""Small checkpoints of random weights in the published layout.

Equal seeds give equal weights. Activations keep their size from layer to layer, router scores and
logits are well separated, and constants that an implementation may forget (norm weights, correction
bias, theta) have values that change the result.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import platformdirs
from tokenizers import Tokenizer

from glmd.checkpoint.config import MODEL_TYPE, ModelConfig, load_config
from glmd.checkpoint.hub import DEMO
from glmd.checkpoint.layout import (
    Component,
    Shape,
    Weight,
    main_weights,
    mtp_prefix,
    mtp_weights,
)
from glmd.checkpoint.weights import INDEX_NAME, TensorFileWriter, TensorSpec, read_header

SPECIAL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|observation|>",
)  # fmt: skip
"""Tokens of the published tokenizer that skip_special_tokens skips."""

ADDED_TOKENS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink",
)  # fmt: skip
"""Added tokens that are not special."""

_EOS = ("<|endoftext|>", "<|user|>", "<|observation|>")
_BYTES = 256

_SMALL: dict[str, Any] = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "model_type": MODEL_TYPE,
    "attention_bias": False,
    "hidden_act": "silu",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "pad_token_id": _BYTES + SPECIAL_TOKENS.index("<|endoftext|>"),
    "eos_token_id": [_BYTES + SPECIAL_TOKENS.index(token) for token in _EOS],
}
"""All last dimensions are multiples of 64, so that all matrices can be quantised."""


def write_random_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    dtype: Literal["BF16", "F32"] = "BF16",
    shards: int = 1,
    mtp_shares_vocabulary: bool = True,
    predictable: bool = False,
    **config: Any,
) -> ModelConfig:
    """Write a random checkpoint in Hugging Face's layout, with a byte tokenizer.

    As published: weights per expert, unsplit `kv_b_proj`, the MTP layer under `model.layers.N` if
    `num_nextn_predict_layers` is 1, and `e_score_correction_bias` in F32.

    Args:
        folder: created; must not exist or be empty.
        seed: determines the weights, up to rounding to `dtype`.
        dtype: of all weights except the correction bias.
        shards: number of weight files; more than one have an index.
        mtp_shares_vocabulary: the MTP layer's embedding and head are bit-equal to the main
            model's, as published; else they have values of their own.
        predictable: a token determines the next one, and the MTP layer drafts what the model
            chooses. Layers add nothing to the hidden states, at the same cost.
        config: entries of config.json that replace the defaults; None removes an entry. The
            tokenizer is omitted if the vocabulary has no room for its 277 tokens.

    Returns:
        the configuration, as read back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = {k: v for k, v in {**_SMALL, "dtype": _DTYPE_NAMES[dtype], **config}.items()
           if v is not None or k == "rope_scaling"}  # fmt: skip
    if "num_attention_heads" in config and "num_key_value_heads" not in config:
        raw["num_key_value_heads"] = config["num_attention_heads"]
    _write_json(folder / "config.json", raw)
    parsed = load_config(folder)
    weights = list(main_weights(parsed))
    if parsed.num_nextn_predict_layers:
        weights += mtp_weights(parsed)
    twins = {}
    if mtp_shares_vocabulary:
        prefix = mtp_prefix(parsed)
        twins[f"{prefix}.embed_tokens.weight"] = "model.embed_tokens.weight"
        twins[f"{prefix}.shared_head.head.weight"] = "lm_head.weight"
    draw = _draw_predictable if predictable else _draw
    _write_weights(folder, weights, twins, draw, seed=seed, dtype=dtype, shards=shards)
    _write_json(
        folder / "generation_config.json",
        {"do_sample": True, "temperature": 1.0, "eos_token_id": raw.get("eos_token_id")},
    )
    if parsed.vocab_size >= _BYTES + len(SPECIAL_TOKENS) + len(ADDED_TOKENS):
        _write_tokenizer(folder)
    return parsed


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round finite float32 to the nearest bfloat16, ties to even; return its bits."""
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)


_DTYPE_NAMES = {"BF16": "bfloat16", "F32": "float32"}


def _write_weights(
    folder: Path,
    weights: list[Weight],
    twins: dict[str, str],
    draw: Callable[[Weight, Shape, str, int], npt.NDArray[np.float32]],
    *,
    seed: int,
    dtype: str,
    shards: int,
) -> None:
    """Write `weights`; `twins` maps tensors to those whose values they share."""
    specs: list[TensorSpec] = []
    makers: dict[str, Weight] = {}
    for weight in weights:
        for source in dict.fromkeys(weight.sources):
            if source in makers:
                continue  # kv_b_proj, the source of two arrays.
            makers[source] = weight
            kind = "F32" if weight.keeps_float32 else dtype
            specs.append(TensorSpec(source, kind, weight.source_shape))
    weight_map = {}
    for number, part in enumerate(_split(specs, shards), start=1):
        name = (
            f"model-{number:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        )
        with TensorFileWriter(folder / name, part, {"format": "pt"}) as writer:
            for spec in part:
                weight_map[spec.name] = name
                drawn = draw(makers[spec.name], spec.shape, twins.get(spec.name, spec.name), seed)
                stored = to_bf16(drawn) if spec.dtype == "BF16" else drawn
                writer.write(spec.name, stored.tobytes())
    if shards > 1:
        total = sum(spec.nbytes for spec in specs)
        _write_json(
            folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _draw(weight: Weight, shape: Shape, name: str, seed: int) -> npt.NDArray[np.float32]:
    """Draw the values of one tensor from the seed and its name."""
    rng = np.random.default_rng([seed, *name.encode()])
    values = rng.standard_normal(prod(shape), dtype=np.float32).reshape(shape)
    if weight.keeps_float32:
        return values * np.float32(0.1)
    if weight.component is Component.NORM:
        return 1 + values * np.float32(0.1)
    if weight.component is Component.EMBEDDING:
        return values
    # Wider where the result selects something, so that rounding does not change the selection.
    gain = {Component.HEAD: 3.0, Component.ROUTER: 2.0}.get(weight.component, 1.0)
    return values * np.float32(gain / np.sqrt(shape[-1]))


def _draw_predictable(
    weight: Weight, shape: Shape, name: str, seed: int
) -> npt.NDArray[np.float32]:
    """Draw so that layers add nothing and the MTP layer reads the next token."""
    if weight.component is Component.NORM:
        return np.ones(shape, np.float32)
    if weight.component is Component.MTP_PROJECTION:
        return np.eye(*shape, dtype=np.float32)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return np.zeros(shape, np.float32)
    return _draw(weight, shape, name, seed)


def _split(specs: list[TensorSpec], parts: int) -> Iterator[list[TensorSpec]]:
    bounds = [len(specs) * i // parts for i in range(parts + 1)]
    for i in range(parts):
        yield specs[bounds[i] : bounds[i + 1]]


def _write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer without merges: one token per UTF-8 byte."""
    added = [
        {
            "id": _BYTES + i,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": content in SPECIAL_TOKENS,
        }
        for i, content in enumerate(SPECIAL_TOKENS + ADDED_TOKENS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    _write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": byte_level | {"use_regex": False},
            "decoder": byte_level | {"use_regex": False},
            "model": {
                "type": "BPE",
                "vocab": {char: byte for byte, char in _byte_chars().items()},
                "merges": [],
            },
        },
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": _SMALL["max_position_embeddings"],
        },
    )


def _byte_chars() -> dict[int, str]:
    """GPT-2's printable characters for the 256 bytes, as in tokenizers' ByteLevel."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(_BYTES) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(_BYTES + i) for i, byte in enumerate(others)
    }


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

MIDDLE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 20,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 16384,
    "rope_theta": 1_000_000.0,
    "num_nextn_predict_layers": 0,
}
"""Attention dimensions of GLM-4.7-Flash, everything else smaller: 47 million parameters, so that a
CPU can run the long contexts too."""


DEEP: dict[str, Any] = MIDDLE | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 24,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 8,
}
"""Many small layers: steps take as long as their operations have overhead, whatever the number of
rows, as on a GPU at small batch sizes. There drafts pay even on a CPU."""


def middle_checkpoint(*, mtp: bool = False, deep: bool = False) -> Path:
    """Return the folder of the mid-size checkpoint (`MIDDLE`) in the user's cache.

    The first call writes the checkpoint in a few seconds. Its dtype is glmd's default on this
    machine, because mlx_lm.server has no setting for the dtype.

    Args:
        mtp: with an MTP layer whose drafts are all accepted.
        deep: of the dimensions `DEEP` instead.
    """
    dtype: Literal["BF16", "F32"] = "BF16" if on_gpu() else "F32"
    config = (DEEP if deep else MIDDLE) | {"num_nextn_predict_layers": int(mtp)}
    contents = hashlib.sha256(json.dumps([config, dtype]).encode())
    for file in TEXT_FILES:
        contents.update((DEMO / file).read_bytes())
    name = f"{'deep' if deep else 'middle'}-{contents.hexdigest()[:8]}"
    folder = platformdirs.user_cache_path("glmd") / "bench" / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder.parent))
        try:
            write_talkative_checkpoint(unfinished, dtype=dtype, predictable=mtp, **config)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def on_gpu() -> bool:
    """Return whether MLX computes on a GPU."""
    return bool(mx.default_device().type == mx.DeviceType.gpu)


def write_talkative_checkpoint(
    folder: Path, *, dtype: Literal["BF16", "F32"], predictable: bool = False, **config: Any
) -> None:
    """Write a random checkpoint whose answers have exactly the requested length.

    Tokenizer and chat template are the demo's. The rows of the output head for tokens that end or
    structure an answer are 0.

    Args:
        folder: an empty folder.
        dtype: type of the weights.
        predictable: see `write_random_checkpoint`.
        config: entries of config.json; see `write_random_checkpoint`.
    """
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    added = sorted(tokenizer.get_added_tokens_decoder())
    ends = [tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    write_random_checkpoint(
        folder, dtype=dtype, vocab_size=tokenizer.get_vocab_size(),
        eos_token_id=ends, pad_token_id=ends[0], predictable=predictable, **config,
    )  # fmt: skip
    for name in TEXT_FILES:
        shutil.copy(DEMO / name, folder)
    tensors = read_header(folder / "model.safetensors")
    for head in (tensors[name] for name in tensors if name.endswith("head.weight")):
        row = head.nbytes // head.shape[0]
        with head.file.open("r+b") as file:
            for token in added:
                file.seek(head.offset + token * row)
                file.write(bytes(row))
