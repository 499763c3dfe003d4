"""Input items of stored responses: continued, referred to and listed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from glmd.api.responses.input import InputItems, Item
from glmd.api.responses.objects import InputItemList
from glmd.api.responses.store import StoredResponse
from glmd.errors import InvalidRequest, invalid_field
from glmd.utils.text import quoted

Order = Literal["asc", "desc"]

ID_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "custom_tool_call": "ctc",
}

WITH_STATUS = ("message", "function_call", "custom_tool_call", "tool_search_call")
"""Types of items to which OpenAI's schema adds a status, like all types that end in `_output`."""


def referred_ids(input: str | list[Item], previous_id: str | None) -> Iterator[str]:
    """Ids of the responses that a request's input continues or refers to."""
    if previous_id:
        yield previous_id
    for item in input if isinstance(input, list) else ():
        if item.get("type") == "item_reference" and (id := _response_of(item)) is not None:
            yield id


def read_input(
    input: str | list[Item],
    previous_id: str | None,
    stored: Mapping[str, StoredResponse],
) -> InputItems:
    """Items of a request's input, after the conversation of the previous response.

    Args:
        stored: those of `referred_ids` that the client may use.

    Raises:
        InvalidRequest: the response is not stored, or not done.
    """
    if isinstance(input, str):
        input = [{"type": "message", "role": "user", "content": input}]
    known: dict[str, Item] = {}
    if any(item.get("type") == "item_reference" for item in input):
        for found in stored.values():
            known |= dict(numbered_items(found))
            known |= {one.id: one.model_dump(exclude_none=True) for one in found.response.output}
    new = [_resolve(item, known) for item in input]
    return InputItems(_previous(previous_id, stored).conversation if previous_id else [], new)


def _previous(id: str, own: Mapping[str, StoredResponse]) -> StoredResponse:
    stored = own.get(id)
    if stored is None:
        raise InvalidRequest(
            f"previous_response_id: response {quoted(id)} is not stored, or not any more.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    if stored.response.status not in ("completed", "incomplete"):
        raise invalid_field(
            "previous_response_id", f"response {quoted(id)} is {stored.response.status}."
        )
    return stored


def _response_of(item: Item) -> str | None:
    """The id of an item's response, which the item's own id holds."""
    id = item.get("id")
    parts = id.split("_") if isinstance(id, str) else []
    return f"resp_{parts[1]}" if len(parts) == 3 else None


def _resolve(item: Item, known: Mapping[str, Item]) -> Item:
    """The item that `item` refers to.

    The item itself if it is no reference, or refers to nothing stored.
    """
    id = item.get("id")
    if item.get("type") != "item_reference" or not isinstance(id, str):
        return item
    return known.get(id, item)


def numbered_items(stored: StoredResponse) -> Iterator[tuple[str, Item]]:
    """The input items of a response and of earlier responses, with ids.

    An item that the client sent without an id has one that holds the response's.
    """
    response = stored.response.id.removeprefix("resp_")
    for index, item in enumerate([*stored.items.earlier, *stored.items.new]):
        id = item.get("id")
        if not isinstance(id, str) or not id:
            prefix = ID_PREFIXES.get(_type_of(item), "item")
            id = f"{prefix}_{response}_i{index}"
        yield id, item


def list_items(
    stored: StoredResponse, *, after: str | None, limit: int, order: Order
) -> InputItemList:
    """One page of a response's input items.

    Args:
        after: id of the item before the page; None: the page is the first.

    Raises:
        InvalidRequest: no item has the id `after`.
    """
    items = list(numbered_items(stored))
    if order == "desc":
        items.reverse()
    start = 0
    if after is not None:
        ids = [id for id, _ in items]
        if after not in ids:
            raise invalid_field("after", f"no input item has the id {quoted(after)}.")
        start = ids.index(after) + 1
    page = items[start : start + limit]
    return InputItemList(
        data=[shown_item(id, item) for id, item in page],
        first_id=page[0][0] if page else "",
        last_id=page[-1][0] if page else "",
        has_more=start + limit < len(items),
    )


def shown_item(id: str, item: Item) -> dict[str, Any]:
    """An input item with the fields that OpenAI's schema requires of listed items."""
    kind = _type_of(item)
    shown: dict[str, Any] = {"id": id, "type": kind}
    if kind in WITH_STATUS or kind.endswith("_output"):
        shown["status"] = "completed"
    if kind.startswith("tool_search"):
        shown |= {"call_id": None, "execution": "client"}
    shown |= {key: each for key, each in item.items() if each is not None} | {"id": id}
    if kind == "message":
        shown["content"] = _shown_content(item.get("content"), item.get("role") == "assistant")
    return shown


def _shown_content(content: object, is_answer: bool) -> object:
    """Content of a message as a list of parts, with all fields of text in an answer."""
    kind = "output_text" if is_answer else "input_text"
    if content is None or isinstance(content, str):
        content = [{"text": content or ""}]
    if not isinstance(content, list):
        return content
    parts: list[object] = []
    for part in content:
        given = {"text": part} if isinstance(part, str) else part
        if isinstance(given, Mapping) and isinstance(given.get("text"), str):
            added: dict[str, Any] = {"annotations": [], "logprobs": []} if is_answer else {}
            given = added | dict(given) | {"type": kind}
        elif isinstance(given, Mapping) and given.get("type") == "input_image":
            given = {"detail": "auto"} | dict(given)
        parts.append(given)
    return parts


def _type_of(item: Item) -> str:
    return str(item.get("type") or "message")
