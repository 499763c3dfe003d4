"""Raw strings, as tool calls carry them: which ones a schema allows, as terminals of a grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from llguidance import LLMatcher, LLTokenizer, regex_to_lark

from glmd.chat.tool_args import ArgType, type_of
from glmd.structured_output.backend import byte_tokenizer, make_matcher

Node = dict[str, Any]

MAX_ALTERNATIVES = 64
"""Of one argument, all its `anyOf`s and `allOf`s multiplied out."""

_MAX_STEPS = 32

ANY_TEXT = "/(?s:.*)/"

_SPACE = r"[ \t\r\n]*"
_JSON_OF = {
    "null": "null",
    "boolean": "true|false",
    "integer": r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?",
    "number": r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?",
    "array": r"\[(?s:.*)",
    "object": r"\{(?s:.*)",
}
"""Text that is JSON of a type, or may be where that takes more than a regular expression."""


class UnknownText(Exception):
    """The strings of a schema cannot be described by terminals."""


@dataclass(frozen=True)
class Text:
    """Strings that fulfil all of this."""

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
        """The body of a terminal: these strings, as far as they are read as strings again.

        Args:
            kind: what the reader of calls takes the argument for.

        Returns:
            None if there are none.

        Raises:
            UnknownText: a pattern cannot be matched as a whole.
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
            parts = parts or [ANY_TEXT]  # a negation alone would match what is no UTF-8
            parts += [f"~/{_SPACE}(?:{other}){_SPACE}/" for other in _others(kind)]
        body = " & ".join(parts)
        return None if len(parts) > 1 and _is_empty(body) else body


@lru_cache(maxsize=1024)
def _is_empty(body: str) -> bool:
    """Whether a terminal matches no text at all, which llguidance finds out by the way only."""
    grammar = LLMatcher.grammar_from_lark(f"start: TEXT\nTEXT: {body}")
    matcher = make_matcher(_single_bytes(), grammar)
    matcher.compute_bitmask()
    return matcher.is_error()


@cache
def _single_bytes() -> LLTokenizer:
    return byte_tokenizer({"<end>": 256}, [256])


def quote(text: str) -> str:
    """A literal of the grammar language."""
    return json.dumps(text, ensure_ascii=False)


def texts(node: Node | bool, definitions: Mapping[str, Node]) -> list[Text]:
    """The strings that are valid under a schema: those of any of the returned alternatives.

    Args:
        node: in normal form; `definitions` are what its references point to.

    Raises:
        UnknownText: there are too many alternatives.
    """
    return _texts(node, definitions, 0)


def _texts(node: Node | bool, definitions: Mapping[str, Node], step: int) -> list[Text]:
    if step > _MAX_STEPS:
        raise UnknownText
    if isinstance(node, bool):
        return [Text()] if node else []
    kind = node.get("type", "string")
    if "string" not in ([kind] if isinstance(kind, str) else kind):
        return []
    values = None
    if "enum" in node:
        values = tuple(value for value in node["enum"] if isinstance(value, str))
    patterns = (node["pattern"],) if "pattern" in node else ()
    found = [Text(patterns, node.get("minLength", 0), node.get("maxLength"), values)]
    if "$ref" in node:
        target = definitions[node["$ref"].rpartition("/")[2]]
        found = _meet(found, _texts(target, definitions, step + 1))
    for branch in node.get("allOf", ()):
        found = _meet(found, _texts(branch, definitions, step + 1))
    if "anyOf" in node:
        either = [one for each in node["anyOf"] for one in _texts(each, definitions, step + 1)]
        found = _meet(found, either)
    return found


def _meet(some: Iterable[Text], others: list[Text]) -> list[Text]:
    found = list(dict.fromkeys(one & other for one in some for other in others))
    if len(found) > MAX_ALTERNATIVES:
        raise UnknownText
    return [one for one in found if one.values is None or one.values]


def _others(kind: ArgType) -> list[str]:
    """Regular expressions of the texts that the reader of calls takes for something else."""
    if kind.only_string:
        return []
    names = kind.types | {type_of(value) for value in kind.values}
    found = list(dict.fromkeys(_JSON_OF[name] for name in sorted(names) if name in _JSON_OF))
    return [*found, '"(?s:.*)'] if kind.free else found


# -- patterns -----------------------------------------------------------------------------

_ITEM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
"""An escape, a class, or one character."""
_QUANTIFIER = re.compile(r"[*+?]|\{[0-9]+(?:,[0-9]*)?\}")
_REST = "(?s:.*)"


def whole(pattern: str) -> str:
    """A regular expression that matches the texts in which `pattern` is found.

    Anchors may stand where a text begins or ends, also in groups: `^a|b$`, `(^a|b)c`.

    Raises:
        UnknownText: there are others.
    """
    return _whole(pattern, left=True, right=True)


def _whole(pattern: str, *, left: bool, right: bool) -> str:
    """As `whole`, but anchors and free text only at the given ends."""
    return "|".join(_whole_branch(items, left, right) for items in _branches(pattern))


def _branches(pattern: str) -> list[list[str]]:
    """The alternatives of a pattern, each a list of items; a group is one item."""
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
