"""The checkpoint's chat template, compiled once.

A template writes control tokens as text, and so may a user. To tell them apart, the tags in the
template's own literals are replaced, in its syntax tree, by marks that nobody else can write:
a few private-use characters drawn at random when the template is loaded. What is rendered then
falls apart into marks, which become control ids, and text, which stays text whatever it spells.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glmd.errors import CheckpointError, InvalidRequest

if TYPE_CHECKING:
    from glmd.chat.tokenizer import Piece

DEFAULTS = {"enable_thinking": True, "clear_thinking": False}
"""As the model card recommends."""

PRIVATE_USE = 0xF0000
"""First of the 65,534 characters of plane 15, none of which means anything to anyone."""

ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
PROBE = (
    {"role": "system", "content": "?"},
    {"role": "user", "content": "?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "?", "type": "function", "function": {"name": "?", "arguments": {}}},
        ],
    },
    {"role": "tool", "content": "?"},
)
"""A conversation in which a template of GLM's format writes all of ROLES."""

OURS = ("messages", "tools", "add_generation_prompt")


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a template wrote: plain text, and the tags that the template itself put there."""

    pieces: list[Piece]
    text: str
    """As a person reads it (`/apply-template`): tags spelled out."""


class Template(Protocol):
    """What a prompt is built with."""

    def variables(self, kwargs: Mapping[str, Any]) -> dict[str, Any]: ...
    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Rendered: ...


class ChatTemplate:
    """A Jinja chat template in the environment that transformers gives it.

    See `_compile_jinja_template` in transformers/utils/chat_template_utils.py.
    """

    def __init__(
        self,
        source: str,
        controls: Mapping[str, int],
        *,
        file: str = "chat_template.jinja",
        defaults: Mapping[str, bool] | None = None,
    ) -> None:
        """
        Args:
            source: the template.
            controls: the tokenizer's control tokens, spelling to id.
            file: where it comes from, for errors.
            defaults: instead of `DEFAULTS`.

        Raises:
            CheckpointError: it does not compile, or it is not in GLM's format.
        """
        self.source = source
        self.defaults = dict(DEFAULTS if defaults is None else defaults)
        draw = secrets.SystemRandom().sample(range(0xFFFE), 4)
        secret = "".join(chr(PRIVATE_USE + number) for number in draw)
        self._spellings = list(controls)
        self._ids = list(controls.values())
        marks = {name: secret + chr(PRIVATE_USE + i) for i, name in enumerate(self._spellings)}
        self._mark = re.compile(f"{secret}(.)", re.DOTALL)
        try:
            self._template = _compile(source, marks)
            probe = self.render(PROBE)
        except (jinja2.TemplateError, InvalidRequest) as error:
            raise CheckpointError(f"{file} is no usable template: {error}", file=file) from error
        missing = [name for name in ROLES if controls.get(name) not in probe.pieces]
        if missing:
            raise CheckpointError(f"{file} never writes {', '.join(missing)}", file=file)

    @classmethod
    def load(
        cls,
        folder: Path,
        controls: Mapping[str, int],
        *,
        defaults: Mapping[str, bool] | None = None,
    ) -> ChatTemplate:
        """Read `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`.

        Raises:
            CheckpointError: there is none, it does not compile, or it is not in GLM's format.
        """
        source, file = read_template(folder)
        return cls(source, controls, file=str(file), defaults=defaults)

    def variables(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The template's variables: `kwargs` without nulls, over the defaults.

        Raises:
            InvalidRequest: a thinking switch is not a boolean, or a variable is not the client's.
        """
        return template_variables(kwargs, self.defaults)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """Render messages in the template's own (OpenAI-like) shape.

        Raises:
            InvalidRequest: the template refuses the conversation.
        """
        variables = self.variables(kwargs or {})
        try:
            marked = self._template.render(
                messages=messages,
                tools=tools or None,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except Exception as error:  # a template is data: whatever it raises is about this request
            raise InvalidRequest(
                f"The chat template cannot render this conversation: {error}", param="messages"
            ) from error
        pieces: list[Piece] = []
        spelled: list[str] = []
        for position, part in enumerate(self._mark.split(marked)):
            if position % 2:
                index = ord(part) - PRIVATE_USE
                pieces.append(self._ids[index])
                spelled.append(self._spellings[index])
            elif part:
                pieces.append(part)
                spelled.append(part)
        return Rendered(pieces, "".join(spelled))


def read_template(folder: Path) -> tuple[str, Path]:
    """A checkpoint's template, from `chat_template.jinja`, or `chat_template` in
    `tokenizer_config.json`; and which of the two.

    Raises:
        CheckpointError: there is none, or the file is damaged.
    """
    file = folder / "chat_template.jinja"
    config = folder / "tokenizer_config.json"
    try:
        if file.is_file():
            return file.read_text("utf-8"), file
        source = json.loads(config.read_text("utf-8")).get("chat_template")
    except FileNotFoundError:
        source = None
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{config} is damaged: {error}", file=str(config)) from error
    if not isinstance(source, str):
        message = f"{folder} has no chat template (chat_template.jinja)"
        raise CheckpointError(message, file=str(file))
    return source, config


def template_variables(kwargs: Mapping[str, Any], defaults: Mapping[str, bool]) -> dict[str, Any]:
    """The template's variables: `kwargs` without nulls, over the defaults.

    Raises:
        InvalidRequest: a thinking switch is not a boolean, or a variable is not the client's.
    """
    given = {key: value for key, value in kwargs.items() if value is not None}
    for key in OURS:
        if key in given:
            param = f"chat_template_kwargs.{key}"
            raise InvalidRequest(f"{param} cannot be set: the server sets it.", param=param)
    for key in defaults:
        if key in given and not isinstance(given[key], bool):
            param = f"chat_template_kwargs.{key}"
            raise InvalidRequest(f"{param} must be true or false.", param=param)
    return {**defaults, **given}


def _compile(source: str, marks: Mapping[str, str]) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    tree = environment.parse(source)
    longest_first = sorted(marks, key=len, reverse=True)
    spelling = re.compile("|".join(map(re.escape, longest_first)))
    for text in tree.find_all(jinja2.nodes.TemplateData):
        text.data = spelling.sub(lambda match: marks[match[0]], text.data)
    for constant in tree.find_all(jinja2.nodes.Const):
        if isinstance(constant.value, str):
            constant.value = spelling.sub(lambda match: marks[match[0]], constant.value)
    return environment.from_string(tree)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks text for training: here, plain text."""

    tags = {"generation"}  # noqa: RUF012  (declared so by the base class)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        allow_nan=False,  # what JSON calls 1e999 is no number that could be written
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
