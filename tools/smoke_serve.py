"""Start `glmd serve` on the demo checkpoint and request one streamed answer.

python smoke_serve.py GLMD    (GLMD: path of the command)

Exits with status 0 if the server became ready, answered, and exited on SIGTERM.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import httpx

START_TIMEOUT = 120.0
"""Seconds. Importing everything takes 10 s on a slow machine with a cold disk cache."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def wait_until_ready(client: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"glmd serve exited with status {server.returncode} before it was ready.")
        try:
            if client.get("/health").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # Not listening yet.
        time.sleep(0.2)
    sys.exit(f"glmd serve was not ready within {START_TIMEOUT:.0f} s.")


def streamed_answer(client: httpx.Client) -> str:
    body = {
        "messages": [{"role": "user", "content": "Hello!"}],
        "stream": True,
        "max_tokens": 200,
        "enable_thinking": False,
    }
    text = ""
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if line.startswith("data: ") and data != "[DONE]":
                for choice in json.loads(data)["choices"]:
                    text += choice["delta"].get("content") or ""
    return text


def main(glmd: str) -> None:
    port = free_port()
    server = subprocess.Popen(
        [glmd, "serve", "--port", str(port)], env={**os.environ, "GLMD_DISK_CACHE": "0"}
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until_ready(client, server)
            answer = streamed_answer(client)
    finally:
        server.terminate()
        status = server.wait(timeout=30)
    if not answer.strip():
        sys.exit("The answer was empty.")
    if status not in (0, -15):
        sys.exit(f"glmd serve exited with status {status}.")
    print(f"Answer: {answer.strip()!r}")


if __name__ == "__main__":
    main(sys.argv[1])
