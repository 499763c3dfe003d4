"""From what an answer has to be to the text of a grammar."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from glmd.chat.special_tokens import SpecialTokens
from glmd.errors import InvalidRequest
from glmd.structured_output.json_schema import JsonSchemaCompiler
from glmd.structured_output.spec import (
    AnswerFormat,
    Choice,
    Grammar,
    JsonObject,
    JsonSchema,
    OutputSpec,
    Regex,
)
from glmd.structured_output.string_terminals import quote
from glmd.structured_output.tool_grammar import CallGrammar

_LEXEME_OPTION = re.compile(r"\[[^\]\n]*\b(max_tokens|temperature|stop)\s*=")


@dataclass(frozen=True)
class Built:
    """A grammar in llguidance's form.

    Attributes:
        relaxed: keywords of schemas that it does not enforce.
    """

    text: str
    relaxed: tuple[str, ...]


def build(structure: OutputSpec, tags: SpecialTokens) -> Built:
    """The grammar of an answer.

    It begins at the first token of the content, or, with `calls` "free", behind the first
    `<tool_call>`. Whether llguidance takes it is not known yet.

    Raises:
        InvalidRequest: names the field or keyword that is malformed or cannot be enforced.
    """
    parts: list[dict[str, object]] = []
    relaxed: list[str] = []
    rules: list[str] = []
    starts: list[str] = []
    if structure.format is not None:
        answer, notes = _answer(structure.format)
        starts.append("@answer")
        parts.append({"name": "answer", **answer})
        relaxed += notes
    if structure.calls != "none":
        calls = CallGrammar(tags)
        rules = calls.rules(
            structure.tools, parallel=structure.parallel, begun=structure.calls == "free"
        )
        starts.append("calls")
        relaxed += calls.relaxed
    lark = "\n".join([f"start: {' | '.join(starts)}", *rules])
    return Built(json.dumps({"grammars": [{"lark_grammar": lark}, *parts]}), tuple(relaxed))


def _answer(form: AnswerFormat) -> tuple[dict[str, object], list[str]]:
    """A grammar of the content, and the keywords that it does not enforce."""
    match form:
        case JsonObject():
            normaliser = JsonSchemaCompiler({}, strict=True)
            return {"json_schema": normaliser.document({"type": "object"})}, []
        case JsonSchema():
            normaliser = JsonSchemaCompiler(form.schema, strict=form.strict)
            node = normaliser.normalise(form.schema, form.param)
            document = normaliser.document(node, whitespace=form.whitespace)
            return {"json_schema": document}, normaliser.relaxed
        case Regex():
            return {"lark_grammar": f"start: TEXT\nTEXT: /{regex_to_lark(form.pattern, '')}/"}, []
        case Choice():
            options = " | ".join(map(quote, form.options))
            return {"lark_grammar": f"start: TEXT\nTEXT: {options}"}, []
        case Grammar():
            return {"lark_grammar": _lark(form)}, []


def _lark(grammar: Grammar) -> str:
    option = _LEXEME_OPTION.search(grammar.text)
    if option is not None:
        raise InvalidRequest(
            f"{grammar.param} uses {option[1]}=, which only makes sense where text is generated "
            "token by token without drafts.",
            param=grammar.param,
        )
    try:
        return any_to_lark(grammar.text)
    except Exception as error:  # the converter raises bare Exception
        raise InvalidRequest(f"{grammar.param}: {error}", param=grammar.param) from error
