"""Checkpoints of random weights, in the layout in which the model is published.

For tests and benchmarks: small, quick to make, the same for the same seed, and behaving like a
model. Activations keep their size from layer to layer, the router's choices and the logits are
well apart, and every constant that a wrong implementation may forget (norm weights, correction
bias, theta) differs from the value at which it would not matter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from glmd.checkpoint.config import MODEL_TYPE, ModelConfig, load_config
from glmd.checkpoint.layout import (
    Component,
    Shape,
    Weight,
    main_weights,
    mtp_prefix,
    mtp_weights,
)
from glmd.checkpoint.weights import INDEX_NAME, TensorFileWriter, TensorSpec

SPECIAL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|observation|>",
)  # fmt: skip
"""Tokens of the published tokenizer that decoding with skip_special_tokens leaves out."""

ADDED_TOKENS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink",
)  # fmt: skip
"""Tokens that are added, but not special."""

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
"""Every last dimension is a multiple of 64, so that every matrix can be quantised."""


def write_random_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    dtype: Literal["BF16", "F32"] = "BF16",
    shards: int = 1,
    mtp_shares_vocabulary: bool = True,
    **config: Any,
) -> ModelConfig:
    """Write a Hugging Face-layout checkpoint of random weights, with a byte-level tokenizer.

    Per-expert weights, `kv_b_proj` whole, the MTP layer under `model.layers.N` if
    `num_nextn_predict_layers` is 1, and `e_score_correction_bias` in F32, as published.

    Args:
        folder: is made; must not exist or be empty.
        seed: equal seeds give equal weights; dtype and sharding do not change them (but for
            rounding).
        dtype: of all weights but the correction bias.
        shards: the number of weight files; with more than one there is an index.
        mtp_shares_vocabulary: the MTP layer's embedding and head equal the main model's to the
            bit, as in the published model; else they are drawn anew.
        config: entries of config.json instead of the small defaults; None removes one. The
            tokenizer is left out when the vocabulary has no room for its 277 tokens.

    Returns:
        The configuration, as read back.
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
    _write_weights(folder, weights, twins, seed=seed, dtype=dtype, shards=shards)
    _write_json(
        folder / "generation_config.json",
        {"do_sample": True, "temperature": 1.0, "eos_token_id": raw.get("eos_token_id")},
    )
    if parsed.vocab_size >= _BYTES + len(SPECIAL_TOKENS) + len(ADDED_TOKENS):
        _write_tokenizer(folder)
    return parsed


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round float32 to the nearest bfloat16, ties to even; the bits, since numpy has no such type.

    For finite values.
    """
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)


_DTYPE_NAMES = {"BF16": "bfloat16", "F32": "float32"}


def _write_weights(
    folder: Path,
    weights: list[Weight],
    twins: dict[str, str],
    *,
    seed: int,
    dtype: str,
    shards: int,
) -> None:
    """Write `weights`; a tensor named in `twins` gets the values of the other."""
    specs: list[TensorSpec] = []
    makers: dict[str, Weight] = {}
    for weight in weights:
        for source in dict.fromkeys(weight.sources):
            if source in makers:
                continue  # kv_b_proj, of which two arrays are made
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
                drawn = _draw(makers[spec.name], spec.shape, twins.get(spec.name, spec.name), seed)
                stored = to_bf16(drawn) if spec.dtype == "BF16" else drawn
                writer.write(spec.name, stored.tobytes())
    if shards > 1:
        total = sum(spec.nbytes for spec in specs)
        _write_json(
            folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _draw(weight: Weight, shape: Shape, name: str, seed: int) -> npt.NDArray[np.float32]:
    """The values of one tensor depend on the seed and its name alone."""
    rng = np.random.default_rng([seed, *name.encode()])
    values = rng.standard_normal(prod(shape), dtype=np.float32).reshape(shape)
    if weight.keeps_float32:
        return values * np.float32(0.1)
    if weight.component is Component.NORM:
        return 1 + values * np.float32(0.1)
    if weight.component is Component.EMBEDDING:
        return values
    # Wider where a choice is made of the result, so that float errors do not turn it.
    gain = {Component.HEAD: 3.0, Component.ROUTER: 2.0}.get(weight.component, 1.0)
    return values * np.float32(gain / np.sqrt(shape[-1]))


def _split(specs: list[TensorSpec], parts: int) -> Iterator[list[TensorSpec]]:
    bounds = [len(specs) * i // parts for i in range(parts + 1)]
    for i in range(parts):
        yield specs[bounds[i] : bounds[i + 1]]


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges: any text round-trips, one token per UTF-8 byte."""
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
    """GPT-2's printable stand-ins for the 256 bytes, as tokenizers' ByteLevel uses them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(_BYTES) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(_BYTES + i) for i, byte in enumerate(others)
    }


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
