"""Chat templates: rendered as in transformers, with control tokens from the template alone."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from chat_kit import SPELLINGS, TEMPLATE, tag_like, template, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from glmd.chat.template import ChatTemplate
from glmd.chat.tokenizer import Piece
from glmd.checkpoint.chat_template import with_thinking_defaults
from glmd.errors import CheckpointError, InvalidRequest

DEMO = ROOT / "demo" / "glm-4.7-flash-demo"
USER = [{"role": "user", "content": "Hi"}]


def small(source: str) -> ChatTemplate:
    """A template that starts with `source`."""
    return ChatTemplate(source + TEMPLATE, tokenizer().controls)


def spelled(pieces: list[Piece]) -> str:
    """Rendered text with its control tokens spelled out."""
    return "".join(tokenizer().spellings[it] if isinstance(it, int) else it for it in pieces)


def text_of(source: str, **kwargs: Any) -> str:
    return spelled(small(source).render(USER, kwargs=kwargs)).split("[gMASK]")[0]


def test_the_templates_control_tokens_are_ids_and_the_rest_is_text() -> None:
    tags = tokenizer().special_tokens
    pieces = template().render(USER)
    start = [tokenizer().controls["[gMASK]"], tokenizer().controls["<sop>"]]
    assert pieces == [*start, tags.user, "Hi", tags.assistant, tags.think]
    assert spelled(pieces) == "[gMASK]<sop><|user|>Hi<|assistant|><think>"


@given(tag_like, tag_like, tag_like)
def test_no_text_of_a_client_becomes_a_control_token(one: str, two: str, three: str) -> None:
    """In messages, in names and values of arguments, in tools."""

    def render(*texts: str) -> list[Any]:
        a, b, c = texts
        call = {"function": {"name": a, "arguments": {b: c, "x": [b, {c: 1}]}}}
        conversation: list[dict[str, Any]] = [
            {"role": "system", "content": a},
            {"role": "user", "content": b},
            {"role": "assistant", "content": c, "reasoning_content": a, "tool_calls": [call]},
            {"role": "tool", "content": b},
        ]
        tools = [{"type": "function", "function": {"name": c, "parameters": {a: b}}}]
        return template().render(conversation, tools=tools)

    plain = [piece for piece in render("a", "b", "c") if isinstance(piece, int)]
    pieces = render(one, two, three)
    assert [piece for piece in pieces if isinstance(piece, int)] == plain or not one.strip()
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    assert two in text
    assert set(tokenizer().encode(text)).isdisjoint(tokenizer().spellings)


@given(st.text(st.characters(categories=["Co", "Cn"]), max_size=20))
def test_private_use_characters_of_a_client_are_kept(text: str) -> None:
    pieces = template().render([{"role": "user", "content": "a" + text + "b"}])
    assert "a" + text + "b" in pieces


def test_variables_have_the_model_cards_defaults_and_null_means_default() -> None:
    source = "{{ enable_thinking }} {{ clear_thinking }} {{ other is defined }}"
    assert text_of(source) == "True False False"
    assert text_of(source, enable_thinking=None, clear_thinking=None, other=None) == (
        "True False False"
    )
    assert text_of(source, enable_thinking=False, clear_thinking=True, other=0) == (
        "False True True"
    )


@pytest.mark.parametrize("key", ["messages", "tools", "add_generation_prompt"])
def test_the_servers_own_variables_cannot_be_set(key: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        template().render(USER, kwargs={key: []})
    assert caught.value.param == f"chat_template_kwargs.{key}"


def test_a_thinking_switch_must_be_a_boolean() -> None:
    with pytest.raises(InvalidRequest) as caught:
        template().render(USER, kwargs={"enable_thinking": "no"})
    assert caught.value.param == "chat_template_kwargs.enable_thinking"


@pytest.mark.parametrize(
    "source", ["{{ raise_exception('no way') }}", "{{ messages[0].x.y }}", "{{ 1 / 0 }}"]
)
def test_an_error_in_a_template_is_an_invalid_request(source: str) -> None:
    late = small("{% if fail %}" + source + "{% endif %}")
    with pytest.raises(InvalidRequest, match="messages: the chat template cannot render") as caught:
        late.render(USER, kwargs={"fail": True})
    assert caught.value.param == "messages"


def test_json_is_printed_unescaped_in_key_order() -> None:
    value = {"b": "ü<&>'", "a": [1.5, None, True]}
    printed = text_of("{{ (value or 0) | tojson }}", value=value)
    assert printed == json.dumps(value, ensure_ascii=False)
    printed = text_of("{{ (value or 0) | tojson(indent=1) }}", value={"b": 1})
    assert printed == '{\n "b": 1\n}'


def test_a_template_can_print_the_date() -> None:
    assert text_of("{{ strftime_now('%Y') }}").isdigit()


def test_templates_cannot_access_python_internals() -> None:
    for source in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(CheckpointError, match="not usable"):
            small(source)


def test_a_template_is_read_from_its_file_or_from_the_tokenizers_config(tmp_path: Path) -> None:
    config = {"chat_template": TEMPLATE.replace("# Tools", "# Old")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tools = [{"type": "function"}]
    load = ChatTemplate.load
    assert "# Old" in spelled(load(tmp_path, tokenizer().controls).render(USER, tools=tools))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert "# Tools" in spelled(load(tmp_path, tokenizer().controls).render(USER, tools=tools))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, "", "no chat template"),
        ("tokenizer_config.json", "{}", "no chat template"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("chat_template.jinja", "{% if %}", "not a Jinja template"),
        ("chat_template.jinja", TEMPLATE.replace("<|user|>", "<user>"), "write <.user.>. Take"),
    ],
)
def test_a_missing_or_broken_template_is_named(
    tmp_path: Path, name: str | None, content: str, message: str
) -> None:
    if name is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        ChatTemplate.load(tmp_path, tokenizer().controls)


LOOP = """
{% for i in range(5) %}
  {% if i == 1 %}{% continue %}{% endif %}
  {% if i == 3 %}{% break %}{% endif %}
  {# nothing #}
{{ i }}{% generation %}<think>{% set i = 9 %}{{ i }}{% endgeneration %}
{% endfor %}
{%- set n = namespace(x=dict(a=1)) %}{{ n.x | tojson(indent=2) }}
{{ '<|assistant|>' ~ '</think>' }}
"""


@pytest.mark.parametrize(
    "source", [(DEMO / "chat_template.jinja").read_text(), TEMPLATE, LOOP + TEMPLATE]
)
def test_templates_render_the_same_text_as_in_transformers(source: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    call = {"function": {"name": "f", "arguments": {"a": "x", "b": [1, "ü"]}}}
    conversation: list[dict[str, Any]] = [
        {"role": "system", "content": "Be <b>brief</b>."},
        {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": " Yo ", "reasoning_content": " hm ", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "Bye"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for clear in (False, True):
        kwargs = {"enable_thinking": clear, "clear_thinking": clear}
        made = ChatTemplate(source, tokenizer().controls)
        ours = made.render(conversation, tools=tools, kwargs=kwargs)
        theirs, _ = utils.render_jinja_template(
            [conversation], tools=tools, chat_template=source, add_generation_prompt=True, **kwargs
        )
        assert spelled(ours) == theirs[0]


def test_every_control_token_of_a_template_is_marked() -> None:
    for name in SPELLINGS:
        assert tokenizer().controls[name] in small(f"{name}{{{{ '{name}' }}}}").render(USER)


JOINS = ("'<|' + {} + '|>'", "'<|' ~ {} ~ '|>'", "'<|%s|>' % {}", "'<|{{}}|>'.format({})")


@pytest.mark.parametrize("join", JOINS)
@given(st.lists(tag_like, min_size=1, max_size=4))
def test_tags_made_of_roles_are_tags_and_texts_of_clients_are_not(
    join: str, texts: list[str]
) -> None:
    tags, made = tokenizer().special_tokens, _by_roles(join)
    roles = ["system", "user", "assistant", "tool"]
    messages = [{"role": roles[i % 4], "content": text} for i, text in enumerate(texts)]
    pieces = made.render(messages)
    expected = [(tags.system, tags.user, tags.assistant, tags.observation)[i % 4]
                for i in range(len(texts))]  # fmt: skip
    assert [piece for piece in pieces if isinstance(piece, int)] == expected
    assert [piece for piece in pieces if isinstance(piece, str)] == [t for t in texts if t]


@cache
def _by_roles(join: str) -> ChatTemplate:
    role = "('observation' if message.role == 'tool' else message.role)"
    loop = "{%- for message in messages -%}{{ " + join.format(role) + " }}{{ message.content }}"
    return ChatTemplate(loop + "{%- endfor -%}", tokenizer().controls)


def test_a_role_that_is_printed_alone_is_text() -> None:
    assert text_of("{{ messages[0].role }} {{ messages | tojson }}") == (
        'user [{"role": "user", "content": "Hi"}]'
    )


@pytest.mark.parametrize(
    "head",
    [
        "{%- set enable_thinking = false -%}\n{%- set clear_thinking = true -%}\n",
        "{# first #}\n{% set clear_thinking = True %}\n\n{%set enable_thinking=False%}",
        with_thinking_defaults("")
        + "{% set enable_thinking = false %}{% set clear_thinking=true %}",
    ],
)
def test_leading_set_lines_are_defaults(head: str) -> None:
    made = small(head + "{{ enable_thinking }} {{ clear_thinking }}")
    assert made.defaults == {"enable_thinking": False, "clear_thinking": True}
    assert made.ignored == ()

    def shown(**kwargs: Any) -> str:
        return spelled(made.render(USER, kwargs=kwargs)).split("[gMASK]")[0].strip()

    assert shown() == "False True"
    assert shown(enable_thinking=True) == "True True"
    assert shown(enable_thinking=None, clear_thinking=False) == "False False"


def test_a_variable_that_a_template_ignores_is_reported() -> None:
    fixed = "[gMASK]{%- set enable_thinking = true -%}" + TEMPLATE
    assert ChatTemplate(fixed, tokenizer().controls).ignored == ("enable_thinking",)
