"""Measure the time from messages to token ids, with and without the chat template's process.

    python benchmarks/prompt_path.py [CHECKPOINT] [--tokens 30000] [--repeat 30]

A `new` conversation is encoded for the first time. For a `returning` one the ids of long texts are
cached, as when a client sends its conversation again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from itertools import count, repeat
from pathlib import Path
from statistics import median

from glmd.chat.prompt import build_prompt
from glmd.chat.template import ChatTemplate
from glmd.chat.template_process import TemplateProcess
from glmd.chat.tokenizer import Tokenizer
from glmd.chat.types import AssistantMessage, Conversation, Message, Prompt, UserMessage

DEMO = Path(__file__).resolve().parent.parent / "demo" / "glm-4.7-flash-demo"
TEXT = (
    "The scheduler admits a request, matches its longest prefix in the shared cache, and computes"
    " the rest in chunks between the tokens of other requests. "
)
MESSAGES = (1, 19, 199)
"""Messages per conversation."""


def conversation(number: int, messages: int, characters: int) -> Conversation:
    """A conversation of `characters` in all, whose texts differ from every other number's."""
    size = characters // messages
    made: list[Message] = []
    for index in range(messages):
        text = (f"{number}.{index} " + TEXT * (size // len(TEXT) + 1))[:size]
        made.append(AssistantMessage(text, "Hm.") if index % 2 else UserMessage(text))
    return Conversation(made)


def milliseconds(
    build: Callable[[Conversation], Prompt], conversations: Iterable[Conversation]
) -> str:
    """Median, minimum and maximum time."""
    times = []
    for each in conversations:
        start = time.perf_counter()
        build(each)
        times.append(1000 * (time.perf_counter() - start))
    return f"{median(times):.2f} ({min(times):.2f}-{max(times):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time from messages to token ids.")
    parser.add_argument("checkpoint", nargs="?", type=Path, default=DEMO)
    parser.add_argument("--tokens", type=int, default=30_000, help="prompt length (30000)")
    parser.add_argument("--repeat", type=int, default=30, help="prompts per number (30)")
    options = parser.parse_args()
    tokenizer = Tokenizer.load(options.checkpoint)
    characters = options.tokens * len(TEXT) // len(tokenizer.encode(TEXT))
    start = time.perf_counter()
    process = TemplateProcess.load(options.checkpoint, tokenizer.controls)
    print(f"process started in {1000 * (time.perf_counter() - start):.0f} ms")
    templates: dict[str, ChatTemplate | TemplateProcess] = {
        "in-process": ChatTemplate.load(options.checkpoint, tokenizer.controls),
        "process": process,
    }
    print("messages  tokens  template    new: ms, median (min-max)    returning")
    numbers = count()
    for messages in MESSAGES:
        for name, template in templates.items():

            def build(
                given: Conversation, template: ChatTemplate | TemplateProcess = template
            ) -> Prompt:
                return build_prompt(given, tokenizer=tokenizer, template=template)

            made = [
                conversation(next(numbers), messages, characters) for _ in range(options.repeat)
            ]
            new = milliseconds(build, made)
            returning = milliseconds(build, repeat(made[-1], options.repeat))
            tokens = len(build(made[-1]).tokens)
            print(f"{messages:8}  {tokens:6}  {name:10}  {new:27}  {returning}")
    process.close()


if __name__ == "__main__":
    main()
