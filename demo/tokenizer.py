"""Train the demo tokenizer: byte-level BPE with GLM's tags.

    python demo/tokenizer.py

Writes tokenizer.json and tokenizer_config.json into the checkpoint folder.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import jinja2.sandbox
from dialogues import Dialogue, World, mixture
from dialogues.text import UPPER_WORDS
from dialogues.world import ANIMALS, COLOURS, FOODS, JOBS, ROOMS, SKIES, WORDS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
CHECKPOINT = HERE / "glm-4.7-flash-demo"
SEED = 20260
VOCABULARY = 2048
SPECIAL = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)  # fmt: skip
ADDED = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
)  # fmt: skip
PIECES = (
    r"\p{N}|\p{Lu}\p{Ll}+|\p{Lu}+| ?[\p{Ll}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"| ?[^\s\p{L}\p{M}\p{N}]+|(?<!\s)\s*\n+|\s"
)
"""Each digit is a token. A capitalised word never includes the space before it, so a name has the
same tokens in a sentence, in JSON and in a tool argument, and can be copied token by token. Line
breaks are looked for once in a run of spaces: at each of them it would take quadratic time."""
COMMON = 150
"""Occurrences from which a lower-case word counts equally with and without a space before it, so
that both spellings become one token."""
VALUES = sorted({*WORDS, *ANIMALS, *ROOMS, *FOODS, *SKIES, *COLOURS, *JOBS})
WHOLE = 400
"""Occurrences added for each of VALUES and for UPPER_WORDS in capitals, so each is one token."""


def template() -> jinja2.Template:
    """Load the checkpoint's chat template in the same environment as transformers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string((CHECKPOINT / "chat_template.jinja").read_text())


def render(compiled: jinja2.Template, dialogue: Dialogue) -> str:
    """Render a whole dialogue, last answer included."""
    return compiled.render(
        messages=dialogue.messages, tools=dialogue.tools, clear_thinking=dialogue.clear_thinking
    )


def tag_ids(tokenizer: Tokenizer, *tags: str) -> list[int]:
    """Return the token ids of tags. Raises KeyError if the tokenizer lacks a tag."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[tag] for tag in tags]


def train(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(ADDED),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(tag, special=True) for tag in SPECIAL])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ADDED])
    return tokenizer


def balancing_texts(texts: list[str]) -> list[str]:
    """Return extra texts that balance common words with and without a leading space."""
    spaced: Counter[str] = Counter()
    bare: Counter[str] = Counter()
    for text in texts:
        for space, word in re.findall(r"( ?)(?<![A-Za-z])([a-z]+)", text):
            (spaced if space else bare)[word] += 1
    extra = []
    for word in sorted(set(spaced) | set(bare)):
        if spaced[word] + bare[word] >= COMMON:
            extra += [f" {word}"] * max(0, bare[word] - spaced[word])
            extra += [word] * max(0, spaced[word] - bare[word])
    whole = [*VALUES, *(f" {word}" for word in VALUES), *(word.upper() for word in UPPER_WORDS)]
    return extra + whole * WHOLE


def main() -> None:
    compiled = template()
    world = World(random.Random(SEED), evaluation=False)
    texts = [render(compiled, mixture(world)) for _ in range(20_000)]
    for tag in SPECIAL + ADDED:
        texts = [text.replace(tag, "\n") for text in texts]
    tokenizer = train(texts + balancing_texts(texts))
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.save(str(CHECKPOINT / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": [tag for tag in SPECIAL if tag != "<|endoftext|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "left",
    }
    (CHECKPOINT / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
