"""What a schema says of arrays: their items, and that these be unique."""

from __future__ import annotations

from glmd.chat.types import Json
from glmd.structured_output.schema_context import SchemaContext, malformed


def read_items(reading: SchemaContext, keyword: str, value: Json) -> None:
    """`items`, `prefixItems` and `additionalItems`, in the form of 2020-12."""
    param = reading.where(keyword)
    if isinstance(value, list) or keyword == "prefixItems":  # a list: before 2020-12
        if not isinstance(value, list):
            raise malformed(param, "a list of schemas")
        reading.node["prefixItems"] = [
            reading.normaliser.normalise(item, f"{param}[{index}]")
            for index, item in enumerate(value)
        ]
    elif keyword == "items" or isinstance(reading.schema.get("items"), list):
        reading.node["items"] = reading.schema_or_false(value, param)


def read_unique(reading: SchemaContext, keyword: str, value: Json) -> None:
    """`uniqueItems`, which is only kept where there is one item at most."""
    limit = reading.schema.get("maxItems")
    if value is True and not (isinstance(limit, int) and limit <= 1):
        reading.relax(keyword)
