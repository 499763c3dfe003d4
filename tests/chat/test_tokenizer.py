"""Tokens: text is text, tags are tags."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from chat_kit import SPELLINGS, backend, tag_like, texts, tokenizer
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import models

from glmd.chat.detokenizer import Detokenizer
from glmd.chat.tokenizer import Tokenizer
from glmd.errors import CheckpointError

PLAIN = backend()
any_ids = st.lists(st.integers(0, tokenizer().vocab_size - 1), max_size=40)


@given(tag_like)
def test_text_that_spells_tags_stays_text_and_comes_back_whole(text: str) -> None:
    ids = tokenizer().encode(text)
    assert set(ids).isdisjoint(tokenizer().spellings)
    assert tokenizer().decode(ids) == text


@given(texts)
def test_plain_text_has_the_ids_that_the_library_gives_it(text: str) -> None:
    assume(not any(name in text for name in SPELLINGS))
    assert tokenizer().encode(text) == PLAIN.encode(text, add_special_tokens=False).ids


@given(tag_like)
def test_markup_has_the_ids_that_the_library_gives_it(text: str) -> None:
    assert tokenizer().encode_markup(text).tolist() == PLAIN.encode(text).ids


def test_a_long_text_has_the_same_ids_when_it_comes_again() -> None:
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
def test_token_bytes_join_to_what_the_library_decodes(ids: list[int]) -> None:
    text = [id for id in ids if id not in tokenizer().spellings]
    assert tokenizer().decode(text) == PLAIN.decode(text, skip_special_tokens=False)


@given(any_ids)
def test_decoding_token_by_token_gives_the_text_of_all_at_once(ids: list[int]) -> None:
    detokenizer = Detokenizer()
    pieces = [detokenizer.feed(tokenizer().token_bytes(id)) for id in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer().decode(ids)


@given(texts)
def test_a_character_split_over_tokens_comes_out_whole(text: str) -> None:
    detokenizer = Detokenizer()
    pieces = [detokenizer.feed(bytes([byte])) for byte in text.encode()]
    assert "".join(pieces) == text
    assert not detokenizer.flush()


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    detokenizer = Detokenizer()
    assert detokenizer.feed(b"a\xffb\xe4\xbd") + detokenizer.flush() == "a\ufffdb\ufffd"
    assert detokenizer.feed(b"c") == "c"


def test_an_id_beyond_the_vocabulary_stands_for_nothing() -> None:
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


def test_a_tokenizer_without_a_needed_tag_is_refused_by_its_name(tmp_path: Path) -> None:
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
