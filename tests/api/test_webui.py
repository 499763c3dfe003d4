"""The web page at `/` in a browser: chat, status, accessibility, security policy."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from live import LiveServer, live_server
from page_kit import answers, opened, send
from paths import ROOT

from glmd.api import webui as pages
from glmd.api.client_settings import CLIENTS

expect = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed (make setup-clients)"
).expect


@pytest.fixture(scope="module")
def demo() -> Iterator[LiveServer]:
    with live_server(engine="glmd.engine.core") as live:
        yield live


@pytest.fixture(scope="module")
def locked() -> Iterator[LiveServer]:
    with live_server(api_key="open-sesame") as live:
        yield live


@contextmanager
def asked(live: LiveServer, text: str) -> Iterator[httpx.Response]:
    """The stream of another client's request."""
    body = {"messages": [{"role": "user", "content": text}], "stream": True}
    with live.client() as http, http.stream("POST", "/v1/chat/completions", json=body) as response:
        yield response


def rows(tab: Any) -> Any:
    """Running requests in the page's list."""
    return tab.locator("#running tr")


def figure(tab: Any, name: str) -> Any:
    return tab.locator(f'dd[data-name="{name}"]')


def endless(tab: Any) -> None:
    """Make the real engine ignore end tokens, so that answers are long."""

    def go_on(route: Any) -> None:
        body = route.request.post_data_json | {"ignore_eos": True}
        route.continue_(post_data=body)

    tab.route("**/v1/chat/completions", go_on)


# -- delivery -------------------------------------------------------------------------------


def test_every_file_is_served_with_its_type_and_a_strict_policy(http: httpx.Client) -> None:
    for path in sorted(pages.PATHS):
        response = http.get(path)
        assert response.status_code == 200, path
        policy = response.headers["content-security-policy"].split("; ")
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert not any("unsafe" in rule or "http" in rule or "*" in rule for rule in policy)
        assert response.headers["x-content-type-options"] == "nosniff"
        again = http.get(path, headers={"if-none-match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert http.get("/").headers["content-type"] == "text/html; charset=utf-8"
    assert http.get("/page/app.js").headers["content-type"] == "text/javascript; charset=utf-8"


def test_other_files_are_not_served(http: httpx.Client) -> None:
    for path in (
        "/page/",
        "/page/index.html",
        "/page/docs.html",
        "/page/__init__.py",
        "/page/..%2fapp.py",
    ):
        assert http.get(path).status_code == 404, path


def test_the_page_needs_no_key_and_asks_for_the_key(browser: Any, locked: LiveServer) -> None:
    with locked.client() as http:
        assert {http.get(path).status_code for path in pages.PATHS} == {200}
        assert http.get("/v1/models").status_code == 401
    with opened(browser, locked.url) as tab:
        dialog = tab.get_by_role("dialog", name="This server requires an API key")
        expect(dialog.get_by_label("API key")).to_be_focused()
        tab.keyboard.press("Escape")
        expect(dialog).to_be_hidden()
        expect(tab.locator("#state")).to_have_text("locked")
        send(tab, "⟦</think>Come in.⟧")
        expect(dialog.get_by_label("API key")).to_be_focused()
        tab.keyboard.type("wrong")
        tab.keyboard.press("Enter")
        expect(dialog.get_by_role("alert")).to_contain_text("did not accept the key")
        tab.keyboard.type("open-sesame")
        tab.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        expect(answers(tab)).to_contain_text("Come in.")
        expect(tab.locator("#state")).to_have_text("ready")
        assert tab.evaluate("Object.values(sessionStorage)") == ["open-sesame"]
        assert tab.evaluate("localStorage.length") == 0
        assert "open-sesame" not in tab.content()


def test_settings_of_clients_hold_the_address_and_the_key(browser: Any, locked: LiveServer) -> None:
    with opened(browser, locked.url) as tab:
        expect(tab.locator("#key")).to_be_focused()
        tab.keyboard.type("open-sesame")
        tab.keyboard.press("Enter")
        expect(tab.locator("#state")).to_have_text("ready")
        tab.get_by_role("button", name="Connect").click()
        expect(tab.locator("#addresses")).to_contain_text(f"{locked.url}/v1")
        program = tab.get_by_role("combobox", name="Program")
        expect(program.locator("option")).to_have_count(len(CLIENTS) + 3)
        for name in ("curl", "Python", "JavaScript", *(client.title for client in CLIENTS)):
            program.select_option(label=name)
            expect(tab.locator("#snippet")).to_contain_text(locked.url)
            expect(tab.locator("#snippet")).to_contain_text("open-sesame")


def test_the_screenshot_of_the_page_is_small() -> None:
    picture = (ROOT / "docs" / "page.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) <= 300_000


# -- the chat -------------------------------------------------------------------------------


def test_the_demo_shows_reasoning_then_the_answer(browser: Any, demo: LiveServer) -> None:
    with opened(browser, demo.url) as tab:
        tab.evaluate("checks.watch()")
        send(tab, "What is 17 + 25?")
        expect(answers(tab)).to_have_count(1)
        assert tab.evaluate("checks.seen") == ["reasoning", "content"]
        reasoning = tab.locator(".reasoning .prose")
        expect(reasoning).to_be_hidden()  # Folded away, and to be had again.
        tab.get_by_text("Thought for").click()
        expect(reasoning).to_have_text(re.compile(r"\S"))
        assert "written" in tab.locator(".note").inner_text()


def test_reasoning_is_streamed_apart_from_the_answer(tab: Any) -> None:
    send(tab, "⟦First I think.{wait}⟧")
    expect(tab.locator(".reasoning .prose")).to_have_text("First I think.")
    expect(tab.locator(".reasoning")).to_have_attribute("open", "")
    expect(tab.locator(".answer .content")).to_be_empty()
    dim, plain = (
        tab.locator(where).evaluate("(element) => getComputedStyle(element).color")
        for where in (".reasoning .prose", ".answer .content")
    )
    assert dim != plain


def test_a_conversation_continues_after_a_stopped_answer(tab: Any) -> None:
    send(tab, "⟦First I think.{wait}⟧")
    expect(tab.locator(".reasoning .prose")).to_have_text("First I think.")
    tab.get_by_role("button", name="Stop").click()
    expect(answers(tab)).to_have_count(1)
    with tab.expect_request("**/v1/chat/completions") as sent:
        send(tab, "⟦</think>And on.⟧")
    expect(answers(tab).last).to_contain_text("And on.")
    assert sent.value.post_data_json["messages"][1]["reasoning_content"] == "First I think."


def test_escape_cancels_the_request(browser: Any, demo: LiveServer) -> None:
    with opened(browser, demo.url) as tab:
        endless(tab)
        send(tab, "Hello, I am Nora.")
        expect(tab.locator(".answer")).to_contain_text(re.compile(r"\w"))
        expect(rows(tab)).to_have_count(1)
        tab.keyboard.press("Escape")
        expect(tab.locator(".note")).to_contain_text("stopped")
        expect(rows(tab)).to_have_count(0)
        expect(tab.get_by_role("button", name="Send")).to_be_visible()
        demo.wait_until_idle()


def test_each_request_has_the_earlier_turns_and_the_options(tab: Any) -> None:
    tab.get_by_role("button", name="Options").click()
    tab.get_by_label("System prompt").fill("Be brief.")
    tab.get_by_label("Temperature").fill("0.5")
    tab.get_by_label("Seed").fill("7")
    tab.get_by_label("Clear earlier thinking").check()
    send(tab, "⟦Hm.</think>One.⟧")
    expect(answers(tab)).to_have_count(1)
    tab.get_by_label("Think", exact=True).uncheck()
    with tab.expect_request("**/v1/chat/completions") as sent:
        send(tab, "⟦Two.⟧")
    expect(answers(tab)).to_have_count(2)
    body = sent.value.post_data_json
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "⟦Hm.</think>One.⟧"},
        {"role": "assistant", "content": "One.", "reasoning_content": "Hm."},
        {"role": "user", "content": "⟦Two.⟧"},
    ]
    assert (body["temperature"], body["seed"]) == (0.5, 7)
    assert (body["enable_thinking"], body["clear_thinking"]) == (False, True)
    assert "top_p" not in body


def test_try_again_replaces_the_last_answer_and_new_chat_clears_all(tab: Any) -> None:
    send(tab, "⟦</think>Once.⟧")
    expect(answers(tab)).to_have_count(1)
    with tab.expect_request("**/v1/chat/completions") as sent:
        tab.get_by_role("button", name="Try again").click()
    assert len(sent.value.post_data_json["messages"]) == 1
    expect(answers(tab)).to_have_count(1)
    tab.get_by_role("button", name="New chat").click()
    expect(tab.locator(".answer")).to_have_count(0)
    with tab.expect_request("**/v1/chat/completions") as sent:
        send(tab, "⟦</think>Anew.⟧")
    assert len(sent.value.post_data_json["messages"]) == 1
    expect(answers(tab)).to_have_count(1)


def test_an_error_is_shown_and_the_conversation_continues(tab: Any) -> None:
    send(tab, "⟦{refuse}⟧")
    expect(tab.get_by_role("alert").filter(has_text="As you wish.")).to_be_visible()
    expect(answers(tab)).to_have_count(1)
    send(tab, "⟦</think>Better.⟧")
    expect(answers(tab).last).to_contain_text("Better.")


def test_an_engine_crash_is_an_error_beside_the_partial_answer(
    tab: Any, scripted: LiveServer
) -> None:
    send(tab, "⟦</think>So far{wait}⟧")
    expect(tab.locator(".content")).to_have_text("So far")
    assert scripted.service.engine.pid is not None
    os.kill(scripted.service.engine.pid, signal.SIGKILL)
    expect(tab.get_by_role("alert").filter(has_text="engine stopped")).to_be_visible()
    expect(tab.locator(".content")).to_have_text("So far")
    scripted.wait_for("ready")
    send(tab, "⟦</think>Back.⟧")
    expect(answers(tab).last).to_contain_text("Back.")
    expect(figure(tab, "Restarts")).not_to_have_text("0")


def test_the_options_show_the_defaults_of_the_server_and_of_a_profile(browser: Any) -> None:
    with (
        live_server(enable_thinking=False, temperature=0.6) as live,
        opened(browser, live.url) as tab,
    ):
        tab.get_by_role("button", name="Options").click()
        expect(tab.get_by_label("Temperature")).to_have_attribute("placeholder", "0.6")
        expect(tab.get_by_label("Think", exact=True)).not_to_be_checked()
        tab.get_by_label("Profile").select_option("general")
        expect(tab.get_by_label("Temperature")).to_have_attribute("placeholder", "1")
        with tab.expect_request("**/v1/chat/completions") as sent:
            send(tab, "⟦Done.⟧")
        body = sent.value.post_data_json
        assert (body["profile"], body["enable_thinking"]) == ("general", False)
        assert "temperature" not in body
        expect(answers(tab)).to_contain_text("Done.")


def test_an_invalid_option_is_shown_and_not_sent(tab: Any) -> None:
    tab.get_by_role("button", name="Options").click()
    tab.get_by_label("Temperature").fill("3")
    tab.get_by_role("button", name="Options").click()
    send(tab, "⟦</think>Hot.⟧")
    expect(tab.get_by_label("Temperature")).to_be_focused()
    expect(tab.get_by_label("Message")).to_have_value("⟦</think>Hot.⟧")
    expect(tab.locator(".answer")).to_have_count(0)


# -- the server -----------------------------------------------------------------------------


def test_requests_of_other_clients_are_listed_and_can_be_cancelled(
    tab: Any, scripted: LiveServer
) -> None:
    with asked(scripted, "⟦</think>Still here{wait}⟧") as response:
        expect(rows(tab)).to_have_count(1)
        expect(rows(tab)).to_contain_text("decoding")
        button = rows(tab).get_by_role("button", name="Cancel the chat request")
        button.focus()
        tab.keyboard.press("Enter")
        expect(rows(tab)).to_have_count(0)
        assert "cancelled at the server" in response.read().decode()
    expect(tab.locator("#recent tr").first).to_contain_text("cancelled")
    assert tab.evaluate("document.activeElement.id") == "requests"
    scripted.wait_until_idle()


def test_cancelling_the_pages_own_request_is_an_error_in_the_chat(tab: Any) -> None:
    send(tab, "⟦</think>Mine{wait}⟧")
    rows(tab).get_by_role("button").click()
    expect(tab.locator(".answer").get_by_role("alert")).to_contain_text("cancelled at the server")
    expect(tab.locator(".content")).to_have_text("Mine")


def test_the_figures_equal_the_engines_statistics(browser: Any, demo: LiveServer) -> None:
    with opened(browser, demo.url) as tab:
        send(tab, "Hello, I am Nora.")
        expect(answers(tab)).to_have_count(1)
        demo.wait_until_idle()
        expect(tab.locator("#state")).to_have_text("ready")
        expect(figure(tab, "Running")).to_have_text("0")
        stats = demo.service.engine.stats
        expect(figure(tab, "Tokens cached")).to_have_text(f"{stats.kv_tokens:,}")
        expect(figure(tab, "Segments")).to_have_text(f"{stats.kv_segments:,}")
        assert stats.kv_segments > 0
        expect(figure(tab, "In use")).to_have_text("0")
        expect(tab.locator("#bytes-taken")).to_have_text(
            re.compile(r"^[\d.]+ MiB of [\d.]+ [GT]iB$")
        )
        for name in ("Tokens per second", "Time to first token"):
            picture = tab.get_by_role("img", name=re.compile(f"^{name}: .*at most"))
            expect(picture).to_be_visible()
        assert "NaN" not in tab.locator("#server").inner_text()
        assert "undefined" not in tab.locator("#server").inner_text()


def test_an_unreachable_server_is_shown_and_reconnected(tab: Any) -> None:
    expect(tab.locator("#state")).to_have_text("ready")
    tab.context.set_offline(True)
    expect(tab.locator("#state")).to_have_text("unreachable")
    send(tab, "⟦</think>Hello?⟧")
    expect(tab.get_by_role("alert").filter(has_text="cannot be reached")).to_be_visible()
    tab.context.set_offline(False)
    expect(tab.locator("#state")).to_have_text("ready")


# -- for everyone ---------------------------------------------------------------------------


def test_the_page_can_be_used_by_keyboard(tab: Any) -> None:
    expect(tab.get_by_label("Message")).to_be_focused()
    tab.keyboard.type("⟦</think>a")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("b⟧")
    tab.keyboard.press("Enter")
    expect(answers(tab).locator(".content")).to_have_text("a\nb", use_inner_text=True)
    expect(tab.get_by_label("Message")).to_be_focused()
    names = []
    for _ in range(6):
        tab.keyboard.press("Tab")
        names.append(tab.evaluate("document.activeElement.name || document.activeElement.id"))
    assert names == [
        "enable_thinking", "clear_thinking", "attach", "options-button", "new", "send"
    ]  # fmt: skip
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("Enter")
    expect(tab.locator(".answer")).to_have_count(0)
    expect(tab.get_by_label("Message")).to_be_focused()


def test_progress_is_announced_and_every_control_has_a_name(tab: Any) -> None:
    assert tab.evaluate("checks.unnamed()") == []
    assert tab.get_by_role("log").get_attribute("aria-live") in (None, "polite")
    progress = tab.locator("#progress")
    assert progress.get_attribute("role") == "status"
    send(tab, "⟦Hm.{wait}⟧")
    expect(progress).to_have_text("Thinking")
    expect(tab.locator(".answer")).to_have_attribute("aria-busy", "true")
    tab.keyboard.press("Escape")
    expect(progress).to_have_text("Stopped.")
    expect(tab.locator(".answer")).to_have_attribute("aria-busy", "false")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_both_color_schemes(
    browser: Any, scripted: LiveServer, scheme: str
) -> None:
    with opened(browser, scripted.url, color_scheme=scheme, reduced_motion="reduce") as tab:
        tab.get_by_role("button", name="Options").click()
        send(tab, "⟦Hm.</think>```py\nx = 1\n```\nDone.⟧")
        expect(answers(tab)).to_have_count(1)
        send(tab, "⟦{refuse}⟧")
        expect(tab.get_by_role("alert").filter(has_text="As you wish.")).to_be_visible()
        tab.get_by_text("Thought for").click()
        ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        darkness = sum(map(int, re.findall(r"\d+", ground)[:3]))
        assert (darkness < 200) == (scheme == "dark")
        assert tab.evaluate("checks.faint()") == []


def test_a_narrow_window_shows_one_view_without_horizontal_scrolling(tab: Any) -> None:
    tab.set_viewport_size({"width": 360, "height": 640})
    send(tab, f"⟦</think>{'word' * 60}\n```\n{'code ' * 60}\n```⟧")
    expect(answers(tab)).to_have_count(1)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    expect(tab.locator("#server")).to_be_hidden()
    tab.get_by_role("button", name="Server").click()
    expect(figure(tab, "Running")).to_be_visible()
    expect(tab.get_by_label("Message")).to_be_hidden()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
