"""Search for the request bodies that disturb a server most, and check what they may disturb.

    python benchmarks/hostile_bodies.py [--seconds 120] [--seed 1] [--max-mib 32]

A body is a route, a field of its requests, and a filler that is repeated in the field up to a size
within `max_body`. The search tries fields and fillers at random, varies those that disturbed most,
and at last sends the worst of them from several connections at once. Meanwhile another process asks
for `/livez` twenty times a second.

The server is `glmd serve` with a clock around each callback of its event loop. Three bounds decide
the exit status: the 99th percentile of `/livez`, the CPU time of the longest callback, and the
memory that is left of it all.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import random
import re
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import httpx
import psutil

from glmd.utils.memory import process_memory_bytes

MIB = 1 << 20

LIVEZ_SECONDS = 0.2
"""Bound of the 99th percentile of `/livez`."""

CALLBACK_SECONDS = 0.05
"""Bound of the CPU time of one callback of the event loop."""

LEFT_BYTES = 50 * MIB
"""Bound of the API process's memory after the search, beside that before."""

PROBE_INTERVAL = 0.05
SETTLE_SECONDS = 5.0
IDLE_SECONDS = 10.0
STORM_CONNECTIONS = 4
WORST = 8

LISTED = 0.005
"""CPU time from which a callback is written to the server's list."""

# -- bodies -------------------------------------------------------------------------------

HOLE = "@hole@"
HI = {"role": "user", "content": "Hi"}
FUNCTION = {"name": "f", "parameters": {"type": "object"}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "default", "messages": [HI], "max_tokens": 1, **fields}


def message(**fields: Any) -> dict[str, Any]:
    return chat(messages=[{**HI, **fields}])


def schema(value: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}
    return chat(response_format=form)


def tool(value: Any) -> dict[str, Any]:
    return chat(tools=[{"type": "function", "function": {**FUNCTION, **value}}])


def call(**fields: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": "{}", **fields}
    calls = [{"id": "a", "type": "function", "function": function}]
    result = {"role": "tool", "tool_call_id": "a", "content": "ok"}
    return chat(messages=[HI, {"role": "assistant", "tool_calls": calls}, result])


CHAT_BODIES = [
    chat(messages=HOLE),
    message(content=HOLE),
    message(role=HOLE),
    message(junk=HOLE),
    message(content=[{"type": "text", "text": HOLE}]),
    message(content=[{"type": HOLE}]),
    message(role="assistant", tool_calls=HOLE),
    message(role="assistant", reasoning_content=HOLE),
    message(role="tool", tool_call_id=HOLE),
    call(arguments=HOLE),
    call(name=HOLE),
    chat(tools=HOLE),
    tool({"parameters": HOLE}),
    tool({"parameters": {"type": "object", "properties": HOLE}}),
    tool({"parameters": {"enum": HOLE}}),
    tool({"parameters": {"anyOf": HOLE}}),
    tool({"strict": True, "parameters": {"type": "object", "properties": HOLE}}),
    tool({"description": HOLE}),
    tool({"name": HOLE}),
    chat(tool_choice=HOLE),
    chat(chat_template_kwargs=HOLE),
    chat(chat_template_kwargs={"x": HOLE}),
    chat(junk=HOLE),
    HOLE,
]
OPENAI_BODIES = [
    *CHAT_BODIES,
    schema(HOLE),
    schema({"enum": HOLE}),
    schema({"type": "object", "properties": HOLE}),
    chat(response_format=HOLE),
    chat(stop=HOLE),
    chat(stop_token_ids=HOLE),
    chat(logit_bias=HOLE),
    chat(model=HOLE),
    chat(profile=HOLE),
    chat(cache_salt=HOLE),
    chat(user=HOLE),
    chat(metadata=HOLE),
    chat(modalities=HOLE),
    chat(thinking=HOLE),
    chat(stream_options=HOLE),
    chat(max_tokens=HOLE),
    chat(seed=HOLE),
    chat(guided_json=HOLE),
    chat(guided_regex=HOLE),
    chat(guided_choice=HOLE),
    chat(guided_grammar=HOLE),
    chat(structured_outputs={"json": HOLE}),
]
BLOCK = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": HOLE}]}
ANTHROPIC_BODIES = [
    *CHAT_BODIES,
    chat(system=HOLE),
    chat(system=[{"type": "text", "text": HOLE}]),
    chat(messages=[HI, BLOCK]),
    chat(tools=[{"name": "f", "input_schema": HOLE}]),
    chat(tools=[{"name": "f", "input_schema": {"type": "object", "properties": HOLE}}]),
    chat(stop_sequences=HOLE),
    chat(output_config={"format": {"type": "json_schema", "schema": HOLE}}),
    chat(metadata=HOLE),
]
RESPONSES_BODIES = [
    {"model": "default", "max_output_tokens": 1, "store": store, **fields}
    for store in (True, False)
    for fields in (
        {"input": HOLE},
        {"input": [{"role": "user", "content": HOLE}]},
        {"input": [{"role": HOLE, "content": "Hi"}]},
        {"input": [{"type": HOLE}]},
        {"input": [{"type": "item_reference", "id": HOLE}]},
        {"input": [{"type": "reasoning", "summary": HOLE}]},
        {"input": "Hi", "instructions": HOLE},
        {"input": "Hi", "previous_response_id": HOLE},
        {"input": "Hi", "tools": HOLE},
        {"input": "Hi", "tools": [{"type": "namespace", "name": "n", "tools": HOLE}]},
        {"input": "Hi", "tools": [{"type": "function", "name": "f", "parameters": HOLE}]},
        {"input": "Hi", "include": HOLE},
        {"input": "Hi", "metadata": HOLE},
        {"input": "Hi", "text": {"format": HOLE}},
        {"input": "Hi", "junk": HOLE},
    )
]
COMPLETION_BODIES = [
    {"model": "default", "max_tokens": 1, "prompt": HOLE},
    {"model": "default", "max_tokens": 1, "prompt": HOLE, "echo": True, "logprobs": 1},
    {"model": "default", "max_tokens": 1, "prompt": [[1], HOLE]},
    {"model": "default", "max_tokens": 1, "prompt": "Hi", "junk": HOLE},
    {"model": "default", "max_tokens": 1, "prompt": "Hi", "stop": HOLE},
]
BODIES: dict[str, list[Any]] = {
    "/v1/chat/completions": OPENAI_BODIES,
    "/v1/messages": ANTHROPIC_BODIES,
    "/v1/messages/count_tokens": ANTHROPIC_BODIES,
    "/v1/responses": RESPONSES_BODIES,
    "/v1/responses/input_tokens": RESPONSES_BODIES,
    "/v1/completions": COMPLETION_BODIES,
    "/tokenize": [
        {"prompt": HOLE, "return_token_strs": True},
        {"content": HOLE},
        {"prompt": "Hi", "junk": HOLE},
        *CHAT_BODIES,
    ],
    "/apply-template": CHAT_BODIES,
    "/detokenize": [{"tokens": HOLE}, {"tokens": [HOLE]}],
}
"""By route, requests with one hole for a filler."""


def calls_and_results(size: int) -> str:
    """Twenty assistant messages with calls, each with its results in reverse order."""
    count = max(1, size // 20 // 160)
    messages = [HI]
    for turn in range(20):
        ids = [f"{turn}-{number}" for number in range(count)]
        calls = [
            {"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}}
            for id in ids
        ]
        messages.append({"role": "assistant", "tool_calls": calls})  # type: ignore[dict-item]
        messages += [{"role": "tool", "tool_call_id": id, "content": ""} for id in reversed(ids)]
    return json.dumps(messages)


def uses_and_results(size: int) -> str:
    """The same in Anthropic's form."""
    count = max(1, size // 20 // 140)
    messages: list[dict[str, Any]] = [HI]
    for turn in range(20):
        ids = [f"{turn}-{number}" for number in range(count)]
        uses = [{"type": "tool_use", "id": id, "name": "f", "input": {}} for id in ids]
        results = [{"type": "tool_result", "tool_use_id": id} for id in reversed(ids)]
        messages.append({"role": "assistant", "content": uses})
        messages.append({"role": "user", "content": results})
    return json.dumps(messages)


def repeated(start: str, unit: str, end: str) -> Callable[[int], str]:
    """A filler of `size` bytes; `%d` in the unit is its number."""
    length = len((unit.replace("%d", "1234567")).encode())

    def fill(size: int) -> str:
        count = max(1, size // length)
        if "%d" in unit:
            middle = "".join(unit.replace("%d", str(number)) for number in range(count))
        else:
            middle = unit * count
        return start + middle.removesuffix(",") + end

    return fill


def array(unit: str) -> Callable[[int], str]:
    return repeated("[", unit + ",", "]")


def nested(opening: str, closing: str) -> Callable[[int], str]:
    def fill(size: int) -> str:
        depth = min(190, size // len(opening + closing))
        return opening * depth + "1" + closing * depth

    return fill


TOOL = '{"type":"function","name":"f%d","function":{"name":"f%d"},"input_schema":{}}'
FILLERS: dict[str, Callable[[int], str]] = {
    "ones": array("1"),
    "negative": array("-1"),
    "floats": array("0.5"),
    "ids": array("1999"),
    "huge ids": array("100000321"),
    "texts": array('""'),
    "words": array('"word %d"'),
    "nulls": array("null"),
    "arrays": array("[]"),
    "objects": array("{}"),
    "pairs": array("[1,2]"),
    "messages": array('{"role":"user","content":"Hi"}'),
    "replies": array('{"role":"assistant","content":"Hi"}'),
    "bad roles": array('{"role":"x"}'),
    "parts": array('{"type":"text","text":""}'),
    "input parts": array('{"type":"input_text","text":"a"}'),
    "images": array('{"type":"image_url","image_url":{"url":"x"}}'),
    "items": array('{"type":"reasoning","summary":[]}'),
    "uses": array('{"type":"tool_use","id":"%d","name":"f","input":{}}'),
    "tools": array(TOOL),
    "strict tools": array(TOOL[:-1] + ',"strict":true,"parameters":{"type":"string"}}'),
    "bad tools": array('{"type":"web_search%d"}'),
    "calls": calls_and_results,
    "tool uses": uses_and_results,
    "members": repeated("{", '"k%d":0,', "}"),
    "schemas": repeated("{", '"k%d":{"type":"string"},', "}"),
    "biases": repeated("{", '"%d":1,', "}"),
    "same key": repeated("{", '"a":[],', "}"),
    "deep arrays": nested("[", "]"),
    "deep objects": nested('{"properties":{"a":', "}}"),
    "deep content": nested('{"type":"text","text":', "}"),
    "letters": repeated('"', "a", '"'),
    "spaces": repeated('"', " ", '"'),
    "lines": repeated('"', "A line.\\n", '"'),
    "prose": repeated('"', "The quick brown fox jumps over the lazy dog. ", '"'),
    "digits": repeated('"', "1234567890", '"'),
    "marks": repeated('"', "!?", '"'),
    "accents": repeated('"', "é", '"'),
    "faces": repeated('"', "😀", '"'),
    "escapes": repeated('"', "\\u0001", '"'),
    "pairs of escapes": repeated('"', "\\ud83d\\ude00", '"'),
    "lone surrogates": repeated('"', "\\ud800", '"'),
    "quotes": repeated('"', "\\\"'", '"'),
    "tags": repeated('"', "<|user|>", '"'),
    "JSON": repeated('"{\\"a\\":[', "1,", '1]}"'),
    "number": repeated("", "9", ""),
    "unclosed": repeated('"', "a", ""),
    "alternatives": repeated('"', "a|", 'b"'),
    "optional": repeated('"', "(a?)", '"'),
}


@dataclass(frozen=True)
class Candidate:
    """A body, to be built when it is sent."""

    route: str
    number: int
    filler: str
    size: int

    def build(self) -> bytes:
        start, _, end = json.dumps(BODIES[self.route][self.number]).partition(f'"{HOLE}"')
        filler = FILLERS[self.filler](self.size - len(start) - len(end))
        # Fillers of calls are whole requests' messages; elsewhere they are values like others.
        return f"{start}{filler}{end}".encode()

    def __str__(self) -> str:
        text = json.dumps(BODIES[self.route][self.number])
        near = text.partition(HOLE)[0][-32:-1]
        return f"{self.size / MIB:5.2f} MiB {self.route} …{near} {self.filler}"


def draw(randomness: random.Random, largest: int) -> Candidate:
    route = randomness.choice(list(BODIES))
    return Candidate(
        route,
        randomness.randrange(len(BODIES[route])),
        randomness.choice(list(FILLERS)),
        min(largest, int(2 ** randomness.uniform(16, 25))),
    )


def vary(candidate: Candidate, randomness: random.Random, largest: int) -> Candidate:
    other = draw(randomness, largest)
    match randomness.randrange(3):
        case 0:
            size = min(largest, int(candidate.size * 2 ** randomness.uniform(-1, 1.5)))
            return Candidate(candidate.route, candidate.number, candidate.filler, size)
        case 1:
            return Candidate(candidate.route, candidate.number, other.filler, candidate.size)
        case _:
            return Candidate(other.route, other.number, candidate.filler, candidate.size)


# -- the server and its observers ---------------------------------------------------------


def serve(listed: str, arguments: list[str]) -> None:
    """Run `glmd` with a clock around each callback; append long ones to the file `listed`."""
    run = asyncio.Handle._run
    main = threading.main_thread()
    output = os.open(listed, os.O_WRONLY | os.O_APPEND)

    def timed(handle: asyncio.Handle) -> None:
        before = time.thread_time()
        run(handle)
        seconds = time.thread_time() - before
        if seconds > LISTED and threading.current_thread() is main:
            name = re.sub(r"\s+", " ", repr(handle))[:200]
            os.write(output, f"{time.time()} {seconds} {name}\n".encode())

    asyncio.Handle._run = timed  # type: ignore[method-assign, assignment]
    sys.argv = ["glmd", *arguments]
    runpy.run_module("glmd", run_name="__main__")


def probe(port: int, stop: Event, results: Connection) -> None:
    """Ask for `/livez` at fixed times; report each moment and the seconds that the answer took."""
    answers: list[tuple[float, float]] = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    while not stop.is_set():
        started = time.time()
        connection.request("GET", "/livez")
        connection.getresponse().read()
        answers.append((started, time.time() - started))
        time.sleep(max(0.0, PROBE_INTERVAL - (time.time() - started)))
    results.send(answers)


@dataclass
class Result:
    """One body and what it did."""

    candidate: Candidate
    status: int
    seconds: float
    callback: float
    name: str

    def __str__(self) -> str:
        return (
            f"{self.callback * 1e3:7.0f} ms {self.seconds:7.2f} s {self.status} {self.candidate}"
            f" {self.name}"
        )


class Server:
    """A server process under observation."""

    def __init__(self, folder: Path, max_mib: int) -> None:
        self._listed = folder / "callbacks"
        self._listed.touch()
        self._log = folder / "log"
        arguments = ["serve", "--port=0", f"--log-file={self._log}"]
        environment = {**os.environ, "GLMD_MAX_BODY": str(max_mib * MIB)}
        environment |= {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
        self.process = psutil.Popen(
            [sys.executable, __file__, "--serve", str(self._listed), *arguments], env=environment
        )
        self._read = 0
        self.port = self._wait_for_port()

    def _wait_for_port(self) -> int:
        while self.process.poll() is None:
            text = self._log.read_text() if self._log.exists() else ""
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", text):
                port = int(found[1])
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200:
                    return port
            time.sleep(0.2)
        raise SystemExit(self._log.read_text())

    def callbacks(self) -> list[tuple[float, float, str]]:
        """Moment, CPU time and name of each long callback since the last call."""
        with self._listed.open() as file:
            file.seek(self._read)
            lines = file.readlines()
            self._read = file.tell()
        found = []
        for line in lines:
            moment, seconds, name = line.rstrip("\n").split(" ", 2)
            found.append((float(moment), float(seconds), name))
        return found

    def send(self, candidate: Candidate) -> tuple[int, float]:
        """Send a body; return the status and the seconds."""
        body = candidate.build()
        started = time.time()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            headers = {"content-type": "application/json"}
            connection.request("POST", candidate.route, body, headers)
            response = connection.getresponse()
            response.read()
            status = response.status
        except (ConnectionError, http.client.HTTPException):
            status = 0
        finally:
            connection.close()
        return status, time.time() - started

    def try_body(self, candidate: Candidate) -> Result:
        self.callbacks()
        status, seconds = self.send(candidate)
        longest = max(self.callbacks(), key=lambda found: found[1], default=(0.0, 0.0, ""))
        name = re.sub(r"^<\w+ |created at.*", "", longest[2])[:60]
        return Result(candidate, status, seconds, longest[1], name)


@contextmanager
def started(max_mib: int) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), max_mib)
        try:
            yield server
        finally:
            server.process.terminate()
            try:
                server.process.wait(60)
            except subprocess.TimeoutExpired:
                server.process.kill()


def search(server: Server, seconds: float, seed: int, largest: int) -> list[Result]:
    """Return all bodies that were tried, the worst first."""
    randomness = random.Random(seed)
    results: list[Result] = []
    end = time.time() + seconds

    def badness(result: Result) -> float:
        return result.callback

    while time.time() < end and server.process.poll() is None:
        if results and randomness.random() < 0.4:
            candidate = vary(randomness.choice(results[:WORST]).candidate, randomness, largest)
        else:
            candidate = draw(randomness, largest)
        results.append(server.try_body(candidate))
        results.sort(key=badness, reverse=True)
    return results


def storm(server: Server, worst: list[Result], seconds: float) -> None:
    """Send the worst bodies from several connections at once."""
    end = time.time() + seconds

    def send() -> None:
        while time.time() < end:
            for result in worst:
                server.send(result.candidate)

    threads = [threading.Thread(target=send) for _ in range(STORM_CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> int:
    parser = argparse.ArgumentParser(description="Search for the bodies that disturb most.")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-mib", type=int, default=32)
    options = parser.parse_args()
    with started(options.max_mib) as server:
        for route in BODIES:  # load what is loaded late
            server.send(Candidate(route, 0, "ones", 1000))
            server.send(Candidate(route, 0, "prose", 100_000))
        before = process_memory_bytes(server.process.pid)
        server.callbacks()
        stop = multiprocessing.Event()
        results, theirs = multiprocessing.Pipe(duplex=False)
        prober = multiprocessing.Process(target=probe, args=(server.port, stop, theirs))
        prober.start()
        time.sleep(IDLE_SECONDS)
        begun = time.time()
        share = options.seconds / 4
        tried = search(server, options.seconds - share, options.seed, options.max_mib * MIB)
        print(f"{len(tried)} bodies. CPU time of the longest callback, duration, status, body:")
        for result in tried[:WORST]:
            print(result)
        print("Slowest:")
        for result in sorted(tried, key=lambda result: -result.seconds)[:WORST]:
            print(result)
        storm(server, tried[: WORST // 2], share)
        longest = max([found[1] for found in server.callbacks()], default=0.0)
        longest = max(longest, *(result.callback for result in tried))
        time.sleep(SETTLE_SECONDS)
        stop.set()
        probes = results.recv()
        prober.join()
        left = process_memory_bytes(server.process.pid) - before
    idle = percentile([seconds for moment, seconds in probes if moment < begun], 0.99)
    answers = [seconds for moment, seconds in probes if moment >= begun]
    slow = percentile(answers, 0.99)
    print(f"/livez, 99th percentile: {slow * 1e3:.0f} ms of {len(answers)} answers,", end=" ")
    print(f"bound {LIVEZ_SECONDS * 1e3:.0f} ms; longest {max(answers) * 1e3:.0f} ms;", end=" ")
    print(f"{idle * 1e3:.0f} ms before the first body, load {os.getloadavg()[0]:.1f}")
    print(f"longest callback: {longest * 1e3:.0f} ms of CPU, bound {CALLBACK_SECONDS * 1e3:.0f} ms")
    print(f"memory left: {left / MIB:.0f} MiB of {before / MIB:.0f}, bound {LEFT_BYTES / MIB:.0f}")
    held = slow <= LIVEZ_SECONDS and longest <= CALLBACK_SECONDS and left <= LEFT_BYTES
    return 0 if held else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
