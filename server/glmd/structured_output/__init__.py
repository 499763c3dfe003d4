"""Guaranteed structure: what an answer has to be, as a grammar for the engine.

`read` maps what clients write to a `Structure`; `GrammarCompiler` turns that into the `Guidance`
that goes with a request to the engine. docs/structured-output.md says what is enforced.
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
    Regex,
    Structure,
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
    "Regex",
    "Structure",
    "ToolRule",
    "make_structure",
    "only_format",
    "read_guided",
    "read_response_format",
]
