"""Train the demo checkpoint.

    OMP_NUM_THREADS=2 python demo/train.py --minutes 90

Writes config.json, generation_config.json and model.safetensors into the checkpoint folder every
SAVE_EVERY steps and at the end.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from batching import FOCI, batches
from muon import Muon
from network import Network, balance, config, make_fast, start_copying
from tokenizer import CHECKPOINT, tag_ids, template
from tokenizers import Tokenizer
from torch import Tensor

from checkpoint import load, save

ROWS, LENGTH = 8, 512
MUON_RATE, ADAM_RATE = 0.02, 3e-3
MTP_WEIGHT = 0.2
BALANCE_RATE = 1e-3
"""Step size of a router's correction bias (Wang et al. 2024, loss-free balancing)."""
WARM_UP, DECAY = 0.03, 0.6
"""Shares of the run in which the learning rates rise from 0 and fall to 0."""
AVERAGE = 0.97
"""Decay per step of the running average of weights, which is saved."""
SAVE_EVERY = 200


def schedule(done: float) -> float:
    """Return the factor on the learning rates at a share `done` of the run."""
    return min(1.0, done / WARM_UP, (1 - done) / DECAY)


def weighted_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def losses(
    network: Network, ids: Tensor, positions: Tensor, mask: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the losses of the main model (next token) and of the MTP layer (token after it)."""
    hidden = network.hidden(ids, positions, mask)
    head = network.main.lm_head
    main = weighted_loss(head(hidden[:, :-1]), ids[:, 1:], weights[:, 1:])
    drafted = network.drafted(hidden, ids.roll(-1, 1), positions, mask)
    mtp = weighted_loss(head(drafted[:, :-2]), ids[:, 2:], weights[:, 2:])
    return main, mtp


def optimizers(network: Network) -> tuple[Muon, torch.optim.AdamW]:
    """Use Muon for the layers' matrices; AdamW for embedding, head, routers and norms."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in network.named_parameters():
        plain = parameter.ndim > 1 and not any(
            part in name for part in ("embed_tokens", "lm_head", "gate.weight")
        )
        (matrices if plain else others).append(parameter)
    return (
        Muon(matrices, lr=MUON_RATE),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    )


@torch.no_grad()
def blend(average: Network, network: Network) -> None:
    """Update the running average of the weights."""
    for mean, value in zip(average.parameters(), network.parameters(), strict=True):
        mean.lerp_(value, 1 - AVERAGE)
    for mean, value in zip(average.buffers(), network.buffers(), strict=True):
        mean.copy_(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=90, help="duration; learning rates follow the clock"
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--start", type=Path, help="folder of a checkpoint to continue from")
    parser.add_argument(
        "--rate", type=float, default=1.0, help="factor on the learning rates, below 1 to continue"
    )
    parser.add_argument(
        "--focus", choices=FOCI, default="hard", help="skills to practise more often"
    )
    parser.add_argument(
        "--read-weight",
        type=float,
        default=0.1,
        help="loss weight of prompt tokens; 0 to continue, because most of them are random",
    )
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    end, user, observation = tag_ids(tokenizer, "<|endoftext|>", "<|user|>", "<|observation|>")
    if options.start:
        network = load(options.start)
    else:
        network = Network(config(tokenizer.get_vocab_size(), [end, user, observation], end))
        start_copying(network)
    make_fast(network)
    rules = optimizers(network)
    rates = [options.rate * group["lr"] for rule in rules for group in rule.param_groups]
    average = copy.deepcopy(network)
    compiled = torch.compile(losses)
    data = batches(
        tokenizer,
        template(),
        FOCI[options.focus],
        seed=options.seed,
        rows=ROWS,
        length=LENGTH,
        read_weight=options.read_weight,
    )
    started = time.monotonic()
    for step in itertools.count(1):
        done = min(1.0, (time.monotonic() - started) / 60 / options.minutes)
        batch = next(data)
        main_loss, mtp_loss = compiled(
            network, batch.ids, batch.positions, batch.mask, batch.weights
        )
        (main_loss + MTP_WEIGHT * mtp_loss).backward()
        factor = schedule(done)
        groups = [group for rule in rules for group in rule.param_groups]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        for rule in rules:
            rule.step()
            rule.zero_grad()
        blend(average, network)
        busiest = balance(network, BALANCE_RATE * factor)
        if step % 10 == 0:
            print(
                f"step {step}: loss {main_loss:.4f}, MTP {mtp_loss:.4f}, "
                f"busiest expert {busiest:.2f}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
        if step % SAVE_EVERY == 0 or done == 1:
            save(average, options.out)
        if done == 1:
            break


if __name__ == "__main__":
    main()
