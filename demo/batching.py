"""Training batches: tokens of dialogues, with a loss weight for each."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import jinja2
import torch
from dialogues import PRACTICE, SKILLS, Dialogue, World, mixture
from tokenizer import render, tag_ids
from tokenizers import Tokenizer
from torch import Tensor

WAITING = 24
"""Size of the pool that rows are packed from. 24 dialogues fill rows to 98 %."""

DRILLS = 0.1
"""Share of examples that repeat or reverse random tokens.

Such examples train copying from the context, which names, numbers and tool calls consist of.
"""

BACKWARDS = 0.3
"""Share of drills that reverse their passage."""


@dataclass(frozen=True)
class Focus:
    """Skills to practise more often than in the mixture.

    Attributes:
        share: Share of dialogues drawn from `skills` only.
        skills: Relative weight of each skill.
    """

    share: float
    skills: dict[str, int]


FOCI = {
    "hard": Focus(
        0.4,
        {
            "arithmetic": 4, "word problem": 1, "upper case": 2, "reverse": 3, "count words": 2,
            "pick word": 2, "JSON": 1, "one call": 2, "two calls": 3, "named call": 2,
            "two results": 2, "count": 1, "list": 1,
        },
    ),
    "calls": Focus(
        0.65,
        {
            "arithmetic": 4, "word problem": 1, "upper case": 1, "reverse": 3, "count words": 1,
            "pick word": 1, "one call": 5, "no arguments": 2, "two calls": 8, "named call": 4,
            "two results": 2, "multi-turn": 1,
        },
    ),
    "names": Focus(
        0.7,
        {
            "look up": 7, "many calls": 14, "two calls": 8, "one call": 3, "no arguments": 1,
            "named call": 5, "two results": 5, "tools not needed": 1, "count": 5, "greeting": 2,
            "arithmetic": 4, "word problem": 2, "reverse": 3, "count words": 2, "JSON": 1,
            "multi-turn": 1,
        },
    ),
    "weak": Focus(
        0.65,
        {
            "look up": 3, "many calls": 8, "two calls": 8, "one call": 2, "named call": 4,
            "two results": 3, "tools not needed": 3, "arithmetic": 6, "word problem": 5,
            "upper case": 2, "reverse": 3, "count words": 4, "pick word": 1, "JSON": 2, "count": 2,
            "list": 2, "greeting": 1, "say hello": 1,
        },
    ),
}  # fmt: skip
"""Focus of each training round. `weak` has the skills that were solved below 85 % before it;
practising calls alone had made other skills worse."""

Example = tuple[list[int], list[float]]


@dataclass(frozen=True)
class Batch:
    """Rows of equal length. A row holds several dialogues, separated by the attention mask."""

    ids: Tensor
    """[rows, length]"""
    positions: Tensor
    """[rows, length], from 0 in each dialogue."""
    weights: Tensor
    """[rows, length], loss weight of each token; 0 for a dialogue's first tokens and padding."""
    mask: Tensor
    """[rows, 1, length, length], true where a token attends to another."""


def example(
    tokenizer: Tokenizer, compiled: jinja2.Template, dialogue: Dialogue, read_weight: float
) -> Example:
    """Return a dialogue's tokens, up to the end tag of its last answer, and their loss weights.

    Answers whose reasoning was cleared from the history get `read_weight`, because a full weight
    would teach answering without reasoning.
    """
    end = "<|observation|>" if "tool_calls" in dialogue.messages[-1] else "<|user|>"
    ids = tokenizer.encode(render(compiled, dialogue) + end, add_special_tokens=False).ids
    user, observation, assistant = tag_ids(
        tokenizer, "<|user|>", "<|observation|>", "<|assistant|>"
    )
    counted_from = 0
    if dialogue.clear_thinking and dialogue.thinking:
        counted_from = len(ids) - 2 - ids[-2::-1].index(user)
    weights = [0.0] * 3 + [read_weight] * (len(ids) - 3)
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


def drill(world: World, tokenizer: Tokenizer) -> Example:
    """Return a random passage followed by repeats or its reverse; only these have a weight."""
    vocabulary = tokenizer.get_vocab_size()
    if world.chance(BACKWARDS):
        passage = world.rng.sample(range(vocabulary), world.number(4, 30))
        there = [*passage, *tokenizer.encode(" reverse").ids]
        return there + passage[::-1], [0.0] * len(there) + [1.0] * len(passage)
    passage = [world.number(0, vocabulary - 1) for _ in range(world.number(4, 40))]
    repeats = world.number(2, max(2, 80 // len(passage)))
    first = [0.0] * (len(passage) + 1)
    return passage * repeats, (first + [1.0] * (len(passage) * repeats))[: len(passage) * repeats]


def dialogue(world: World, focus: Focus) -> Dialogue:
    """Draw a dialogue from the mixture or from the skills in focus."""
    if not world.chance(focus.share):
        return mixture(world)
    skill = world.rng.choices(list(focus.skills), list(focus.skills.values()))[0]
    return PRACTICE[skill](world) if skill in PRACTICE else SKILLS[skill][0](world)


def pack(rows: list[list[Example]], length: int) -> Batch:
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
    tokenizer: Tokenizer,
    compiled: jinja2.Template,
    focus: Focus,
    *,
    seed: int,
    rows: int,
    length: int,
    read_weight: float,
) -> Iterator[Batch]:
    """Yield batches without end. Each row takes the oldest waiting dialogues that fit."""
    world = World(random.Random(seed), evaluation=False)
    waiting: list[Example] = []
    while True:
        filled: list[list[Example]] = []
        for _ in range(rows):
            row: list[Example] = []
            left = length
            while True:
                while len(waiting) < WAITING:
                    made = (
                        drill(world, tokenizer)
                        if world.chance(DRILLS)
                        else example(tokenizer, compiled, dialogue(world, focus), read_weight)
                    )
                    if len(made[0]) <= length:
                        waiting.append(made)
                fitting = (n for n, (tokens, _) in enumerate(waiting) if len(tokens) <= left)
                chosen = next(fitting, None)
                if chosen is None:
                    break
                row.append(waiting.pop(chosen))
                left -= len(row[-1][0])
            filled.append(row)
        yield pack(filled, length)
