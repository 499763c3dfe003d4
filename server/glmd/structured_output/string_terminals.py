"""Terminals for strings in tool calls: raw text without quotes and escapes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from llguidance import LLMatcher, LLTokenizer, regex_to_lark

from glmd.chat.tool_args import ArgType, type_of
from glmd.structured_output.alternatives import TooManyAlternatives, alternatives
from glmd.structured_output.backend import byte_tokenizer, make_matcher
from glmd.structured_output.request import Schema

MAX_ALTERNATIVES = 64
"""Alternatives of one argument's strings."""

ANY_TEXT = "/(?s:.*)/"

_SPACE = r"[ \t\r\n]*"
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_JSON_OF = {
    "null": "null",
    "boolean": "true|false",
    "integer": _NUMBER,
    "number": _NUMBER,
    "array": r"\[(?s:.*)",
    "object": r"\{(?s:.*)",
}
"""Regular expressions that match all JSON texts of a type, and more for arrays and objects."""


class UnknownText(Exception):
    """The strings of a schema cannot be described by terminals."""


@dataclass(frozen=True)
class Text:
    """Strings that fulfil all attributes.

    Attributes:
        patterns: regular expressions that are found in the string.
        max_length: in characters; None for no limit.
        values: the only possible strings; None for any.
    """

    patterns: tuple[str, ...] = ()
    min_length: int = 0
    max_length: int | None = None
    values: tuple[str, ...] | None = None

    def __and__(self, other: Text) -> Text:
        lengths = [each.max_length for each in (self, other) if each.max_length is not None]
        if self.values is None or other.values is None:
            values = other.values if self.values is None else self.values
        else:
            values = tuple(value for value in self.values if value in other.values)
        return Text(
            tuple(dict.fromkeys(self.patterns + other.patterns)),
            max(self.min_length, other.min_length),
            min(lengths, default=None),
            values,
        )

    def terminal(self, kind: ArgType) -> str | None:
        """Return a terminal's body for texts that the tool parser reads as strings.

        Args:
            kind: type of the argument in the tool parser.

        Returns:
            None if there are no such strings.

        Raises:
            UnknownText: a pattern cannot be rewritten to match a whole text.
        """
        parts = [f"/{regex_to_lark(whole(pattern), 'dw')}/" for pattern in self.patterns]
        if self.min_length or self.max_length is not None:
            most = "" if self.max_length is None else self.max_length
            parts.append(f"/(?s:.{{{self.min_length},{most}}})/")
        if self.values is not None:
            values = [value for value in self.values if json.loads(kind.json_of(value)) == value]
            if not values:
                return None
            parts.append("(" + " | ".join(map(quote, values)) + ")")
        else:
            parts = parts or [ANY_TEXT]  # a negation alone would match invalid UTF-8
            parts += [f"~/{_SPACE}(?:{other}){_SPACE}/" for other in _texts_of_other_types(kind)]
        body = " & ".join(parts)
        return None if len(parts) > 1 and _is_empty(body) else body


def texts(schema: Schema, definitions: Mapping[str, Schema]) -> list[Text]:
    """Return alternatives that together describe the strings under a compiled schema.

    Args:
        definitions: targets of the schema's references.

    Raises:
        UnknownText: there are too many alternatives.
    """
    try:
        found = alternatives(schema, definitions, _read_text, MAX_ALTERNATIVES)
    except TooManyAlternatives:
        raise UnknownText from None
    return [text for text in dict.fromkeys(found) if text.values != ()]


def _read_text(schema: Mapping[str, Any]) -> Text:
    values: tuple[str, ...] | None = None
    if "string" not in schema.get("type", ("string",)):
        values = ()
    elif "enum" in schema:
        values = tuple(value for value in schema["enum"] if isinstance(value, str))
    patterns = (schema["pattern"],) if "pattern" in schema else ()
    return Text(patterns, schema.get("minLength", 0), schema.get("maxLength"), values)


def _texts_of_other_types(kind: ArgType) -> Iterable[str]:
    """Return regular expressions of texts that the tool parser reads as non-strings."""
    if kind.only_string:
        return []
    names = kind.types | {type_of(value) for value in kind.values}
    found = list(dict.fromkeys(_JSON_OF[name] for name in sorted(names) if name in _JSON_OF))
    return [*found, '"(?s:.*)'] if kind.free else found


def quote(text: str) -> str:
    """Return a literal of the grammar language."""
    return json.dumps(text, ensure_ascii=False)


@lru_cache(maxsize=1024)
def _is_empty(body: str) -> bool:
    """Return whether a terminal matches no text, by llguidance's mask."""
    grammar = LLMatcher.grammar_from_lark(f"start: TEXT\nTEXT: {body}")
    matcher = make_matcher(_single_bytes(), grammar)
    matcher.compute_bitmask()
    return matcher.is_error()


@cache
def _single_bytes() -> LLTokenizer:
    return byte_tokenizer({"<end>": 256}, [256])


# -- patterns -----------------------------------------------------------------------------


_ITEM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
"""An escape, a character class, or one character."""
_QUANTIFIER = re.compile(r"[*+?]|\{[0-9]+(?:,[0-9]*)?\}")
_REST = "(?s:.*)"


def whole(pattern: str) -> str:
    """Return a regular expression for whole texts that contain a match.

    Anchors are understood at the start and end of a pattern, also in groups: `^a|b$`, `(^a|b)c`.

    Raises:
        UnknownText: there are other anchors.
    """
    return _whole(pattern, left=True, right=True)


def _whole(pattern: str, *, left: bool, right: bool) -> str:
    """Rewrite a pattern as `whole` does, anchored or free at the given ends."""
    return "|".join(_whole_branch(items, left, right) for items in _branches(pattern))


def _branches(pattern: str) -> list[list[str]]:
    """Split a pattern into its alternatives, each a list of items.

    A group is one item.
    """
    branches: list[list[str]] = [[]]
    depth = 0
    for item in _ITEM.findall(pattern):
        if item == "|" and not depth:
            branches.append([])
            continue
        depth -= item == ")"
        if depth or item == ")":
            branches[-1][-1] += item
        else:
            branches[-1].append(item)
        depth += item == "("
    return branches


def _whole_branch(items: list[str], left: bool, right: bool) -> str:
    anchored_left = anchored_right = False
    while left and items and items[0] == "^":
        items, anchored_left = items[1:], True
    while right and items and items[-1] == "$":
        items, anchored_right = items[:-1], True
    free_left, free_right = left and not anchored_left, right and not anchored_right
    if len(items) == 1 and _is_group(items[0]):
        return _group(items[0], free_left, free_right)
    if free_left and items and _is_group(items[0]) and not _quantified(items, 0):
        items, free_left = [_group(items[0], True, False), *items[1:]], False
    if free_right and items and _is_group(items[-1]):
        items, free_right = [*items[:-1], _group(items[-1], False, True)], False
    for item in items:
        if item in ("^", "$") or (_is_group(item) and _has_anchor(item)):
            raise UnknownText
    return (_REST if free_left else "") + "".join(items) + (_REST if free_right else "")


def _is_group(item: str) -> bool:
    return item.startswith("(") and len(item) > 1


def _quantified(items: list[str], index: int) -> bool:
    return _QUANTIFIER.match("".join(items[index + 1 :])) is not None


def _group(item: str, left: bool, right: bool) -> str:
    opening = re.match(r"\((?:\?(?::|P?<[^>]*>))?", item)
    assert opening is not None
    return f"(?:{_whole(item[opening.end() : -1], left=left, right=right)})"


def _has_anchor(group: str) -> bool:
    return any(item in ("^", "$") for item in _ITEM.findall(group))
