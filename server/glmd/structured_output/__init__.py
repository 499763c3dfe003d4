"""Structured output: constraints on answers, and their grammars.

`request` reads what clients write into an `OutputSpec`; `GrammarCompiler` compiles the spec to the
`GrammarSpec` of an engine request. docs/structured-output.md says what is enforced.
"""

from glmd.structured_output.compiler import GrammarCompiler
from glmd.structured_output.request import (
    GUIDED,
    make_structure,
    only_format,
    read_guided,
    read_response_format,
)
from glmd.structured_output.spec import (
    AnswerFormat,
    Choice,
    Grammar,
    JsonObject,
    JsonSchema,
    OutputSpec,
    Regex,
    ToolRule,
)

__all__ = [
    "GUIDED",
    "AnswerFormat",
    "Choice",
    "Grammar",
    "GrammarCompiler",
    "JsonObject",
    "JsonSchema",
    "OutputSpec",
    "Regex",
    "ToolRule",
    "make_structure",
    "only_format",
    "read_guided",
    "read_response_format",
]
