"""The template process renders as `ChatTemplate` does, within limits on time and memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from chat_kit import TEMPLATE, tag_like, template, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from live import CHECKPOINT, live_server

from glmd.chat.template_process import TemplateProcess
from glmd.checkpoint.chat_template import read_template
from glmd.errors import CheckpointError, InvalidRequest

pytestmark = pytest.mark.e2e

HANG = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "a loop without an end": HANG,
    "a string without a limit": "{% set s = namespace(x='aaaaaaaa') %}"
    "{% for _ in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
    "a product": "{% set n = 99999999999 %}{{ 'a' * n }}",
    "a width": "{{ '%99999999999d' % 1 }}",
    "a list of lists of lists": "{% set s = namespace(x=[1]) %}"
    "{% for _ in range(60) %}{% set s.x = [s.x, s.x] %}{% endfor %}{{ s.x | tojson }}",
    "a power": "{% set n = 99999999 %}{{ n ** n }}",
    "output without an end": "{% for _ in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
}
"""Templates that exceed a limit, by the message that triggers each."""

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__base__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{% set _ = messages.append({'role': 'user', 'content': 'more'}) %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def on_request(sources: dict[str, str]) -> str:
    """A template that runs the source in `sources` whose name is the last message."""
    branches = "".join(
        f"{{% if messages[-1].content == {json.dumps(name)} %}}{source}{{% endif %}}"
        for name, source in sources.items()
    )
    return branches + TEMPLATE


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    renderer = TemplateProcess(TEMPLATE, tokenizer().controls)
    yield renderer
    renderer.close()


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | tag_like,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(tag_like, inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=20)
@given(text=st.text(st.characters(), max_size=9) | tag_like, value=values)
def test_the_process_renders_as_the_template_does(
    process: TemplateProcess, text: str, value: Any
) -> None:
    conversation = [
        *ask(text),
        {
            "role": "assistant",
            "content": text,
            "reasoning_content": text,
            "tool_calls": [{"function": {"name": text, "arguments": {"a": value, text: "\ud800"}}}],
        },
    ]
    tools = [{"type": "function", "function": {"name": text, "parameters": {"x": value}}}]
    kwargs = {"enable_thinking": False, "other": value}
    ours = process.render(conversation, tools=tools, kwargs=kwargs)
    assert ours == template().render(conversation, tools=tools, kwargs=kwargs)


@pytest.fixture(scope="module")
def hostile() -> Iterator[TemplateProcess]:
    source = on_request(HOSTILE)
    renderer = TemplateProcess(source, tokenizer().controls, max_seconds=0.4, max_bytes=200 * 2**20)
    yield renderer
    renderer.close()


@pytest.mark.parametrize("what", HOSTILE)
def test_a_template_over_a_limit_is_killed_and_the_next_conversation_rendered(
    hostile: TemplateProcess, what: str
) -> None:
    with pytest.raises(InvalidRequest, match=r"takes more|needs too much|cannot render"):
        hostile.render(ask(what))
    assert hostile.render(ask("Hi")) == template().render(ask("Hi"))


def test_a_template_that_hangs_on_every_conversation_is_a_checkpoint_error() -> None:
    before = set(psutil.Process().children())
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: .* more than 0\.2 s"):
        TemplateProcess(HANG + TEMPLATE, tokenizer().controls, max_seconds=0.2)
    with pytest.raises(CheckpointError, match="not a Jinja template"):
        TemplateProcess("{% if %}", tokenizer().controls)
    assert set(psutil.Process().children()) <= before


def test_the_sandbox_holds() -> None:
    renderer = TemplateProcess(
        on_request({source: source for source in ESCAPES}), tokenizer().controls
    )
    plain = [tokenizer().controls[name] for name in ("[gMASK]", "<sop>", "<|user|>")]
    try:
        for source in ESCAPES:
            with suppress(InvalidRequest):
                # An attribute that the sandbox hides is undefined, which is no error.
                pieces = renderer.render(ask(source))
                assert [piece for piece in pieces if isinstance(piece, int)][:3] == plain, source
    finally:
        renderer.close()


def test_closing_leaves_no_process() -> None:
    before = set(psutil.Process().children())
    process = TemplateProcess(TEMPLATE, tokenizer().controls)
    (child,) = set(psutil.Process().children()) - before
    process.close()
    assert not child.is_running()


def test_a_conversation_that_hangs_the_template_does_not_hang_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        TemplateProcess,
        "load",
        lambda at, own: TemplateProcess(read_template(at)[0], own, max_seconds=0.4),
    )
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    own = (CHECKPOINT / "chat_template.jinja").read_text()
    when = "{% if messages[-1].content == 'hang' %}" + HANG + "{% endif %}"
    (folder / "chat_template.jinja").write_text(when + own)
    with live_server(folder=folder) as live, live.client() as http, ThreadPoolExecutor() as pool:

        def chat(text: str) -> Any:
            return http.post("/v1/chat/completions", json={"messages": ask(text)})

        hanging = pool.submit(chat, "hang")
        while not hanging.done():
            assert http.get("/health").status_code == 200
        error = hanging.result().json()["error"]
        assert (hanging.result().status_code, error["param"]) == (400, "messages")
        assert "more than 0.4 s" in error["message"]
        answer = chat("⟦</think>Tweet.⟧").json()
        assert answer["choices"][0]["message"]["content"] == "Tweet."
