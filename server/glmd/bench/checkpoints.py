"""Checkpoints of random weights for the benchmarks."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import platformdirs
from tokenizers import Tokenizer

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.checkpoint.hub import DEMO
from glmd.checkpoint.weights import read_header

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


def middle_checkpoint() -> Path:
    """Return the folder of the mid-size checkpoint (`MIDDLE`) in the user's cache.

    The first call writes the checkpoint in a few seconds. Its dtype is glmd's default on this
    machine, because mlx_lm.server has no setting for the dtype.
    """
    dtype: Literal["BF16", "F32"] = "BF16" if on_gpu() else "F32"
    contents = hashlib.sha256(json.dumps([MIDDLE, dtype]).encode())
    for file in TEXT_FILES:
        contents.update((DEMO / file).read_bytes())
    name = f"middle-{contents.hexdigest()[:8]}"
    folder = platformdirs.user_cache_path("glmd") / "bench" / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder.parent))
        try:
            write_talkative_checkpoint(unfinished, dtype=dtype, **MIDDLE)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def on_gpu() -> bool:
    """Return whether MLX computes on a GPU."""
    return bool(mx.default_device().type == mx.DeviceType.gpu)


def write_talkative_checkpoint(
    folder: Path, *, dtype: Literal["BF16", "F32"], **config: Any
) -> None:
    """Write a random checkpoint whose answers are plain text of exactly the requested length.

    Tokenizer and chat template are the demo's. The rows of the output head for tokens that end or
    structure an answer are 0.

    Args:
        folder: an empty folder.
        dtype: type of the weights.
        config: entries of config.json; see `write_random_checkpoint`.
    """
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    added = sorted(tokenizer.get_added_tokens_decoder())
    ends = [tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    write_random_checkpoint(
        folder, dtype=dtype, vocab_size=tokenizer.get_vocab_size(),
        eos_token_id=ends, pad_token_id=ends[0], **config,
    )  # fmt: skip
    for name in TEXT_FILES:
        shutil.copy(DEMO / name, folder)
    head = read_header(folder / "model.safetensors")["lm_head.weight"]
    row = head.nbytes // head.shape[0]
    with head.file.open("r+b") as file:
        for token in added:
            file.seek(head.offset + token * row)
            file.write(bytes(row))
