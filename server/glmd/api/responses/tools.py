"""Tools of the Responses API: functions and custom tools, alone or in namespaces, and tools that
OpenAI hosts.

A custom tool takes text. The model knows it as a function with that text as its one argument, which
in GLM's form of a call stands there raw. The grammar that such a tool may have is told to the
model, in the tool's description, and not enforced: what takes the text checks it anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glmd.api.tools import numbered, read_flat_tools
from glmd.chat.types import Tool
from glmd.errors import InvalidRequest

HOSTED = (
    "web_search",
    "file_search",
    "code_interpreter",
    "image_generation",
    "mcp",
    "tool_search",
    "programmatic_tool_calling",
)
"""How the types of tools begin that OpenAI's servers run."""

INPUT = "input"
"""What the model calls the text that a custom tool takes."""

NAMESPACE_SEPARATOR = "__"
"""Between namespace and name, in what the model reads: `mcp__files` and `read` are
`mcp__files__read`."""


def full_name(namespace: object, name: str) -> str:
    """What the model calls a function."""
    return f"{namespace}{NAMESPACE_SEPARATOR}{name}" if namespace else name


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Attributes:
        functions: what the model is told of.
        names: of each function in a namespace, by what the model calls it: namespace and name.
        custom: those that are custom tools, by what the model calls them.
        left_out: hosted tools.
        raw: the request's, without those.
    """

    functions: list[Tool]
    names: dict[str, tuple[str, str]]
    custom: frozenset[str]
    left_out: list[str]
    raw: list[dict[str, Any]]


def read_tools(raw: Sequence[dict[str, Any]] | None) -> Tools:
    """
    Raises:
        InvalidRequest: names the field at fault.
    """
    flat: list[tuple[Mapping[str, Any], str]] = []
    names: dict[str, tuple[str, str]] = {}
    for tool, where in numbered(raw):
        if tool.get("type") == "namespace":
            flat += _members(tool, where, names)
        else:
            flat.append((tool, where))
    custom = frozenset(str(tool.get("name")) for tool, _ in flat if tool.get("type") == "custom")
    functions, left_out = read_flat_tools(
        [(as_function(tool, where), where) for tool, where in flat],
        schema_key="parameters",
        function_types=("function",),
        is_hosted=lambda type: type.startswith(HOSTED),
    )
    kept = [one for one in raw or () if not str(one.get("type")).startswith(HOSTED)]
    return Tools(functions, names, custom, left_out, kept)


def as_function(tool: Mapping[str, Any], param: str) -> Mapping[str, Any]:
    """A custom tool as the function that the model knows; any other tool as it is.

    Raises:
        InvalidRequest: its format is malformed.
    """
    if tool.get("type") != "custom":
        return tool
    description, form = tool.get("description"), tool.get("format")
    if isinstance(form, Mapping) and form.get("type") == "grammar":
        grammar = form.get("definition")
        if not isinstance(grammar, str):
            field = f"{param}.format.definition"
            raise InvalidRequest(f"{field} must be a string.", param=field)
        told = f"The input follows this {form.get('syntax') or 'lark'} grammar:\n{grammar}"
        description = f"{description}\n\n{told}" if description else told
    elif form is not None and (not isinstance(form, Mapping) or form.get("type") != "text"):
        field = f"{param}.format.type"
        raise InvalidRequest(f"{field} must be text or grammar.", param=field)
    return {
        "type": "function",
        "name": tool.get("name"),
        "description": description,
        "parameters": {
            "type": "object",
            "properties": {INPUT: {"type": "string"}},
            "required": [INPUT],
        },
    }


def _members(
    namespace: Mapping[str, Any], param: str, names: dict[str, tuple[str, str]]
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """A namespace's functions as the model is to know them, which `names` takes note of."""
    space, members = namespace.get("name"), namespace.get("tools")
    if not isinstance(space, str) or not space:
        raise InvalidRequest(f"{param}.name must be a non-empty string.", param=f"{param}.name")
    if not isinstance(members, list):
        raise InvalidRequest(f"{param}.tools must be a list.", param=f"{param}.tools")
    for index, member in enumerate(members):
        where = f"{param}.tools[{index}]"
        if not isinstance(member, Mapping):
            raise InvalidRequest(f"{where} must be an object.", param=where)
        name = member.get("name")
        if isinstance(name, str) and name:
            names[full_name(space, name)] = (space, name)
            name = full_name(space, name)
        yield {**member, "name": name}, where
