"""The checkpoint's chat template: messages to plain text and control tokens.

A template writes control tokens as text, and a user can write the same text. To tell them apart,
the control tokens in the template's literals are replaced, in its syntax tree, by marks:
private-use characters drawn at random when the template is loaded. Names of roles carry marks
where they are printed, for templates that make tags of them (`'<|' + message.role + '|>'`). The
output is split at the marks, which become token ids. Everything else stays text, whatever it
spells.
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
import jinja2.visitor
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glmd.chat.tokenizer import SPELLINGS, Piece
from glmd.checkpoint.chat_template import (
    RECOMMENDED_THINKING,
    explain_remedy,
    read_template,
    split_thinking,
)
from glmd.errors import CheckpointError, InvalidRequest, invalid_field

SERVER_VARIABLES = ("messages", "tools", "add_generation_prompt")

PRIVATE_USE = 0xF0000
"""First of the 65,534 private-use characters of plane 15."""

ROLES = tuple(SPELLINGS[role] for role in ("system", "user", "assistant", "observation"))
ROLE_NAMES = tuple(tag.strip("<|>") for tag in ROLES)
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

THINKING_PROBE = (
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "2", "reasoning_content": "3"},
    {"role": "user", "content": "4"},
)
"""A conversation whose prompt depends on each variable for thinking."""


class _Role(str):
    """A role's name that has a mark on either side where it is printed or joined."""

    def __new__(cls, name: str, mark: str) -> _Role:
        self = super().__new__(cls, name)
        self._printed = mark + name + mark
        return self

    _printed: str

    def __str__(self) -> str:
        return self._printed

    def __format__(self, spec: str) -> str:
        return format(self._printed, spec)

    def __add__(self, other: str) -> str:
        return self._printed + str(other)

    def __radd__(self, other: str) -> str:
        return other + self._printed


class ChatTemplate:
    """A Jinja chat template in the environment that transformers gives it.

    See `_compile_jinja_template` in transformers/utils/chat_template_utils.py.

    Attributes:
        source: the template as it is in the file.
        defaults: values of the variables for thinking in requests that set none: those that the
            template sets at its head, else the recommended ones.
        ignored: variables for thinking that make no difference to the template.
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
        values, source = split_thinking(source)
        self.defaults: Mapping[str, bool] = {**RECOMMENDED_THINKING, **values}
        draw = secrets.SystemRandom().sample(range(0xFFFE), 4)
        secret = "".join(chr(PRIVATE_USE + number) for number in draw)
        self._ids = list(controls.values())
        marks = {name: secret + chr(PRIVATE_USE + i) for i, name in enumerate(controls)}
        self._mark = re.compile(f"{secret}(.)", re.DOTALL)
        self._marks = marks
        self._role_mark = secret + chr(PRIVATE_USE + len(marks))
        self._role_tag = re.compile(rf"<\|{self._role_mark}(\w+){self._role_mark}\|>")
        try:
            self._template = _compile(source, marks, self._role_mark)
            probe = self.render(PROBE)
            self.ignored = tuple(name for name in self.defaults if not self._heeds(name))
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{file}: not a Jinja template: {error}", file=file) from error
        except InvalidRequest as error:
            problem = error.message.removeprefix("messages: ")
            raise CheckpointError(f"{file}: not usable: {problem}", file=file) from error
        missing = [name for name in ROLES if controls.get(name) not in probe]
        if missing:
            problem = f"the template does not write {', '.join(missing)}"
            remedy = explain_remedy(Path(file).parent)
            raise CheckpointError(f"{file}: {problem}. {remedy}", file=file)

    def _heeds(self, name: str) -> bool:
        """Whether a variable for thinking makes a difference."""
        on, off = (self.render(THINKING_PROBE, kwargs={name: value}) for value in (True, False))
        return on != off

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
        variables = template_variables(kwargs or {}, self.defaults)
        try:
            marked = self._template.render(
                messages=[self._with_role(message) for message in messages],
                tools=tools or None,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except Exception as error:  # a template can raise anything, about this conversation
            raise invalid_field("messages", f"the chat template cannot render: {error}") from error
        marked = self._role_tag.sub(self._tag_of, marked).replace(self._role_mark, "")
        pieces: list[Piece] = []
        for position, part in enumerate(self._mark.split(marked)):
            if position % 2:
                pieces.append(self._ids[ord(part) - PRIVATE_USE])
            elif part:
                pieces.append(part)
        return pieces

    def _with_role(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        role = message.get("role")
        return (
            {**message, "role": _Role(role, self._role_mark)} if isinstance(role, str) else message
        )

    def _tag_of(self, match: re.Match[str]) -> str:
        """The mark of the control token that a role's name and its brackets spell."""
        return self._marks.get(f"<|{match[1]}|>", match[0])


def template_variables(kwargs: Mapping[str, Any], defaults: Mapping[str, bool]) -> dict[str, Any]:
    """`defaults`, updated with the values in `kwargs` that are not None.

    Raises:
        InvalidRequest: a thinking switch is not a boolean, or the server sets the variable.
    """
    given = {key: value for key, value in kwargs.items() if value is not None}
    for key in SERVER_VARIABLES:
        if key in given:
            raise invalid_field(f"chat_template_kwargs.{key}", "set by the server.")
    for key in defaults:
        if not isinstance(given.get(key, True), bool):
            raise invalid_field(f"chat_template_kwargs.{key}", "must be true or false.")
    return {**defaults, **given}


class _RoleNames(jinja2.visitor.NodeTransformer):
    """Replaces a role's name in literals by a global variable with its `_Role`."""

    def visit_Const(self, node: jinja2.nodes.Const) -> jinja2.nodes.Node:  # noqa: N802
        if node.value not in ROLE_NAMES:
            return node
        return jinja2.nodes.Name(_role_variable(node.value), "load", lineno=node.lineno)


def _role_variable(name: str) -> str:
    return f"_role_{name}"


def _compile(source: str, marks: Mapping[str, str], role_mark: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    for name in ROLE_NAMES:
        environment.globals[_role_variable(name)] = _Role(name, role_mark)
    tree = _RoleNames().visit(environment.parse(source))
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
