"""The chat of the web page in a browser: Markdown, kept conversations, files, tools, loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import LiveServer, live_server
from page_kit import answers, opened, send
from paths import TESTS
from PIL import Image

from glmd.api import webui as pages
from glmd.api.client_settings import CLIENTS

expect = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed (make setup-clients)"
).expect

AXE = TESTS / "clients" / "node_modules" / "axe-core" / "axe.min.js"

MARKDOWN = """# Title

Some *text* with **bold**, `code`, [a link](https://example.org/a) and https://example.org/b.
No: <img src=x onerror=alert(1)> [bad](javascript:alert(1)) [here](/health) ![pic](http://x/y.png)

1. one
2. two
   - nested

   ```
   in a list
   ```

| left | right |
|:-----|------:|
| 1    | 2     |

> quoted

```python
if a < b:

    pass
```

Inline $e^{i\\pi}$ and \\(a_b\\) for $5 or $10.

$$
\\frac{1}{2}

+ x
$$

Then \\[ y \\] and $\\wrong{$.

[ref]: https://example.org/c

See [ref].
"""

CODE = "if a < b:\n\n    pass\n"


def asked(tab: Any, text: str) -> Any:
    """Send `text` and return the messages of the request, once it is answered."""
    with tab.expect_request("**/v1/chat/completions") as sent:
        send(tab, text)
    expect(tab.locator("#send")).to_be_visible()
    return sent.value.post_data_json["messages"]


COUNT_UNSTORED = """() => {
    const transaction = IDBDatabase.prototype.transaction;
    let unstored = 0;
    IDBDatabase.prototype.transaction = function (stores, mode) {
        const change = transaction.call(this, stores, mode);
        if (mode === "readwrite") {
            unstored += 1;
            change.addEventListener("complete", () => (unstored -= 1));
        }
        return change;
    };
    const shown = () => send.hidden || (window.unstoredOnceAnswered = unstored);
    new MutationObserver(shown).observe(send, { attributeFilter: ["hidden"] });
}"""
"""Notes how many changes are not stored yet when the page shows that an answer is complete."""


def titles(tab: Any) -> Any:
    return tab.locator("#chat-list .title")


# -- Markdown -------------------------------------------------------------------------------


def test_markdown_is_elements_and_markup_stays_text(tab: Any) -> None:
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    send(tab, f"⟦</think>{MARKDOWN}⟧")
    expect(answers(tab)).to_have_count(1)
    content = tab.locator(".answer .content")
    for place, text in {
        "h3": "Title", "em": "text", "strong": "bold", "p > code": "code", "ol ul > li": "nested",
        "th.right": "right", "td.left": "1", "blockquote": "quoted",
    }.items():  # fmt: skip
        expect(content.locator(place).first).to_have_text(text)
    links = content.locator("a").evaluate_all("(all) => all.map((each) => each.href)")
    assert links == [
        "https://example.org/a", "https://example.org/b", "http://x/y.png", "https://example.org/c"
    ]  # fmt: skip
    assert tab.locator(".answer img, .question img").count() == 0
    expect(content.locator("math")).to_have_count(4)
    expect(content.locator(".math.display math")).to_have_count(2)
    expect(content.locator(".math > code")).to_have_text("\\wrong{")
    expect(content).to_contain_text("for $5 or $10.")
    expect(content.locator(".code-head span").last).to_have_text("python")
    content.get_by_role("button", name="Copy the code, python").click()
    expect(content.get_by_text("Copied")).to_be_visible()
    assert tab.evaluate("navigator.clipboard.readText()") == CODE


def test_markdown_that_is_streamed_equals_markdown_that_came_at_once(tab: Any) -> None:
    """Finished blocks are the same elements to the end, so that selections survive."""
    code = "\n".join(f"line {number}" + "\n" * (number % 3 == 0) for number in range(200))
    texts = [
        MARKDOWN,
        f"{MARKDOWN}\n```\n{code}\n```",
        "a\r\nb\r\n\r\n- c\r\n\r\n- d",
        "```\nopen",
        "$",
        "",
    ]
    found = tab.evaluate(
        """async (texts) => {
            const { Markdown, showMarkdown } = await import("./page/markdown.js");
            const shown = (text) => showMarkdown(document.createElement("div"), text);
            shown("$a$");
            await new Promise((resolve) => document.addEventListener("formulas", resolve));
            return texts.map((text) => {
                const element = document.createElement("div");
                const markdown = new Markdown(element);
                let first = null;
                let kept = true;
                for (let at = 0; at < text.length; at += 3) {
                    markdown.rest += text.slice(at, at + 3);
                    markdown.end();
                    if (element.children.length > 1) first ??= element.firstChild;
                    kept &&= first === null || first === element.firstChild;
                }
                const whole = shown(text);
                return [element.innerHTML, kept, whole.innerHTML];
            });
        }""",
        texts,
    )
    for streamed, kept, whole in found:
        assert kept
        assert streamed == whole


# -- conversations --------------------------------------------------------------------------


def test_conversations_are_kept_listed_deleted_and_restored(tab: Any) -> None:
    asked(tab, "First ⟦Hm.</think>**One**⟧")
    tab.get_by_role("button", name="Options").click()
    tab.get_by_label("System prompt").fill("Be brief.")
    tab.get_by_role("button", name="New chat").click()
    tab.get_by_label("Temperature").fill("0.5")
    tab.evaluate(COUNT_UNSTORED)
    asked(tab, "Second ⟦</think>Two⟧")
    assert tab.evaluate("unstoredOnceAnswered") == 0
    tab.reload()
    expect(titles(tab)).to_have_text(["Second ⟦</think>Two⟧", "First ⟦Hm.</think>**One**⟧"])
    titles(tab).last.click()
    expect(tab.locator(".answer strong")).to_have_text("One")
    expect(tab.locator(".reasoning summary")).to_contain_text("Thought for")
    expect(tab.locator(".note")).to_contain_text("tokens/s")
    assert [each["role"] for each in asked(tab, "⟦</think>On.⟧")] == [
        "system", "user", "assistant", "user"
    ]  # fmt: skip
    titles(tab).filter(has_text="Second").click()
    tab.get_by_role("button", name="Options").click()
    expect(tab.get_by_label("Temperature")).to_have_value("0.5")
    tab.get_by_role("button", name="Delete Second").click()
    expect(titles(tab)).to_have_count(1)
    expect(tab.locator(".answer")).to_have_count(0)
    tab.get_by_role("button", name="Undo").click()
    expect(titles(tab)).to_have_count(2)
    expect(tab.locator(".answer")).to_contain_text("Two")


def test_edited_questions_and_new_answers_are_branches(tab: Any) -> None:
    asked(tab, "⟦</think>One⟧")
    asked(tab, "⟦</think>Two⟧")
    tab.get_by_role("button", name="Edit").first.click()
    tab.get_by_label("New text").fill("⟦</think>Uno⟧")
    with tab.expect_request("**/v1/chat/completions") as sent:
        tab.keyboard.press("Enter")
    assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "⟦</think>Uno⟧"}]
    expect(answers(tab).locator(".content")).to_have_text(["Uno"])
    tab.get_by_role("button", name="Try again").click()
    answer = tab.locator("article.answer")
    expect(answer.get_by_text("2 of 2")).to_be_visible()
    answer.get_by_role("button", name="Previous branch").click()
    expect(answer.get_by_text("1 of 2")).to_be_visible()
    tab.locator(".asked").get_by_role("button", name="Previous branch").click()
    expect(answers(tab).locator(".content")).to_have_text(["One", "Two"])
    tab.reload()
    titles(tab).click()
    expect(answers(tab).locator(".content")).to_have_text(["One", "Two"])


def test_an_answer_goes_on_while_another_conversation_is_shown(
    tab: Any, scripted: LiveServer
) -> None:
    send(tab, "Slow ⟦</think>Still{wait}⟧")
    expect(tab.locator(".content")).to_have_text("Still")
    tab.get_by_role("button", name="New chat").click()
    asked(tab, "Quick ⟦</think>Done⟧")
    titles(tab).filter(has_text="Slow").click()
    expect(tab.locator(".answer")).to_have_attribute("aria-busy", "true")
    expect(tab.locator(".content")).to_have_text("Still")
    tab.get_by_role("button", name="Stop").click()
    expect(tab.locator(".note")).to_contain_text("stopped")
    scripted.wait_until_idle()


def test_an_exported_conversation_can_be_imported(tab: Any, tmp_path: Path) -> None:
    asked(tab, "⟦Hm.</think>One⟧")
    tab.get_by_role("button", name="Try again").click()
    expect(tab.get_by_text("2 of 2")).to_be_visible()
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Export").click()
    file = tmp_path / "chat.json"
    download.value.save_as(file)
    tab.get_by_label("Chats to import").set_input_files(file)
    expect(titles(tab)).to_have_count(2)
    expect(tab.get_by_text("2 of 2")).to_be_visible()
    other = tmp_path / "other.json"  # As `glmd chat` and the APIs write messages.
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Ho", "reasoning_content": "Hm"},
    ]
    other.write_text(json.dumps({"messages": messages}))
    tab.get_by_label("Chats to import").set_input_files(other)
    expect(answers(tab)).to_contain_text("Ho")
    sent = asked(tab, "⟦</think>On⟧")
    assert sent[:3] == [messages[0], {"role": "user", "content": "Hi"}, messages[2]]
    other.write_text('{"messages": [{"role": "king"}]}')
    tab.get_by_label("Chats to import").set_input_files(other)
    expect(tab.locator("#chats-note")).to_contain_text("other.json: The file has a message of role")


# -- files and tools ------------------------------------------------------------------------


def test_text_files_are_part_of_the_message(tab: Any, tmp_path: Path) -> None:
    text = tmp_path / "notes.md"
    text.write_text("# Notes\n```\nx\n```\n")
    other = tmp_path / "picture.png"
    other.write_bytes(b"\x89PNG\0")
    tab.get_by_label("Text files").set_input_files([text, other])
    expect(tab.locator("#file-error")).to_have_text("picture.png: no text file.")
    expect(tab.locator("#files li")).to_contain_text(["notes.md"])
    tab.evaluate(
        """() => {
            const data = new DataTransfer();
            data.items.add(new File(["dropped"], "b.txt"));
            document.getElementById("log").dispatchEvent(
                new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }"""
    )
    expect(tab.locator("#files li")).to_have_count(2)
    (message,) = asked(tab, "What? ⟦</think>Notes⟧")
    assert message["content"] == (
        "notes.md:\n````\n# Notes\n```\nx\n```\n````\n\nb.txt:\n```\ndropped\n```\n\n"
        "What? ⟦</think>Notes⟧"
    )
    expect(tab.locator("#files li")).to_have_count(0)
    tab.locator(".question summary").first.click()
    expect(tab.locator(".question pre").first).to_contain_text("# Notes")


def test_tool_calls_are_shown_and_their_results_sent(tab: Any) -> None:
    tab.get_by_role("button", name="Options").click()
    tools = tab.get_by_label("Tools:")
    tools.fill("[")
    expect(tab.locator("#tools-error")).to_contain_text("no JSON")
    weather = {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}
    tools.fill(json.dumps([{"type": "function", "function": weather}]))
    tab.get_by_role("button", name="Options").click()
    asked(
        tab,
        "⟦</think><tool_call>weather<arg_key>city</arg_key><arg_value>Rome</arg_value></tool_call>⟧",
    )
    call = tab.locator(".call")
    expect(call.locator("summary")).to_have_text("Called weather")
    assert json.loads(call.locator("pre").inner_text()) == {"city": "Rome"}
    tab.get_by_label("Result of weather").fill("Sunny ⟦</think>Take a hat.⟧")
    with tab.expect_request("**/v1/chat/completions") as sent:
        tab.get_by_role("button", name="Send the results").click()
    expect(answers(tab).last).to_contain_text("Take a hat.")
    _, answer, result = sent.value.post_data_json["messages"]
    assert answer["tool_calls"][0]["function"]["name"] == "weather"
    assert (result["role"], result["tool_call_id"]) == ("tool", answer["tool_calls"][0]["id"])


# -- loading --------------------------------------------------------------------------------


def test_the_first_message_waits_for_the_model(
    browser: Any, random_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(random_checkpoint, tmp_path / "model")
    with (
        live_server(
            folder=folder, engine="fake_engine", config={"on_load": "wait"}, ready=False
        ) as live,
        opened(browser, live.url) as tab,
    ):
        expect(tab.locator("#loading-text")).to_contain_text("Loading the model: 6 B of 12 B")
        shown = tab.locator("#server").inner_text()
        assert "no MTP layer" not in shown
        assert "of 1 B" not in shown
        send(tab, "Hello")
        expect(tab.locator(".note")).to_contain_text("Loading the model: 6 B of 12 B")
        (folder / "go").touch()
        expect(answers(tab)).to_contain_text("cut off at the token limit")
        expect(tab.get_by_role("alert").filter(has_text="load")).to_have_count(0)
        expect(tab.locator("#loading")).to_be_hidden()


def test_a_message_to_an_unloaded_model_loads_it(browser: Any) -> None:
    with live_server(idle_unload=0.005) as live, opened(browser, live.url) as tab:
        live.wait_for("unloaded")
        expect(tab.locator("#loading-text")).to_contain_text("The next message loads it.")
        send(tab, "⟦</think>Awake⟧")
        expect(answers(tab)).to_contain_text("Awake")


# -- the reference --------------------------------------------------------------------------


def test_the_reference_has_every_route_and_field(
    browser: Any, scripted: LiveServer, http: httpx.Client
) -> None:
    openapi = http.get("/openapi.json").json()
    routes = [
        f"{method.upper()} {path}" for path, all in openapi["paths"].items() for method in all
    ]
    with opened(browser, scripted.url + "/docs") as tab:
        expect(tab.locator("summary code")).to_have_count(len(routes))
        assert sorted(tab.locator("summary code").all_inner_texts()) == sorted(routes)
        tab.get_by_text("POST /v1/chat/completions", exact=True).click()
        reference = tab.locator("details[open]")
        expect(reference.get_by_role("row", name="thinking_budget").first).to_be_visible()
        assert "undefined" not in reference.inner_text()


# -- for everyone ---------------------------------------------------------------------------


def test_the_manifest_and_its_icons_are_served(http: httpx.Client) -> None:
    manifest = http.get("/page/app.webmanifest").json()
    for icon in manifest["icons"]:
        assert f"/page/{icon['src']}" in pages.PATHS
    folder = Path(pages.__file__).parent
    assert Image.open(folder / "icon.png").size == (512, 512)
    for library in ("markdown-it", "katex"):
        assert f"== {library} " in (folder / "LICENSES.txt").read_text()


SMALL = """() => [...document.querySelectorAll("button, select, summary, input, nav a, .links a")]
    .map((each) => each.type === "checkbox" ? each.closest("label") : each)
    .filter((each) => each.checkVisibility() && each.type !== "file")
    .filter((each) => Math.min(each.offsetHeight, each.offsetWidth) < 44)
    .map((each) => each.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 390)])
def test_accessibility_checks_find_no_fault(
    browser: Any, scripted: LiveServer, scheme: str, width: int
) -> None:
    if not AXE.exists():
        pytest.skip("the packages of tests/clients are not installed (make setup-clients)")
    # axe-core builds elements of strings, which the page's policy forbids.
    options = {"color_scheme": scheme, "reduced_motion": "reduce", "bypass_csp": True}
    with opened(browser, scripted.url, **options) as tab:
        tab.set_viewport_size({"width": width, "height": 844})

        def check(place: str) -> None:
            tab.evaluate(AXE.read_text())
            found = tab.evaluate("axe.run({ resultTypes: ['violations'] })")
            faults = [
                (each["id"], [node["html"][:160] for node in each["nodes"]])
                for each in found["violations"]
                if each["impact"] in ("serious", "critical", "moderate")
            ]
            assert faults == [], place
            assert tab.evaluate(SMALL) == [], place
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, place

        asked(tab, f"⟦Hm.</think>{MARKDOWN}⟧")
        tab.get_by_role("button", name="Try again").click()
        expect(answers(tab)).to_have_count(1)
        expect(tab.get_by_text("2 of 2")).to_be_visible()
        tab.get_by_role("button", name="Options").click()
        check("chat")
        tab.get_by_role("button", name="Connect").click()
        expect(tab.get_by_role("combobox", name="Program").locator("option")).to_have_count(
            len(CLIENTS) + 3
        )
        check("connect")
        tab.keyboard.press("Escape")
        if width < 1000:
            for view in ("Chats", "Server"):
                tab.get_by_role("button", name=view, exact=True).click()
                check(view)
        tab.goto(scripted.url + "/docs")
        tab.get_by_text("POST /v1/completions", exact=True).click()
        check("reference")
