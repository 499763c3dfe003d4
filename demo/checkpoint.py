"""Read and write the demo network as a BF16 checkpoint in Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

import torch
from network import MTPLayer, Network
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

WEIGHTS = "model.safetensors"


def mtp_tensors(network: Network) -> dict[str, Tensor]:
    """Return the MTP layer's tensors under the names that GLM checkpoints use.

    These have one tensor per expert, and copies of the embedding and head.
    """
    main = network.main
    tensors: dict[str, Tensor] = {
        "embed_tokens.weight": main.model.embed_tokens.weight,
        "shared_head.head.weight": main.lm_head.weight,
    }
    for name, value in network.mtp.state_dict().items():
        if name == "mlp.experts.gate_up_proj":
            for expert, both in enumerate(value):
                gate, up = both.chunk(2)
                tensors[f"mlp.experts.{expert}.gate_proj.weight"] = gate
                tensors[f"mlp.experts.{expert}.up_proj.weight"] = up
        elif name == "mlp.experts.down_proj":
            for expert, down in enumerate(value):
                tensors[f"mlp.experts.{expert}.down_proj.weight"] = down
        else:
            tensors[name] = value
    prefix = f"model.layers.{main.config.num_hidden_layers}."
    return {prefix + name: stored(name, value) for name, value in tensors.items()}


def stored(name: str, value: Tensor) -> Tensor:
    """Return a copy in BF16; the router's correction bias stays float32."""
    dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
    return value.detach().to(dtype).clone().contiguous()


def save(network: Network, folder: Path) -> None:
    main = Glm4MoeLiteForCausalLM(network.main.config)
    main.load_state_dict(network.main.state_dict())
    biases = {
        name: value.clone()
        for name, value in main.state_dict().items()
        if name.endswith("e_score_correction_bias")
    }
    main.to(torch.bfloat16)
    for name, value in biases.items():
        parent, _, leaf = name.rpartition(".")
        setattr(main.get_submodule(parent), leaf, torch.nn.Buffer(value))
    main.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.2,
        top_k=50,
        top_p=0.95,
        min_p=0.01,
        eos_token_id=main.config.eos_token_id,
        pad_token_id=main.config.pad_token_id,
    )
    main.save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS) | mtp_tensors(network)
    save_file(dict(sorted(tensors.items())), folder / WEIGHTS, metadata={"format": "pt"})


def load(folder: Path) -> Network:
    """Load a network in float32."""
    network = Network(Glm4MoeLiteConfig.from_pretrained(folder))
    network.main = Glm4MoeLiteForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = load_file(folder / WEIGHTS)
    prefix = f"model.layers.{network.main.config.num_hidden_layers}."
    network.mtp.load_state_dict(mtp_state(network.mtp, tensors, prefix))
    return network


def mtp_state(layer: MTPLayer, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, like in layer.state_dict().items():
        if ".experts." not in name:
            state[name] = tensors[prefix + name].to(like.dtype)
            continue
        base, _, kind = name.rpartition(".")
        parts = ("gate", "up") if kind == "gate_up_proj" else ("down",)
        state[name] = torch.stack(
            [
                torch.cat([tensors[f"{prefix}{base}.{e}.{part}_proj.weight"] for part in parts])
                for e in range(len(like))
            ]
        ).to(like.dtype)
    return state
