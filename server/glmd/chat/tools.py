"""Read the tools of all APIs, and order the results of their calls.

Hosted tools are left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from glmd.chat.tool_args import TOO_DEEP, check_schema
from glmd.chat.types import (
    MAX_TOOLS,
    AssistantMessage,
    Json,
    Message,
    Tool,
    ToolMessage,
    check_count,
)
from glmd.errors import InvalidRequest, invalid_field
from glmd.utils.text import quoted

NumberedTool = tuple[Mapping[str, Any], str]
"""A tool, and its place in the request, such as `tools[0]`."""

HOSTED = (
    *("web_search", "web_fetch", "file_search", "tool_search", "image_generation", "mcp"),
    *("code_execution", "code_interpreter", "programmatic_tool_calling", "advisor"),
    *("bash", "shell", "local_shell", "apply_patch", "text_editor", "memory"),
    *("computer", "browser"),
)
"""Prefixes of the types of tools that OpenAI's or Anthropic's servers run, or describe."""

NO_RESULT = "[no result]"
"""Stands for a result that is missing before others: the model tells results apart by order."""


def read_tools(
    raw: Sequence[Mapping[str, Any]] | None, ignored: list[str] | None = None
) -> list[Tool]:
    """Functions of a chat request.

    Other tools are left out, also where there is no function.

    Args:
        ignored: takes the names of what is left out.

    Raises:
        InvalidRequest: names the field, such as `tools[0].function.name`.
    """
    hosted = (*HOSTED, "custom")
    tools, others = collect_tools(numbered(raw), _read_nested, hosted=hosted, alone=True)
    if ignored is not None:
        ignored += others
    return tools


def numbered(raw: Sequence[Mapping[str, Any]] | None) -> list[NumberedTool]:
    """Each tool with its place in the request.

    Raises:
        InvalidRequest: there are too many tools.
    """
    check_count(raw, MAX_TOOLS, "tools")
    return [(tool, f"tools[{index}]") for index, tool in enumerate(raw or ())]


def read_flat_tools(
    raw: Iterable[NumberedTool], *, schema_key: str, function_types: Sequence[str | None]
) -> tuple[list[Tool], list[str]]:
    """Functions of the Responses or Messages API, and names of left-out tools.

    Args:
        schema_key: key of a function's JSON schema.
        function_types: values of `type` that mean a function. None: `type` may be absent.

    Raises:
        InvalidRequest: a tool is malformed or of an unknown type, or all tools are hosted.
    """

    def read(definition: Mapping[str, Any], where: str) -> Tool:
        type = definition.get("type")
        if type not in function_types:
            shown = quoted(type) if isinstance(type, str) else "this type"
            problem = f"{shown} is not supported. Send a function with name and {schema_key}."
            raise invalid_field(f"{where}.type", problem)
        return _read_flat(definition, where, schema_key)

    return collect_tools(raw, read, hosted=HOSTED)


def collect_tools(
    raw: Iterable[NumberedTool],
    read: Callable[[Mapping[str, Any], str], Tool],
    *,
    hosted: tuple[str, ...],
    alone: bool = False,
) -> tuple[list[Tool], list[str]]:
    """Functions among the tools, and names of ignored hosted tools and schemas.

    A hosted tool runs on the provider's servers (a web search), or the provider's model knows it
    without a schema. Beside functions it is left out; alone it is refused where clients send it in
    a request of its own, whose results the model would make up.

    Args:
        hosted: prefixes of the types of hosted tools.
        alone: hosted tools without a function are left out, too.

    Raises:
        InvalidRequest: as for `read`; or two tools have one name, or all tools are hosted.
    """
    tools: dict[str, Tool] = {}
    left_out: list[str] = []
    unread: list[str] = []
    for definition, where in raw:
        type = definition.get("type") if isinstance(definition, Mapping) else None
        if isinstance(type, str) and type.startswith(hosted):
            left_out.append(f"{where}.type={type}")
            continue
        tool = read(definition, where)
        if tool.name in tools:
            field = tool.param.rpartition(".")[0] or where
            raise invalid_field(f"{field}.name", f"duplicate tool name {quoted(tool.name)}.")
        tools[tool.name] = tool
        if tool.schema_error is not None:
            unread.append(tool.schema_error.param or tool.param)
    if left_out and not tools and not alone:
        param, _, type = left_out[0].partition("=")
        raise invalid_field(param, f"this server runs no hosted tools ({type}).")
    return list(tools.values()), left_out + unread


def read_function(
    raw: Mapping[str, Any],
    param: str,
    definition: dict[str, Json],
    schema_key: str = "parameters",
    *,
    deferred: bool = False,
) -> Tool:
    """Check a function's name and `strict`, and look for errors in its JSON schema.

    A malformed schema is an error only if calls must follow it: one sloppy tool of somebody's MCP
    server must not stop all others.

    Args:
        definition: the tool in the shape of OpenAI's chat API, for the template.
        schema_key: key of the JSON schema in `raw`.

    Raises:
        InvalidRequest: names the field.
    """
    name, schema = raw.get("name"), raw.get(schema_key)
    param_of_schema = f"{param}.{schema_key}"
    if not isinstance(name, str) or not name.strip():
        raise invalid_field(f"{param}.name", "must be a non-empty string.")
    strict, error = is_strict(raw, param), None
    if schema is None:
        schema = {}
    try:
        check_schema(schema, param_of_schema)
    except InvalidRequest as found:
        if strict or found.code == TOO_DEEP:
            raise
        error = found
    return Tool(
        name,
        schema if isinstance(schema, dict) else {},
        definition,
        strict,
        param_of_schema,
        deferred,
        error,
    )


def read_definition(raw: Mapping[str, Any], param: str) -> Tool | None:
    """A tool that a conversation defines, in the shape of any API.

    None: it is no function.
    """
    try:
        if isinstance(raw.get("function"), Mapping):
            return _read_nested(raw, param)
        schema_key = "input_schema" if "input_schema" in raw else "parameters"
        return _read_flat(raw, param, schema_key)
    except InvalidRequest:
        return None


def is_strict(function: Mapping[str, Any], param: str) -> bool:
    """The value of a function's `strict`; False for null.

    Raises:
        InvalidRequest: not a boolean or null.
    """
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise invalid_field(f"{param}.strict", "must be true or false.")
    return strict is True


def _read_nested(raw: Mapping[str, Any], param: str) -> Tool:
    """A tool of the chat API."""
    if not isinstance(raw, Mapping):
        raise invalid_field(param, "must be an object.")
    if raw.get("type") not in (None, "function"):
        raise invalid_field(f"{param}.type", 'must be "function".')
    function = raw.get("function")
    param = f"{param}.function"
    if not isinstance(function, Mapping):
        raise invalid_field(param, "must be an object.")
    deferred = raw.get("defer_loading") is True or function.get("defer_loading") is True
    definition: dict[str, Json] = {"type": "function", **raw}
    if deferred:
        kept = {key: value for key, value in function.items() if key != "defer_loading"}
        definition = {"type": "function", "function": kept}
    return read_function(function, param, definition, deferred=deferred)


def _read_flat(raw: Mapping[str, Any], param: str, schema_key: str) -> Tool:
    """A tool of the Responses or Messages API."""
    description = raw.get("description")
    if description is not None and not isinstance(description, str):
        raise invalid_field(f"{param}.description", "must be a string.")
    fields = {
        "name": raw.get("name"),
        "description": description,
        "parameters": raw.get(schema_key),
    }
    function = {key: value for key, value in fields.items() if value is not None}
    definition: dict[str, Json] = {"type": "function", "function": function}
    deferred = raw.get("defer_loading") is True
    return read_function(raw, param, definition, schema_key, deferred=deferred)


def order_tool_results(messages: Sequence[Message]) -> list[Message]:
    """Put each run of tool results in the order of their calls.

    The chat template prints results without ids, so only their order tells the model which call
    a result belongs to. Results without an open call follow the others.
    """
    ordered: list[Message] = []
    open_calls: dict[int, str] = {}
    """Ids of the last assistant message's calls without a result, by index, in order."""
    places: dict[str, deque[int]] = {}
    """Indices of those calls, by id."""
    results: dict[int, ToolMessage] = {}
    """Results of the present run, by index of the call."""
    others: list[ToolMessage] = []

    def end_run() -> None:
        for index in range(max(results, default=-1) + 1):
            if index in results:
                ordered.append(results[index])
            elif index in open_calls:
                id = open_calls.pop(index)
                places[id].remove(index)
                ordered.append(ToolMessage(NO_RESULT, id))
        ordered.extend(others)
        results.clear()
        others.clear()

    for message in messages:
        if isinstance(message, ToolMessage):
            wanted = message.call_id
            if wanted is None:
                wanted = next(iter(open_calls.values()), None)
            same = places.get(wanted) if wanted is not None else None
            if not same:
                others.append(message)
            else:
                call = same.popleft()
                del open_calls[call]
                results[call] = message
            continue
        end_run()
        if isinstance(message, AssistantMessage):
            open_calls = {index: call.id for index, call in enumerate(message.calls)}
            places = {id: deque() for id in open_calls.values()}
            for index, id in open_calls.items():
                places[id].append(index)
        ordered.append(message)
    end_run()
    return ordered
