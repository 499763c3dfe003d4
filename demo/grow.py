"""Grow the demo checkpoint: more layers, more and wider experts, the same function.

    python demo/grow.py --out grown --layers 8 --copies 2 --width 128
    OMP_NUM_THREADS=2 python demo/train.py --start grown --out grown --minutes 40 --rate 0.5

New layers write zeros, new columns of experts are read with zeros, and copies of an expert share
the score of the original, so the logits stay equal until training tells the parts apart.
"""

from __future__ import annotations

import argparse
import copy
import shutil
from pathlib import Path

import torch
from network import Network
from tokenizer import CHECKPOINT
from torch import Tensor
from transformers import Glm4MoeLiteConfig

from checkpoint import load, save

NOISE = 0.02
"""Standard deviation of new weights, and relative difference between copies of an expert."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def settings(old: Glm4MoeLiteConfig, layers: int, copies: int, width: int) -> Glm4MoeLiteConfig:
    new = copy.deepcopy(old)
    new.num_hidden_layers = layers
    new.mlp_layer_types = ["dense"] + ["sparse"] * (layers - 1)
    new.n_routed_experts *= copies
    new.num_experts_per_tok *= copies
    new.moe_intermediate_size = width
    return new


def grown(value: Tensor, like: Tensor, name: str) -> Tensor:
    """Return `value` enlarged to the shape of `like`."""
    if "mlp.gate." in name or ".experts." in name:  # a copy of each expert behind the originals
        repeats = like.shape[0] // value.shape[0]
        value = torch.cat([value] * repeats)
    if value.shape == like.shape:
        return value
    out = torch.randn_like(like) * NOISE
    if name.endswith("gate_up_proj"):
        for half, part in zip(value.chunk(2, 1), out.chunk(2, 1), strict=True):
            part[:, : half.shape[1]] = half
    elif name.endswith(("down_proj", "down_proj.weight")):
        out.zero_()
        out[..., : value.shape[-1]] = value
    else:  # gate and up of the shared expert
        out[: value.shape[0]] = value
    return out


@torch.no_grad()
def grow(old: Network, layers: int, copies: int, width: int) -> Network:
    new = Network(settings(old.main.config, layers, copies, width))
    count = old.main.config.num_hidden_layers
    places = [round(index * (layers - 1) / (count - 1)) for index in range(count)]
    source = old.state_dict()
    state = new.state_dict()
    for name, like in state.items():
        if not name.startswith("main.model.layers."):
            state[name] = grown(source[name], like, name)
            continue
        index, _, rest = name.removeprefix("main.model.layers.").partition(".")
        if int(index) in places:
            origin = f"main.model.layers.{places.index(int(index))}.{rest}"
            state[name] = grown(source[origin], like, rest)
        elif rest.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
            state[name] = torch.zeros_like(like)
    for name, value in state.items():
        if ".experts." in name or name.endswith("mlp.gate.weight"):
            state[name] = value * (1 + NOISE * torch.randn_like(value))
    new.load_state_dict(state)
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--copies", type=int, default=2, help="factor on the number of experts")
    parser.add_argument("--width", type=int, default=128, help="of the experts")
    options = parser.parse_args()
    torch.manual_seed(1)
    network = grow(load(CHECKPOINT), options.layers, options.copies, options.width)
    options.out.mkdir(parents=True)
    for file in TOKENIZER_FILES:
        shutil.copyfile(CHECKPOINT / file, options.out / file)
    save(network, options.out)
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters")


if __name__ == "__main__":
    main()
