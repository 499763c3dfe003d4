"""Take screenshots of the web UI in headless Chromium: under load, and a conversation.

python tools/picture.py [FILE]    docs/page.png by default; the second is FILE with -chat
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from browsers import chromium, find_chromium  # noqa: E402

LARGEST = 300_000
"""Size limit in bytes, because the repository keeps every version."""

LOAD_SECONDS = 125
"""Duration of the load, slightly longer than the time axis of the plots."""

OPTIONS = ["--memory-budget", "384MiB"]
"""A small budget, so that the memory of the demo is visible beside it."""

ADDRESS = re.compile(r"http://[\w.:]+")
"""URL of the server in its log, in either log format."""

START_SECONDS = 120

MESSAGES = ["Hello, I am Nora.", "Tell me a story about a fox."]

MARKDOWN = [
    {"role": "user", "content": "How does Newton's method find a square root?"},
    {
        "role": "assistant",
        "content": """Start with a guess $x_0$ and repeat

$$
x_{n+1} = \\frac{1}{2} \\left(x_n + \\frac{a}{x_n}\\right)
$$

| step | $x_n$ for $a = 2$ |
|-----:|:------------------|
| 0 | 1 |
| 1 | **1**.5 |
| 2 | **1.41**666… |

```python
def square_root(a: float, steps: int = 6) -> float:
    x = a
    for _ in range(steps):
        x = (x + a / x) / 2
    return x
```

1. Each step doubles the number of correct digits.
2. For `a = 0` the loop divides by zero in the end.
""",
    },
]
"""A conversation that the demo cannot write; it is imported, and shown in a second picture."""

PROMPTS = [
    "Hello, I am Emil.",
    "Tell me a story about a mouse.",
    "What is the capital of France?",
    "Tell me a story about a bear and a river.",
    "Who are you?",
]


@contextmanager
def serving() -> Iterator[str]:
    """Run `glmd serve` on the demo checkpoint and yield the URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "glmd", "serve", "--port", "0", *OPTIONS],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "server"),
            "GLMD_DRAIN_TIMEOUT": "0",
            "GLMD_DISK_CACHE": "0",
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        found = next(filter(None, map(ADDRESS.search, process.stderr)))
        threading.Thread(target=process.stderr.read, daemon=True).start()
        deadline = time.monotonic() + START_SECONDS
        while httpx.get(f"{found[0]}/health").status_code != 200:
            if time.monotonic() > deadline:
                raise TimeoutError(f"The server was not ready within {START_SECONDS} s.")
            time.sleep(0.1)
        yield found[0]
    finally:
        process.terminate()
        process.wait()


def client(url: str, seed: int, until: float) -> None:
    """Send chat requests with random pauses until `until` (monotonic seconds)."""
    rng = random.Random(seed)
    messages: list[dict[str, str]] = []
    with httpx.Client(base_url=url, timeout=120) as http:
        while time.monotonic() < until:
            if len(messages) > 8:
                messages = []
            messages.append({"role": "user", "content": rng.choice(PROMPTS)})
            body = {"messages": messages, "max_tokens": rng.randrange(60, 260), "ignore_eos": True}
            answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
            message = answer["choices"][0]["message"]
            messages.append({"role": "assistant", "content": message["content"]})
            time.sleep(rng.uniform(0, 4))


def talk(page: Any) -> None:
    """Show Markdown, send MESSAGES through the page and open the reasoning of the answers."""
    shown = {"messages": MARKDOWN}
    page.get_by_label("Chats to import").set_input_files(
        {"name": "shown.json", "mimeType": "application/json", "buffer": json.dumps(shown).encode()}
    )
    page.locator("article.answer").wait_for()
    page.get_by_role("button", name="New chat").click()
    for number, text in enumerate(MESSAGES, start=1):
        page.get_by_label("Message").fill(text)
        page.keyboard.press("Enter")
        page.locator("article.answer[aria-busy=false]").nth(number - 1).wait_for()
    page.locator(".reasoning summary").first.click()


def main() -> int:
    file = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs" / "page.png")
    chat = file.with_name(f"{file.stem}-chat.png")
    path = find_chromium()
    if path is None:
        print("tools/picture.py: Chromium not found. Install Chromium or Chrome.", file=sys.stderr)
        return 1
    with serving() as url, chromium(path) as browser:
        until = time.monotonic() + LOAD_SECONDS
        clients = [threading.Thread(target=client, args=(url, seed, until)) for seed in range(3)]
        for each in clients:
            each.start()
        page = browser.new_page(
            viewport={"width": 1360, "height": 800}, device_scale_factor=1.5, color_scheme="light"
        )
        page.goto(url)
        talk(page)
        page.wait_for_timeout(1000 * (until - 4 - time.monotonic()))
        page.locator("#running tr").nth(1).wait_for()
        page.screenshot(path=file)
        page.set_viewport_size({"width": 900, "height": 760})
        page.emulate_media(color_scheme="dark")
        page.get_by_role("button", name="Chats", exact=True).click()
        page.get_by_role("button", name=MARKDOWN[0]["content"], exact=True).click()
        page.locator(".math.display math").wait_for()
        page.screenshot(path=chat)
        for each in clients:
            each.join()
    return max(map(compress, (file, chat)))


def compress(file: Path) -> int:
    """Reduce the colours of a picture; returns 1 if it is too large."""
    Image.open(file).convert("RGB").quantize(dither=Image.Dither.NONE).save(file, optimize=True)
    size = file.stat().st_size
    print(f"{file}: {size:,} bytes")
    return int(size > LARGEST)


if __name__ == "__main__":
    sys.exit(main())
