"""The terminal's side of `/v1/chat/completions`."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from glmd.errors import ServerRefused

CONNECT = 5.0
"""Seconds until a connection stands. An answer's first byte may take as long as it takes."""

SILENCE = 300.0
"""Seconds without a sign of life, which a stream gives every few (setting `keep_alive`)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of the answer."""

    kind: Literal["reasoning", "content"]
    text: str


@dataclass(slots=True)
class Reply:
    """An answer as far as it has come.

    Attributes:
        finish: why it ended, in OpenAI's words; None: it has not.
        usage: OpenAI's, once it has ended.
        first: seconds from the request to the first text.
        last: likewise to the last.
    """

    reasoning: str = ""
    content: str = ""
    finish: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    first: float | None = None
    last: float = 0.0

    @property
    def message(self) -> dict[str, str]:
        """The turn, as it goes back with the next request."""
        message = {"role": "assistant", "content": self.content}
        return message | ({"reasoning_content": self.reasoning} if self.reasoning else {})


class ChatClient:
    """A server that speaks OpenAI's API.

    Args:
        url: without `/v1`.
        key: what it wants as a key, if it wants one.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url
        # Straight there: a proxy from the environment has no business with a server that is near.
        self._http = httpx.Client(
            base_url=url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(SILENCE, connect=CONNECT),
            trust_env=False,
        )

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """What `/v1/models` lists.

        Raises:
            ServerRefused: it says no, or says nothing.
        """
        listed: list[dict[str, Any]] = self._get("/v1/models")["data"]
        return listed

    def check_model(self, name: str) -> None:
        """Raise ServerRefused unless the server has a model of that name."""
        self._get(f"/v1/models/{name}")

    def _get(self, path: str) -> dict[str, Any]:
        try:
            response = self._http.get(path)
        except httpx.TransportError as error:
            raise self._no_answer(error) from error
        if response.is_error:
            raise refusal(response)
        body: dict[str, Any] = response.json()
        return body

    def answer(self, body: Mapping[str, Any], reply: Reply) -> Generator[Piece, None, None]:
        """The pieces of an answer as they come, also put into `reply`.

        Closing the iterator, or an interrupt while it waits, cancels the request.

        Raises:
            ServerRefused: the server says no, breaks off, or says nothing.
        """
        sent = time.monotonic()
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    raise refusal(response)
                for chunk in chunks(response):
                    for piece in read(chunk, reply):
                        reply.last = time.monotonic() - sent
                        reply.first = reply.last if reply.first is None else reply.first
                        yield piece
        except httpx.TransportError as error:
            raise self._no_answer(error) from error

    def _no_answer(self, error: httpx.TransportError) -> ServerRefused:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return ServerRefused(
                f"No server answers at {self.url}: start one with `glmd serve`, or have this"
                " command start one with --model."
            )
        return ServerRefused(f"The connection to {self.url} broke off ({error}).")


def chunks(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON of each event of a stream."""
    for line in response.iter_lines():
        data = line.removeprefix("data: ")
        if data not in (line, "[DONE]"):
            yield json.loads(data)


def read(chunk: Mapping[str, Any], reply: Reply) -> Iterator[Piece]:
    """The pieces of one chunk.

    Raises:
        ServerRefused: it is an error.
    """
    if "error" in chunk:
        raise ServerRefused(chunk["error"]["message"])
    reply.usage = chunk.get("usage") or reply.usage
    for choice in chunk["choices"]:
        delta = choice["delta"]
        if text := delta.get("reasoning_content"):
            reply.reasoning += text
            yield Piece("reasoning", text)
        if text := delta.get("content"):
            reply.content += text
            yield Piece("content", text)
        reply.finish = choice["finish_reason"] or reply.finish


def refusal(response: httpx.Response) -> ServerRefused:
    """What an error response says, for people."""
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"{response.url} answers {response.status_code} {response.reason_phrase}."
    if response.status_code == httpx.codes.UNAUTHORIZED:
        message += " Put it into GLMD_API_KEY."
    return ServerRefused(message)
