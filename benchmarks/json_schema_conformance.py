"""Compare glmd's JSON-schema compiler with llguidance's own support on the official test suite.

    pip download --no-deps --no-binary jsonschema jsonschema==4.26.0   # carries the suite
    tar xzf jsonschema-4.26.0.tar.gz
    PYTHONPATH=server python benchmarks/json_schema_conformance.py jsonschema-4.26.0/json

Every schema is compiled by each compiler, every test instance is fed to the grammar in compact and
in spaced JSON, and 20 random answers are drawn from the grammar and validated by `jsonschema`.
A schema counts once, in the first class that applies:

- wrong: the grammar accepts an invalid instance, or a random answer is invalid.
- refused: an error, or an enforced `format` that the suite treats as an annotation.
- too strict: the grammar accepts no spelling of a valid instance.
- exact: all instances are judged as the suite judges them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "server"), str(ROOT / "tests" / "support")]

from grammars import TOKENIZER, accepts, answers, matcher_of  # noqa: E402
from jsonschema import Draft7Validator, Draft202012Validator  # noqa: E402
from jsonschema.exceptions import ValidationError  # noqa: E402
from llguidance import LLMatcher  # noqa: E402
from referencing.exceptions import Unresolvable  # noqa: E402
from schemas import SCHEMAS  # noqa: E402

from glmd.errors import InvalidRequest  # noqa: E402
from glmd.structured_output.backend import GrammarError, make_matcher  # noqa: E402
from glmd.structured_output.request import JsonSchema  # noqa: E402

DRAFTS = {"draft2020-12": Draft202012Validator, "draft7": Draft7Validator}
ANSWERS = 20
SURROGATE = re.compile("[\ud800-\udfff]")
CLASSES = ("exact", "too strict", "refused", "wrong")


EDGE_CASES: dict[str, tuple[Any, str]] = {
    "excluded minimum": ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "0"),
    "excluded maximum": ({"type": "number", "minimum": -0.5, "exclusiveMaximum": 0}, "-0"),
    "constant above 2^53": ({"const": 2**53 + 1}, str(2**53)),
    "bound above 2^53": ({"type": "integer", "minimum": 2**53 + 1}, str(2**53)),
    "duplicate name": ({"type": "object", "minProperties": 2}, '{"a":1,"a":2}'),
    "escaped name": (
        {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
        '{"\\u0061":"x"}',
    ),
    "declared name against propertyNames": (
        {"properties": {"A": {}}, "propertyNames": {"pattern": "^[a-z]$"}},
        '{"A":1}',
    ),
    "undeclared required name": (
        {"properties": {}, "required": ["z"], "unevaluatedProperties": False},
        '{"z":1}',
    ),
    "oneOf with an implied type": ({"oneOf": [{"minLength": 3}, {"type": "integer"}]}, "5"),
    "leap day": ({"type": "string", "format": "date"}, '"2023-02-29"'),
    "leap second": ({"type": "string", "format": "time"}, '"12:59:60Z"'),
}
"""Schemas with an invalid text, from bugs that the suite does not find."""


@dataclass(frozen=True)
class Case:
    """A schema with texts to judge.

    Attributes:
        source: the row of the table.
        instances: spellings of one value, and whether the value is valid.
    """

    source: str
    draft: str
    name: str
    schema: Any
    instances: list[tuple[list[str], bool]]


def suite_cases(folder: Path) -> Iterator[Case]:
    for draft in DRAFTS:
        root = folder / "tests" / draft
        for file in sorted([*root.glob("*.json"), *root.glob("optional/format/*.json")]):
            if file.name == "format.json":
                continue  # formats as annotations; optional/format has them as assertions
            for case in json.loads(file.read_bytes()):
                instances = [(spellings(test["data"]), test["valid"]) for test in case["tests"]]
                name = f"{file.relative_to(root).with_suffix('')}: {case['description']}"
                yield Case(draft, draft, name, case["schema"], instances)


def spellings(value: Any) -> list[str]:
    """Return a value as compact and spaced JSON, with and without escapes."""
    return [
        json.dumps(value, separators=separators, ensure_ascii=ascii_only)
        for separators in ((",", ":"), (", ", ": "))
        for ascii_only in (False, True)
    ]


def own_cases() -> Iterator[Case]:
    for name, schema in SCHEMAS.items():
        yield Case("glmd's tests", "draft2020-12", name, schema, [])
    for name, (schema, invalid) in EDGE_CASES.items():
        yield Case("edge cases", "draft2020-12", name, schema, [([invalid], False)])


def by_glmd(schema: Any) -> LLMatcher:
    return matcher_of(JsonSchema(schema, "schema"))


def by_llguidance(schema: Any) -> LLMatcher:
    return make_matcher(TOKENIZER, LLMatcher.grammar_from_json_schema(json.dumps(schema)))


def by_llguidance_lenient(schema: Any) -> LLMatcher:
    return make_matcher(
        TOKENIZER,
        LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"lenient": True}),
    )


COMPILERS: dict[str, Callable[[Any], LLMatcher]] = {
    "glmd": by_glmd,
    "llguidance": by_llguidance,
    "llguidance, lenient": by_llguidance_lenient,
}


def accepts_any(matcher: LLMatcher, texts: list[str]) -> bool:
    return any(accepts(matcher, text) for text in texts if not SURROGATE.search(text))


def judge(case: Case, compile_schema: Callable[[Any], LLMatcher]) -> tuple[str, str]:
    """The class of a case, and an example that shows why."""
    try:
        matcher = compile_schema(case.schema)
    except (InvalidRequest, GrammarError, ValueError) as error:
        return "refused", str(error).partition("\n")[0]
    accepted = [accepts_any(matcher, texts) for texts, _ in case.instances]
    for (texts, valid), found in zip(case.instances, accepted, strict=True):
        if found and not valid:
            return "wrong", f"accepts {texts[0][:100]}"
    validator = DRAFTS[case.draft](case.schema, format_checker=DRAFTS[case.draft].FORMAT_CHECKER)
    try:
        for text in answers(matcher, ANSWERS):
            validator.validate(json.loads(text))
    except ValidationError:
        return "wrong", f"generates {text[:100]}"
    except Unresolvable:
        pass  # a reference to a document that this script does not load
    except AssertionError as error:
        return "refused", f"when followed: {str(error).partition(chr(10))[0]}"
    for (texts, valid), found in zip(case.instances, accepted, strict=True):
        if valid and not found:
            return "too strict", f"rejects {texts[0][:100]}"
    return "exact", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("suite", type=Path, help="Folder that holds tests/draft2020-12.")
    parser.add_argument("--details", action="store_true", help="Print each case that is not exact.")
    options = parser.parse_args()
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for case in [*suite_cases(options.suite), *own_cases()]:
        for name, compile_schema in COMPILERS.items():
            verdict, example = judge(case, compile_schema)
            counts[case.source, name][verdict] += 1
            if options.details and verdict != "exact":
                schema = json.dumps(case.schema)[:160]
                print(f"{name} | {verdict} | {case.source}/{case.name} | {schema} | {example}")
    print(f"| schemas | compiler | {' | '.join(CLASSES)} |\n|---|---|{'---:|' * len(CLASSES)}")
    for (source, name), found in sorted(counts.items()):
        columns = " | ".join(str(found[each]) for each in CLASSES)
        print(f"| {source} ({found.total()}) | {name} | {columns} |")


if __name__ == "__main__":
    main()
