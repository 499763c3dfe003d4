"""Structured output: constraints on answers, and their grammars.

`request` reads what clients write into an `OutputSpec`; `GrammarCompiler` compiles the spec to the
`GrammarSpec` of an engine request. docs/structured-output.md says what is enforced.
"""
