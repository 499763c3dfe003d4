"""mlx-lm's two functions in the form in which model cards show them.

    model, tokenizer = load("leonsarmiento/GLM-4.7-Flash-5bit-mlx")
    text = generate(model, tokenizer, prompt="hello", temp=0.2, top_k=50, top_p=0.95)

In mlx-lm itself such a call raises a TypeError: sampling became an object there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glmd.chat.messages import read_tools
from glmd.llm import LLM, Messages


class CardTokenizer:
    """What snippets on model cards call on a tokenizer."""

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
        """The token ids of a rendered conversation."""
        rendered = self._llm.template.render(
            [dict(message) for message in messages],
            tools=[tool.definition for tool in read_tools(tools)],
            add_generation_prompt=add_generation_prompt,
            kwargs=template,
        )
        ids: list[int] = self._llm.tokenizer.encode_rendered(rendered).tolist()
        return ids

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self._llm.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, tags spelled out."""
        return self._llm.tokenizer.decode(ids)


def load(model: str | Path | None = None, **config: Any) -> tuple[LLM, CardTokenizer]:
    """Load a model as `mlx_lm.load` does: `model, tokenizer = load("…")`."""
    llm = LLM(model, **config)
    return llm, CardTokenizer(llm)


def generate(
    model: LLM,
    tokenizer: CardTokenizer,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 256,
    temp: float | None = None,
    verbose: bool = False,
    **options: Any,
) -> str:
    """Continue one prompt as `mlx_lm.generate` does, with the sampling that cards ask for.

    Args:
        prompt: token ids, or text in which tags count as tags.
        temp: temperature.
        verbose: print the text as well.
        options: `top_k`, `top_p`, `min_p`, `seed`, `stop`, … as for `LLM.generate`.

    Returns:
        the text, tags spelled out as mlx-lm's are.
    """
    if temp is not None:
        options["temperature"] = temp
    (completion,) = model.generate([prompt], max_tokens=max_tokens, n=1, **options)
    if verbose:
        print(completion.text)
    return completion.text
