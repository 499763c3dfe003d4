"""llguidance as glmd uses it, the same in the process that checks grammars and in the engine."""

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
    # What one mask may cost: about 14 ms of lexing and 5 ms of parsing.
    step_lexer_fuel=200_000,
    step_max_items=100_000,
    # 1 to 2 kB each.
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""Per grammar, so that one request can slow down neither a step nor the machine."""


_UNSPELLABLE = "\U0010fffe\U0010ffff"
"""Before the names of control tokens, so that no text is one, not even text that must come next:
llguidance has the tokenizer put that into tokens, and would find them in it."""


class GrammarError(GlmdError):
    """A grammar cannot be used: it is wrong, contradicts itself, or is beyond `LIMITS`."""


def load_tokenizer(folder: Path, vocab_size: int, end_ids: Sequence[int]) -> LLTokenizer:
    """A checkpoint's vocabulary as grammars see it.

    Every added token is a control token there: a grammar reaches it by id alone (`<[154829]>`),
    neither by name nor by text that spells the name. Where a grammar leaves but one text, masks
    allow only the tokens into which the tokenizer itself would put it.

    Takes a second or two, and 140 MB, for 150,000 tokens. Holds the GIL.

    Args:
        folder: holds tokenizer.json.
        vocab_size: of the logits; ids beyond the tokenizer's are never allowed.
        end_ids: ids that end a sequence, allowed where a grammar is fulfilled; at least one.

    Raises:
        CheckpointError: the tokenizer is missing or damaged.
    """
    file = folder / "tokenizer.json"
    try:
        tokenizer = json.loads(file.read_bytes())
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
    """What `TokenizerWrapper` asks of a tokenizer; one token per byte of text."""

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
    """A stand-in to check grammars with: a checkpoint's control tokens, and single bytes.

    Args:
        controls: ids by name.
    """
    return LLTokenizer(TokenizerWrapper(_Bytes(controls, end_ids[0])), eos_token=list(end_ids))


def make_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Compile a grammar: milliseconds for common ones, seconds for some within `LIMITS`.

    Drops the GIL meanwhile.

    Raises:
        GrammarError: says what is wrong, in llguidance's words.
    """
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise GrammarError(matcher.get_error().strip())
    return matcher
