"""GrammarCompiler: cached, in a worker process, and limited in time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from grammars import CONTROLS, TAGS

from glmd.chat.types import Tool
from glmd.errors import InvalidRequest
from glmd.ipc import GrammarSpec
from glmd.structured_output.compiler import GrammarCompiler
from glmd.structured_output.request import (
    Grammar,
    JsonSchema,
    OutputSpec,
    Regex,
    ToolRule,
    make_structure,
)
from glmd.utils.worker import Worker, WorkerError

pytestmark = pytest.mark.e2e

SLOW = {"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]}
"""Within all limits but that of time: takes minutes."""

CHAIN = "start: r0\n" + "".join(f'r{i}: r{i + 1} "a"\n' for i in range(20_000)) + 'r20000: "b"'
"""Overflows llguidance's stack and ends the process."""


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


def test_a_grammar_is_compiled_once_for_concurrent_and_later_requests() -> None:
    async def task(compiler: GrammarCompiler) -> None:
        async def compile(name: str, *, in_reasoning: bool) -> GrammarSpec:
            spec = json_schema({"type": "object", "properties": {name: {}}})
            found = await compiler.compile(spec, in_reasoning=in_reasoning)
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


def test_an_unconstrained_answer_has_no_grammar() -> None:
    async def task(compiler: GrammarCompiler) -> None:
        loose = Tool("f", {}, {"type": "function", "function": {"name": "f"}})
        for spec in (OutputSpec(), make_structure(None, [loose]), make_structure(None, [])):
            assert await compiler.compile(spec, in_reasoning=True) is None

    run(task)


def test_the_grammar_of_free_calls_starts_after_the_first_tool_call_tag() -> None:
    async def task(compiler: GrammarCompiler) -> None:
        strict = Tool("f", {}, {"type": "function", "function": {"name": "f"}}, strict=True)
        found = await compiler.compile(make_structure(None, [strict]), in_reasoning=True)
        assert found is not None
        assert found.after == (TAGS.tool_call,)
        assert not found.required

    run(task)


def test_a_grammar_over_the_time_limit_is_refused_and_others_compile() -> None:
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

    run(task, max_seconds=0.5)


def test_a_refusal_for_time_is_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause of the machine refuses one request, not the tools of an agent until a restart."""

    async def task(compiler: GrammarCompiler) -> None:
        spec = json_schema({"type": "null"})
        with monkeypatch.context() as patch:
            patch.setattr(Worker, "ask", fail)
            with pytest.raises(InvalidRequest, match="takes more than"):
                await compiler.compile(spec, in_reasoning=False)
        assert await compiler.compile(spec, in_reasoning=False) is not None

    def fail(*_: Any, **__: Any) -> bytes:
        raise WorkerError("time")

    run(task)


def test_a_grammar_that_crashes_the_worker_is_refused_and_others_compile() -> None:
    async def task(compiler: GrammarCompiler) -> None:
        crashing = OutputSpec(Grammar(CHAIN, "guided_grammar"))
        with pytest.raises(InvalidRequest, match="more than the grammar compiler can take"):
            await compiler.compile(crashing, in_reasoning=False)
        assert await compiler.compile(json_schema({"type": "string"}), in_reasoning=False)

    run(task, max_seconds=60)


def test_a_client_that_disconnects_does_not_cancel_the_grammar_of_another() -> None:
    async def task(compiler: GrammarCompiler) -> None:
        spec = json_schema({"type": "boolean"})
        leaving = asyncio.create_task(compiler.compile(spec, in_reasoning=False))
        staying = asyncio.create_task(compiler.compile(spec, in_reasoning=False))
        await asyncio.sleep(0)
        leaving.cancel()
        assert await staying is not None

    run(task)


@pytest.mark.parametrize(
    ("spec", "param", "words"),
    [
        (json_schema({"not": {}}), "guided_json.not", "cannot be enforced"),
        (json_schema({"x": "\ud800"}), "guided_json", "surrogate"),
        (json_schema({"const": float("nan")}), "guided_json", "NaN"),
        (json_schema({"const": 10**30}), "guided_json.const", "doubles cannot hold"),
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
def test_refusals_name_the_field(spec: OutputSpec, param: str, words: str) -> None:
    async def task(compiler: GrammarCompiler) -> None:
        with pytest.raises(InvalidRequest, match=words) as caught:
            await compiler.compile(spec, in_reasoning=False)
        assert caught.value.param == param

    run(task)
