"""Average the weights of two checkpoints from the same training line.

    python demo/blend.py FOLDER OTHER                          print the loss for several shares
    python demo/blend.py FOLDER OTHER --share 0.7 --out OUT    write the average

Losses are those of training dialogues, so that evaluation dialogues stay unseen until the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from batching import Batch, Focus, batches
from network import Network, make_fast
from tokenizer import CHECKPOINT, template
from tokenizers import Tokenizer
from torch import Tensor
from train import LENGTH, ROWS, losses

from checkpoint import load, save

SHARES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)


def average(ours: dict[str, Tensor], theirs: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    return {name: value.lerp(theirs[name], share) for name, value in ours.items()}


@torch.no_grad()
def loss(network: Network, data: list[Batch]) -> Tensor:
    """Return the answers' loss of the main model and of the MTP layer: [2]."""
    each = [losses(network, b.ids, b.positions, b.mask, b.weights) for b in data]
    return torch.tensor(each).mean(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--share", type=float, help="share of OTHER's weights, 0 to 1")
    parser.add_argument("--out", type=Path, help="folder to write the average to")
    parser.add_argument("--batches", type=int, default=24, help="batches to measure the loss on")
    parser.add_argument("--seed", type=int, default=1, help="of the batches; not a training seed")
    options = parser.parse_args()
    if (options.share is None) != (options.out is None):
        parser.error("--share and --out must be given together")
    network = load(options.folder)
    # Copied, because load_state_dict writes into the network's own arrays.
    ours = {name: value.clone() for name, value in network.state_dict().items()}
    theirs = load(options.other).state_dict()
    if options.out is not None:
        network.load_state_dict(average(ours, theirs, options.share))
        save(network, options.out)
        return
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    source = batches(
        tokenizer,
        template(),
        Focus(0.0, {}),
        seed=options.seed,
        rows=ROWS,
        length=LENGTH,
        read_weight=0.0,
    )
    data = [next(source) for _ in range(options.batches)]
    make_fast(network)
    for share in SHARES:
        network.load_state_dict(average(ours, theirs, share))
        main_loss, mtp_loss = loss(network, data)
        print(f"share {share}: loss {main_loss:.4f}, MTP {mtp_loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
