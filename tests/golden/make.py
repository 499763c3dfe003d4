"""Write `logits.npz`: what transformers' Glm4MoeLiteForCausalLM answers in float32.

Run where glmd is installed with the extra `parity`:

    python tests/golden/make.py

The checkpoint is not stored: `write_random_checkpoint` makes it of the seed, and a digest of its
weights is stored to tell a change of the weights from a change of the forward pass.
"""

from __future__ import annotations

import hashlib
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from glmd.bench.random_checkpoint import write_random_checkpoint

FILE = Path(__file__).with_name("logits.npz")

CONFIG: dict[str, Any] = {
    "seed": 20,
    "dtype": "F32",
    "vocab_size": 320,
    "hidden_size": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "rope_theta": 50_000.0,
    "num_nextn_predict_layers": 0,
}
"""Arguments of `write_random_checkpoint`. Theta is not that to which mlx-lm falls back."""

TOKENS = np.random.default_rng(5).integers(0, 320, 96).astype(np.int32)


def write_checkpoint(folder: Path) -> str:
    """Write the checkpoint; returns the digest of its weights."""
    write_random_checkpoint(folder, **CONFIG)
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def transformers_logits(folder: Path, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """[tokens, vocabulary]. Needs torch, which this module is imported without."""
    torch, transformers = import_module("torch"), import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    return np.asarray(logits.numpy(), np.float32)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        digest = write_checkpoint(Path(name))
        logits = transformers_logits(Path(name), TOKENS)
    np.savez_compressed(FILE, digest=digest, tokens=TOKENS, logits=logits)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
