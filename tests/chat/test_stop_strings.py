"""Stop strings: found wherever tokens end, and nothing of them is ever shown."""

from __future__ import annotations

from chat_kit import answer, ids, text_ids, texts, tool
from hypothesis import given
from hypothesis import strategies as st

from glmd.chat.detokenizer import StopStrings

few = st.text("ab", min_size=1, max_size=5)
stops = st.lists(few, min_size=1, max_size=4)


def first_match(text: str, strings: list[str]) -> tuple[str, str | None]:
    """By definition: the shortest beginning of `text` that ends in a stop string."""
    for end in range(len(text) + 1):
        found = [string for string in strings if text[:end].endswith(string)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(stops, st.text("abc", max_size=40), st.lists(st.integers(1, 5)))
def test_text_is_cut_before_the_first_stop_string_however_it_arrives(
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
def test_no_piece_of_a_matched_stop_string_is_streamed(
    strings: list[str], before: str, after: str
) -> None:
    text = before + strings[0] + after
    whole = answer(text_ids(text), stop=strings)
    assert whole.content == first_match(text, strings)[0]
    assert whole.finish == "stop"
    assert whole.stop_sequence == first_match(text, strings)[1]


def test_a_stop_string_ends_the_answer_and_is_named() -> None:
    cut = answer("One. Two. STOP Three.", stop=["STOP", "END"])
    assert (cut.content, cut.finish, cut.stop_sequence) == ("One. Two. ", "stop", "STOP")


def test_a_stop_string_that_never_completes_is_shown_after_all() -> None:
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
