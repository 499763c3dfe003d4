"""Log-probabilities in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from glmd.api.openai.protocol import TokenLogprob, TopLogprob
from glmd.chat.events import TokenInfo
from glmd.chat.tokenizer import Tokenizer


def spell_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenInfo]) -> list[TokenLogprob]:
    """Tokens as text and as exact bytes, each with those that were as likely."""
    return [
        TokenLogprob(
            **_spelt(tokenizer, token.id),
            logprob=token.logprobs.logprob,
            top_logprobs=[
                TopLogprob(**_spelt(tokenizer, id), logprob=logprob)
                for id, logprob in zip(
                    token.logprobs.top_ids, token.logprobs.top_logprobs, strict=True
                )
            ],
        )
        for token in tokens
    ]


def _spelt(tokenizer: Tokenizer, id: int) -> dict[str, Any]:
    """A token's text, with U+FFFD for what is no UTF-8 by itself, and its exact bytes."""
    spelling = tokenizer.token_bytes(id)
    return {"token": spelling.decode("utf-8", "replace"), "bytes": list(spelling)}
