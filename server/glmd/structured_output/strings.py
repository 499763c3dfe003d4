"""What a schema says of strings: `pattern` and `format`."""

from __future__ import annotations

import json
import re
from functools import lru_cache

from llguidance import LLMatcher

from glmd.chat.tool_args import NAMED
from glmd.chat.types import Json
from glmd.structured_output.backend import LIMITS
from glmd.structured_output.formats import ENFORCED, UNSUPPORTED
from glmd.structured_output.schema_context import Node, SchemaContext, malformed, read_count


def read_pattern(reading: SchemaContext, keyword: str, value: Json) -> None:
    """`pattern`."""
    if not isinstance(value, str):
        raise malformed(reading.where(keyword), "a string")
    problem = pattern_problem(value)
    if problem:
        reading.relax(keyword, f": {problem}")
        return
    _add_pattern(reading, value)


def read_format(reading: SchemaContext, keyword: str, value: Json) -> None:
    """`format`: a pattern, where it is enforced; an annotation, where it is unknown."""
    if not isinstance(value, str):
        raise malformed(reading.where(keyword), "a string")
    if "string" not in (reading.types or NAMED):
        return
    if value in UNSUPPORTED:
        reading.relax(keyword, f" if it is {value}")
    if value not in ENFORCED:
        return
    found = ENFORCED[value]
    constraint: Node = {"pattern": f"^(?:{found.pattern})$"}
    if found.max_length is not None:
        constraint["maxLength"] = found.max_length
    if reading.types is not None and len(reading.types) == 1:
        _add_pattern(reading, constraint["pattern"])
        if found.max_length is not None:
            read_count(reading, "maxLength", found.max_length)
        return
    # Values of other types may come in any format.
    others = [name for name in NAMED if name != "string"]
    reading.also.append({"anyOf": [{"type": "string", **constraint}, {"type": others}]})


@lru_cache(maxsize=1024)
def pattern_problem(pattern: str) -> str:
    """Why a regular expression cannot be enforced, or ""."""
    schema = json.dumps({"type": "string", "pattern": pattern})
    grammar = LLMatcher.grammar_from_json_schema(schema)
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS)
    if not failed:
        return ""
    reason = messages[0].rpartition("\nerror: ")[2]  # behind a drawing of where it is wrong
    return re.sub(r"\s+", " ", reason).strip()[:200]


def _add_pattern(reading: SchemaContext, pattern: str) -> None:
    if "pattern" in reading.node:
        reading.also.append({"type": "string", "pattern": pattern})
    else:
        reading.node["pattern"] = pattern
