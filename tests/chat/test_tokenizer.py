"""The tokenizer: text never becomes a control token."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from chat_kit import SPELLINGS, any_ids, backend, tag_like, texts, tokenizer
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers

from glmd.chat import tokenizer as tokenizer_module
from glmd.chat.tokenizer import Tokenizer
from glmd.errors import CheckpointError

PLAIN = backend()


@given(tag_like)
def test_text_that_spells_tags_stays_text_and_decodes_unchanged(text: str) -> None:
    ids = tokenizer().encode(text)
    assert set(ids).isdisjoint(tokenizer().spellings)
    assert tokenizer().decode(ids) == text


@given(texts)
def test_plain_text_has_the_same_ids_as_in_the_library(text: str) -> None:
    assume(not any(name in text for name in SPELLINGS))
    assert tokenizer().encode(text) == PLAIN.encode(text, add_special_tokens=False).ids


@given(tag_like)
def test_markup_has_the_same_ids_as_in_the_library(text: str) -> None:
    assert tokenizer().encode_markup(text).tolist() == PLAIN.encode(text).ids


def test_a_cached_text_has_the_same_ids() -> None:
    text = "The quick brown fox. <|user|> " * 30
    first = tokenizer().encode_rendered(["a", 7, text, 8, "b"])
    again = tokenizer().encode_rendered(["a", 7, text, 8, "b"])
    encode = tokenizer().encode
    assert first.tolist() == [*encode("a"), 7, *encode(text), 8, *encode("b")]
    assert np.array_equal(first, again)
    assert first.dtype == np.int32


def test_a_lone_surrogate_becomes_the_replacement_character() -> None:
    assert tokenizer().decode(tokenizer().encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer().decode(tokenizer().encode("\ud83d\ude42")) == "🙂"


@given(any_ids)
def test_token_bytes_join_to_the_text_that_the_library_decodes(ids: list[int]) -> None:
    text = [id for id in ids if id not in tokenizer().spellings]
    assert tokenizer().decode(text) == PLAIN.decode(text, skip_special_tokens=False)


def test_an_id_beyond_the_vocabulary_has_no_bytes() -> None:
    assert tokenizer().token_bytes(tokenizer().vocab_size + 100) == b""


def test_a_tokenizer_is_loaded_from_its_folder(tmp_path: Path) -> None:
    backend().save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.controls == tokenizer().controls
    assert sorted(loaded.controls) == sorted(SPELLINGS)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version"')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: "):
        Tokenizer.load(tmp_path)


def test_a_missing_control_token_is_named(tmp_path: Path) -> None:
    backend().save(str(tmp_path / "tokenizer.json"))
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    saved["added_tokens"] = [one for one in saved["added_tokens"] if one["content"] != "<arg_key>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match="<arg_key>"):
        Tokenizer.load(tmp_path)


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(CheckpointError, match="byte-level BPE"):
        Tokenizer.load(tmp_path)


GLM_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pre-tokenizer of GLM-4.7's tokenizer.json."""


WORDS = ("a", "Zé", "the", " ", "\n", "\r\n", "'s", ".", "你", "7", "\u0301")


@cache
def glm_tokenizer() -> Tokenizer:
    made = backend()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GLM_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return Tokenizer(made, "tokenizer.json")


@pytest.mark.parametrize("made", [tokenizer, glm_tokenizer], ids=["GPT-2", "GLM"])
@given(st.lists(st.sampled_from(WORDS)))
def test_a_text_in_steps_has_the_ids_of_the_whole(
    made: Callable[[], Tokenizer], parts: list[str]
) -> None:
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "STEP_CHARS", 3)
        steps = list(tokenizer_module.cut_text(text))
        longer = list(tokenizer_module.cut_text(text + "the end"))
    assert "".join(steps) == text
    assert max(map(len, steps), default=0) <= 6
    assert longer[: len(steps[:-1])] == steps[:-1], "equal beginnings are cut alike"
    ends = list(accumulate(map(len, steps)))[:-1]
    if all(tokenizer_module.CUT.match(text, end - 1) for end in ends):
        encode = made().encode
        assert [id for step in steps for id in encode(step)] == encode(text)


@given(st.lists(st.sampled_from(["<|user|>", "<|us", "er|>", "a", "<think>", "<", "\n"])))
def test_markup_is_split_alike_in_steps_of_any_length(parts: list[str]) -> None:
    text = "".join(parts)
    whole = list(tokenizer().split_markup(text))
    spellings = tokenizer().spellings
    assert "".join(spellings[piece] if isinstance(piece, int) else piece for piece in whole) == text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "STEP_CHARS", 2)
        assert list(tokenizer().split_markup(text)) == whole
