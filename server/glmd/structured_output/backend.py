"""llguidance tokenizers and matchers of the grammar worker and the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from glmd.errors import CheckpointError, GlmdError

LIMITS = LLParserLimits(
    # After `{` an object of 1,000 optional properties has 4,000 items; the default is 2,000.
    max_items_in_row=8_000,
    initial_lexer_fuel=1_000_000,
    # One mask: about 14 ms of lexing and 5 ms of parsing at most.
    step_lexer_fuel=200_000,
    step_max_items=100_000,
    # 1 kB to 2 kB each.
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""Limits of one grammar, so that one request can slow down neither a step nor the machine."""

_UNSPELLABLE = "\U0010fffe\U0010ffff"
"""Prefix of control tokens' names, so that no text spells one. llguidance tokenizes text that a
grammar forces, and would otherwise find control tokens in such text."""


class GrammarError(GlmdError):
    """A grammar is malformed, matches nothing, or exceeds `LIMITS`."""


def load_tokenizer(folder: Path, vocab_size: int, end_ids: Sequence[int]) -> LLTokenizer:
    """Load a checkpoint's vocabulary for grammars.

    Every added token is a control token: a grammar names it by id (`<[154829]>`), and neither its
    name nor text matches it. Where a grammar forces a text, masks allow only the tokens that the
    tokenizer encodes the text to.

    Takes 1 s to 2 s and 140 MB for 150,000 tokens, and holds the GIL.

    Args:
        folder: contains tokenizer.json.
        vocab_size: number of logits; ids beyond the tokenizer's are never allowed.
        end_ids: ids that end a sequence, allowed where a grammar is complete; at least one.

    Raises:
        CheckpointError: the tokenizer is missing or damaged.
    """
    file = folder / "tokenizer.json"
    try:
        tokenizer = json.loads(file.read_bytes())
        tokenizer |= {"truncation": None, "padding": None}
        vocabulary = tokenizer["model"]["vocab"]
        for token in tokenizer["added_tokens"]:
            name = token["content"]
            token |= {"content": _UNSPELLABLE + name, "special": True}
            if name in vocabulary:
                vocabulary[_UNSPELLABLE + name] = vocabulary.pop(name)
        return LLTokenizer(
            json.dumps(tokenizer, ensure_ascii=False), n_vocab=vocab_size, eos_token=list(end_ids)
        )
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file", file=str(file)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not a tokenizer: {error}", file=str(file)) from error


class _Bytes:
    """Tokenizer for `TokenizerWrapper` with one token per byte of text."""

    bos_token_id = None

    def __init__(self, controls: Mapping[str, int], end_id: int) -> None:
        self.tokens = [b""] * (1 + max(255, *controls.values()))
        free = (id for id in range(len(self.tokens)) if id not in set(controls.values()))
        self._ids = [next(free) for _ in range(256)]
        for byte, id in enumerate(self._ids):
            self.tokens[id] = bytes((byte,))
        for name, id in controls.items():
            self.tokens[id] = (_UNSPELLABLE + name).encode()
        self.special_token_ids = list(controls.values())
        self.eos_token_id = end_id

    def __call__(self, text: bytes) -> list[int]:
        return [self._ids[byte] for byte in text]


def byte_tokenizer(controls: Mapping[str, int], end_ids: Sequence[int]) -> LLTokenizer:
    """Return a tokenizer to check grammars with: control tokens and single bytes.

    Args:
        controls: ids of control tokens by name.
    """
    return LLTokenizer(TokenizerWrapper(_Bytes(controls, end_ids[0])), eos_token=list(end_ids))


def make_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Compile a grammar without holding the GIL.

    Takes milliseconds for common grammars, and up to minutes for some within `LIMITS`.

    Raises:
        GrammarError: with llguidance's message.
    """
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise GrammarError(matcher.get_error().strip())
    return matcher
