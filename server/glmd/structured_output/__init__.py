"""Guaranteed structure: what an answer has to be, as a grammar for the engine.

`read` maps what clients write to an `OutputSpec`; `GrammarCompiler` turns that into the
`GrammarSpec` of a request to the engine. docs/structured-output.md says what is enforced.
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
