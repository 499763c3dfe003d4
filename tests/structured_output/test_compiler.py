"""Compiling on demand: cached, in a process of its own, and never longer than it may take."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from grammars import CONTROLS, TAGS

from glmd.chat.types import Tool
from glmd.errors import InvalidRequest
from glmd.ipc import GrammarSpec
from glmd.structured_output import (
    GrammarCompiler,
    JsonSchema,
    OutputSpec,
    Regex,
    ToolRule,
    make_structure,
)

SLOW = {"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]}
"""Within all limits but that of time: minutes."""


def run(task: Callable[[GrammarCompiler], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        compiler = GrammarCompiler(CONTROLS, **options)
        try:
            await task(compiler)
        finally:
            await compiler.close()

    asyncio.run(main())


def json_schema(schema: Any) -> OutputSpec:
    return OutputSpec(JsonSchema(schema, "guided_json"))


def test_a_grammar_is_compiled_once_for_all_who_ask() -> None:
    async def task(compiler: GrammarCompiler) -> None:
        async def compile(name: str, *, in_reasoning: bool) -> GrammarSpec:
            structure = json_schema({"type": "object", "properties": {name: {}}})
            found = await compiler.compile(structure, in_reasoning=in_reasoning)
            assert found is not None
            return found

        first, second, other = await asyncio.gather(
            compile("a", in_reasoning=False),
            compile("a", in_reasoning=True),
            compile("b", in_reasoning=False),
        )
        third = await compile("a", in_reasoning=False)
        assert first.grammar is second.grammar is third.grammar
        assert other.grammar != first.grammar
        assert first.after == ()
        assert second.after == (TAGS.end_think,)
        assert second.required

    run(task)


def test_where_anything_goes_there_is_no_grammar() -> None:
    async def task(compiler: GrammarCompiler) -> None:
        loose = Tool("f", {}, {"type": "function", "function": {"name": "f"}})
        for structure in (OutputSpec(), make_structure(None, [loose]), make_structure(None, [])):
            assert await compiler.compile(structure, in_reasoning=True) is None

    run(task)


def test_calls_of_strict_tools_are_guided_from_where_they_begin() -> None:
    async def task(compiler: GrammarCompiler) -> None:
        strict = Tool("f", {}, {"type": "function", "function": {"name": "f"}}, strict=True)
        found = await compiler.compile(make_structure(None, [strict]), in_reasoning=True)
        assert found is not None
        assert found.after == (TAGS.tool_call,)
        assert not found.required

    run(task)


def test_what_takes_too_long_is_refused_and_harms_nobody_else() -> None:
    async def task(compiler: GrammarCompiler) -> None:
        async def refused() -> str:
            with pytest.raises(InvalidRequest) as caught:
                await compiler.compile(json_schema(SLOW), in_reasoning=False)
            assert caught.value.param == "guided_json"
            return caught.value.message

        slow = asyncio.create_task(refused())
        await asyncio.sleep(0)
        quick = await compiler.compile(json_schema({"type": "null"}), in_reasoning=False)
        assert quick is not None
        assert await slow == "guided_json takes more than 0.5 s to compile."
        began = asyncio.get_running_loop().time()
        await refused()
        assert asyncio.get_running_loop().time() - began < 0.5, "the refusal was not remembered"

    run(task, max_seconds=0.5)


def test_a_worker_that_died_is_replaced() -> None:
    async def task(compiler: GrammarCompiler) -> None:
        await compiler.compile(json_schema({"type": "null"}), in_reasoning=False)
        worker = compiler._worker
        assert worker is not None
        worker.kill()
        await worker.wait()
        assert await compiler.compile(json_schema({"type": "string"}), in_reasoning=False)

    run(task)


def test_a_structure_that_kills_the_worker_is_refused_and_the_next_one_is_not() -> None:
    async def task(compiler: GrammarCompiler) -> None:
        await compiler.compile(json_schema({"type": "null"}), in_reasoning=False)
        worker = compiler._worker
        assert worker is not None
        deadly = asyncio.create_task(compiler.compile(json_schema(SLOW), in_reasoning=False))
        while not compiler._turn.locked():
            await asyncio.sleep(0)
        worker.kill()
        with pytest.raises(InvalidRequest, match="more than the grammar compiler can take"):
            await deadly
        assert await compiler.compile(json_schema({"type": "string"}), in_reasoning=False)

    run(task, max_seconds=60)


def test_a_client_that_leaves_does_not_take_the_grammar_from_another() -> None:
    async def task(compiler: GrammarCompiler) -> None:
        structure = json_schema({"type": "boolean"})
        leaving = asyncio.create_task(compiler.compile(structure, in_reasoning=False))
        staying = asyncio.create_task(compiler.compile(structure, in_reasoning=False))
        await asyncio.sleep(0)
        leaving.cancel()
        assert await staying is not None

    run(task)


@pytest.mark.parametrize(
    ("structure", "param", "words"),
    [
        (json_schema({"not": {}}), "guided_json.not", "cannot be enforced"),
        (json_schema({"x": "\ud800"}), "guided_json", "surrogate"),
        (json_schema({"x": "y" * (2 << 20)}), "guided_json", "larger than 1 MiB"),
        (
            json_schema({"allOf": [{"type": "null"}, {"type": "string"}]}),
            "guided_json",
            "incompatible",
        ),
        (OutputSpec(Regex("(?=a)b", "guided_regex")), "guided_regex", "look-around"),
        (
            OutputSpec(
                calls="required",
                tools=(
                    ToolRule("a", {}, "tools[0]", strict=True, enforced=True),
                    ToolRule("b", {"not": {}}, "tools[1]", strict=True, enforced=True),
                ),
            ),
            "tools[1].not",
            "cannot be enforced",
        ),
    ],
)
def test_refusals_name_the_field(structure: OutputSpec, param: str, words: str) -> None:
    async def task(compiler: GrammarCompiler) -> None:
        with pytest.raises(InvalidRequest, match=words) as caught:
            await compiler.compile(structure, in_reasoning=False)
        assert caught.value.param == param

    run(task)
