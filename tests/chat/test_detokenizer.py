"""Incremental detokenization, and stop strings across token boundaries."""

from __future__ import annotations

from chat_kit import answer, any_ids, ids, text_ids, texts, tokenizer, tool
from hypothesis import given
from hypothesis import strategies as st

from glmd.chat.detokenizer import Detokenizer, StopStrings


@given(any_ids)
def test_decoding_token_by_token_gives_the_text_of_all_at_once(ids: list[int]) -> None:
    detokenizer = Detokenizer()
    pieces = [detokenizer.feed(tokenizer().token_bytes(id)) for id in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer().decode(ids)


@given(texts)
def test_a_character_split_over_tokens_is_returned_whole(text: str) -> None:
    detokenizer = Detokenizer()
    pieces = [detokenizer.feed(bytes([byte])) for byte in text.encode()]
    assert "".join(pieces) == text
    assert not detokenizer.flush()


def test_invalid_bytes_become_replacement_characters() -> None:
    detokenizer = Detokenizer()
    assert detokenizer.feed(b"a\xffb\xe4\xbd") + detokenizer.flush() == "a\ufffdb\ufffd"
    assert detokenizer.feed(b"c") == "c"


# Stop strings

few = st.text("ab", min_size=1, max_size=5)
stops = st.lists(few, min_size=1, max_size=4)


def first_match(text: str, strings: list[str]) -> tuple[str, str | None]:
    """By definition: the shortest prefix of `text` that ends in a stop string."""
    for end in range(len(text) + 1):
        found = [string for string in strings if text[:end].endswith(string)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(stops, st.text("abc", max_size=40), st.lists(st.integers(1, 5)))
def test_text_ends_before_the_first_stop_string_however_it_is_split(
    strings: list[str], text: str, cuts: list[int]
) -> None:
    stop = StopStrings(strings)
    shown, rest = "", text
    for cut in [*cuts, len(text)]:
        shown += stop.feed(rest[:cut])
        rest = rest[cut:]
    assert (shown + stop.flush(), stop.matched) == first_match(text, strings)


@given(stops, st.text("ab", max_size=30))
def test_only_what_may_become_a_stop_string_is_withheld(strings: list[str], text: str) -> None:
    stop = StopStrings(strings)
    shown = ""
    for count, character in enumerate(text, start=1):
        shown += stop.feed(character)
        if stop.matched:
            return
        held = text[len(shown) : count]
        assert text[:count] == shown + held
        endings = [text[start:count] for start in range(count + 1)]
        longest = next(end for end in endings if any(one.startswith(end) for one in strings))
        assert held == longest


@given(st.lists(texts.filter(bool), min_size=1, max_size=3), texts, texts)
def test_no_part_of_a_matched_stop_string_is_streamed(
    strings: list[str], before: str, after: str
) -> None:
    text = before + strings[0] + after
    whole = answer(text_ids(text), stop=strings)
    assert whole.content == first_match(text, strings)[0]
    assert whole.finish == "stop"
    assert whole.stop_sequence == first_match(text, strings)[1]


def test_a_stop_string_ends_the_answer_and_is_reported() -> None:
    cut = answer("One. Two. STOP Three.", stop=["STOP", "END"])
    assert (cut.content, cut.finish, cut.stop_sequence) == ("One. Two. ", "stop", "STOP")


def test_an_incomplete_stop_string_is_shown_at_the_end() -> None:
    assert answer("One ST", stop=["STOP"]).content == "One ST"


def test_stop_strings_do_not_apply_to_reasoning_and_arguments() -> None:
    weather = tool("get", city={"type": "string"})
    whole = answer(
        "a STOP b</think>c<tool_call>get<arg_key>city</arg_key><arg_value>x STOP y</arg_value>"
        "</tool_call>",
        tools=[weather],
        stop=["STOP"],
        in_reasoning=True,
    )
    assert whole.reasoning == "a STOP b"
    assert whole.content == "c"
    assert whole.objects == [("get", {"city": "x STOP y"})]
    assert whole.finish == "tool_calls"


def test_a_stop_string_does_not_reach_across_a_call() -> None:
    text = "ST<tool_call>get</tool_call>OP"
    assert answer(text, tools=[tool("get")], stop=["STOP"]).content == "STOP"


def test_outputs_after_the_stop_string_are_ignored() -> None:
    generated = ids("a STOP b</think>c<tool_call>get</tool_call>")
    for sizes in ([], [100]):
        cut = answer(generated, tools=[tool("get")], stop=["STOP"], sizes=sizes)
        assert (cut.content, cut.calls, cut.finish) == ("a ", [], "stop")
