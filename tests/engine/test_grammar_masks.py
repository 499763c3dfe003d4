"""Grammar masks of rows: behind a sequence's last token, and behind its drafts."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from grammars import CONTROLS, END_IDS, TAGS, allowed, matcher_of

from glmd.bench.random_checkpoint import write_random_checkpoint
from glmd.engine.structured_output import GrammarState, MaskRequest, StructuredOutputManager
from glmd.errors import CheckpointError
from glmd.ipc import GrammarSpec, SamplingParams
from glmd.model.sampler import SamplingRow, SequenceSampling, TokenMasks, noise_key, sample
from glmd.structured_output.backend import GrammarError
from glmd.structured_output.compiler import build_grammar
from glmd.structured_output.request import (
    AnswerFormat,
    Choice,
    Grammar,
    JsonSchema,
    OutputSpec,
    Regex,
)

VOCABULARY = 512
END_THINK, CALL = CONTROLS["</think>"], CONTROLS["<tool_call>"]
TEXT = set(range(255))
"""Single bytes. llguidance marks control tokens with 255, which UTF-8 does not contain."""


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> StructuredOutputManager:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(folder)
    return StructuredOutputManager(folder, VOCABULARY, END_IDS)


def start(
    manager: StructuredOutputManager,
    form: AnswerFormat,
    *,
    after: tuple[int, ...] = (),
    required: bool = True,
) -> GrammarState:
    spec = GrammarSpec(
        grammar=build_grammar(OutputSpec(form), TAGS).text, after=after, required=required
    )
    return manager.start(spec, manager.prepare(spec).result())


def masks(manager: StructuredOutputManager, *requests: MaskRequest) -> dict[int, set[int]]:
    """Allowed tokens by row."""
    rows, words = manager.masks(requests)
    assert words.shape == (len(rows), VOCABULARY // 32)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    return {row: set(np.flatnonzero(mask).tolist()) for row, mask in zip(rows, bits, strict=True)}


def letters(text: str) -> set[int]:
    return set(text.encode())


def test_each_row_is_masked_by_what_came_before_it(manager: StructuredOutputManager) -> None:
    first, second = (start(manager, Regex(r"a[bc]{2}", "p")) for _ in range(2))
    second.accept(ord("a"))
    found = masks(manager, MaskRequest(first), MaskRequest(second))
    assert found == {0: letters("a"), 1: letters("bc")}
    second.accept(ord("b"))
    second.accept(ord("c"))
    assert masks(manager, MaskRequest(second)) == {0: set(END_IDS)}
    second.accept(END_IDS[1])
    assert second.error is None


def test_masks_behind_drafts_do_not_advance_the_state(
    manager: StructuredOutputManager,
) -> None:
    state = start(manager, Regex("a[bc]d", "p"))
    one = MaskRequest(state, list(b"abd"))
    found = masks(manager, one)
    assert found == {0: letters("a"), 1: letters("bc"), 2: letters("d"), 3: set(END_IDS)}
    assert masks(manager, one) == found
    state.accept(ord("a"))
    assert masks(manager, MaskRequest(state))[0] == letters("bc")


def test_rows_behind_a_refused_draft_have_no_mask(
    manager: StructuredOutputManager,
) -> None:
    state = start(manager, Regex("a[bc]d", "p"))
    other = start(manager, Regex("x", "p"))
    found = masks(manager, MaskRequest(state, list(b"axd")), MaskRequest(other))
    assert found == {0: letters("a"), 1: letters("bc"), 4: letters("x")}
    assert state.error is None


def test_rows_behind_the_end_have_no_mask(manager: StructuredOutputManager) -> None:
    state = start(manager, Regex("a", "p"))
    drafts = [ord("a"), END_IDS[0], ord("a")]
    assert masks(manager, MaskRequest(state, drafts)) == {0: letters("a"), 1: set(END_IDS)}
    assert masks(manager, MaskRequest(state)) == {0: letters("a")}


def test_before_a_required_grammar_only_text_and_its_start_are_allowed(
    manager: StructuredOutputManager,
) -> None:
    state = start(manager, Regex("a", "p"), after=(END_THINK,))
    waiting = TEXT | {END_THINK}
    drafts = [ord("x"), END_THINK, ord("a")]
    found = masks(manager, MaskRequest(state, drafts))
    assert found == {0: waiting, 1: waiting, 2: letters("a"), 3: set(END_IDS)}
    assert not state.active
    state.accept(ord("x"))
    assert not state.active
    state.accept(END_THINK)
    assert masks(manager, MaskRequest(state)) == {0: letters("a")}


def test_before_an_optional_grammar_rows_have_no_mask(
    manager: StructuredOutputManager,
) -> None:
    state = start(manager, Regex("a", "p"), after=(CALL,), required=False)
    assert masks(manager, MaskRequest(state)) == {}
    assert masks(manager, MaskRequest(state, [CALL])) == {1: letters("a")}
    state.accept(CALL)
    assert masks(manager, MaskRequest(state)) == {0: letters("a")}


def test_banned_tokens_are_masked_unless_nothing_else_is_allowed(
    manager: StructuredOutputManager,
) -> None:
    state = start(manager, Regex("a?", "p"))
    ban = tuple(END_IDS)
    assert masks(manager, MaskRequest(state, banned=ban)) == {0: letters("a")}
    state.accept(ord("a"))
    assert masks(manager, MaskRequest(state, banned=ban)) == {0: set(END_IDS)}


def test_text_allows_neither_control_tokens_nor_padding_ids(
    manager: StructuredOutputManager,
) -> None:
    state = start(manager, Regex("(?s:.*)", "p"))
    found = masks(manager, MaskRequest(state))[0]
    assert found <= TEXT | set(END_IDS)


def test_text_that_spells_a_control_token_is_generated_as_text(
    manager: StructuredOutputManager,
) -> None:
    for name in CONTROLS:
        state = start(manager, Choice((name,), "p"))
        for byte in name.encode():
            assert masks(manager, MaskRequest(state)) == {0: {byte}}
            state.accept(byte)
        assert state.error is None


def test_masks_are_those_of_the_grammar_alone(manager: StructuredOutputManager) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", 1]}}, "required": ["a"]}
    form = JsonSchema(schema, "p")
    state, matcher = start(manager, form), matcher_of(form)
    for token in b'{"a": "x"}':
        found = masks(manager, MaskRequest(state))[0]
        assert found <= set(allowed(matcher).tolist())
        assert token in found or not found & TEXT
        state.accept(token)
        matcher.consume_token(token)
    assert state.error is None


def test_sequences_of_the_same_grammar_are_independent(
    manager: StructuredOutputManager,
) -> None:
    one, other = (start(manager, Regex("ab", "p")) for _ in range(2))
    one.accept(ord("a"))
    assert masks(manager, MaskRequest(one), MaskRequest(other)) == {
        0: letters("b"),
        1: letters("a"),
    }


def test_a_token_against_the_grammar_sets_the_error(
    manager: StructuredOutputManager,
) -> None:
    state = start(manager, Regex("ab", "p"))
    state.accept(ord("x"))
    assert state.error is not None
    assert "doesn't satisfy the grammar" in state.error


def test_a_grammar_beyond_limits_sets_the_error(
    manager: StructuredOutputManager,
) -> None:
    names = [f"r{i}" for i in range(5000)]
    start_rule = f'start: "a" {" ".join(f"{name}?" for name in names)}'
    rules = [f'{name}: "x"' for name in names]
    state = start(manager, Grammar("\n".join([start_rule, *rules]), "p"))
    state.accept(ord("a"))
    manager.masks([MaskRequest(state)])
    assert state.error is not None
    assert "items; max is" in state.error


def test_an_invalid_grammar_fails(manager: StructuredOutputManager) -> None:
    wrong = GrammarSpec(grammar=json.dumps({"grammars": [{"lark_grammar": "start: nope"}]}))
    with pytest.raises(GrammarError, match="nope"):
        manager.prepare(wrong).result()


def test_without_a_tokenizer_grammars_fail(tmp_path: Path) -> None:
    manager = StructuredOutputManager(tmp_path, VOCABULARY, END_IDS)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        manager.prepare(GrammarSpec(grammar="start: X")).result()


# -- on logits ----------------------------------------------------------------------------


def rows(count: int, **sampling: object) -> list[SamplingRow]:
    spec = SequenceSampling(SamplingParams(temperature=0), noise_key(1, 0), **sampling)  # type: ignore[arg-type]
    return [SamplingRow(spec, 0, None) for _ in range(count)]


def words(*allowed: set[int], vocabulary: int) -> mx.array:
    bits = np.zeros((len(allowed), -(-vocabulary // 32) * 32), np.uint8)
    for row, ids in enumerate(allowed):
        bits[row, list(ids)] = 1
    return mx.array(np.packbits(bits, axis=1, bitorder="little").view(np.uint32))


@pytest.mark.parametrize("vocabulary", [64, 70, 33])
@pytest.mark.parametrize("masked", [[0, 2], [0, 1, 2], [1]])
def test_masked_rows_choose_the_best_allowed_token_others_the_best(
    vocabulary: int, masked: list[int]
) -> None:
    rng = np.random.default_rng(vocabulary)
    logits = rng.standard_normal((3, vocabulary)).astype(np.float32)
    choices = [{0, vocabulary - 1, 31, 32}, {5}, {7, 8, 9}]
    mask = TokenMasks(masked, words(*(choices[row] for row in masked), vocabulary=vocabulary))
    given = mx.array(logits)
    found = np.array(sample(given, rows(3), mx.zeros(3, mx.int32), mask).tokens)
    for row in range(3):
        ids = sorted(choices[row]) if row in masked else range(vocabulary)
        assert found[row] == max(ids, key=lambda id: logits[row, id])
    assert np.array_equal(np.array(given), logits), "the model's own logits were changed"


def test_masks_override_biases_and_bans() -> None:
    logits = mx.zeros((2, 64))
    bias = mx.array(np.eye(64, dtype=np.float32)[3] * 5 + np.eye(64, dtype=np.float32)[9] * 9)
    both = rows(2, bias=bias, min_tokens=4, banned_at_first=(3, 9))
    mask = TokenMasks([0], words({3, 4}, vocabulary=64))
    tokens = np.array(sample(logits, both, mx.zeros(2, mx.int32), mask).tokens)
    assert tokens[0] == 3
    assert tokens[1] not in (3, 9)
