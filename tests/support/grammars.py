"""Random answers from grammars, for tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from jsonschema import Draft202012Validator
from llguidance import LLMatcher

from glmd.bench.random_checkpoint import ADDED_TOKENS, SPECIAL_TOKENS
from glmd.chat.tokenizer import SpecialTokens
from glmd.structured_output.backend import byte_tokenizer, make_matcher
from glmd.structured_output.compiler import build_grammar
from glmd.structured_output.request import AnswerFormat, JsonSchema, OutputSpec

CONTROLS = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS + ADDED_TOKENS)}
"""Ids of control tokens in random checkpoints."""
NAMES = {id: name for name, id in CONTROLS.items()}
END_IDS = [
    CONTROLS[name]
    for name in ("<|endoftext|>", "<|user|>", "<|observation|>", "<|system|>", "<|assistant|>")
]
"""Ids that end an answer: every role tag does, whatever config.json lists."""
TAGS = SpecialTokens.find(CONTROLS, "tokenizer.json")
TOKENIZER = byte_tokenizer(CONTROLS, END_IDS)
WORDS = -(-TOKENIZER.vocab_size // 32)


def _weights() -> np.ndarray:
    """Return likelihoods of tokens, such that strings, numbers and arrays end soon."""
    weights = np.full(TOKENIZER.vocab_size, 0.15)
    for characters, weight in ((b"0123456789,", 2), (b" \n\t", 0.3), (b'"]}', 8), (b"\\", 1)):
        weights[list(characters)] = weight
    weights[256:] = 20
    weights[CONTROLS["</arg_value>"]] = 60
    return weights


WEIGHTS = _weights()


def matcher_of(spec: OutputSpec | AnswerFormat) -> LLMatcher:
    if not isinstance(spec, OutputSpec):
        spec = OutputSpec(spec)
    return make_matcher(TOKENIZER, build_grammar(spec, TAGS).text)


def schema_matcher(schema: dict[str, Any] | bool, *, strict: bool = True) -> LLMatcher:
    return matcher_of(JsonSchema(schema, "schema", strict=strict))


def allowed(matcher: LLMatcher) -> np.ndarray:
    """Return the ids that may come next."""
    mask = np.zeros(WORDS, np.uint32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    assert not matcher.is_error(), matcher.get_error()
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def walk(matcher: LLMatcher, rng: np.random.Generator, limit: int = 3000) -> list[int] | None:
    """Return random tokens up to an end token; None if there is no end within `limit` tokens."""
    matcher = matcher.deep_copy()
    tokens: list[int] = []
    while len(tokens) < limit:
        ids = allowed(matcher)
        likely = WEIGHTS[ids]
        token = int(rng.choice(ids, p=likely / likely.sum()))
        if token in END_IDS and matcher.is_stopped():
            return [*tokens, token]
        assert matcher.consume_token(token), matcher.get_error()
        tokens.append(token)
        if token in END_IDS:
            return tokens
    return None


def text_of(tokens: list[int]) -> str:
    """Return the text of tokens that are bytes, except for the last, an end token."""
    assert tokens[-1] in END_IDS
    return bytes(tokens[:-1]).decode()


def answers(matcher: LLMatcher, count: int, seed: int = 0) -> Iterator[str]:
    """Yield the answers of `count` walks that reach an end."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        tokens = walk(matcher, rng)
        if tokens is not None:
            yield text_of(tokens)


def validate(text: str, schema: dict[str, Any] | bool) -> None:
    checker = Draft202012Validator.FORMAT_CHECKER
    Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))


def accepts(matcher: LLMatcher, *tokens: str | int) -> bool:
    """Return whether texts and token ids, concatenated, are a complete answer."""
    copy = matcher.deep_copy()
    ids = [id for each in tokens for id in ([each] if isinstance(each, int) else each.encode())]
    return all(map(copy.consume_token, ids)) and copy.is_accepting()
