"""Dialogues as training batches: tokens, and how much each counts as a target."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import jinja2
import torch
from dialogues import SKILLS, Dialogue, World, mixture
from tokenizer import render
from tokenizers import Tokenizer
from torch import Tensor

OTHER_WEIGHT = 0.1
"""Loss weight of what the model only reads: enough to learn the format's rhythm."""

WAITING = 24
"""Dialogues to choose from: enough to fill rows to 98 %."""

DRILLS = 0.1
"""Share of examples that are no dialogues but random tokens said again and again.

They have the model copy what stands in its context, whatever it is; and names, numbers and tools
of dialogues are little else than copying.
"""

HARD = {"arithmetic": 4, "one call": 2, "two calls": 3, "named call": 2, "count": 2, "list": 1}
"""Skills that take longest to learn, with their weights among one another."""

HARD_SHARE = 0.35
"""Share of dialogues drawn from those skills alone, beside what the mixture has of them."""

Example = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Batch:
    """Rows of one length, each packed with several dialogues that do not see one another."""

    ids: Tensor
    """[rows, length]"""
    positions: Tensor
    """[rows, length], from 0 in each dialogue."""
    weights: Tensor
    """[rows, length], of each token as a target; 0 for a dialogue's start and for padding."""
    mask: Tensor
    """[rows, 1, length, length], true where a token looks at another."""


def weighed(tokenizer: Tokenizer, compiled: jinja2.Template, dialogue: Dialogue) -> Example:
    """A dialogue's tokens, up to the tag that ends its last answer, and their loss weights.

    Answers whose reasoning was cleared from the history count as read, not as written: they would
    teach answering without it.
    """
    end = "<|observation|>" if "tool_calls" in dialogue.messages[-1] else "<|user|>"
    ids = tokenizer.encode(render(compiled, dialogue) + end, add_special_tokens=False).ids
    user, observation, assistant = (
        tokenizer.token_to_id(tag) for tag in ("<|user|>", "<|observation|>", "<|assistant|>")
    )
    counted_from = 0
    if dialogue.clear_thinking and dialogue.thinking:
        counted_from = len(ids) - 2 - ids[-2::-1].index(user)
    weights = [0.0] * 3 + [OTHER_WEIGHT] * (len(ids) - 3)
    place = 0
    while place < len(ids):
        if ids[place] == assistant and place >= counted_from:
            place += 2
            while True:
                weights[place] = 1.0
                if ids[place] in (user, observation):
                    break
                place += 1
        place += 1
    return ids, weights


def drill(world: World, vocabulary: int) -> Example:
    """A random passage, repeated; only the repetitions count."""
    passage = [world.number(0, vocabulary - 1) for _ in range(world.number(4, 40))]
    repeats = world.number(2, max(2, 80 // len(passage)))
    first = [0.0] * (len(passage) + 1)
    return passage * repeats, (first + [1.0] * (len(passage) * repeats))[: len(passage) * repeats]


def dialogue(world: World) -> Dialogue:
    """One of the mixture, or of the hard skills."""
    if not world.chance(HARD_SHARE):
        return mixture(world)
    make, _ = SKILLS[world.rng.choices(list(HARD), list(HARD.values()))[0]]
    return make(world)


def packed(rows: list[list[Example]], length: int) -> Batch:
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    owner = torch.full((len(rows), length), -1)
    for row, examples in enumerate(rows):
        start = 0
        for number, (tokens, token_weights) in enumerate(examples):
            span = slice(start, start + len(tokens))
            ids[row, span] = torch.tensor(tokens)
            weights[row, span] = torch.tensor(token_weights)
            positions[row, span] = torch.arange(len(tokens))
            owner[row, span] = number
            start += len(tokens)
    mask = (owner[:, :, None] == owner[:, None, :]).tril()
    return Batch(ids, positions, weights, mask[:, None])


def batches(
    tokenizer: Tokenizer, compiled: jinja2.Template, *, seed: int, rows: int, length: int
) -> Iterator[Batch]:
    """Endless training batches; each row takes the oldest waiting dialogues that still fit it."""
    world = World(random.Random(seed), evaluation=False)
    waiting: list[Example] = []
    while True:
        filled: list[list[Example]] = []
        for _ in range(rows):
            row: list[Example] = []
            left = length
            while True:
                while len(waiting) < WAITING:
                    waiting.append(
                        drill(world, tokenizer.get_vocab_size())
                        if world.chance(DRILLS)
                        else weighed(tokenizer, compiled, dialogue(world))
                    )
                fitting = (n for n, (tokens, _) in enumerate(waiting) if len(tokens) <= left)
                chosen = next(fitting, None)
                if chosen is None:
                    break
                row.append(waiting.pop(chosen))
                left -= len(row[-1][0])
            filled.append(row)
        yield packed(filled, length)
