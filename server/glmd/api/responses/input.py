"""Input items and tools of the Responses API in neutral form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glmd.api.generation_request import numbered_tools, object_schema, read_flat_tools
from glmd.chat.messages import arguments_of, order_tool_results, text_of
from glmd.chat.types import (
    MAX_MESSAGES,
    AssistantMessage,
    Json,
    Message,
    SystemMessage,
    Tool,
    ToolCall,
    ToolMessage,
    UserMessage,
    check_count,
)
from glmd.errors import invalid_field

Item = dict[str, Any]

HOSTED = (
    "web_search",
    "file_search",
    "code_interpreter",
    "image_generation",
    "mcp",
    "tool_search",
    "programmatic_tool_calling",
)
"""Prefixes of the types of tools that OpenAI's servers run."""

CUSTOM_INPUT = "input"
"""Name of the one argument of a custom tool, which is text."""

# -- schemas for the OpenAPI document -----------------------------------------------------

TEXT: dict[str, Any] = {"type": "string"}
NAME = {"type": "string", "minLength": 1}


def list_of(*kinds: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": {"anyOf": list(kinds)}}


TEXT_PARTS = list_of(
    object_schema("input_text", {"text": TEXT}), object_schema("output_text", {"text": TEXT})
)
CALL = {"call_id": NAME, "name": NAME}
OUTPUT = {"call_id": NAME, "output": {"anyOf": [TEXT, TEXT_PARTS]}}
MESSAGE = object_schema(
    "message",
    {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [TEXT, TEXT_PARTS]},
    },
)
ITEMS = list_of(
    MESSAGE | {"required": ["role", "content"]},
    object_schema(
        "reasoning",
        {"summary": list_of(object_schema("summary_text", {"text": TEXT}))},
        content=list_of(object_schema("reasoning_text", {"text": TEXT})),
    ),
    object_schema("function_call", CALL | {"arguments": TEXT}, namespace=TEXT),
    object_schema("function_call_output", OUTPUT),
    object_schema("custom_tool_call", CALL | {"input": TEXT}, namespace=TEXT),
    object_schema("custom_tool_call_output", OUTPUT),
    object_schema("item_reference", {"id": TEXT}),
)
INPUT_SCHEMA: dict[str, Any] = {"anyOf": [TEXT, ITEMS]}

GRAMMAR = object_schema("grammar", {"syntax": {"enum": ["lark", "regex"]}, "definition": TEXT})
FUNCTIONS = (
    object_schema(
        "function",
        {"name": NAME},
        description=TEXT,
        parameters={"type": ["object", "null"]},
        strict={"type": ["boolean", "null"]},
    ),
    object_schema(
        "custom",
        {"name": NAME},
        description=TEXT,
        format={"anyOf": [object_schema("text", {}), GRAMMAR, {"type": "null"}]},
    ),
)
NAMESPACE = object_schema(
    "namespace", {"name": NAME, "tools": list_of(*FUNCTIONS)}, description=TEXT
)
TOOLS_SCHEMA: dict[str, Any] = {"anyOf": [list_of(*FUNCTIONS, NAMESPACE), {"type": "null"}]}

# -- items --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InputItems:
    """Items of a conversation.

    Attributes:
        earlier: Items of the response that the request continues.
        new: Items of the request's input, with references resolved.
        size: Bytes of JSON of the items.
    """

    earlier: Sequence[Item]
    new: Sequence[Item]
    size: int

    def messages(self, instructions: str | None) -> list[Message]:
        """The items as messages, after the instructions.

        Raises:
            InvalidRequest: an item is malformed, or there is none.
        """
        items = [*self.earlier, *self.new]
        check_count(items, MAX_MESSAGES, "input")
        params = ["previous_response_id"] * len(self.earlier)
        params += [f"input[{index}]" for index in range(len(self.new))]
        messages: list[Message] = [SystemMessage(instructions)] if instructions else []
        messages += read_items(items, params)
        if not messages:
            raise invalid_field("input", "must hold at least one item.")
        return messages


@dataclass(slots=True)
class _AssistantTurn:
    """Items of one assistant turn."""

    param: str
    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    ends_in_text: bool = False


def read_items(items: Sequence[Item], params: Sequence[str]) -> list[Message]:
    """The items as messages.

    An assistant turn is several items; two assistant messages in a row are two turns.

    Args:
        params: Place of each item in the request, for errors.

    Raises:
        InvalidRequest: an item is malformed.
    """
    messages: list[Message] = []
    places: list[str] = []
    turn: _AssistantTurn | None = None

    def close_turn() -> None:
        nonlocal turn
        if turn is not None:
            text, reasoning = "".join(turn.texts), "".join(turn.reasoning)
            messages.append(AssistantMessage(text, reasoning, tuple(turn.calls)))
            places.append(turn.param)
            turn = None

    for item, param in zip(items, params, strict=True):
        kind = item.get("type") or "message"
        role = item.get("role")
        is_text = kind == "message" and role == "assistant"
        if is_text or kind in ("reasoning", "function_call", "custom_tool_call"):
            if is_text and turn is not None and turn.ends_in_text:
                close_turn()
            turn = turn or _AssistantTurn(param)
            turn.ends_in_text = is_text
            if is_text:
                turn.texts.append(text_of(item.get("content"), f"{param}.content"))
            elif kind == "reasoning":
                turn.reasoning.append(_read_reasoning(item, param))
            else:
                turn.calls.append(_read_call(item, param))
            continue
        close_turn()
        messages.append(_read_message(item, kind, role, param))
        places.append(param)
    close_turn()
    return order_tool_results(messages, places, id_key="call_id")


def _read_message(item: Item, kind: object, role: object, param: str) -> Message:
    if kind in ("function_call_output", "custom_tool_call_output"):
        call_id = _string(item, "call_id", param)
        return ToolMessage(text_of(item.get("output"), f"{param}.output"), call_id)
    if kind != "message":
        raise invalid_field(f"{param}.type", f"{kind!r} is not supported.")
    text = text_of(item.get("content"), f"{param}.content")
    match role:
        case "user":
            return UserMessage(text)
        case "system" | "developer":
            return SystemMessage(text)
        case _:
            raise invalid_field(f"{param}.role", "must be system, developer, user or assistant.")


def _read_reasoning(item: Item, param: str) -> str:
    """Reasoning text: the content, else the summary, else nothing.

    An item with neither comes from another server, and only that server can read it.
    """
    for key, kind in (("content", "reasoning_text"), ("summary", "summary_text")):
        parts = item.get(key) or []
        where = f"{param}.{key}"
        if not isinstance(parts, list):
            raise invalid_field(where, "must be a list.")
        texts = []
        for index, part in enumerate(parts):
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str) or part.get("type") != kind:
                raise invalid_field(f"{where}[{index}]", f"must be a {kind} with a text.")
            texts.append(text)
        if texts:
            return "".join(texts)
    return ""


def _read_call(item: Item, param: str) -> ToolCall:
    name = _string(item, "name", param)
    arguments: dict[str, Json]
    if item.get("type") == "custom_tool_call":
        text = item.get("input")
        if not isinstance(text, str):
            raise invalid_field(f"{param}.input", "must be a string.")
        arguments = {CUSTOM_INPUT: text}
    else:
        arguments = arguments_of(item.get("arguments"), f"{param}.arguments")
    call_id = _string(item, "call_id", param)
    return ToolCall(call_id, full_name(item.get("namespace"), name), arguments)


def _string(item: Mapping[str, Any], key: str, param: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not value:
        raise invalid_field(f"{param}.{key}", "must be a non-empty string.")
    return value


# -- tools --------------------------------------------------------------------------------


def full_name(namespace: object, name: str) -> str:
    """Name of a function for the model: `mcp__files` and `read` are `mcp__files__read`."""
    return f"{namespace}__{name}" if namespace else name


@dataclass(frozen=True)
class RequestTools:
    """Tools of a request.

    Attributes:
        functions: Tools for the prompt.
        namespaces: Namespace and name of each function in a namespace, by its full name.
        custom: Full names of custom tools.
        ignored: Names of hosted tools.
        raw: The request's tools without hosted tools.
    """

    functions: list[Tool]
    namespaces: dict[str, tuple[str, str]]
    custom: frozenset[str]
    ignored: list[str]
    raw: list[dict[str, Any]]


def read_tools(raw: Sequence[dict[str, Any]] | None) -> RequestTools:
    """Functions and custom tools, alone or in namespaces.

    Raises:
        InvalidRequest: a tool is malformed.
    """
    flat: list[tuple[Mapping[str, Any], str]] = []
    namespaces: dict[str, tuple[str, str]] = {}
    for tool, where in numbered_tools(raw):
        if tool.get("type") == "namespace":
            flat += _read_namespace(tool, where, namespaces)
        else:
            flat.append((tool, where))
    custom = frozenset(str(tool.get("name")) for tool, _ in flat if tool.get("type") == "custom")
    functions, ignored = read_flat_tools(
        [(_as_function(tool, where), where) for tool, where in flat],
        schema_key="parameters",
        function_types=("function",),
        hosted=HOSTED,
    )
    kept = [tool for tool in raw or () if not str(tool.get("type")).startswith(HOSTED)]
    return RequestTools(functions, namespaces, custom, ignored, kept)


def _as_function(tool: Mapping[str, Any], param: str) -> Mapping[str, Any]:
    """A custom tool as a function with one text argument; other tools unchanged.

    The tool's grammar goes into the description and is not enforced: the client checks the input.

    Raises:
        InvalidRequest: the format is malformed.
    """
    if tool.get("type") != "custom":
        return tool
    description, form = tool.get("description"), tool.get("format")
    if isinstance(form, Mapping) and form.get("type") == "grammar":
        grammar = form.get("definition")
        if not isinstance(grammar, str):
            raise invalid_field(f"{param}.format.definition", "must be a string.")
        note = f"The input follows this {form.get('syntax') or 'lark'} grammar:\n{grammar}"
        description = f"{description}\n\n{note}" if description else note
    elif form is not None and (not isinstance(form, Mapping) or form.get("type") != "text"):
        raise invalid_field(f"{param}.format.type", "must be text or grammar.")
    return {
        "type": "function",
        "name": tool.get("name"),
        "description": description,
        "parameters": {
            "type": "object",
            "properties": {CUSTOM_INPUT: {"type": "string"}},
            "required": [CUSTOM_INPUT],
        },
    }


def _read_namespace(
    namespace: Mapping[str, Any], param: str, names: dict[str, tuple[str, str]]
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """A namespace's tools under their full names, which are added to `names`."""
    space, members = _string(namespace, "name", param), namespace.get("tools")
    if not isinstance(members, list):
        raise invalid_field(f"{param}.tools", "must be a list.")
    for index, member in enumerate(members):
        where = f"{param}.tools[{index}]"
        if not isinstance(member, Mapping):
            raise invalid_field(where, "must be an object.")
        name = member.get("name")
        if isinstance(name, str) and name:
            names[full_name(space, name)] = (space, name)
            name = full_name(space, name)
        yield {**member, "name": name}, where
