"""Masks for the rows of a step: behind each sequence's last token, and behind its drafts."""

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
from glmd.structured_output import Choice, Grammar, JsonSchema, Regex
from glmd.structured_output.backend import GrammarError
from glmd.structured_output.compiler import build_grammar
from glmd.structured_output.spec import AnswerFormat, OutputSpec

VOCABULARY = 512
END_THINK, CALL = CONTROLS["</think>"], CONTROLS["<tool_call>"]
TEXT = set(range(255))
"""Single bytes. (255, which is in no UTF-8, marks control tokens inside of llguidance.)"""


@pytest.fixture(scope="module")
def constraints(tmp_path_factory: pytest.TempPathFactory) -> StructuredOutputManager:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(folder)
    return StructuredOutputManager(folder, VOCABULARY, END_IDS)


def start(
    constraints: StructuredOutputManager,
    form: AnswerFormat,
    *,
    after: tuple[int, ...] = (),
    required: bool = True,
) -> GrammarState:
    guidance = GrammarSpec(
        grammar=build_grammar(OutputSpec(form), TAGS).text, after=after, required=required
    )
    return constraints.start(guidance, constraints.prepare(guidance).result())


def masks(constraints: StructuredOutputManager, *asks: MaskRequest) -> dict[int, set[int]]:
    """Allowed tokens by row."""
    rows, words = constraints.masks(asks)
    assert words.shape == (len(rows), VOCABULARY // 32)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    return {row: set(np.flatnonzero(mask).tolist()) for row, mask in zip(rows, bits, strict=True)}


def letters(text: str) -> set[int]:
    return set(text.encode())


def test_each_row_is_masked_by_what_came_before_it(constraints: StructuredOutputManager) -> None:
    first, second = (start(constraints, Regex(r"a[bc]{2}", "p")) for _ in range(2))
    second.accept(ord("a"))
    found = masks(constraints, MaskRequest(first), MaskRequest(second))
    assert found == {0: letters("a"), 1: letters("bc")}
    second.accept(ord("b"))
    second.accept(ord("c"))
    assert masks(constraints, MaskRequest(second)) == {0: set(END_IDS)}
    second.accept(END_IDS[1])
    assert second.error is None


def test_masks_behind_drafts_follow_them_and_leave_no_trace(
    constraints: StructuredOutputManager,
) -> None:
    constraint = start(constraints, Regex("a[bc]d", "p"))
    ask = MaskRequest(constraint, list(b"abd"))
    found = masks(constraints, ask)
    assert found == {0: letters("a"), 1: letters("bc"), 2: letters("d"), 3: set(END_IDS)}
    assert masks(constraints, ask) == found
    constraint.accept(ord("a"))
    assert masks(constraints, MaskRequest(constraint))[0] == letters("bc")


def test_nothing_is_masked_behind_a_draft_that_the_grammar_refuses(
    constraints: StructuredOutputManager,
) -> None:
    constraint = start(constraints, Regex("a[bc]d", "p"))
    other = start(constraints, Regex("x", "p"))
    found = masks(constraints, MaskRequest(constraint, list(b"axd")), MaskRequest(other))
    assert found == {0: letters("a"), 1: letters("bc"), 4: letters("x")}
    assert constraint.error is None


def test_nothing_is_masked_behind_the_end(constraints: StructuredOutputManager) -> None:
    constraint = start(constraints, Regex("a", "p"))
    drafts = [ord("a"), END_IDS[0], ord("a")]
    assert masks(constraints, MaskRequest(constraint, drafts)) == {0: letters("a"), 1: set(END_IDS)}
    assert masks(constraints, MaskRequest(constraint)) == {0: letters("a")}


def test_before_a_required_grammar_only_text_may_come_or_what_begins_it(
    constraints: StructuredOutputManager,
) -> None:
    constraint = start(constraints, Regex("a", "p"), after=(END_THINK,))
    waiting = TEXT | {END_THINK}
    drafts = [ord("x"), END_THINK, ord("a")]
    found = masks(constraints, MaskRequest(constraint, drafts))
    assert found == {0: waiting, 1: waiting, 2: letters("a"), 3: set(END_IDS)}
    assert not constraint.active
    constraint.accept(ord("x"))
    assert not constraint.active
    constraint.accept(END_THINK)
    assert masks(constraints, MaskRequest(constraint)) == {0: letters("a")}


def test_before_a_grammar_that_may_begin_rows_pay_nothing(
    constraints: StructuredOutputManager,
) -> None:
    constraint = start(constraints, Regex("a", "p"), after=(CALL,), required=False)
    assert masks(constraints, MaskRequest(constraint)) == {}
    assert masks(constraints, MaskRequest(constraint, [CALL])) == {1: letters("a")}
    constraint.accept(CALL)
    assert masks(constraints, MaskRequest(constraint)) == {0: letters("a")}


def test_bans_hold_unless_the_grammar_leaves_nothing_else(
    constraints: StructuredOutputManager,
) -> None:
    constraint = start(constraints, Regex("a?", "p"))
    ban = tuple(END_IDS)
    assert masks(constraints, MaskRequest(constraint, banned=ban)) == {0: letters("a")}
    constraint.accept(ord("a"))
    assert masks(constraints, MaskRequest(constraint, banned=ban)) == {0: set(END_IDS)}


def test_no_grammar_text_reaches_a_control_token_nor_an_id_that_pads_the_vocabulary(
    constraints: StructuredOutputManager,
) -> None:
    constraint = start(constraints, Regex("(?s:.*)", "p"))
    found = masks(constraints, MaskRequest(constraint))[0]
    assert found <= TEXT | set(END_IDS)


def test_text_that_spells_a_control_token_stays_text_even_where_nothing_else_may_come(
    constraints: StructuredOutputManager,
) -> None:
    for name in CONTROLS:
        constraint = start(constraints, Choice((name,), "p"))
        for byte in name.encode():
            assert masks(constraints, MaskRequest(constraint)) == {0: {byte}}
            constraint.accept(byte)
        assert constraint.error is None


def test_masks_are_those_of_the_grammar_alone(constraints: StructuredOutputManager) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", 1]}}, "required": ["a"]}
    form = JsonSchema(schema, "p")
    constraint, matcher = start(constraints, form), matcher_of(form)
    for token in b'{"a": "x"}':
        found = masks(constraints, MaskRequest(constraint))[0]
        assert found <= set(allowed(matcher).tolist())
        assert token in found or not found & TEXT
        constraint.accept(token)
        matcher.consume_token(token)
    assert constraint.error is None


def test_one_sequence_does_not_move_another_of_the_same_grammar(
    constraints: StructuredOutputManager,
) -> None:
    one, other = (start(constraints, Regex("ab", "p")) for _ in range(2))
    one.accept(ord("a"))
    assert masks(constraints, MaskRequest(one), MaskRequest(other)) == {
        0: letters("b"),
        1: letters("a"),
    }


def test_a_token_against_the_grammar_is_noted_as_its_end(
    constraints: StructuredOutputManager,
) -> None:
    constraint = start(constraints, Regex("ab", "p"))
    constraint.accept(ord("x"))
    assert constraint.error is not None
    assert "doesn't satisfy the grammar" in constraint.error


def test_a_grammar_that_outgrows_its_limits_is_noted(constraints: StructuredOutputManager) -> None:
    names = [f"r{i}" for i in range(5000)]
    start_rule = f'start: "a" {" ".join(f"{name}?" for name in names)}'
    rules = [f'{name}: "x"' for name in names]
    constraint = start(constraints, Grammar("\n".join([start_rule, *rules]), "p"))
    constraint.accept(ord("a"))
    constraints.masks([MaskRequest(constraint)])
    assert constraint.error is not None
    assert "items; max is" in constraint.error


def test_a_wrong_grammar_fails_on_its_own(constraints: StructuredOutputManager) -> None:
    wrong = GrammarSpec(grammar=json.dumps({"grammars": [{"lark_grammar": "start: nope"}]}))
    with pytest.raises(GrammarError, match="nope"):
        constraints.prepare(wrong).result()


def test_without_a_tokenizer_grammars_fail_and_nothing_else(tmp_path: Path) -> None:
    constraints = StructuredOutputManager(tmp_path, VOCABULARY, END_IDS)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        constraints.prepare(GrammarSpec(grammar="start: X")).result()


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
    found = sample(given, rows(3), mx.zeros(3, mx.int32), mask).tokens.tolist()
    for row in range(3):
        ids = sorted(choices[row]) if row in masked else range(vocabulary)
        assert found[row] == max(ids, key=lambda id: logits[row, id])
    assert np.array_equal(np.array(given), logits), "the model's own logits were changed"


def test_bias_is_added_before_the_mask_and_bans_are_left_to_it() -> None:
    logits = mx.zeros((2, 64))
    bias = mx.array(np.eye(64, dtype=np.float32)[3] * 5 + np.eye(64, dtype=np.float32)[9] * 9)
    both = rows(2, bias=bias, min_tokens=4, banned_at_first=(3, 9))
    mask = TokenMasks([0], words({3, 4}, vocabulary=64))
    tokens = sample(logits, both, mx.zeros(2, mx.int32), mask).tokens.tolist()
    assert tokens[0] == 3
    assert tokens[1] not in (3, 9)
