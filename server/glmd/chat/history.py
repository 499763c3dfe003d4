"""Text of a conversation's records: messages, parts, calls, results and tools.

Clients send the whole conversation with every request, so an error about an earlier message would
end the conversation. A record is therefore never refused: it becomes text, or a placeholder where
the model cannot read it, and `HistoryReader.omitted` lists what is missing. Only the newest input
is refused, because there the client can still send something else.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from glmd.chat.tool_args import dump, record_arguments
from glmd.chat.tools import read_definition
from glmd.chat.types import (
    MAX_BLOCKS,
    AssistantMessage,
    Tool,
    ToolCall,
    check_count,
)
from glmd.errors import InvalidRequest, invalid_field
from glmd.utils.text import quoted

TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "summary_text": "text",
    "refusal": "refusal",
}
"""Types of content parts that are text, and the key that holds the text."""

REASONING_PARTS = ("thinking", "reasoning", "reasoning_content", "reasoning_text")

REASONING_FIELDS = (
    "reasoning_content",  # DeepSeek, and this server
    "reasoning",  # OpenRouter, vLLM
    "reasoning_text",  # GitHub Copilot
    "thinking",  # Ollama
    "thinking_blocks",  # LiteLLM
    "reasoning_details",  # OpenRouter
)
"""Fields of an assistant message with its reasoning; the first that is not empty counts."""

REASONING_KEYS = ("thinking", "text", "content", "summary", *REASONING_FIELDS)
"""Keys that hold the text of reasoning sent as an object."""

CALL_PARTS = ("tool_use", "tool_call", "tool-call", "function_call")

MEDIA = {
    "image": (
        *("image", "image_url", "image_file", "input_image", "output_image"),
        *("computer_screenshot", "image_generation_call"),
    ),
    "audio": ("audio", "audio_url", "input_audio", "output_audio"),
    "video": ("video", "video_url", "input_video"),
    "file": ("file", "input_file", "container_upload"),
}
MEDIA_OF = {kind: medium for medium, kinds in MEDIA.items() for kind in kinds}
"""Medium of each type of content that the model cannot read."""

SILENT = (
    *("redacted_thinking", "fallback", "configuration_update", "compaction_trigger"),
    *("mcp_list_tools", "mcp_tool_listing"),
)
"""Types of records that concern another server only. Nothing stands in their place."""

HIDDEN = (
    *("type", "id", "status", "cache_control", "signature", "citations", "caller", "fingerprint"),
    *("call_id", "tool_use_id", "annotations", "logprobs"),
)
"""Fields of no use to the model, like all whose name begins with `encrypted_`."""

UNKNOWN_TOOL = "unknown_tool"
"""Name of a recorded call without a name."""

CUSTOM_INPUT = "input"
"""Name of the one argument of a custom tool, which is text."""

THINK, END_THINK = "<think>", "</think>"
DETAILS, END_DETAILS = '<details type="reasoning"', "</details>"
SUMMARY, END_SUMMARY = "<summary>", "</summary>"


class HistoryReader:
    """Renders the records of one conversation, in order.

    Attributes:
        tools: the tools of the request and of the conversation so far, by name.
        omitted: `PLACE=KIND` of each record without its content in the text.
    """

    def __init__(self, tools: Iterable[Tool] = ()) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self.omitted: list[str] = []
        self._offered = {name for name, tool in self.tools.items() if not tool.deferred}
        self._described = set(self._offered)

    @property
    def offered(self) -> list[Tool]:
        """The tools that are offered after the records read so far."""
        return [tool for name, tool in self.tools.items() if name in self._offered]

    # -- content --------------------------------------------------------------------------

    def text(
        self, content: object, param: str, *, strict: bool = False, separator: str = ""
    ) -> str:
        """Text of a message's content: null, a string, or a list of parts.

        Args:
            strict: refuse what is not text, instead of replacing it.

        Raises:
            InvalidRequest: `strict`, and a part is not text, or malformed.
        """
        if content is None:
            return ""
        if isinstance(content, str):
            return content
        if isinstance(content, Sequence):
            check_count(content, MAX_BLOCKS, param)
            parts = [
                self.part(part, f"{param}[{index}]", strict=strict)
                for index, part in enumerate(content)
            ]
            return separator.join(part for part in parts if part or not separator)
        if strict:
            raise invalid_field(param, "must be a string or a list of content parts.")
        return self.part(content, param) if isinstance(content, Mapping) else dump(content)

    def part(self, part: object, param: str, *, strict: bool = False) -> str:  # noqa: PLR0911
        """Text of one content part, block or item.

        Raises:
            InvalidRequest: as for `text`.
        """
        if isinstance(part, str):
            return part
        if not isinstance(part, Mapping):
            if strict:
                raise invalid_field(param, "this content is not supported. Send text.")
            return dump(part)
        kind = part.get("type")
        kind = kind if isinstance(kind, str) else None if kind is None else dump(kind)
        if kind is None and not strict:
            kind = "text" if isinstance(part.get("text"), str) else None
        match kind:
            case str() if kind in TEXT_PARTS:
                return self._text_part(part, TEXT_PARTS[kind], param, strict=strict)
            case "document":
                return self._document(part, param, strict=strict)
            case "search_result":
                heads = [part.get(key) for key in ("title", "source")]
                body = self.text(part.get("content"), f"{param}.content", strict=strict)
                return "\n".join([*(head for head in heads if isinstance(head, str)), body])
            case "tool_reference":
                return self.offer([part.get("tool_name", part.get("name"))], param)
            case "tool_addition" | "tool_removal":
                return self._tool_change(part.get("tool"), kind, param)
            case "compaction" if isinstance(part.get("content"), str):
                changes = self.text(part.get("tool_changes"), param, separator="\n")
                return f"{part['content']}\n{changes}".rstrip("\n")
        if strict:
            raise _not_text(kind, param)
        return self._record(part, kind or "object", param)

    def omit(self, kind: str, param: str, shown: str | None = None) -> str:
        """Note a record that the model cannot read, and return the placeholder `shown`."""
        self.omitted.append(f"{param}={kind}")
        return shown if shown is not None else f"[{kind} omitted]"

    def _text_part(self, part: Mapping[str, Any], key: str, param: str, *, strict: bool) -> str:
        text = part.get(key)
        if isinstance(text, str):
            return text
        if strict:
            raise invalid_field(f"{param}.{key}", "must be a string.")
        return "" if text is None else dump(text)

    def _document(self, part: Mapping[str, Any], param: str, *, strict: bool) -> str:
        source = part.get("source")
        if isinstance(source, Mapping) and source.get("type") in ("text", "content"):
            is_text = source["type"] == "text"
            if is_text and strict and not isinstance(source.get("data"), str):
                raise invalid_field(f"{param}.source.data", "must be a string.")
            key = "data" if is_text else "content"
            body = self.text(source.get(key), f"{param}.source.{key}", strict=strict)
            title = part.get("title")
            return f"{title}\n{body}" if isinstance(title, str) and title else body
        if strict:
            raise invalid_field(param, "a document must be text. The model reads text only.")
        return self._medium("file", "document", part, param)

    def _record(self, record: Mapping[str, Any], kind: str, param: str) -> str:
        if kind in MEDIA_OF:
            return self._medium(MEDIA_OF[kind], kind, record, param)
        if kind in SILENT:
            return self.omit(kind, param, "")
        shown = self._visible(record, param)
        if not shown:
            return self.omit(kind, param)
        content = shown.get("content") if isinstance(shown, dict) else None
        if isinstance(content, str) and len(shown) == 1:
            return content  # a summary, the text of a result
        return dump(shown) if kind == "object" else f"[{kind}] {dump(shown)}"

    def _medium(self, medium: str, kind: str, part: Mapping[str, Any], param: str) -> str:
        name = part.get("filename") or part.get("title") or part.get("name")
        nested = part.get("file")
        if name is None and isinstance(nested, Mapping):
            name = nested.get("filename")
        named = f"{medium} {name}" if isinstance(name, str) and len(name) < 200 else medium
        return self.omit(kind, param, f"[{named} omitted: this model reads text only]")

    def _visible(self, value: Any, param: str) -> Any:
        """A JSON value without the fields that are of no use to the model."""
        if isinstance(value, Mapping):
            kind = value.get("type")
            inner: dict[str, Any] = {}
            for key, each in value.items():
                if each is None or key in HIDDEN or key.startswith("encrypted_"):
                    continue
                where = f"{param}.{key}"
                nested = each.get("type") if isinstance(each, Mapping) else None
                if isinstance(nested, str) and nested in (*MEDIA_OF, "document"):
                    inner[key] = self.part(each, where)
                else:
                    inner[key] = self._visible(each, where)
            if "tool_references" in inner:
                names = [one.get("tool_name") for one in value["tool_references"] or ()]
                return self.offer(names, param)
            is_text = isinstance(kind, str) and kind in TEXT_PARTS and set(inner) == {"text"}
            return inner["text"] if is_text else inner
        if isinstance(value, list):
            return [
                self.part(each, f"{param}[{index}]")
                if isinstance(each, Mapping) and each.get("type") in (*MEDIA_OF, "tool_reference")
                else self._visible(each, f"{param}[{index}]")
                for index, each in enumerate(value)
            ]
        return value

    def refuse_images(self, content: object, param: str) -> None:
        """Refuse images among a message's own parts.

        Raises:
            InvalidRequest: names the image's part.
        """
        for index, part in enumerate(content if isinstance(content, list) else ()):
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and MEDIA_OF.get(kind) == "image":
                raise _not_text(kind, f"{param}[{index}]")

    # -- tools ----------------------------------------------------------------------------

    def define(self, tools: Iterable[Tool], param: str) -> str:
        """Offer tools that the conversation itself defines, and describe them."""
        names = []
        for tool in tools:
            if tool.name not in self.tools:
                self.tools[tool.name] = replace(tool, deferred=True)
            names.append(tool.name)
        return self.offer(names, param)

    def offer(self, names: Iterable[object], param: str) -> str:
        """Offer deferred tools from here on; returns the text that describes them."""
        lines: list[str] = []
        again: list[str] = []
        for name in names:
            tool = self.tools.get(name) if isinstance(name, str) else None
            if tool is None:
                again.append(self.omit("tool_reference", param, f"{name} (not defined)"))
                continue
            self._offered.add(tool.name)
            if tool.name in self._described:
                again.append(tool.name)
            else:
                self._described.add(tool.name)
                lines.append(dump(tool.definition))
        text = []
        if lines:
            text += ["These tools can be called from now on:", "<tools>", *lines, "</tools>"]
        if again:
            text.append(f"Available tools: {', '.join(again)}")
        return "\n".join(text)

    def withdraw(self, name: object) -> str:
        """Stop offering a tool; returns the text that says so."""
        if isinstance(name, str):
            self._offered.discard(name)
        return f"No longer available: {name}"

    def _tool_change(self, change: object, kind: str, param: str) -> str:
        """Text of a mid-conversation change of tools (Anthropic)."""
        change = change if isinstance(change, Mapping) else {}
        name = change.get("name", change.get("tool_name"))
        server = change.get("server_name")
        if isinstance(server, str):
            spelled = (f"mcp__{server}__{name}", f"{server}_{name}")
            name = next((each for each in spelled if each in self.tools), spelled[0])
            if change.get("type") == "mcp_toolset_reference":
                return self.omit("mcp_toolset_reference", param)
        if kind == "tool_removal":
            return self.withdraw(name)
        definition = change.get("definition")
        if isinstance(definition, Mapping):
            tool = read_definition(definition, f"{param}.tool.definition")
            if tool is None:
                return self.omit("tool_definition", param)
            return self.define([tool], param)
        return self.offer([name], param)

    # -- assistant messages -----------------------------------------------------------------

    def assistant_parts(self, content: object, param: str, turn: AssistantTurn) -> None:
        """Add the parts of an assistant's content to `turn`."""
        if not isinstance(content, list):
            turn.texts.append(self.text(content, param))
            return
        check_count(content, MAX_BLOCKS, param)
        for index, part in enumerate(content):
            where = f"{param}[{index}]"
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind in REASONING_PARTS:
                turn.reasoning.append(reasoning_of(part))
            elif kind in CALL_PARTS:
                turn.calls.append(self.call(part, where))
            else:
                turn.texts.append(self.part(part, where))

    def call(self, raw: object, param: str) -> ToolCall:
        """A recorded call in the shape of any API."""
        if not isinstance(raw, Mapping):
            self.omit("tool_call", param)
            return ToolCall("", UNKNOWN_TOOL, {})
        function = next(
            (raw[key] for key in ("function", "custom") if isinstance(raw.get(key), Mapping)), raw
        )
        id = next((raw[key] for key in ("call_id", "id") if isinstance(raw.get(key), str)), "")
        name = function.get("name")
        name = name.strip() if isinstance(name, str) else ""
        given = function.get("arguments", function.get("input"))
        if raw.get("type") in ("custom", "custom_tool_call"):
            arguments: dict[str, Any] = {
                CUSTOM_INPUT: given if isinstance(given, str) else dump(given)
            }
        else:
            arguments = record_arguments(given)
        return ToolCall(id, name or UNKNOWN_TOOL, arguments)


@dataclass(slots=True)
class AssistantTurn:
    """Parts of one assistant turn, in any API's order."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)

    def message(self) -> AssistantMessage:
        """The turn as a message, with reasoning at the beginning of its text taken out."""
        sent, reasoning = "".join(self.texts), "".join(self.reasoning)
        text = sent
        if not reasoning:
            reasoning, text = split_reasoning(sent)
        return AssistantMessage(
            text, reasoning, tuple(self.calls), sent_text=None if text == sent else sent
        )


def reasoning_of(value: object) -> str:
    """Text of reasoning that was sent as text, as an object, or as a list of either."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return next(filter(None, (reasoning_of(value.get(key)) for key in REASONING_KEYS)), "")
    return "".join(map(reasoning_of, value)) if isinstance(value, list) else ""


def split_reasoning(text: str) -> tuple[str, str]:
    """Reasoning at the beginning of an assistant's text, and the rest of the text.

    Reasoning stands between `<think>` and `</think>`, or in the block that Open WebUI makes of it.
    Tags elsewhere, and tags that do not close, are text.
    """
    found: list[str] = []
    while True:
        start = text.lstrip()
        if start.startswith(THINK):
            inner, closed, rest = start.removeprefix(THINK).partition(END_THINK)
        elif start.startswith(DETAILS):
            inner, closed, rest = start.partition(">")[2].partition(END_DETAILS)
            inner = _unquote(inner)
        else:
            break
        if not closed:
            break
        found.append(inner.strip())
        text = rest.lstrip("\n")
    return "\n".join(found), text


def _unquote(details: str) -> str:
    """Text in Open WebUI's block, quoted and HTML-escaped, after its summary."""
    head, closed, rest = details.partition(END_SUMMARY)
    body = rest if closed and head.lstrip().startswith(SUMMARY) else details
    lines = html.unescape(body.strip()).splitlines()
    return "\n".join(line.removeprefix(">").removeprefix(" ") for line in lines)


def _not_text(kind: str | None, param: str) -> InvalidRequest:
    shown = "this content" if kind is None else f"content of type {quoted(kind)}"
    return invalid_field(param, f"{shown} is not supported. The model reads text only.")


# -- order ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewestInput:
    """The messages that ask for something now, and may be refused.

    They begin with the newest user message, if the assistant has not answered it. Behind tool
    results only images are refused: clients put what a tool has read there (a PDF), and could not
    go on after an error.

    Attributes:
        start: index of the first of the messages.
        is_strict: whatever is not text is refused.
    """

    start: int
    is_strict: bool

    @classmethod
    def of(cls, kinds: Sequence[str]) -> NewestInput:
        """
        Args:
            kinds: `assistant`, `tool`, `user` or another role of each message.
        """
        turn = start = len(kinds)
        while turn and kinds[turn - 1] != "assistant":
            turn -= 1
        while start > turn and kinds[start - 1] != "tool":
            start -= 1
            if kinds[start] == "user":
                break
        return cls(start, "tool" not in kinds[turn:])
