"""Evaluate the demo checkpoint on held-out dialogues and print the README's table.

    OMP_NUM_THREADS=2 python demo/evaluate.py

A dialogue is solved if all text after the reasoning, end tag included, equals the expected text. A
story is solved if it names its hero and ends by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from dialogues import SKILLS, Dialogue, draw
from network import Network, make_fast
from tokenizer import CHECKPOINT, render, template
from tokenizers import Tokenizer
from torch import Tensor

from checkpoint import load

LONGEST = 340
"""Generation limit in tokens. The longest expected answer has about 250."""


@dataclass(frozen=True)
class Task:
    dialogue: Dialogue
    prompt: list[int]
    expected: str
    """Expected text after the reasoning."""


@dataclass
class Score:
    solved: float
    """Share of solved tasks."""
    accepted: float
    """Mean probability that the main model accepts the MTP layer's draft."""
    failure: str | None


def tasks(
    tokenizer: Tokenizer, compiled: jinja2.Template, skill: str, seeds: range
) -> Iterable[Task]:
    for seed in seeds:
        dialogue = draw(skill, seed, evaluation=True)
        end = "<|observation|>" if "tool_calls" in dialogue.messages[-1] else "<|user|>"
        prompt = compiled.render(
            messages=dialogue.messages[:-1],
            tools=dialogue.tools,
            clear_thinking=dialogue.clear_thinking,
            enable_thinking=dialogue.thinking,
            add_generation_prompt=True,
        )
        whole = render(compiled, dialogue) + end
        assert whole.startswith(prompt)
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        yield Task(dialogue, ids, whole[len(prompt) :].rpartition("</think>")[2])


def generate(network: Network, prompts: list[list[int]], *, greedy: bool) -> list[list[int]]:
    """Return each prompt's continuation with its end tag, by transformers with left padding."""
    settings = network.main.generation_config
    longest = max(map(len, prompts))
    ids = torch.tensor([[settings.pad_token_id] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
    out = network.main.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=LONGEST,
        **(plain if greedy else {}),
    )
    answers = []
    for row in out[:, longest:].tolist():
        ends = [place for place, token in enumerate(row) if token in settings.eos_token_id]
        answers.append(row[: ends[0] + 1] if ends else row)
    return answers


def solved(skill: str, task: Task, answer: str) -> bool:
    text = answer.rpartition("</think>")[2]
    if skill != "story":
        return text == task.expected
    hero = task.dialogue.messages[-2]["content"].rstrip(".").rpartition(" ")[2]
    return hero in text and text.endswith("<|user|>") and len(text) > 100


def recommended(logits: Tensor) -> Tensor:
    """Return probabilities under the recommended sampling parameters: [rows, vocabulary]."""
    kept = logits.topk(50).values[:, -1:]
    probabilities = logits.where(logits >= kept, -torch.inf).div(0.2).softmax(-1)
    ordered, order = probabilities.sort(descending=True)
    ordered = ordered.where(ordered.cumsum(-1) - ordered < 0.95, 0.0)
    ordered = ordered.where(ordered >= 0.01 * ordered[:, :1], 0.0)
    return torch.zeros_like(ordered).scatter(1, order, ordered / ordered.sum(-1, keepdim=True))


def acceptance(
    network: Network, prompts: list[list[int]], answers: list[list[int]], *, greedy: bool
) -> float:
    """Return the mean probability that a draft is accepted.

    The mean is over all answer tokens except the first two. The MTP layer attends to all confirmed
    tokens before the draft, as in the engine.
    """
    whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    length = max(map(len, whole))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in whole])
    hidden = network.hidden(ids)
    drafted = network.drafted(hidden, ids.roll(-1, 1))
    drafting = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        drafting[row, len(prompt) : len(whole[row]) - 1] = True
    wanted = network.main.lm_head(hidden[drafting])
    drafts = network.main.lm_head(drafted.roll(1, 1)[drafting])
    if greedy:
        return float((wanted.argmax(-1) == drafts.argmax(-1)).float().mean())
    return float(torch.minimum(recommended(wanted), recommended(drafts)).sum(-1).mean())


@torch.no_grad()
def score(
    network: Network, tokenizer: Tokenizer, skill: str, todo: list[Task], *, greedy: bool
) -> Score:
    torch.manual_seed(0)
    prompts = [task.prompt for task in todo]
    answers = generate(network, prompts, greedy=greedy)
    texts = [tokenizer.decode(answer, skip_special_tokens=False) for answer in answers]
    good = [solved(skill, task, text) for task, text in zip(todo, texts, strict=True)]
    failure = None
    if not all(good):
        first = good.index(False)
        asked = tokenizer.decode(prompts[first], skip_special_tokens=False)
        failure = f"{asked[-300:]} >>> {texts[first]} (not {todo[first].expected})"
    accepted = acceptance(network, prompts, answers, greedy=greedy)
    return Score(sum(good) / len(good), accepted, failure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=200, help="dialogues per skill")
    parser.add_argument("--seed", type=int, default=0, help="of the first dialogue of a skill")
    parser.add_argument("--skill", action="append", help="evaluate this skill; may be repeated")
    parser.add_argument("--failures", action="store_true", help="print one failure per skill")
    options = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    network = load(options.checkpoint).eval()
    make_fast(network)
    print("| skill | solved, greedy | solved, recommended | MTP accepted, greedy | recommended |")
    print("| --- | --- | --- | --- | --- |")
    totals = torch.zeros(4)
    skills = options.skill or list(SKILLS)
    seeds = range(options.seed, options.seed + options.count)
    for skill in skills:
        todo = list(tasks(tokenizer, template(), skill, seeds))
        greedy, sampled = (
            score(network, tokenizer, skill, todo, greedy=greedy) for greedy in (True, False)
        )
        row = (greedy.solved, sampled.solved, greedy.accepted, sampled.accepted)
        totals += torch.tensor(row)
        print(f"| {skill} | {' | '.join(f'{share:.1%}' for share in row)} |", flush=True)
        if options.failures and greedy.failure:
            print("   ", greedy.failure.replace("\n", "\\n"))
    mean = totals / len(skills)
    print(f"| mean of the skills | {' | '.join(f'{share:.1%}' for share in mean)} |")


if __name__ == "__main__":
    main()
