"""`load` and `generate` of mlx-lm, with the arguments shown on model cards.

    model, tokenizer = load("leonsarmiento/GLM-4.7-Flash-5bit-mlx")
    text = generate(model, tokenizer, prompt="hello", temp=0.2, top_k=50, top_p=0.95)

Current mlx-lm raises a TypeError for this call, because sampling arguments moved to an object.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glmd.chat.messages import read_tools
from glmd.llm import LLM, Messages


class TokenizerWrapper:
    """The methods of mlx-lm's tokenizer that model cards use."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.chat_template = llm.template.source

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **template: Any,
    ) -> list[int]:
        """Return the token ids of a rendered conversation."""
        rendered = self._llm.template.render(
            [dict(message) for message in messages],
            tools=[tool.definition for tool in read_tools(tools)],
            add_generation_prompt=add_generation_prompt,
            kwargs=template,
        )
        ids: list[int] = self._llm.tokenizer.encode_rendered(rendered).tolist()
        return ids

    def encode(self, text: str) -> list[int]:
        """Return the token ids of plain text."""
        return self._llm.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return self._llm.tokenizer.decode(ids)


def load(model: str | Path | None = None, **config: Any) -> tuple[LLM, TokenizerWrapper]:
    """Load a model as `mlx_lm.load` does. `config`: keyword arguments of `LLM`."""
    llm = LLM(model, **config)
    return llm, TokenizerWrapper(llm)


def generate(
    model: LLM,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 256,
    temp: float | None = None,
    verbose: bool = False,
    **options: Any,
) -> str:
    """Continue one prompt as `mlx_lm.generate` does.

    Args:
        prompt: token ids, or text in which special tokens are recognized.
        temp: temperature. None: the checkpoint's default.
        verbose: also print the text.
        options: `top_k`, `top_p`, `min_p`, `seed`, `stop`, … as for `LLM.generate`.

    Returns:
        The generated text, special tokens included.
    """
    if temp is not None:
        options["temperature"] = temp
    (completion,) = model.generate([prompt], max_tokens=max_tokens, n=1, **options)
    if verbose:
        print(completion.text)
    return completion.text
