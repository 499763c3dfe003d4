"""Input items and tools of the Responses API in neutral form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from glmd.api.generation_request import Effort, object_schema
from glmd.chat.history import (
    CUSTOM_INPUT,
    AssistantTurn,
    HistoryReader,
    NewestInput,
    reasoning_of,
)
from glmd.chat.tools import (
    HOSTED,
    NumberedTool,
    numbered,
    order_tool_results,
    read_definition,
    read_flat_tools,
)
from glmd.chat.types import (
    MAX_MESSAGES,
    Message,
    SystemMessage,
    Tool,
    ToolMessage,
    UserMessage,
    check_count,
)
from glmd.errors import InvalidRequest, invalid_field
from glmd.structured_output.request import read_response_format
from glmd.utils.text import quoted

Item = dict[str, Any]

EFFORT: TypeAdapter[str | None] = TypeAdapter(Effort)

TOOL_SEARCH = "tool_search"
"""Name of the function that stands for a tool search that the client runs."""

CALLS = {
    "function_call": "arguments",
    "custom_tool_call": "input",
    "tool_search_call": "arguments",
    "local_shell_call": "action",
    "shell_call": "action",
    "computer_call": "action",
    "apply_patch_call": "operation",
    "program": "code",
}
"""Types of calls that the client answers, and the key that holds their arguments."""

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
    object_schema(
        "tool_search_call", {"arguments": {"type": "object"}}, call_id=NAME, execution=TEXT
    ),
    object_schema("tool_search_output", {"tools": {"type": "array"}}, call_id=NAME),
    object_schema("item_reference", {"id": TEXT}),
    object_schema(
        "configuration_update",
        {},
        reasoning={"type": "object", "properties": {"effort": TEXT}},
        text={"type": "object", "properties": {"format": {"type": "object"}}},
    ),
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
    """

    earlier: Sequence[Item]
    new: Sequence[Item]

    def configured(
        self, effort: str | None, format: Mapping[str, Any] | None
    ) -> tuple[str | None, Mapping[str, Any] | None]:
        """Reasoning effort and format of the answer at the end of the conversation.

        Args:
            effort: The request's. An item `configuration_update` replaces it, and the format, until
                the next does.
        """
        for item in (*self.earlier, *self.new):
            if item.get("type") == "configuration_update":
                try:
                    update = read_configuration(item, "")
                except InvalidRequest:  # `ItemReader` refuses or lists it.
                    continue
                effort, format = update[0] or effort, update[1] or format
        return effort, format

    def messages(
        self, instructions: str | None, reader: HistoryReader, tools: RequestTools
    ) -> list[Message]:
        """The items as messages, after the instructions.

        Args:
            tools: Takes the tools that items define.

        Raises:
            InvalidRequest: the newest input is malformed, or there is none.
        """
        items = [*self.earlier, *self.new]
        check_count(items, MAX_MESSAGES, "input")
        params = ["previous_response_id"] * len(self.earlier)
        params += [f"input[{index}]" for index in range(len(self.new))]
        messages: list[Message] = [SystemMessage(instructions)] if instructions else []
        messages += ItemReader(reader, tools).read(items, params)
        if not messages:
            raise invalid_field("input", "must hold at least one item.")
        return messages


class ItemReader:
    """Reads items as messages.

    An assistant turn is several items; two assistant messages in a row are two turns.
    """

    def __init__(self, reader: HistoryReader, tools: RequestTools) -> None:
        self._reader = reader
        self._tools = tools
        self._messages: list[Message] = []
        self._turn: AssistantTurn | None = None
        self._ends_in_text = False

    def read(self, items: Sequence[Item], params: Sequence[str]) -> list[Message]:
        """The items as messages.

        Args:
            params: Place of each item in the request, for errors.

        Raises:
            InvalidRequest: an item of the newest input is malformed.
        """
        kinds = [_kind(item) for item in items]
        newest = NewestInput.of(kinds)
        for index, (item, param) in enumerate(zip(items, params, strict=True)):
            if kinds[index] == "assistant":
                self._add_to_turn(item, param)
                continue
            self._close_turn()
            is_new = index >= newest.start
            if is_new and kinds[index] == "user":
                self._reader.refuse_images(item.get("content"), f"{param}.content")
            strict = is_new and newest.is_strict
            if kinds[index] == "configuration_update":
                self._check_configuration(item, param, strict=strict)
            elif (message := self._message(item, param, strict=strict)) is not None:
                self._messages.append(message)
        self._close_turn()
        return order_tool_results(self._messages)

    def _close_turn(self) -> None:
        if self._turn is not None:
            self._messages.append(self._turn.message())
        self._turn, self._ends_in_text = None, False

    def _add_to_turn(self, item: Item, param: str) -> None:
        kind = item.get("type") or "message"
        is_text = kind == "message"
        if is_text and self._ends_in_text:
            self._close_turn()
        self._ends_in_text = is_text
        turn = self._turn = self._turn or AssistantTurn()
        if is_text:
            self._reader.assistant_parts(item.get("content"), f"{param}.content", turn)
        elif kind == "reasoning":
            text = reasoning_of(item.get("content")) or reasoning_of(item.get("summary"))
            turn.reasoning.append(text)
            if not text and item.get("encrypted_content"):
                self._reader.omit("reasoning", param)  # Only the server that wrote it can read it.
        elif kind in CALLS:
            name = item.get("name")
            if kind not in ("function_call", "custom_tool_call"):
                name = kind.removesuffix("_call")
            elif isinstance(name, str):
                name = full_name(item.get("namespace"), name)
            arguments = item.get(CALLS[kind], item.get("actions"))
            call = {"type": kind, "call_id": item.get("call_id", item.get("id"))}
            turn.calls.append(
                self._reader.call({**call, "name": name, "arguments": arguments}, param)
            )
        else:
            turn.texts.append(self._reader.part(item, param))

    def _message(self, item: Item, param: str, *, strict: bool) -> Message | None:
        kind, role = item.get("type") or "message", item.get("role")
        reader = self._reader
        if _kind(item) == "tool":
            return self._result(item, param)
        if kind == "message":
            text = reader.text(item.get("content"), f"{param}.content", strict=strict)
            if role in ("system", "developer"):
                return SystemMessage(text)
            if role != "user" and strict:
                raise invalid_field(
                    f"{param}.role", "must be system, developer, user or assistant."
                )
            return UserMessage(text)
        if kind == "additional_tools":
            return SystemMessage(reader.define(self._defined(item, param), param))
        if kind == "item_reference":
            if strict:
                raise invalid_field(f"{param}.id", "the item is not stored, or not any more.")
            return UserMessage(reader.omit(kind, param))
        if kind == "compaction_trigger" and strict:
            raise invalid_field(
                f"{param}.type", "compaction is not available. Ask for a summary in a message."
            )
        if strict and kind not in RECORDS:
            raise invalid_field(f"{param}.type", f"{quoted(str(kind))} is not supported.")
        text = reader.part(item, param)
        return UserMessage(text) if text else None

    def _check_configuration(self, item: Item, param: str, *, strict: bool) -> None:
        """Refuse or list an item that `InputItems.configured` cannot apply."""
        try:
            read_configuration(item, param)
        except InvalidRequest:
            if strict:
                raise
            self._reader.omit("configuration_update", param)

    def _result(self, item: Item, param: str) -> ToolMessage:
        reader = self._reader
        if item.get("type") == "tool_search_output":
            text = reader.define(self._defined(item, param), param) or "No tools found."
        else:
            key = "output" if "output" in item else "result"
            text = reader.text(item.get(key), f"{param}.{key}")
        id = item.get("call_id", item.get("id"))
        return ToolMessage(text, id if isinstance(id, str) else None)

    def _defined(self, item: Item, param: str) -> list[Tool]:
        """The functions that an item defines; other tools are left out."""
        raw = item.get("tools")
        tools = []
        for index, tool in enumerate(raw if isinstance(raw, list) else ()):
            where = f"{param}.tools[{index}]"
            try:
                flat = list(self._tools.flatten(tool, where))
            except InvalidRequest:
                flat = []
            read = [read_definition(one, place) for one, place in flat]
            tools += [one for one in read if one is not None]
            if not flat or None in read:
                self._reader.omit("tool", where)
        return tools


RECORDS = ("compaction", "mcp_list_tools", "mcp_approval_response")
"""Types of items that record something also where they are the newest."""


def read_configuration(item: Item, param: str) -> tuple[str | None, Mapping[str, Any] | None]:
    """Reasoning effort and format of a `configuration_update`; None: unchanged.

    Raises:
        InvalidRequest: a field is malformed.
    """
    reasoning, text = item.get("reasoning"), item.get("text")
    effort = reasoning.get("effort") if isinstance(reasoning, Mapping) else None
    format = text.get("format") if isinstance(text, Mapping) else None
    try:
        effort = EFFORT.validate_python(effort)
    except ValidationError as error:
        where = f"{param}.reasoning.effort"
        raise invalid_field(where, f"{quoted(str(effort))} is no reasoning effort.") from error
    read_response_format(format, f"{param}.text.format", flat=True)
    return effort, format


def _kind(item: Item) -> str:
    """`assistant`, `tool`, or the role or type of another item."""
    kind = item.get("type") or "message"
    if kind == "message":
        return str(item.get("role"))
    kind = str(kind)
    if kind in ("reasoning", "mcp_approval_request", "program") or kind.endswith("_call"):
        return "assistant"
    return "tool" if kind.endswith("_output") else kind


# -- tools --------------------------------------------------------------------------------


def full_name(namespace: object, name: str) -> str:
    """Name of a function for the model, such as `mcp__files__read`."""
    return f"{namespace}__{name}" if namespace else name


@dataclass(slots=True)
class RequestTools:
    """Tools of a request.

    Attributes:
        functions: The functions of the request.
        namespaces: Namespace and name of each function in a namespace, by its full name.
        custom: Full names of custom tools.
        searches: The client runs a tool search, which is the function `TOOL_SEARCH`.
        ignored: Names of hosted tools.
        shown: The request's tools without hosted tools, as the response shows them.
    """

    functions: list[Tool] = field(default_factory=list)
    namespaces: dict[str, tuple[str, str]] = field(default_factory=dict)
    custom: set[str] = field(default_factory=set)
    searches: bool = False
    ignored: list[str] = field(default_factory=list)
    shown: list[dict[str, Any]] = field(default_factory=list)

    def flatten(self, tool: object, param: str) -> Iterator[NumberedTool]:
        """A tool, or the tools of a namespace, as functions under their full names.

        Raises:
            InvalidRequest: the tool is malformed.
        """
        if not isinstance(tool, Mapping):
            raise invalid_field(param, "must be an object.")
        flat = [(tool, param)]
        if tool.get("type") == "namespace":
            flat = list(_read_namespace(tool, param, self.namespaces))
        for each, where in flat:
            if each.get("type") == "custom":
                self.custom.add(str(each.get("name")))
            elif _is_client_search(each):
                self.searches = True
            yield _as_function(each, where), where


def read_tools(raw: Sequence[dict[str, Any]] | None) -> RequestTools:
    """Functions and custom tools, also in namespaces, and the client's tool search.

    Raises:
        InvalidRequest: a tool is malformed.
    """
    tools = RequestTools()
    flat = [each for tool, where in numbered(raw) for each in tools.flatten(tool, where)]
    functions, ignored = read_flat_tools(
        flat, schema_key="parameters", function_types=("function",)
    )
    tools.functions += functions
    tools.ignored += ignored
    tools.shown += [
        shown_tool(tool)
        for tool in raw or ()
        if _is_client_search(tool) or not str(tool.get("type")).startswith(HOSTED)
    ]
    return tools


def shown_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool in a response: with all fields that OpenAI's schema requires."""
    shown: dict[str, Any] = {}
    if tool.get("type") == "function":
        shown = {"description": None, "parameters": None, "strict": bool(tool.get("strict"))}
    elif tool.get("type") == "namespace":
        members = [shown_tool(member) for member in tool.get("tools") or ()]
        return {**tool, "description": tool.get("description") or "", "tools": members}
    return shown | {key: value for key, value in tool.items() if value is not None}


def _is_client_search(tool: Mapping[str, Any]) -> bool:
    return tool.get("type") == TOOL_SEARCH and tool.get("execution") == "client"


def _as_function(tool: Mapping[str, Any], param: str) -> Mapping[str, Any]:
    """A custom tool as a function with one text argument, a tool search as a function.

    Other tools are unchanged.

    The tool's grammar goes into the description and is not enforced: the client checks the input.

    Raises:
        InvalidRequest: the format is malformed.
    """
    if _is_client_search(tool):
        return {**tool, "type": "function", "name": TOOL_SEARCH}
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
) -> Iterator[NumberedTool]:
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


def _string(item: Mapping[str, Any], key: str, param: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not value:
        raise invalid_field(f"{param}.{key}", "must be a non-empty string.")
    return value
