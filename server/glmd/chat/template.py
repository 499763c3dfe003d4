"""The checkpoint's chat template: messages to plain text and control tokens.

A template writes control tokens as text, and a user can write the same text. To tell them apart,
the control tokens in the template's literals are replaced, in its syntax tree, by marks:
private-use characters drawn at random when the template is loaded. The output is then split at the
marks, which become token ids. Everything else stays text, whatever it spells.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glmd.chat.tokenizer import SPELLINGS, Piece
from glmd.errors import CheckpointError, InvalidRequest, invalid_field

DEFAULT_VARIABLES = {"enable_thinking": True, "clear_thinking": False}
"""As the model card recommends."""

SERVER_VARIABLES = ("messages", "tools", "add_generation_prompt")

PRIVATE_USE = 0xF0000
"""First of the 65,534 private-use characters of plane 15."""

ROLES = tuple(SPELLINGS[role] for role in ("system", "user", "assistant", "observation"))
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
"""A conversation for which a template in GLM's format writes all `ROLES`."""


class ChatTemplate:
    """A Jinja chat template in the environment that transformers gives it.

    See `_compile_jinja_template` in transformers/utils/chat_template_utils.py.
    """

    def __init__(
        self, source: str, controls: Mapping[str, int], *, file: str = "chat_template.jinja"
    ) -> None:
        """
        Args:
            source: the template.
            controls: id of each control token, by spelling (`Tokenizer.controls`).
            file: the template's file, for errors.

        Raises:
            CheckpointError: the template does not compile, or is not in GLM's format.
        """
        self.source = source
        draw = secrets.SystemRandom().sample(range(0xFFFE), 4)
        secret = "".join(chr(PRIVATE_USE + number) for number in draw)
        self._ids = list(controls.values())
        marks = {name: secret + chr(PRIVATE_USE + i) for i, name in enumerate(controls)}
        self._mark = re.compile(f"{secret}(.)", re.DOTALL)
        try:
            self._template = _compile(source, marks)
            probe = self.render(PROBE)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{file}: not a Jinja template: {error}", file=file) from error
        except InvalidRequest as error:
            problem = error.message.removeprefix("messages: ")
            raise CheckpointError(f"{file}: not usable: {problem}", file=file) from error
        missing = [name for name in ROLES if controls.get(name) not in probe]
        if missing:
            raise CheckpointError(
                f"{file}: the template does not write {', '.join(missing)}.", file=file
            )

    @classmethod
    def load(cls, folder: Path, controls: Mapping[str, int]) -> ChatTemplate:
        """Load a checkpoint's template (`read_template`).

        Raises:
            CheckpointError: no template, or as for the constructor.
        """
        source, file = read_template(folder)
        return cls(source, controls, file=str(file))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Piece]:
        """Render messages in the template's own (OpenAI-like) shape.

        Args:
            kwargs: variables of the template (`template_variables`).

        Raises:
            InvalidRequest: the template cannot render the conversation.
        """
        variables = template_variables(kwargs or {})
        try:
            marked = self._template.render(
                messages=messages,
                tools=tools or None,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except Exception as error:  # a template can raise anything, about this conversation
            raise invalid_field("messages", f"the chat template cannot render: {error}") from error
        pieces: list[Piece] = []
        for position, part in enumerate(self._mark.split(marked)):
            if position % 2:
                pieces.append(self._ids[ord(part) - PRIVATE_USE])
            elif part:
                pieces.append(part)
        return pieces


def read_template(folder: Path) -> tuple[str, Path]:
    """Read `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`.

    Returns: the template, and its file.

    Raises:
        CheckpointError: no template, or the file is damaged.
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
        raise CheckpointError(f"{config}: damaged: {error}", file=str(config)) from error
    if not isinstance(source, str):
        message = f"{folder}: no chat template (chat_template.jinja)."
        raise CheckpointError(message, file=str(file))
    return source, config


def template_variables(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`DEFAULT_VARIABLES`, updated with the values in `kwargs` that are not None.

    Raises:
        InvalidRequest: a thinking switch is not a boolean, or the server sets the variable.
    """
    given = {key: value for key, value in kwargs.items() if value is not None}
    for key in SERVER_VARIABLES:
        if key in given:
            raise invalid_field(f"chat_template_kwargs.{key}", "set by the server.")
    for key in DEFAULT_VARIABLES:
        if not isinstance(given.get(key, True), bool):
            raise invalid_field(f"chat_template_kwargs.{key}", "must be true or false.")
    return {**DEFAULT_VARIABLES, **given}


def _compile(source: str, marks: Mapping[str, str]) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
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
    """`{% generation %}…{% endgeneration %}`, a mark for training, as plain text."""

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
        allow_nan=False,  # 1e999 in a request is infinite, which JSON cannot write
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
