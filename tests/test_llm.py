"""The library: `from glmd import LLM, load, generate`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from glmd import LLM, generate, load
from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.chat.types import Finished, ReasoningDelta
from glmd.errors import InvalidRequest

pytestmark = pytest.mark.engine

TEMPLATE = ROOT / "demo/glm-4.7-flash-demo/chat_template.jinja"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm") / "random"
    write_random_checkpoint(folder, seed=7)
    shutil.copy(TEMPLATE, folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    llm = LLM(folder)
    yield llm
    llm.close()


def test_a_batch_gives_each_prompt_the_same_tokens_as_alone(llm: LLM) -> None:
    prompts = ["One", "Another prompt", "<|user|>Third<|assistant|>"]
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    together = llm.generate(prompts, **options)
    alone = [llm.generate(prompt, **options)[0] for prompt in prompts]
    assert [output.tokens for output in together] == [output.tokens for output in alone]
    assert all(len(output.tokens) == 12 for output in together)
    assert all(output.finish_reason == "length" for output in together)


def test_n_continuations_differ_and_are_reproducible_by_seed(llm: LLM) -> None:
    options: dict[str, Any] = {
        "max_tokens": 16,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "ignore_eos": True,
    }
    first = llm.generate("Once", n=3, seed=5, **options)
    again = llm.generate("Once", n=3, seed=5, **options)
    assert [output.tokens for output in first] == [output.tokens for output in again]
    assert len({tuple(output.tokens) for output in first}) == 3


def test_a_repeated_prompt_is_cached_except_its_last_token(llm: LLM) -> None:
    prompt = "A prompt that is sent twice."
    llm.generate(prompt, max_tokens=1)
    (completion,) = llm.generate(prompt, max_tokens=1)
    assert completion.cached_tokens == completion.prompt_tokens - 1


def test_chat_separates_reasoning_from_content(llm: LLM) -> None:
    thinking = llm.chat(HELLO, max_tokens=4, ignore_eos=True)
    assert not thinking.text
    direct = llm.chat(HELLO, template={"enable_thinking": False}, max_tokens=4, ignore_eos=True)
    assert not direct.reasoning


def test_the_events_of_a_stream_add_up_to_the_answer(llm: LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "seed": 3, "temperature": 1.0}
    whole = llm.chat(HELLO, **options)
    events = list(llm.stream(HELLO, **options))
    assert isinstance(events[-1], Finished)
    reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    assert reasoning == whole.reasoning


def test_a_closed_stream_leaves_nothing_running(llm: LLM) -> None:
    events = llm.stream(HELLO, max_tokens=500, ignore_eos=True)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_work
    assert llm.engine.stats().running == 0


def test_an_unknown_option_is_rejected_by_name(llm: LLM) -> None:
    with pytest.raises(
        InvalidRequest, match="max_new_tokens: unknown option; did you mean max_tokens"
    ):
        llm.generate("x", max_new_tokens=3)


def test_a_prompt_longer_than_the_context_names_both_numbers(llm: LLM) -> None:
    limit = llm.engine.info.max_context
    with pytest.raises(InvalidRequest, match=rf"{limit + 1} tokens.*{limit} tokens"):
        llm.generate([[1] * (limit + 1)])
    assert not llm.engine.has_work


def test_an_invalid_prompt_does_not_affect_the_next_batch(llm: LLM) -> None:
    with pytest.raises(InvalidRequest):
        llm.generate([[1, 2, 3], [10**6]], max_tokens=4)
    assert llm.generate([[1, 2, 3]], max_tokens=4, ignore_eos=True)[0].finish_reason == "length"


def test_the_snippet_of_the_model_card_works(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load(folder)
    prompt: Any = "hello"
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    response = generate(
        model,
        tokenizer,
        prompt=prompt,
        max_tokens=8,
        temp=0.2,
        top_k=50,
        top_p=0.95,
        min_p=0.01,
        verbose=True,
    )
    assert response in capsys.readouterr().out


def test_importing_glmd_imports_no_mlx() -> None:
    code = "import glmd, sys; assert not {'mlx', 'mlx.core', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "server"})
